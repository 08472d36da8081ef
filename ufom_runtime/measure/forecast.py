"""What a hypergradient will take, in seconds and bytes, before a long run: from one step's cost and the counts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ufom_runtime.algorithms import HELD as HELD_LENGTH
from ufom_runtime.algorithms import first_state
from ufom_runtime.batching import rows_together
from ufom_runtime.derivatives import pull_back
from ufom_runtime.estimators import Estimator, hypergradient, proxy_length
from ufom_runtime.measure.clock import measure_cost, median_seconds
from ufom_runtime.memory import peak_bytes
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_runtime.steps import Steps
from ufom_theory import CostModel, Truncated
from ufom_theory.checks import instance
from ufom_theory.planner import states_held


@dataclass(frozen=True)
class Forecast:
    """One call of `hypergradient`.

    Attributes:
        seconds: of all tasks, in expectation over the coins.
        bytes: the most that its tensors hold at once, as `peak_bytes` counts them, where a coin is 1 (if q > 0).
    """

    seconds: float
    bytes: int


def forecast(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks,
    estimator: Estimator,
    *,
    chunk: int | None = None,
    compile: bool = False,
) -> Forecast:
    """Predict the time and memory of `hypergradient(problem, theta, tasks, estimator, chunk=chunk, compile=compile)`.

    A step and what stands outside the loop are timed at φ_0 and multiplied by the counts of Proposition 1; the bytes
    are those of a loop of a few steps, and of the states that the sweep holds besides. So it takes a few steps, however
    long the loop. The bytes are the plain path's, also where the steps are compiled, which need no more.

    Args:
        problem: the problem.
        theta: outer parameters, shape (s,).
        tasks: n stacked tasks.
        estimator: what will be run.
        chunk, compile: as in `hypergradient`.

    Raises:
        UfomError: as `hypergradient`, or chunk < 1.
    """
    tasks = check(problem, theta, tasks)
    instance("estimator", estimator, Estimator, "write UFOM(q), FOM or EXACT")
    estimator.proxy.refuse_beyond(problem.r)
    n = len(tasks)
    lengths = (problem.r if estimator.q else proxy_length(problem, estimator.proxy),)
    pairs = torch.stack([torch.zeros(n, dtype=torch.int64, device="cpu"), torch.arange(n, device="cpu")])
    chunk = min(n, rows_together(problem, theta[None], tasks, pairs, lengths, estimator.sweep, chunk, compile=compile))
    seconds = n * _seconds(problem, theta, tasks.take(slice(chunk)), estimator, compile)
    # with one task more than a chunk, so that the copies that a chunk takes of its tasks are seen
    return Forecast(seconds, _bytes(problem, theta, tasks.take(slice(chunk + 1)), estimator, chunk))


def _seconds(problem: BilevelProblem, theta: Tensor, tasks: Tasks, estimator: Estimator, compile: bool) -> float:
    """Seconds a task."""
    n = len(tasks)
    # one of the gradients it counts is the outer loss's, which is timed by itself
    timed = measure_cost(problem, theta, tasks, sweep=estimator.sweep, compile=compile)
    cost: CostModel = replace(timed, proxy=estimator.proxy)
    rows, held = theta.expand(n, -1), 0.0

    def outside() -> object:
        phi = first_state(problem, rows, tasks)
        return pull_back(problem, rows, tasks, *Steps(problem, rows, tasks, compile=compile).outer(phi))

    with torch.enable_grad():
        rest = median_seconds(outside, theta.device) / n
        if proxy_length(problem, estimator.proxy) == HELD_LENGTH:
            x, steps = first_state(problem, rows, tasks), Steps(problem, rows, tasks)
            (_, g), b2 = steps.held(x, 0), torch.ones_like(x)
            held = problem.r * median_seconds(lambda: steps.held_back(x, g, 0, None, b2), theta.device) / n
    return float(cost.c_det + estimator.q * cost.c_rnd - cost.c1 + rest + held)


def _bytes(problem: BilevelProblem, theta: Tensor, tasks: Tasks, estimator: Estimator, chunk: int) -> int:
    r, sweep, k, exact = problem.r, estimator.sweep, estimator.proxy.steps, estimator.q > 0
    held = proxy_length(problem, estimator.proxy) == HELD_LENGTH
    coins = torch.full((len(tasks),), exact, device="cpu")

    def peak(steps: int) -> int:
        short = problem.cut(steps)
        proxy = estimator.proxy if held else Truncated(0 if exact else min(k, steps))
        probe = Estimator((0.5 if held else 1.0) * exact, sweep, proxy)  # at q = 1 no proxy is run
        run = partial(hypergradient, short, theta, tasks, probe, coins=coins, chunk=chunk)
        return peak_bytes(run, (theta, *tasks.parts))

    few = min(r, 4)
    kept = r if exact or held else k  # steps of which something is kept
    if held or sweep.kind == "unrolled":
        return peak(few) + max(0, kept - few) * (peak(few) - peak(few - 1)) if kept and few > 1 else peak(few)
    states, of_few = (states_held(r, Truncated(k), sweep), sweep.states_held(few)) if exact else (k, min(k, few))
    return peak(few) + (states - of_few) * first_state(problem, theta[None], tasks.take(slice(1))).nbytes * chunk
