"""All that could be run within a memory: their predicted times and, by the law of the outer steps, their best q."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ufom_runtime.coins import Coin
from ufom_runtime.estimators import FOM, UFOM, Estimator, Method
from ufom_runtime.measure.chances import DRAWS, Key, Path
from ufom_runtime.measure.parts import Parts
from ufom_runtime.methods.roulette import Roulette
from ufom_theory import Sweep, Truncated, UfomError, optimal_survival
from ufom_theory.coins import scaled_proxy
from ufom_theory.laws import Outer, parse_outer

Array = NDArray[np.float64]
# the best q is flat: nearer values gain below 2 %; below 0.05 single steps are too long for a law of the second order
QS = (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
_EXPONENTS = (0.1, 0.3, 1.0, 2.0, 4.0)  # their best survivals are those of every law, from rare to frequent corrections
UNSURE = 0.15  # relative error of a predicted time
FUSS = 0.02  # another coin or scale has to gain so much


@dataclass(frozen=True)
class Time:
    """Seconds of an outer step, their relative error, and whether they were timed or predicted."""

    seconds: float
    error: float = UNSURE
    clock: str = "predicted"


Times = dict[Method | None, Time]


@dataclass(frozen=True)
class Way:
    """One way to compute an outer direction, as the table names it.

    Attributes:
        method: what is run; None is the script.
        name: FOM, exact, UFOM, roulette or script.
        seconds: of an outer step, predicted.
        bytes: that it holds at most.
        q: probability of the whole correction; 0 for FOM, 1 for exact, nan for the script.
        sweep: how states are recovered; "" where none are.
        proxy: what is debiased: "" for FOM, "held", K, a method's name, or the levels of a roulette.
        coin: "task", "batch" or "stratified"; "" where there is none.
        scale: c, a factor of the proxy.
    """

    method: Method | None
    name: str
    seconds: float
    bytes: int
    q: float = math.nan
    sweep: str = ""
    proxy: str = ""
    coin: str = ""
    scale: float = 1.0

    @property
    def fuss(self) -> bool:
        """Whether coins or the proxy are other than the paper's."""
        return self.scale != 1 or self.coin in ("batch", "stratified")

    @property
    def written(self) -> str:
        """In short, as UFOM(0.05, stored, K = 3)."""
        proxy = f"K = {self.proxy}" if self.proxy.isdigit() else self.proxy
        coin = {"batch": "one coin a batch", "stratified": "stratified"}.get(self.coin, "")
        scale = f"c = {self.scale:g}" if self.scale != 1 else ""
        q = f"{self.q:.2g}" if self.coin or self.name == "roulette" else ""
        said = ", ".join(filter(None, (q, self.sweep, proxy, scale, coin)))
        return f"{self.name}({said})" if said else self.name


SCRIPT = "script"


@dataclass(frozen=True, eq=False)
class Row:
    """A way at each point of the path, and its steps over exact's there.

    Attributes:
        by_point: the ways; all equal but for a switch.
        ratios: shape (points, DRAWS + 1).
    """

    by_point: tuple[Way, ...]
    ratios: Array

    @property
    def ways(self) -> tuple[Way, ...]:
        """The ways, each once, in their order."""
        return tuple(dict.fromkeys(self.by_point))

    def time(self, weights: Sequence[float], times: Times) -> Array:
        """Seconds for the progress of one exact step, as a mean over the horizon, shape (DRAWS + 1,)."""
        seconds = np.array([time_of(way, times).seconds for way in self.by_point])
        return np.asarray((np.asarray(weights) * seconds) @ self.ratios)

    def steps(self, weights: Sequence[float]) -> Array:
        """Steps over exact's along the horizon, shape (DRAWS + 1,)."""
        return np.asarray(np.asarray(weights) @ self.ratios)


def time_of(way: Way, times: Times) -> Time:
    """As it was timed, else as its parts say."""
    return times.get(way.method) or Time(way.seconds)


@dataclass(frozen=True, eq=False)
class Search:
    """What is searched, and by what.

    Attributes:
        outer: how the outer steps are taken.
        batch: tasks an outer step.
        memory: bytes that may be held; None: any.
        parts: the costs.
        held: whether HELD is another proxy than FOM.
        compile: whether steps are compiled; a roulette then runs task by task, and is left out.
        qs: the values of q that are tried; the least is also that of a roulette.
        allowed: whether a way may be chosen, where not all may.
        times: what was timed.
    """

    outer: Outer
    batch: int
    memory: int | None
    parts: Parts
    held: bool = False
    compile: bool = False
    qs: tuple[float, ...] = QS
    allowed: Callable[[Way], bool] = lambda way: True
    times: Times = field(default_factory=dict)

    @property
    def script(self) -> Way:
        """Plain autograd through the unrolled loop."""
        return Way(None, SCRIPT, self.parts.script, self.parts.bytes_script)

    @property
    def fom(self) -> Way:
        """FOM."""
        return self._way(FOM, "FOM")

    @property
    def proxies(self) -> list[Key]:
        """FOM, HELD, the last one, tenth and third of the backward steps, and the methods that were timed."""
        r = self.parts.r
        every = [Truncated(), *[Truncated(held=True)] * self.held]
        every += map(Truncated, truncations(r))
        cuts: list[Key] = [proxy for proxy in every if self._fits(self.parts.bytes(0.0, proxy, Sweep.recomputed()))]
        return cuts + [method for method, (_, held) in self.parts.others.items() if self._fits(held)]

    def sweeps(self, proxy: Key, q: float) -> list[Sweep]:
        """The sweeps that fit: every state again, a few checkpoints, all states, and the graph of the loop."""
        r, k = self.parts.r, proxy.steps if isinstance(proxy, Truncated) else 0

        def fits(sweep: Sweep) -> bool:
            return self._fits(self.parts.bytes(q, proxy, sweep))

        slots = [s for s in range(r - k - 2, 0, -1) if fits(Sweep.checkpointed(s))]
        few = math.isqrt(max(r - k, 1))
        chosen = [min(slots[0], few) if slots[0] == r - k - 2 else slots[0]] if slots else []
        every = [Sweep.recomputed(), *(Sweep.checkpointed(s) for s in chosen)]
        return [sweep for sweep in (*every, Sweep.stored(), Sweep.unrolled()) if fits(sweep)]

    def _fits(self, held: int) -> bool:
        return self.memory is None or held <= self.memory

    def _way(self, e: Estimator, name: str) -> Way:
        seconds = self.parts.expected(e.q, e.proxy, e.sweep, e.coin)
        sweep = str(e.sweep) if e.q else ""
        return Way(e, name, seconds, self.parts.bytes(e.q, e.proxy, e.sweep), e.q, sweep)

    def exact(self) -> list[Way]:
        """The exact gradient by each sweep that fits, the quickest first; none may fit."""
        every = [self._way(Estimator(1.0, sweep), "exact") for sweep in self.sweeps(Truncated(), 1.0)]
        return sorted(filter(self.allowed, every), key=lambda way: time_of(way, self.times).seconds)

    def unbiased(self, path: Path, ufoms: Iterable[tuple[Way, Array]], first: int = 0) -> list[Row]:
        """Of `ufoms`, and of roulettes, the soonest from point `first` on with each proxy, sweep and coin."""
        found: dict[tuple[str, str, str], tuple[float, Row]] = {}
        for way, ratios in (*ufoms, *self._roulettes(path, first)):
            if not self.allowed(way):
                continue
            row = Row((way,) * len(path.steps), ratios)
            spent = float(ratios[first:, 0] @ np.asarray(path.weights[first:])) * way.seconds
            spent *= 1 + FUSS * (way.scale != 1)
            key = way.proxy, way.sweep, way.coin
            if key not in found or spent < found[key][0]:
                found[key] = spent, row
        return [row for _, row in found.values()]

    def _ufoms(self, path: Path) -> Iterator[tuple[Way, Array]]:
        """UFOM with each proxy, scale, coin, q and sweep, and its steps over exact's."""
        coins: tuple[Coin, ...] = ("task", "batch", "stratified") if self.batch > 1 else ("task",)
        tossed = [(coin, q) for coin in coins for q in self._qs(coin)]
        for proxy in path.progress:
            sweeps, best = self.sweeps(proxy, 0.5), path.scale(proxy)
            scales = (1.0, best) if 0 < best != 1 else (1.0,)
            for scale in scales:
                progress = [p if scale == 1 else scaled_proxy(p, scale) for p in path.progress[proxy]]
                for coin, q in tossed:
                    ratios = path.ufom(progress, q, coin)
                    for sweep in sweeps:
                        seconds = self.parts.expected(q, proxy, sweep, coin)
                        yield self._ufom(proxy, q, coin, scale, sweep, seconds), ratios

    def _qs(self, coin: Coin) -> list[float]:
        """Stratified coins are best where qB is whole: between two such q, A is linear in q, and so is C."""
        b = self.batch
        rounded = [max(1, round(q * b)) / b if q * b >= 1 else q for q in self.qs]
        return [q for q in dict.fromkeys(rounded if coin == "stratified" else self.qs) if q < 1]

    def _ufom(self, proxy: Key, q: float, coin: Coin, scale: float, sweep: Sweep, seconds: float) -> Way:
        held = self.parts.bytes(q, proxy, sweep)
        method = UFOM(q, sweep, proxy=proxy, scale=scale, coin=coin)
        return Way(method, "UFOM", seconds, held, q, str(sweep), proxy_name(proxy), coin, scale)

    def _roulettes(self, path: Path, first: int) -> Iterator[tuple[Way, Array]]:
        """A roulette over the lengths that were measured, by each sweep, with the survivals of several exponents."""
        lengths = sorted(p.steps for p in path.measured if isinstance(p, Truncated) and not p.held)
        if len(lengths) < 2 or lengths[0] or self.compile or Truncated() not in path.progress:
            return
        levels = (*lengths, self.parts.r)
        d2 = np.array([[np.broadcast_to(p.d2, DRAWS + 1) for p in path.measured[Truncated(k)]] for k in lengths])
        weights = np.asarray(path.weights[first:]) / sum(path.weights[first:])
        at = d2[:, first:, 0] @ weights
        fom = path.measured[Truncated()]
        exponents = _EXPONENTS if self.outer.rate else sorted({*_EXPONENTS, self.outer.exponent})
        second = [float(np.ravel(p.variance + self.batch * p.gradient_sq)[0]) for p in fom[first:]]
        for sweep in self.sweeps(Truncated(), 0.5):
            if sweep.kind == "unrolled":
                continue
            costs = self.parts.level_costs(levels, sweep)
            seen = set()
            for m in exponents:
                try:
                    q = optimal_survival(at, max(float(second @ weights), float(at[0])), costs, m).q
                except UfomError:
                    continue
                survival = tuple(float(f"{x:.2g}") for x in np.maximum(q, self.qs[0]))
                if survival in seen or survival[0] == survival[-1]:
                    continue  # one level is UFOM
                seen.add(survival)
                rises = (d2 - np.concatenate([d2[1:], np.zeros_like(d2[:1])])).transpose(1, 2, 0)
                added = rises @ (1 / np.array(survival) - 1)
                excess = np.maximum(added, 0.0) / np.where(d2[0] > 0, d2[0], 1.0)
                way = Way(
                    Roulette(levels, survival, sweep), "roulette", self.parts.roulette(levels, survival, sweep),
                    self.parts.bytes(1.0, Truncated(), sweep), survival[-1], str(sweep), "-".join(map(str, levels)),
                )  # fmt: skip
                yield way, path.noisier(Truncated(), excess)

    def rows(self, path: Path | None) -> list[Row]:
        """The script, FOM, the exact gradient by each sweep, every UFOM, and the best switch from FOM.

        Without a path the last two are left out, and FOM's steps are not known.
        """
        points = len(path.steps) if path else 1
        one, exact = np.ones((points, DRAWS + 1)), self.exact()
        known = [Row((way,) * points, one) for way in (self.script, *exact)]
        fom = Row((self.fom,) * points, path.fom() if path else one * np.nan)
        if not path:
            return [*known, fom]
        ufoms = list(self._ufoms(path))
        switched = [
            Row((*fom.by_point[:j], *row.by_point[j:]), np.vstack([fom.ratios[:j], row.ratios[j:]]))
            for j in range(1, points)
            for row in (*known[1:], *self.unbiased(path, ufoms, j))
        ]
        best = min(switched, key=lambda row: row.time(path.weights, self.times)[0], default=None)
        finite = best and math.isfinite(best.steps(path.weights)[0])
        return [*known, fom, *self.unbiased(path, ufoms), *([best] if best and finite else [])]

    def shortlist(self, path: Path) -> list[Key]:
        """FOM, and the other proxy that is soonest where each q has its own best step."""
        tuned, fom = replace(self, outer=parse_outer("tuned"), times={}), Truncated()
        alone = {p: replace(path, outer=tuned.outer, progress={p: x}) for p, x in path.progress.items() if p != fom}
        rows = {p: tuned.unbiased(x, tuned._ufoms(x)) for p, x in alone.items()}
        found = {p: min(float(row.time(x.weights, {})[0]) for row in rows[p]) for p, x in alone.items()}
        return [fom, *sorted(found, key=lambda p: found[p])[:1]]


def soonest(rows: Sequence[Row], weights: Sequence[float]) -> list[Row]:
    """One row a method, sweep and proxy, that with the quickest coins and scale, as their parts foresee them."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.time(weights, {})[0] * (1 + FUSS * row.ways[-1].fuss)):
        last = row.ways[-1]
        found.setdefault((last.name, last.sweep, last.proxy), row)
    return list(found.values())


def truncations(r: int) -> list[int]:
    """The K that are tried besides FOM: the last one, tenth and third of the r backward steps."""
    return sorted({1, r // 10, r // 3} - {0, r})


def proxy_name(proxy: Key) -> str:
    """ "" for FOM, "held", the K of what is debiased, or a method's name."""
    if isinstance(proxy, Truncated):
        return "held" if proxy.held else str(proxy.steps or "")
    return f"{getattr(proxy, 'solver', type(proxy).__name__.lower())}:{getattr(proxy, 'steps', '')}".rstrip(":")
