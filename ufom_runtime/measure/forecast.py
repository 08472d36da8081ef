"""What a hypergradient will take, in seconds and bytes, before a long run: by making the call a few times."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ufom_runtime.debiased import Debiased
from ufom_runtime.estimators import Estimator
from ufom_runtime.measure.calls import measure_calls
from ufom_runtime.problem import BilevelProblem, Task, Tasks
from ufom_theory.checks import typed


@dataclass(frozen=True)
class Forecast:
    """One call of `hypergradient`.

    Attributes:
        seconds: of all tasks, in expectation over the coins.
        bytes: the most that its tensors hold at once, as `peak_bytes` counts them, over the coins.
    """

    seconds: float
    bytes: int


@typed
def forecast(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks,
    estimator: Estimator | Debiased,
    *,
    chunk: int | None = None,
    compile: bool = False,
) -> Forecast:
    """Predict the time and memory of `hypergradient(problem, theta, tasks, estimator, chunk=chunk, compile=compile)`.

    The very call is made, with no task, one task and all tasks corrected, and its time is averaged over the coins; so
    a forecast takes a dozen calls or more.

    Args:
        problem: the problem.
        theta: outer parameters, shape (s,).
        tasks: n stacked tasks, as many as a step will have.
        estimator: what will be run.
        chunk, compile: as in `hypergradient`.

    Raises:
        UfomError: as `hypergradient`; a time whose error stays larger than a fifth of it, on a busy machine.
    """
    cost = measure_calls(problem, theta, tasks, estimator, seconds=0.2, repeats=3, chunk=chunk, compile=compile)
    return Forecast(cost.expected(estimator.q, estimator.coin), cost.bytes)
