"""C1 and C2 in seconds, on the device in use."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.algorithms import first_state
from ufom_runtime.derivatives import leaf, pulled_back
from ufom_runtime.estimators import Estimator
from ufom_runtime.inspection.non_finite import refuse_non_finite
from ufom_runtime.methods.debiased import Debiased
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_runtime.steps import Steps
from ufom_theory import CostModel, Sweep, UfomError
from ufom_theory.checks import finite, instance, integer, scalar, typed

_SURE = 0.2  # a cost's largest relative error


class UnsureTime(UfomError):
    """A time whose error is larger than a fifth of it: the machine was busy."""


@torch.enable_grad()
@typed
def measure_cost(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks,
    estimator: Estimator | Debiased | None = None,
    *,
    sweep: Sweep | None = None,
    seconds: float = 1.0,
    repeats: int = 20,
    chunk: int | None = None,
    compile: bool = False,
) -> CostModel:
    """C_det and C_rnd in seconds a task: of an estimator's very calls, or of steps times their counts.

    With an estimator, `hypergradient` itself is called with no task and with all tasks corrected (`measure_calls`).
    Without one, an inner step (a gradient, C1) and a backward step (a Hessian-vector product, C2) are timed
    alternately, at φ_0: for any sweep and proxy, by Proposition 1.

    Args:
        problem: the problem.
        theta: outer parameters, shape (s,).
        tasks: n stacked tasks; the times are those of one task.
        estimator: what will be run.
        sweep: without an estimator, what will be run; if not given, the paper's. It matters where the product costs
            less: through the graph that the unrolled sweep keeps (C2 is then what keeping a step's graph and going back
            through it take besides C1), and where compiled steps keep their residuals.
        seconds: so long is timed, or as long as `repeats` take.
        repeats: and so often at least.
        chunk: tasks run together; None: all of them; 1: one at a time, without vmap.
        compile: as in `hypergradient`.

    Returns:
        Without an estimator a CostModel with r, C1 and C2 and the paper's proxy, else `CostModel.of` its C_det and
        C_rnd; with standard errors. The medians are given, since a busy machine's times have a long tail.

    Raises:
        UfomError: as `hypergradient`, repeats < 5, or (`UnsureTime`) a cost whose error is larger than a fifth of it.
    """
    seconds = scalar("seconds", seconds, finite, "a finite number ≥ 0", 0.0)
    if scalar("repeats", repeats, integer, 0) < 5:
        raise UfomError(f"repeats = {repeats}: a median with an error needs at least 5")
    if estimator is not None:
        return _as_run(problem, theta, tasks, estimator, seconds, repeats, chunk, compile)
    tasks = check(problem, theta, tasks)
    n = _together(tasks, chunk)
    tasks = tasks.take(slice(n))
    rows, sweep = theta.expand(n, -1), sweep or Sweep.recomputed()
    phi, steps = first_state(problem, rows, tasks), Steps(problem, rows, tasks, sweep.kind == "unrolled", compile)
    b2 = steps.outer(phi)[1]
    refuse_non_finite(problem, rows, tasks, [b2])
    graph = sweep.kind == "unrolled" and not compile
    record = steps.record(phi, 0)[1] if sweep.keeps_steps and not graph else phi

    def gradient() -> object:
        return steps.record(phi, 0) if sweep.keeps_steps and not graph else steps.inner(phi, 0)

    def product() -> object:
        if graph:  # a step and the way back through it
            at, x = leaf(rows), leaf(phi)
            return pulled_back(steps.following(at, x, 0)[0], at, x, b2)
        return steps.back(record, 0, None, b2)

    gradient(), product()  # warm-up: allocators, kernels chosen
    times = np.array(alternate((gradient, product), theta.device, seconds, repeats)) / n
    times[:, 1] -= times[:, 0] * graph
    (c1, c1_sem), (c2, c2_sem) = (median(column) for column in times.T)
    refuse_unsure("an inner step", c1, c1_sem)
    refuse_unsure("a backward step", c2, c2_sem)
    return CostModel(r=problem.r, c1=c1, c2=c2, c1_sem=c1_sem, c2_sem=c2_sem, sweep=sweep)


def _as_run(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks,
    estimator: Estimator | Debiased,
    seconds: float,
    repeats: int,
    chunk: int | None,
    compile: bool,
) -> CostModel:
    from ufom_runtime.measure.calls import measure_calls, refuse_without_coins  # they are built on this file

    refuse_without_coins(estimator)
    both = replace(estimator, q=0.5)  # at q = 0 or 1 one of the two calls would never be made
    cost = measure_calls(problem, theta, tasks, both, seconds=seconds, repeats=repeats, chunk=chunk, compile=compile)
    n = cost.tasks
    rest, sem = cost.seconds[n] - cost.seconds[0], math.hypot(cost.sem[n], cost.sem[0])
    refuse_unsure(f"the correction of {n} tasks", rest, sem)
    return CostModel.of(cost.seconds[0] / n, rest / n, cost.sem[0] / n, sem / n)


@typed
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


def alternate(
    functions: Sequence[Callable[[], object]], device: torch.device, seconds: float, repeats: int
) -> list[list[float]]:
    """Seconds of each function, in rounds: for so long, so often at least, ten times as often while they are unsure."""
    rounds: list[list[float]] = []
    spent = 0.0

    def unsure() -> bool:
        return any(sem > value * _SURE for value, sem in map(median, np.array(rounds).T))

    while (
        len(rounds) < repeats or (spent < seconds and len(rounds) < 10_000) or (len(rounds) < 10 * repeats and unsure())
    ):
        rounds.append([took(f, device) for f in functions])
        spent += sum(rounds[-1])
    return rounds


def refuse_unsure(name: str, value: float, sem: float) -> None:
    """`UnsureTime` where a time's error is larger than a fifth of it."""
    if not sem <= value * _SURE:
        raise UnsureTime(
            f"{name} takes {value:.3g} s with an error of {sem:.2g} s, larger than a fifth of it: the machine is too "
            "busy; time it again when it is quiet, or for longer (seconds=, repeats=)"
        )


def took(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    _wait(device)
    begin = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(values: NDArray[np.float64]) -> tuple[float, float]:
    """The median and its standard error, from the order statistics that bracket it with 95 % (±1 σ = ½√n ranks)."""
    ordered, n = np.sort(values), len(values)
    reach = math.sqrt(n)  # two standard deviations of the median's rank, ½√n each
    low, high = math.floor((n - 1) / 2 - reach), math.ceil((n - 1) / 2 + reach)
    sem = (ordered[min(high, n - 1)] - ordered[max(low, 0)]) / 4
    return float(np.median(ordered)), float(sem)
