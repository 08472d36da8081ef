"""What one call of `hypergradient` takes, in seconds and bytes, by how many of its tasks are corrected."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln, xlog1py, xlogy
from torch import Tensor

from ufom_runtime.coins import Coin
from ufom_runtime.estimators import Estimator, hypergradient
from ufom_runtime.measure.clock import alternate, median, refuse_unsure
from ufom_runtime.memory import peak_bytes
from ufom_runtime.methods.debiased import Debiased
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_theory import UfomError
from ufom_theory.checks import typed


@dataclass(frozen=True)
class CallCost:
    """Seconds and bytes of a call on n tasks.

    Attributes:
        tasks: n.
        seconds: medians of whole calls by the number of corrected tasks, of 0, 1 and n those that can be.
        sem: their standard errors.
        bytes: the most that its tensors hold at once, as `peak_bytes` counts them, over the coins.
    """

    tasks: int
    seconds: dict[int, float]
    sem: dict[int, float]
    bytes: int

    def at(self, corrected: int) -> float:
        """Seconds where this many tasks are corrected: affine between 1 and n."""
        if corrected in self.seconds:
            return self.seconds[corrected]
        one, every = self.seconds[1], self.seconds[self.tasks]
        return one + (every - one) * (corrected - 1) / (self.tasks - 1)

    def expected(self, q: float, coin: Coin = "task") -> float:
        """Mean seconds over the coins."""
        return float(sum(p * self.at(k) for k, p in enumerate(corrected_tasks(self.tasks, q, coin)) if p))


def corrected_tasks(n: int, q: float, coin: Coin) -> NDArray[np.float64]:
    """The probabilities that 0 … n of n tasks are corrected."""
    found = np.zeros(n + 1)
    if coin == "batch":
        found[[0, n]] = 1 - q, q
    elif coin == "stratified":
        least = math.floor(q * n)
        found[least : least + 2] = [1 - (q * n - least), q * n - least][: n + 1 - least]
    else:
        k = np.arange(n + 1)  # in logarithms: the coefficients of a thousand tasks are beyond floating point
        ways = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
        found = np.exp(ways + xlogy(k, q) + xlog1py(n - k, -q))
    return found


def refuse_without_coins(estimator: object) -> None:
    """`UfomError` for what is not UFOM, nor one of its ends, FOM and EXACT."""
    if not isinstance(estimator, Estimator | Debiased):
        raise UfomError(f"estimator = {estimator!r:.100} has no coins: give UFOM(q), FOM or EXACT")


@typed
def measure_calls(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks,
    estimator: Estimator | Debiased,
    *,
    seconds: float = 1.0,
    repeats: int = 5,
    chunk: int | None = None,
    compile: bool = False,
) -> CallCost:
    """Time and weigh `hypergradient(problem, theta, tasks, estimator, chunk=chunk, compile=compile)` by calling it.

    Calls with no task, one task and all tasks corrected are made alternately, after one of each that does not count.

    Args:
        problem: the problem.
        theta: θ, shape (s,).
        tasks: n stacked tasks.
        estimator: what will be run.
        seconds: calls are timed for so long, or as long as `repeats` rounds take; ten times as many rounds while an
            error is larger than a fifth of its time.
        repeats: rounds, 3 at least.
        chunk, compile: as in `hypergradient`.

    Raises:
        UfomError: as `hypergradient`; an estimator without coins; a time whose error stays larger than a fifth of it.
    """
    refuse_without_coins(estimator)
    tasks = check(problem, theta, tasks)
    n, q = len(tasks), estimator.q
    can_be = {0, 1, n} if 0 < q < 1 else {n if q else 0}
    asked, each = sorted(can_be), replace(estimator, coin="task")

    def call(corrected: int) -> Callable[[], object]:
        coins = torch.arange(n, device="cpu") < corrected
        return lambda: hypergradient(problem, theta, tasks, each, coins=coins, chunk=chunk, compile=compile)

    calls = [call(k) for k in asked]
    for one in calls:
        one()
    known = (theta, *tasks.parts)
    most = np.flatnonzero(corrected_tasks(n, q, estimator.coin))[-2:].tolist()  # a mixed batch may hold more
    weighed = max(peak_bytes(call(k), known) for k in most)
    times = np.array(alternate(calls, theta.device, seconds, max(3, repeats)))
    found = [median(column) for column in times.T]
    for k, (value, sem) in zip(asked, found, strict=True):
        refuse_unsure(f"a call with {k} of {n} tasks corrected", value, sem)
    medians, sems = ({k: x[i] for k, x in zip(asked, found, strict=True)} for i in (0, 1))
    return CallCost(n, medians, sems, weighed)
