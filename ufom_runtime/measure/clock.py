"""C1 and C2 in seconds, on the device in use."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.algorithms import first_state
from ufom_runtime.estimators import Estimator
from ufom_runtime.inspection.non_finite import refuse_non_finite
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_runtime.steps import Steps
from ufom_theory import CostModel, Sweep, UfomError
from ufom_theory.checks import instance, integer, scalar


@torch.enable_grad()
def measure_cost(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks,
    *,
    sweep: Sweep | None = None,
    seconds: float = 1.0,
    repeats: int = 20,
    chunk: int | None = None,
    compile: bool = False,
) -> CostModel:
    """Time an inner step (a gradient, C1) and a backward step (a Hessian-vector product, C2), alternately, at φ_0.

    Args:
        problem: the problem.
        theta: outer parameters, shape (s,).
        tasks: n stacked tasks; the times are those of one task.
        sweep: what will be run; if not given, the paper's. It matters where the steps are compiled and the sweep keeps
            their residuals: the product then costs less, and the steps are timed as the sweep's backward loop has them.
        seconds: so long is timed, or as long as `repeats` take.
        repeats: and so often at least.
        chunk: tasks run together; None: all of them; 1: one at a time, without vmap.
        compile: as in `hypergradient`.

    Returns:
        CostModel with r, and C1, C2 in seconds with standard errors; its proxy is the paper's. The medians are given,
        since a busy machine's times have a long tail.

    Raises:
        UfomError: as `hypergradient`, or repeats < 5.
    """
    if scalar("repeats", repeats, integer, 0) < 5:
        raise UfomError(f"repeats = {repeats}: a median with an error needs at least 5")
    tasks = check(problem, theta, tasks)
    n = _together(tasks, chunk)
    tasks = tasks.take(slice(n))
    rows, sweep = theta.expand(n, -1), sweep or Sweep.recomputed()
    phi, steps = first_state(problem, rows, tasks), Steps(problem, rows, tasks, sweep.kind == "unrolled", compile)
    b2 = steps.outer(phi)[1]
    refuse_non_finite(problem, rows, tasks, [b2])
    record = steps.record(phi, 0)[1] if sweep.keeps_steps else phi

    def gradient() -> object:
        return steps.record(phi, 0) if sweep.keeps_steps else steps.inner(phi, 0)

    def product() -> object:
        return steps.back(record, 0, None, b2)

    gradient(), product()  # warm-up: allocators, kernels chosen
    times = np.array(_alternate((gradient, product), theta.device, seconds, repeats)) / n
    (c1, c1_sem), (c2, c2_sem) = (_median(column) for column in times.T)
    return CostModel(r=problem.r, c1=c1, c2=c2, c1_sem=c1_sem, c2_sem=c2_sem, sweep=sweep)


def choose_chunk(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks,
    estimator: Estimator,
    *,
    chunk: int | None = None,
    compile: bool = False,
) -> int | None:
    """Whether these tasks are quicker together (vmap) or in a loop, by timing a step of both once.

    It is asked for, not done behind one's back: the two differ in rounding, and a clock must not decide bits.

    Args:
        problem: the problem.
        theta: outer parameters, shape (s,).
        tasks: n ≥ 2 stacked tasks, as many as are to run together.
        estimator: what will be run; its q says how much a Hessian-vector product counts.
        chunk: the most tasks that may run together; None: all of them; 1 is chosen unseen.
        compile: as in `hypergradient`.

    Returns:
        What to pass on as `chunk`: 1 for a loop; else the `chunk` given, or None, as many as fit; n for compiled steps.

    Raises:
        UfomError: as `hypergradient`.
    """
    tasks = check(problem, theta, tasks)
    instance("estimator", estimator, Estimator, "write UFOM(q), FOM or EXACT")
    most = _together(tasks, chunk)
    if most == 1:
        return 1

    def seconds(together: int) -> float:
        some, sweep = tasks.take(slice(together)), estimator.sweep
        cost = measure_cost(problem, theta, some, sweep=sweep, seconds=0.1, repeats=5, compile=compile)
        cost = replace(cost, proxy=estimator.proxy)
        return float(cost.c_det + estimator.q * cost.c_rnd)

    if seconds(1) <= seconds(most):
        return 1
    return most if compile else chunk


def _together(tasks: Tasks, chunk: int | None) -> int:
    n = len(tasks)
    return n if chunk is None else min(n, int(scalar("chunk, the tasks run together,", chunk, integer, 1)))


def median_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median of ten calls or more, after one that does not count."""
    function()
    return _median(np.array(_alternate((function,), device, 0.2, 10))[:, 0])[0]


def _alternate(
    functions: tuple[Callable[[], object], ...], device: torch.device, seconds: float, repeats: int
) -> list[list[float]]:
    """Seconds of each function, in rounds."""
    rounds: list[list[float]] = []
    spent = 0.0
    while len(rounds) < repeats or (spent < seconds and len(rounds) < 10_000):
        rounds.append([_seconds(f, device) for f in functions])
        spent += sum(rounds[-1])
    return rounds


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median(values: NDArray[np.float64]) -> tuple[float, float]:
    """The median and its standard error, from the order statistics that bracket it with 95 % (±1 σ = ½√n ranks)."""
    ordered, n = np.sort(values), len(values)
    reach = math.sqrt(n)  # two standard deviations of the median's rank, ½√n each
    low, high = math.floor((n - 1) / 2 - reach), math.ceil((n - 1) / 2 + reach)
    sem = (ordered[min(high, n - 1)] - ordered[max(low, 0)]) / 4
    return float(np.median(ordered)), float(sem)
