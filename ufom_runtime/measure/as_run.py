"""Whole outer steps on one batch, as they are run: timed alternately, and weighed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.estimators import Estimator, Method, hypergradient
from ufom_runtime.measure.calls import corrected_tasks
from ufom_runtime.measure.candidates import UNSURE, Time, Times, Way
from ufom_runtime.measure.parts import alternated, script_gradient
from ufom_runtime.memory import peak_bytes
from ufom_runtime.methods.debiased import Debiased
from ufom_runtime.methods.roulette import Roulette
from ufom_runtime.problem import BilevelProblem, Tasks

Array = NDArray[np.float64]
Call = Callable[[], object]
_ROUNDS = 3  # that tell an error
_OFFSETS = 4  # of the evenly spaced numbers that time a roulette


@dataclass(frozen=True, eq=False)
class AsRun:
    """Outer steps on one batch of tasks.

    Attributes:
        problem: the problem.
        theta: θ, shape (s,).
        tasks: the batch.
        chunk, compile: as in `hypergradient`.
    """

    problem: BilevelProblem
    theta: Tensor
    tasks: Tasks
    chunk: int | None = None
    compile: bool = False

    def time(self, ways: Sequence[Way], seconds: float) -> Times:
        """Each of them, alternately; random ones as the mean over their draws.

        The error is that of the ratio to the script, if that is among them, else to the first.
        """
        calls: list[Call] = []
        mixtures = []
        for way in ways:
            mixture = list(self._mixture(way.method))
            mixtures.append((len(calls), [weight for weight, _ in mixture]))
            calls += [call for _, call in mixture]
        rounds = alternated(calls, self.theta.device, seconds)
        found = [rounds[:, at : at + len(weights)] @ np.array(weights) for at, weights in mixtures]
        plain = next((x for way, x in zip(ways, found, strict=True) if way.method is None), found[0])
        return {way.method: _summary(x, plain) for way, x in zip(ways, found, strict=True)}

    def weigh(self, method: Method) -> int:
        """The most bytes that a step was seen to hold, over its draws."""
        if isinstance(method, Roulette):
            calls = [self._roulette(method, torch.full((len(self.tasks),), len(method.survival), device="cpu"))]
        else:
            assert isinstance(method, Estimator | Debiased)
            most = np.flatnonzero(corrected_tasks(len(self.tasks), method.q, method.coin))[-2:]
            calls = [self._corrected(method, int(k)) for k in most]  # a mixed batch may hold more
        calls[0]()  # what is found out at first use is not weighed
        return max(peak_bytes(call, (self.theta, *self.tasks.parts)) for call in calls)

    def _mixture(self, method: Method | None) -> Iterator[tuple[float, Call]]:
        n = len(self.tasks)
        if method is None:
            yield 1.0, lambda: script_gradient(self.problem, self.theta, self.tasks)
        elif isinstance(method, Roulette):
            # with evenly spaced u each level is reached by its mean number of tasks, over the offsets
            survival = torch.tensor(method.survival, device="cpu")
            for i in range(_OFFSETS):
                u = (torch.arange(n, device="cpu") + (i + 0.5) / _OFFSETS) / n
                yield 1 / _OFFSETS, self._roulette(method, (u[:, None] < survival).sum(1))
        elif isinstance(method, Estimator | Debiased):
            chances = corrected_tasks(n, method.q, method.coin)
            some = np.flatnonzero(chances)
            if len(some) > 3:  # by none, and by the mean number of corrected tasks where there are some
                mean = n * method.q / (1 - chances[0])
                low = min(math.floor(mean), n - 1)
                share = min(mean - low, 1.0)
                rest = 1 - chances[0]
                some, weights = np.array([0, low, low + 1]), np.array([chances[0], rest * (1 - share), rest * share])
            else:
                weights = chances[some]
            yield from ((w, self._corrected(method, int(k))) for w, k in zip(weights.tolist(), some, strict=True) if w)

    def _corrected(self, method: Estimator | Debiased, corrected: int) -> Call:
        n = len(self.tasks)
        coins = torch.arange(n, device="cpu") < corrected if 0 < method.q < 1 else None
        return lambda: hypergradient(
            self.problem, self.theta, self.tasks, method, coins=coins, chunk=self.chunk, compile=self.compile
        )

    def _roulette(self, method: Roulette, reached: Tensor) -> Call:
        rows = self.theta.expand(len(self.tasks), -1)
        return lambda: method.at(self.problem, rows, self.tasks, reached, self.compile)


def _summary(rounds: Array, plain: Array) -> Time:
    """The median; its error is that of the log-ratio to `plain` in the same round, by the median deviation.

    Of fewer than three rounds it is that of a predicted time.
    """
    ratios = np.log(rounds / plain)
    error = 1.858 * np.median(abs(ratios - np.median(ratios))) / math.sqrt(len(rounds))  # of a normal's median
    error = error if len(rounds) >= _ROUNDS else UNSURE
    return Time(float(np.median(rounds)), float(error), "timed")
