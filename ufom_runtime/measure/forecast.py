"""What a hypergradient will take, in seconds and bytes, before a long run: by making the call a few times."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from ufom_runtime.estimators import Estimator, Method, hypergradient, refuse_other
from ufom_runtime.measure.calls import measure_calls
from ufom_runtime.measure.clock import alternate, refuse_unsure
from ufom_runtime.memory import peak_bytes
from ufom_runtime.methods.debiased import Debiased
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
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
    estimator: Method,
    *,
    chunk: int | None = None,
    compile: bool = False,
) -> Forecast:
    """Predict the time and memory of `hypergradient(problem, theta, tasks, estimator, chunk=chunk, compile=compile)`.

    The very call is made, with no task, one task and all tasks corrected, and its time is averaged over the coins; so
    a forecast takes a dozen calls or more. Of another method, such as `Roulette`, whose draws decide how long a call
    takes, sixteen calls or more are averaged, and the bytes are those of the largest of four.

    Args:
        problem: the problem.
        theta: outer parameters, shape (s,).
        tasks: n stacked tasks, as many as a step will have.
        estimator: what will be run; it keeps no state.
        chunk, compile: as in `hypergradient`.

    Raises:
        UfomError: as `hypergradient`; a time whose error stays larger than a fifth of it, on a busy machine.
    """
    if not isinstance(estimator, Estimator | Debiased):
        return _averaged(problem, theta, tasks, estimator, chunk, compile)
    cost = measure_calls(problem, theta, tasks, estimator, seconds=0.2, repeats=3, chunk=chunk, compile=compile)
    return Forecast(cost.expected(estimator.q, estimator.coin), cost.bytes)


def _averaged(
    problem: BilevelProblem, theta: Tensor, tasks: Task | Tasks, method: Method, chunk: int | None, compile: bool
) -> Forecast:
    """The mean over a method's draws, each with its own seed."""
    refuse_other(method)
    tasks, seeds = check(problem, theta, tasks), count()

    def call() -> object:
        generator = torch.Generator().manual_seed(next(seeds))
        return hypergradient(problem, theta, tasks, method, generator=generator, chunk=chunk, compile=compile)

    call()
    weighed = max(peak_bytes(call, (theta, *tasks.parts)) for _ in range(4))
    seconds = np.array(alternate((call,), theta.device, 0.2, 16))[:, 0]
    mean, sem = float(seconds.mean()), float(seconds.std() / len(seconds) ** 0.5)
    refuse_unsure("a call", mean, sem)
    return Forecast(mean, weighed)
