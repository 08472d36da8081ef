"""Chain-iterations a second of outer SGD on the synthetic pair (Fig. 1d–f); a benchmark, not a test.

A chain-iteration is one outer step of one chain: r inner steps and, where the coin is 1, r Hessian-vector products.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ufom_runtime import chains
from ufom_theory import UfomError
from ufom_theory.two_tasks import TwoTaskProblem

Array = NDArray[Any]
PAIR = TwoTaskProblem(alpha=0.01, r=10, a=(0.5, 1.5), b=(0.0, 10.0), A=400.0)
Q, GAMMA, CHAINS, STEPS, PARTS, THREADS = 0.2, 0.05, 400_000, 32, 50, 2


def measure_toy(rounds: int = 5) -> pd.DataFrame:
    """Median chain-iterations a second on two cores with quartiles, rounds alternating, and ratios to numpy with masks.

    In the first group all are given the same uniform numbers, each both task and coin (numpy has them taken apart). In
    the second they draw their own, and the time counts; `simulate` also takes the means after the last step.
    """
    library = chains._library()
    if library is None:
        raise UfomError("there is nothing to compare without a C++ compiler: install one, or name it in CXX")
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return _measure(library[0], rounds)
    finally:
        torch.set_num_threads(threads)


def _measure(compiled: Callable[..., Any], rounds: int) -> pd.DataFrame:
    parts = (PARTS, STEPS, CHAINS // PARTS)  # as they lie for a loop over parts of the chains
    uniform, start = draw(parts), np.random.default_rng(1).uniform(-50, 50, CHAINS)
    tasks_and_coins = decode(uniform.swapaxes(0, 1).reshape(STEPS, CHAINS))
    many = [0.0, 0.05, Q, 0.5, 1.0]
    groups: dict[str, dict[str, Callable[[], Any]]] = {
        "numbers drawn before": {
            "numpy with masks": lambda: masked(start, *tasks_and_coins),
            "plain torch": lambda: fused(chains._advance, start, uniform),
            "compiled": lambda: fused(compiled, start, uniform),
        },
        "and drawn": {
            "numpy with masks": lambda: masked(start, *decode(draw((STEPS, CHAINS)))),
            "plain torch": lambda: fused(chains._advance, start, draw(parts)),
            "compiled": lambda: fused(compiled, start, draw(parts)),
            "simulate": lambda: simulate([Q]),
            "simulate, 5 q": lambda: simulate(many),
        },
    }
    rates: dict[tuple[str, str], list[float]] = {(g, name): [] for g, things in groups.items() for name in things}
    ends = {(g, name): groups[g][name]() for g, name in rates}  # warm
    before = [end for (g, _), end in ends.items() if g == "numbers drawn before"]
    for end in before[1:]:
        np.testing.assert_allclose(end, before[0], rtol=1e-11, atol=1e-11)
    load = []
    for _ in range(rounds):
        for g, name in rates:
            begin = time.perf_counter()
            groups[g][name]()
            iterations = CHAINS * STEPS * (len(many) if name.endswith("q") else 1)
            rates[g, name].append(iterations / (time.perf_counter() - begin))
        load.append(os.getloadavg()[0])
    rows = []
    for (g, name), values in rates.items():
        low, median, high = statistics.quantiles(values, n=4)
        rows.append({"group": g, "what": name, "per second": median, "quartiles": f"{low:.3g} … {high:.3g}",
                     "ratio": median / statistics.median(rates[g, "numpy with masks"]), "load": max(load)})  # fmt: skip
    return pd.DataFrame(rows)


def simulate(q: list[float]) -> chains.Curves:
    """The public function, from its own random numbers."""
    return chains.simulate(PAIR, q, (-50.0, 50.0), lambda k: GAMMA, STEPS, chains=CHAINS, every=STEPS)


def draw(shape: tuple[int, ...]) -> Array:
    """Uniform numbers."""
    return np.random.default_rng(0).random(shape)


def decode(uniform: Array) -> tuple[Array, Array]:
    """The tasks and the coins' uniform numbers, as `chains` reads them."""
    tasks = (uniform >= 0.5).astype(np.int64)
    return tasks, 2 * uniform - tasks


def fused(advance: Callable[..., Any], start: Array, uniform: Array) -> Array:
    """θ after all steps of the runtime's outer step, in parts that the cache holds."""
    cells, gammas = chains._cells(PAIR, Q)[0], torch.full((STEPS,), GAMMA, dtype=torch.float64)
    theta, draws = torch.tensor(start).view(PARTS, 1, -1), torch.from_numpy(uniform)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda k: advance(theta[k], draws[k], gammas, cells, PAIR.r), range(PARTS)))
    return theta.flatten().numpy()


def masked(theta: Array, tasks: Array, coins: Array) -> Array:
    """θ after all steps in vectorised numpy, as one writes it down: a mask for each piece, the inner states stored."""
    for task, coin in zip(tasks, coins, strict=True):
        a, b = np.asarray(PAIR.a)[task], np.asarray(PAIR.b)[task]
        centre = b / a
        states = [theta]
        for _ in range(PAIR.r):
            states.append(states[-1] - PAIR.alpha * slope(states[-1] - centre, a))
        proxy = slope(states.pop() - centre, a)
        hit = coin < Q
        exact, a_hit, centre_hit = proxy[hit], a[hit], centre[hit]
        for phi in reversed(states):
            exact = exact - PAIR.alpha * curvature(phi[hit] - centre_hit, a_hit) * exact
        estimate = proxy.copy()
        estimate[hit] += (exact - proxy[hit]) / Q
        theta = theta - GAMMA * estimate
    return theta


def _pieces(u: Array) -> tuple[Array, Array, Array]:
    z = np.abs(u)
    return z <= PAIR.A, (z > PAIR.A) & (z <= PAIR.A + 1), z > PAIR.A + 1


def slope(u: Array, a: Array) -> Array:
    """f' at a distance u from the minimum."""
    quadratic, cubic, linear = _pieces(u)
    out = np.empty_like(u)
    out[quadratic] = a[quadratic] * u[quadratic]
    t = np.abs(u[cubic]) - PAIR.A
    out[cubic] = a[cubic] * np.sign(u[cubic]) * (PAIR.A + t - t**2 / 2)
    out[linear] = a[linear] * np.sign(u[linear]) * (PAIR.A + 0.5)
    return out


def curvature(u: Array, a: Array) -> Array:
    """f'' at a distance u from the minimum."""
    quadratic, cubic, _ = _pieces(u)
    out = np.zeros_like(u)
    out[quadratic] = a[quadratic]
    out[cubic] = a[cubic] * (1 - (np.abs(u[cubic]) - PAIR.A))
    return out


if __name__ == "__main__":
    print(measure_toy().to_string(index=False))
