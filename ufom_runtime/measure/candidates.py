"""All that could be run within a memory: their predicted times and, by the law of the outer steps, their best q."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ufom_runtime.coins import Coin
from ufom_runtime.estimators import FOM, UFOM, Estimator
from ufom_runtime.measure.chances import Path
from ufom_runtime.measure.parts import Parts
from ufom_theory import Sweep, Truncated
from ufom_theory.laws import Outer, parse_outer

Array = NDArray[np.float64]
# the best q is flat: nearer values gain below 2 %; below 0.05 single steps are too long for a law of the second order
_QS = (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
_UNSURE = 0.15  # relative error of a predicted time


@dataclass(frozen=True)
class Time:
    """Seconds of an outer step, their relative error, and whether they were timed or predicted."""

    seconds: float
    error: float = _UNSURE
    clock: str = "predicted"


Times = dict[Estimator | None, Time]


@dataclass(frozen=True, eq=False)
class Row:
    """One way to run: an estimator at each point of the path (None is the script), and its steps over exact's there.

    Attributes:
        by_point: the estimators; all equal but for a switch.
        ratios: shape (points, draws + 1).
    """

    by_point: tuple[Estimator | None, ...]
    ratios: Array

    @property
    def kinds(self) -> tuple[Estimator | None, ...]:
        """The estimators, each once, in their order."""
        return tuple(dict.fromkeys(self.by_point))

    def time(self, weights: Sequence[float], times: Times) -> Array:
        """Seconds for the progress of one exact step, as a mean over the horizon, shape (draws + 1,)."""
        seconds = np.array([times[kind].seconds for kind in self.by_point])
        return np.asarray((np.asarray(weights) * seconds) @ self.ratios)

    def steps(self, weights: Sequence[float]) -> Array:
        """Steps over exact's along the horizon, shape (draws + 1,)."""
        return np.asarray(np.asarray(weights) @ self.ratios)


@dataclass(frozen=True, eq=False)
class Search:
    """What is searched, and by what.

    Attributes:
        outer: how the outer steps are taken.
        batch: tasks an outer step.
        memory: bytes that may be held; None: any.
        parts: the costs.
        held: whether HELD is another proxy than FOM.
    """

    outer: Outer
    batch: int
    memory: int | None
    parts: Parts
    held: bool = False
    times: Times = field(default_factory=dict)

    @property
    def proxies(self) -> list[Truncated]:
        """FOM, HELD, and the last one, tenth and third of the backward steps."""
        r = self.parts.r
        every = [Truncated(), *[Truncated(held=True)] * self.held]
        every += [Truncated(k) for k in sorted({1, r // 10, r // 3} - {0, r})]
        return [proxy for proxy in every if self._fits(Estimator(0.0, proxy=proxy))]

    def sweeps(self, proxy: Truncated, q: float) -> list[Sweep]:
        """The sweeps that fit: every state again, a few checkpoints, all states, and the graph of the loop."""
        r, k = self.parts.r, proxy.steps
        slots = [s for s in range(r - k - 2, 0, -1) if self._fits(Estimator(q, Sweep.checkpointed(s), proxy))]
        few = math.isqrt(max(r - k, 1))
        chosen = [min(slots[0], few) if slots[0] == r - k - 2 else slots[0]] if slots else []
        every = [Sweep.recomputed(), *(Sweep.checkpointed(s) for s in chosen)]
        every += [Sweep.stored(), Sweep.unrolled()]
        return [sweep for sweep in every if self._fits(Estimator(q, sweep, proxy))]

    def _fits(self, e: Estimator) -> bool:
        return self.memory is None or self.parts.bytes(e.q, e.proxy, e.sweep) <= self.memory

    def predict(self, e: Estimator) -> Time:
        """The time of an estimator: as it was timed, else by its parts."""
        if e not in self.times:
            self.times[e] = Time(self.parts.expected(e.q, e.proxy, e.sweep, e.coin))
        return self.times[e]

    def exact(self) -> list[Estimator]:
        """The exact gradient by each sweep that fits, the quickest first; none may fit."""
        every = [Estimator(1.0, sweep) for sweep in self.sweeps(Truncated(), 1.0)]
        return sorted(every, key=lambda e: self.predict(e).seconds)

    def unbiased(self, path: Path, first: int = 0) -> list[Row]:
        """UFOM with each proxy and sweep, at the q and the coin that are soonest from point `first` on."""
        found: dict[tuple[Truncated, Sweep], tuple[float, Row]] = {}
        for e, ratios in self._every(path):
            row = Row((e,) * len(path.steps), ratios)
            self.predict(e)
            spent = float(row.ratios[first:, 0] @ np.asarray(path.weights[first:])) * self.times[e].seconds
            key = (e.proxy, e.sweep)
            if key not in found or spent < found[key][0]:
                found[key] = spent, row
        return [row for _, row in found.values()]

    def _every(self, path: Path) -> Iterator[tuple[Estimator, Array]]:
        coins: tuple[Coin, ...] = ("task", "batch") if self.batch > 1 else ("task",)
        for proxy in path.progress:
            sweeps = self.sweeps(proxy, 0.5)
            for q in _QS:
                for coin in coins:
                    ratios = path.ratios(proxy, q, coin, self.outer, self.batch)
                    for sweep in sweeps:
                        yield UFOM(q, sweep, proxy, coin=coin), ratios

    def rows(self, path: Path) -> list[Row]:
        """FOM, the exact gradient by each sweep, UFOM with each proxy and sweep, and the best switch from FOM."""
        points = len(path.steps)
        self.predict(FOM)
        fom = Row((FOM,) * points, path.ratios(Truncated(), 0.0, "task", self.outer, self.batch))
        one = np.ones_like(fom.ratios)
        exact = [Row((e,) * points, one) for e in self.exact()]
        simple = [*exact, *self.unbiased(path)]
        switched = [
            Row((*fom.by_point[:j], *row.by_point[j:]), np.vstack([fom.ratios[:j], row.ratios[j:]]))
            for j in range(1, points)
            for row in (*exact, *self.unbiased(path, j))
        ]
        best = min(switched, key=lambda row: row.time(path.weights, self.times)[0], default=None)
        return [fom, *simple, *([best] if best and math.isfinite(best.steps(path.weights)[0]) else [])]

    def shortlist(self, path: Path) -> list[Truncated]:
        """FOM, and the other proxy that is soonest where each q has its own best step."""
        tuned, fom = Search(parse_outer("tuned"), self.batch, self.memory, self.parts, self.held), Truncated()
        found = [(row.time(path.weights, tuned.times)[0], row.by_point[0]) for row in tuned.unbiased(path)]
        others = [(time, e.proxy) for time, e in found if e and e.proxy != fom]
        return [fom, *[min(others, key=lambda x: x[0])[1]] * bool(others)]
