"""What the theory's counts promise of the implementation, measured: time by C1 and C2, memory by the states held."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from studies.methods import STREAM, Q
from studies.performance_problems import Config, build
from studies.shared.timing import seconds, spread
from ufom_runtime import (
    EXACT,
    FOM,
    RECOMPUTED,
    UFOM,
    BilevelProblem,
    Estimator,
    forecast,
    hypergradient,
    measure_cost,
    outer_sgd,
    peak_bytes,
)
from ufom_runtime.measure.clock import UnsureTime
from ufom_runtime.memory import LiveBytes
from ufom_runtime.problem import Tasks, one_theta
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import Sweep, Truncated

Rows = Iterator[dict[str, Any]]
BATCHES = {0: 0.4, 1: 0.4, 2: 0.2}  # ones among 8 coins, and how often: their mean is 8·Q


def _over_predicted(rounds: int, pair: Callable[[], tuple[float, float]]) -> dict[str, Any]:
    """Measured over predicted seconds over all rounds; if a time stays unsure, the reason instead of a ratio."""
    try:
        measured, predicted = np.array([pair() for _ in range(rounds)]).T
    except UnsureTime as busy:
        return {"note": str(busy)}
    said = f"{np.median(measured):.4g} s, predicted {np.median(predicted):.4g} s"
    return {"seconds": float(np.median(measured)), **spread(measured / predicted), "note": said}


# C1 and C2 timed anew, so that a machine that slows down slows both sides
_cost = partial(measure_cost, seconds=0.1, repeats=5)


def checkpoint_time(config: Config) -> Rows:
    """The time of the exact gradient with 3 checkpoints, over C1·(r + 1 + repeated steps) + C2·r."""
    problem, theta, tasks = build(config, "hypercleaning", max(config.lengths))
    sweep = Sweep.checkpointed(3)
    run = partial(hypergradient, problem, theta, tasks, Estimator(1.0, sweep))
    run()

    def pair() -> tuple[float, float]:
        cost = _cost(problem, theta, tasks, sweep=sweep)
        return seconds(run), float(cost.c_det + cost.c_rnd)

    row = {"method": "time with 3 checkpoints", "workload": "hypercleaning", "r": problem.r}
    yield {**row, **_over_predicted(config.rounds, pair)}


def checkpoint_memory(config: Config) -> Rows:
    """Peak live bytes of a long loop over a short one's, with equally many checkpoints."""

    def peak(r: int, slots: int) -> int:
        problem, theta, tasks = build(config, "hypercleaning", r)
        estimator = Estimator(1.0, Sweep.checkpointed(slots))
        return peak_bytes(lambda: hypergradient(problem, theta, tasks, estimator), (theta, *Tasks.of(tasks).parts))

    short, long = config.long
    for slots in (3, 9):
        method = f"memory with {slots} checkpoints, r = {long} over r = {short}"
        most = peak(long, slots)
        yield {"method": method, "workload": "hypercleaning", "r": long, "live_bytes": most,
               "ratio": most / peak(short, slots)}  # fmt: skip


def ufom_time(config: Config) -> Rows:
    """UFOM's mean time over Proposition 1's C_det + q·C_rnd, one task at a time and 8 at once.

    A batch is split by its coins, and each part costs what C1 and C2 are at that part's size.
    """
    problem, theta, drawn = build(config, "few-shot", config.steps)
    tasks = Tasks.of(drawn)
    one, estimator = tasks.take(slice(1)), UFOM(Q)
    n, rounds = len(tasks), -(-config.rounds // 5)

    def run(chosen: Any, coins: list[int]) -> float:
        return seconds(lambda: hypergradient(problem, theta, chosen, estimator, coins=torch.tensor(coins) == 1))

    patterns = {ones: [1] * ones + [0] * (n - ones) for ones in BATCHES}
    for coins in ([0], [1]):
        run(one, coins)
    for coins in patterns.values():
        run(tasks, coins)

    def single() -> tuple[float, float]:
        cost = _cost(problem, theta, one)
        return float(np.mean([run(one, [coin]) for coin in STREAM])), float(cost.c_det + Q * cost.c_rnd)

    def batched() -> tuple[float, float]:
        measured = predicted = 0.0
        for ones, share in BATCHES.items():
            rest = _cost(problem, theta, tasks.take(slice(n - ones)))
            corrected = _cost(problem, theta, tasks.take(slice(ones))) if ones else rest
            measured += share * run(tasks, patterns[ones]) / n
            predicted += share * float((n - ones) * rest.c_det + ones * (corrected.c_det + corrected.c_rnd)) / n
        return measured, predicted

    for said, pair in (("one task at a time", single), (f"{n} tasks at once", batched)):
        row = {"method": f"time of UFOM({Q}), {said}", "workload": "few-shot", "r": problem.r}
        yield {**row, **_over_predicted(rounds, pair)}


def growth(config: Config) -> Rows:
    """Live bytes after all outer steps, less those after a tenth of them."""
    estimators = {
        "first-order": FOM,
        "exact, stored": EXACT,
        "exact, unrolled": Estimator(1.0, Sweep.unrolled()),
        "exact, recomputed": RECOMPUTED,
        "exact, 3 checkpoints": Estimator(1.0, Sweep.checkpointed(3)),
        f"UFOM({Q})": UFOM(Q),
        f"UFOM({Q}) on the last 2 steps": UFOM(Q, proxy=Truncated(2)),
    }
    problem, steps = quadratic(r=3), config.outer_steps
    for name, estimator in estimators.items():
        method = f"growth over {steps} outer steps, {name}"
        yield {
            "method": method,
            "workload": "quadratic",
            "r": problem.r,
            "live_bytes": _grown(problem, estimator, steps),
        }


def _grown(problem: BilevelProblem, estimator: Estimator, steps: int) -> int:
    live = list[int]()

    def note(share: float) -> None:
        if round(share * steps) in (steps // 10, steps):
            gc.collect()
            live.append(meter.live)

    with LiveBytes() as meter:
        outer_sgd(problem, one_theta(problem), estimator, lambda k: 0.01, steps, progress=note)
    return live[1] - live[0]


def foreseen(config: Config) -> Rows:
    """Time and peak bytes over what `forecast` says from a few steps."""
    estimators = {
        "first-order": FOM,
        "exact, stored": EXACT,
        "exact, 3 checkpoints": Estimator(1.0, Sweep.checkpointed(3)),
    }
    for workload, r in (("few-shot", config.steps), ("hypercleaning", max(config.lengths))):
        for name, estimator in estimators.items():
            for row in _foreseen(config, workload, r, estimator):
                yield {**row, "method": f"{row['method']}, {name}", "workload": workload, "r": r}


def _foreseen(config: Config, workload: str, r: int, estimator: Estimator) -> Rows:
    problem, theta, tasks = build(config, workload, r)
    one, foretold = Tasks.of(tasks).take(slice(1)), math.nan
    run = partial(hypergradient, problem, theta, one, estimator)
    run()

    def pair() -> tuple[float, float]:
        nonlocal foretold
        expected = forecast(problem, theta, one, estimator)
        foretold = expected.bytes
        return seconds(run), expected.seconds

    yield {"method": "time over its forecast", **_over_predicted(-(-config.rounds // 3), pair)}
    most = peak_bytes(run, (theta, *one.parts))
    yield {"method": "bytes over their forecast", "live_bytes": most, "ratio": most / foretold}


PROMISES: dict[str, Callable[[Config], Rows]] = {
    "time with checkpoints": checkpoint_time,
    "memory with checkpoints": checkpoint_memory,
    "time of UFOM": ufom_time,
    "growth of live memory": growth,
    "forecast": foreseen,
}
