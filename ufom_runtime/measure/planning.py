"""What to run within a memory: proxies, sweeps, coins, scales and roulettes, by measured moments, seconds and bytes.

All is priced by counted calls and held states first; what could be the soonest is then called and weighed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufom_runtime.algorithms import first_state
from ufom_runtime.coins import Coin
from ufom_runtime.estimators import UFOM, Estimator, Method
from ufom_runtime.measure.calls import CallCost, measure_calls
from ufom_runtime.measure.candidates import truncations
from ufom_runtime.measure.clock import alternate, measure_cost, median
from ufom_runtime.measure.moments import MeasuredMoments, measure_moments, moments_by_proxy, tasks_or_all
from ufom_runtime.memory import peak_bytes
from ufom_runtime.methods.debiased import Debiased
from ufom_runtime.methods.implicit import Implicit
from ufom_runtime.methods.roulette import Roulette
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check, held_identity
from ufom_theory import Candidate, Choice, CostModel, Moments, Sweep, Truncated, UfomError, plan
from ufom_theory.checks import byte_count, bytes_text, integer, scalar, typed

_MEASURED = 6  # ways that are called and weighed
_SLACK = 2.0  # over the memory, for what is priced by its states
_LEAST_Q = 1e-3  # where the proxy is nearly exact, any small q is as good
_COINS: tuple[Coin, ...] = ("task", "batch", "stratified")


@dataclass(frozen=True, eq=False)
class Planned:
    """One way to run that fits, at its best q.

    Attributes:
        estimator: for `hypergradient` and `train`.
        label: it in words.
        q: the probability of a correction; of a roulette one a level.
        seconds: foreseen of one call on the batch, the mean over the coins.
        bytes: the most that a call was seen to hold.
        slower: its time to a given precision over the soonest's.
        why: the reason, in words.
    """

    estimator: Method
    label: str
    q: float | tuple[float, ...]
    seconds: float
    bytes: int
    slower: float
    why: str


@dataclass(frozen=True, eq=False)
class _Way:
    """A proxy and a sweep; the exact gradient where the proxy is None, a roulette where there are levels."""

    sweep: Sweep
    proxy: Truncated | Implicit | None = None
    levels: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.levels:
            return f"roulette {self.levels}, {self.sweep}"
        if self.proxy is None:
            return f"exact, {self.sweep}"
        if isinstance(self.proxy, Implicit):
            named = f"{self.proxy.solver} {self.proxy.steps}"
        else:
            named = "HELD" if self.proxy.held else f"K = {self.proxy.steps}" if self.proxy.steps else "FOM"
        return f"UFOM on {named}, {self.sweep}"

    def make(self, q: float, coin: Coin = "task", scale: float = 1.0) -> Estimator | Debiased:
        """The estimator with one coin; not of a roulette."""
        if self.proxy is None:
            return Estimator(1.0, self.sweep)
        return UFOM(q, self.sweep, self.proxy, scale, coin)  # type: ignore[arg-type]  # either kind of proxy


@dataclass(frozen=True, eq=False)
class _Measured:
    """Seconds and bytes of a way: of its calls by corrected tasks, or of a roulette's with all tasks at each level."""

    calls: CallCost | None
    levels: tuple[float, ...]
    bytes: int


@typed
def plan_estimators(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks | None = None,
    memory: int | str = "1GB",
    *,
    m: float | None = None,
    outer: str | None = None,
    batch: int = 4,
    seconds: float = 1.0,
    chunk: int | None = None,
    compile: bool = False,
) -> list[Planned]:
    """What to run within a memory, the soonest to a given precision first: UFOM, a roulette or the exact gradient.

    Searched are FOM, HELD, Truncated(K) and implicit proxies, plain and scaled by c* = E⟨G, F⟩/E‖F‖²; all sweeps; all
    coins; and roulettes of three levels. The moments are measured on all tasks, the seconds and bytes of the soonest
    ways by calling them on a batch. Each proxy and sweep has one row, with its best coin, scale and q.

    Args:
        problem: the problem.
        theta: θ, shape (s,).
        tasks: n stacked tasks, at least `batch`; None: the problem's finite Ω. A batch larger than Ω repeats its tasks.
        memory: bytes that the tensors of a call may hold, a number or a text such as "50MB".
        m: exponent of the time to precision; give exactly one of m and outer.
        outer: how the outer steps are taken, as in `optimal_q`.
        batch: tasks an outer step.
        seconds: so long each way is timed, or three rounds.
        chunk, compile: as in `hypergradient`.

    Raises:
        UfomError: as `measure_moments`, `measure_calls` and `ufom_theory.plan`.
    """
    most, b = byte_count("memory", memory), scalar("batch", batch, integer, 1)
    given, _ = tasks_or_all(problem, tasks)
    every = check(problem, theta, given)
    few = every.take(torch.arange(b, device="cpu") % len(every))
    moments = _moments(problem, theta, tasks, chunk, compile)
    priced = _priced(problem, theta, few, list(_ways(problem.r, moments)), compile)
    searched = {way: _Measured(None, (), int(held)) for way, (_, held) in priced.items() if held <= _SLACK * most}
    measured: dict[_Way, _Measured] = {}
    besides = math.inf  # the least bytes that a call was seen to hold besides its states
    for way in _order(searched, priced, moments, m, outer, b):
        is_exact = way.proxy is None and not way.levels
        if besides < math.inf and priced[way][1] + besides > most:
            continue
        if len(measured) >= _MEASURED and not is_exact:
            continue
        found = _measure(problem, theta, few, way, most, seconds, chunk, compile)
        besides = min(besides, found.bytes - priced[way][1])
        if found.bytes <= most:
            measured[way] = found
            if is_exact and len(measured) >= _MEASURED:
                break
    if not measured:
        raise UfomError(f"nothing fits in memory = {bytes_text(most)}: raise it, or take a smaller batch")
    return _decided(measured, moments, most, m, outer, b)


def _moments(
    problem: BilevelProblem, theta: Tensor, tasks: Task | Tasks | None, chunk: int | None, compile: bool
) -> dict[Any, MeasuredMoments]:
    """Of each proxy that can be used here, the scaled ones apart."""
    r = problem.r
    proxies = [*map(Truncated, [0, *truncations(r)]), *[Truncated(held=True)] * (not held_identity(problem))]
    found: dict[Any, MeasuredMoments] = {
        **moments_by_proxy(problem, theta, tasks, proxies, chunk=chunk, compile=compile)
    }
    for solver in ("neumann", "cg"):
        implicit = Implicit(solver, steps=min(20, r), warn_above=1e300)
        with suppress(UfomError), warnings.catch_warnings():  # where it is not valid it says why if it is asked for
            warnings.simplefilter("ignore")
            found[implicit] = measure_moments(problem, theta, tasks, implicit, chunk=chunk)
    return found


def _ways(r: int, moments: dict[Any, MeasuredMoments]) -> Iterator[_Way]:
    slots = sorted({s for s in (1, 3, math.isqrt(r)) if s < r - 1})
    sweeps = [Sweep.recomputed(), *map(Sweep.checkpointed, slots), Sweep.stored(), Sweep.unrolled()]
    for sweep in sweeps:
        yield _Way(sweep)
        for proxy in moments:
            yield _Way(sweep, proxy)
        if sweep.kind != "unrolled":
            for k in sorted({r // 10, r // 3} - {0, r}):
                yield _Way(sweep, levels=(0, k, r))


def _priced(
    problem: BilevelProblem, theta: Tensor, few: Tasks, ways: Sequence[_Way], compile: bool
) -> dict[_Way, tuple[CostModel | list[float], float]]:
    """Costs in seconds a task by counted calls, and bytes by states, a rough measure of both."""
    cost, r = measure_cost(problem, theta, few, seconds=0.2, repeats=5, compile=compile), problem.r
    c1, c2 = float(cost.c1), float(cost.c2)
    state = first_state(problem, theta[None], few.take(slice(1))).nbytes * len(few)
    found: dict[_Way, tuple[CostModel | list[float], float]] = {}
    for way in ways:
        if way.levels:
            roulette = Roulette(way.levels, (1.0,) * (len(way.levels) - 1), way.sweep)
            found[way] = [float(c) for c in roulette.costs(c1, c2)], state * roulette.states(r)
            continue
        estimator = way.make(0.5)
        zero, one = (replace(estimator, q=q).calls(r, len(theta)).price(c1, c2) for q in (1e-9, 1.0))
        found[way] = CostModel.of(max(zero, 1e-12), max(one - zero, 1e-12)), state * estimator.states(r, len(theta))
    return found


def _scaled(way: _Way, moments: dict[Any, MeasuredMoments]) -> list[tuple[float, Moments]]:
    """The proxy's own moments, and those with its best factor."""
    plain = moments[way.proxy]
    c, _, better = plain.scaled()
    return [(1.0, plain)] + [(float(c), better)] * (abs(float(c) - 1) > 0.02)


def _candidates(
    found: dict[_Way, _Measured],
    cost: Callable[[_Way, Coin, float], CostModel | list[float]],
    moments: dict[Any, MeasuredMoments],
    batch: int,
) -> list[Candidate]:
    """One a way, coin and scale; labels are (way, coin, scale)."""
    rows, any_moments = [], next(iter(moments.values()))
    for way, x in found.items():
        if way.levels:
            levels = [moments[Truncated(k)] for k in way.levels[:-1]]
            same = [
                Moments(y.d2, levels[0].v2, mean_gradient_sq=max(float(y.mean_gradient_sq or 0.0), 0.0)) for y in levels
            ]
            rows.append(Candidate((way, "task", 1.0), same, cost(way, "task", 1.0), x.bytes))
        elif way.proxy is None:
            rows.append(Candidate((way, "task", 1.0), any_moments, cost(way, "task", 1.0), x.bytes, q=1.0))
        else:
            for scale, one in _scaled(way, moments):
                for coin in _COINS if batch > 1 else ("task",):
                    rows.append(Candidate((way, coin, scale), one, cost(way, coin, scale), x.bytes, coin))
    return rows


def _order(
    searched: dict[_Way, _Measured],
    priced: dict[_Way, tuple[CostModel | list[float], float]],
    moments: dict[Any, MeasuredMoments],
    m: float | None,
    outer: str | None,
    batch: int,
) -> list[_Way]:
    """The ways by the time that their counted calls foresee; those of little memory last, in case none other fits."""
    if not searched:
        return sorted(priced, key=lambda way: priced[way][1])
    rows = _candidates(searched, lambda way, coin, scale: priced[way][0], moments, batch)
    chosen = [row.label[0] for row in plan(rows, 2**62, m, outer, batch)]
    return list(dict.fromkeys([*chosen, *sorted(searched, key=lambda way: searched[way].bytes)]))


def _measure(
    problem: BilevelProblem,
    theta: Tensor,
    few: Tasks,
    way: _Way,
    most: int,
    seconds: float,
    chunk: int | None,
    compile: bool,
) -> _Measured:
    """Weigh it, and time it where it fits."""
    n = len(few)
    if not way.levels:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calls = measure_calls(
                problem,
                theta,
                few,
                way.make(0.5),
                seconds=seconds,
                repeats=3,
                chunk=chunk,
                compile=compile,
                memory=most,
            )
        return _Measured(calls, (), calls.bytes)
    roulette = Roulette(way.levels, (0.5,) * (len(way.levels) - 1), way.sweep)

    def run(level: int) -> Callable[[], object]:
        reached = torch.full((n,), level, device="cpu")
        return lambda: roulette.at(problem, theta.expand(n, -1), few, reached, compile)

    runs = [run(level) for level in range(len(way.levels))]
    for one in runs:
        one()
    held = peak_bytes(runs[-1], (theta, *few.parts))
    if held > most:
        return _Measured(None, (), held)
    rounds = np.array(alternate(runs, theta.device, seconds, 3))
    return _Measured(None, tuple(median(column)[0] / n for column in rounds.T), held)


def _decided(
    measured: dict[_Way, _Measured],
    moments: dict[Any, MeasuredMoments],
    most: int,
    m: float | None,
    outer: str | None,
    batch: int,
) -> list[Planned]:
    """The plan by measured costs: twice, the second time with each cost's tangent at the first one's q."""
    at: dict[Any, float] = {}

    def cost(way: _Way, coin: Coin, scale: float) -> CostModel | list[float]:
        x = measured[way]
        if way.levels:
            return [x.levels[0], *(max(c, 1e-3 * x.levels[0]) for c in np.diff(x.levels).tolist())]
        assert x.calls is not None
        if way.proxy is None:
            return CostModel.of(*[x.calls.seconds[batch] / batch / 2] * 2)
        return x.calls.cost(at.get((way, coin, scale), 0.3), coin)

    for _ in range(2):
        rows = plan(_candidates(measured, cost, moments, batch), most, m, outer, batch)
        at = {row.label: row.q for row in rows if isinstance(row.q, float) and row.q > 0}
    best: dict[_Way, Choice] = {}  # each way with its soonest coin and scale
    for row in rows:
        if isinstance(row.q, float) or all(row.q):  # a level that is never reached: a shorter roulette is as good
            best.setdefault(row.label[0], row)
    return [_planned(row, rows, measured, most, batch) for row in best.values()]


def _planned(row: Choice, rows: Sequence[Choice], measured: dict[_Way, _Measured], most: int, batch: int) -> Planned:
    way, coin, scale = row.label
    calls = measured[way].calls
    if way.levels:
        assert isinstance(row.q, tuple)
        estimator: Method = Roulette(way.levels, row.q, way.sweep)
        q: float | tuple[float, ...] = row.q
        seconds = batch * row.cost
    else:
        assert calls is not None
        assert isinstance(row.q, float)
        q = max(row.q, _LEAST_Q)
        estimator, seconds = way.make(q, coin, scale), calls.expected(q, coin)
    named = _named(row.label)
    why = f"{row.slower:.3g}× the winner's time"
    if row is rows[0]:
        why = f"run {named}, which holds {bytes_text(row.bytes)} of {bytes_text(most)}"
        if exact := next((x for x in rows if x.candidate.q == 1 and x is not row), None):
            why += f"; {exact.slower:.3g}× sooner than {_named(exact.label)}"
    return Planned(estimator, named, q, seconds, row.bytes, row.slower, why)


def _named(label: tuple[_Way, Coin, float]) -> str:
    way, coin, scale = label
    return f"{way}" + f", {coin} coins" * (coin != "task") + f", scaled by {scale:.3g}" * (scale != 1)
