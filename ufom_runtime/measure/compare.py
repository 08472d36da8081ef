"""The decision: FOM, UFOM or exact, for this problem, these outer steps, this memory and this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.estimators import Estimator, Method, hypergradient
from ufom_runtime.measure.calls import corrected_tasks
from ufom_runtime.measure.candidates import FUSS, Row, Search, Time, Times, Way
from ufom_runtime.measure.chances import DRAWS, Path
from ufom_runtime.measure.moments import tasks_or_all
from ufom_runtime.measure.parts import Parts, alternated, measure_parts, script_gradient
from ufom_runtime.measure.path import CannotTell, Measuring, pilot_points, usable
from ufom_runtime.measure.verdict import along, decide, opened_at, outcomes, table_of
from ufom_runtime.methods.debiased import Debiased
from ufom_runtime.methods.roulette import Roulette
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check, held_identity
from ufom_theory import Sweep, UfomError
from ufom_theory.checks import byte_count, integer, positive, scalar, typed
from ufom_theory.laws import parse_outer

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
_OFFSETS = 4  # of the evenly spaced numbers that time a roulette
_TIMED = 3  # rows that are timed again, besides FOM, the quickest exact gradient and the script


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What `compare` found; it prints as its sentence.

    Attributes:
        table: one row a way to compute the gradient, the soonest first. method, q, sweep; proxy ("" for FOM, "held", or
            K), coin; ms of an outer step and clock, "timed" or "predicted"; bytes at most; steps_over_exact, outer
            steps over those of the exact gradient for the same progress; time_over_plain, the time for it over the
            plain script's, with its 95 % interval low, high. ∞ where the method makes no progress, nan where that
            cannot be told. A scaled proxy is written "0.6·FOM", a roulette by its levels.
        best: what to run, for `train`; the quickest exact gradient where the answer is "keep your script" or "cannot
            tell".
        why: what to run, in a sentence.
        along: one row a θ that was measured: step; d2, v2 and their ratio rho; mean_gradient_sq; cosine of FOM to ∇M;
            scale, the best factor c* of FOM. Empty where it cannot tell.
        measured: moments at the first θ, costs and bytes of a state, as plain numbers; None where it cannot tell.
    """

    table: pd.DataFrame
    best: Method
    why: str
    along: pd.DataFrame
    measured: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return self.why


@typed
def compare(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks | None = None,
    outer: str | None = None,
    batch: int = 1,
    memory: int | str | None = None,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    pilot: int | None = None,
    budget: float = 60.0,
    seed: int = 0,
    chunk: int | None = None,
    compile: bool = False,
) -> Comparison:
    """Say what to run (FOM, UFOM with which q, proxy and sweep, or exact), and how much sooner than a plain script.

    The progress of an outer step is by the law of `outer` at the measured moments (and curvatures, for a fixed step);
    its seconds and bytes are this machine's. The plain script is autograd through the unrolled loop, one task after
    another. With a horizon θ is followed along a pilot run, and FOM may be left for another method on the way.

    Args:
        problem: the problem.
        theta: θ, shape (s,); or (k, s), points of a run, evenly spaced from its start to step `steps`.
        tasks: n stacked tasks that the moments are measured on; None: the problem's finite Ω.
        outer: how the outer steps are taken: "sgd:0.05", "adam:1e-3", "tuned", "decay:0.5:1" or "paper".
        batch: tasks an outer step.
        memory: bytes that an outer step may hold, 50_000_000 or "50MB"; None: any.
        steps: the horizon, in outer steps of the exact gradient. Neither steps nor seconds: the next step alone.
        seconds: the horizon, in seconds of the script.
        pilot: outer steps of the pilot run; None: as many as fit a quarter of the budget, at most the horizon.
        budget: seconds for the timing and for the pilot run; the moments take what they take.
        seed: of the pilot run.
        chunk, compile: as in `hypergradient`; the script is never compiled.

    Raises:
        UfomError: an argument outside its range, a memory that does not hold a step of FOM, a horizon and outer steps
            without a rate to follow, or as `measure_moments`.
    """
    if outer is None:
        raise UfomError("give outer, how the outer steps are taken: 'sgd:0.05', 'adam:1e-3', 'tuned' or 'decay:0.5:1'")
    chosen, batch = parse_outer(outer), scalar("batch", batch, integer, 1)
    limit = None if memory is None else byte_count("memory", memory)
    budget = scalar("budget, the seconds of timing,", budget, positive)
    given, _ = tasks_or_all(problem, tasks)
    stack = check(problem, theta, given, (1, 2))
    some = stack.take(torch.arange(batch, device="cpu") % len(stack))
    here = theta.detach() if theta.ndim == 1 else theta[0].detach()
    others = usable(problem, theta.detach()[None] if theta.ndim == 1 else theta.detach(), stack)
    parts = measure_parts(problem, here, some, limit, budget / 4, methods=others, chunk=chunk, compile=compile)
    if limit is not None and parts.bytes_forward > limit:
        held = f"a step of FOM holds {parts.bytes_forward} bytes at most"
        raise UfomError(f"memory = {memory!r}: {held}; give more memory, or a smaller batch or chunk")
    search = Search(chosen, batch, limit, parts, not held_identity(problem), compile)
    horizon = _horizon(steps, seconds, pilot, parts)
    if horizon > 1 and theta.ndim == 1 and chosen.rate is None:
        raise UfomError(
            f"outer = '{chosen}' has no rate that a pilot run could follow: give sgd:γ, adam:γ or decay:s:γ₁; or θ at "
            "several points of a run, shape (k, s)"
        )
    clock, exact = _Clock(problem, here, some, chunk, compile), search.exact()[:1]
    path, doubt = None, ""
    try:
        if theta.ndim == 2:
            if horizon < len(theta):
                raise UfomError(f"theta has shape {tuple(theta.shape)}: give steps=, at which the last of them was")
            thetas, at = theta.detach(), tuple(np.linspace(0, horizon, len(theta), dtype=int).tolist())
        else:
            most = horizon if pilot is None else scalar("pilot", pilot, integer, 1)
            one = exact[0] if exact else search.script
            fits = most if pilot is not None else int(budget / 4 / one.seconds)
            method = one.method or Estimator(1.0, Sweep.unrolled())
            thetas, at = pilot_points(problem, here, method, chosen, batch, min(horizon, most, fits), seed)
        if len(thetas) > 1 and others:
            kept = usable(problem, thetas, stack)
            search = replace(search, parts=replace(parts, others={x: y for x, y in parts.others.items() if x in kept}))
        measuring = Measuring(problem, given, chosen, batch, chunk, compile)
        path = measuring.path(thetas, at, horizon, search.proxies, search.shortlist)
    except CannotTell as reason:
        doubt = str(reason)
    found = outcomes(search, path, _timed(search, path, clock, budget / 2))
    best, why = decide(search, path, found, doubt)
    measured = opened_at(search, path, here, given is problem.tasks) if path else None
    return Comparison(table_of(found), best, why, along(path), measured)


def _horizon(steps: int | None, seconds: float | None, pilot: int | None, parts: Parts) -> int:
    if steps is not None and seconds is not None:
        raise UfomError("steps and seconds each give the horizon: give one of them")
    if seconds is not None:
        return max(1, round(float(scalar("seconds, the horizon,", seconds, positive)) / parts.script))
    return scalar("steps, the horizon,", steps if steps is not None else pilot or 1, integer, 1)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class _Clock:
    """Times whole outer steps on one batch."""

    problem: BilevelProblem
    theta: Tensor
    tasks: Tasks
    chunk: int | None
    compile: bool

    def time(self, ways: Sequence[Way], seconds: float) -> Times:
        """Each of them, the script among them, alternately; random ones as the mean over their draws."""
        calls: list[Callable[[], object]] = []
        mixtures = []
        for way in ways:
            mixture = list(self._mixture(way.method))
            mixtures.append((len(calls), [weight for weight, _ in mixture]))
            calls += [call for _, call in mixture]
        rounds = alternated(calls, self.theta.device, seconds)
        found = [rounds[:, at : at + len(weights)] @ np.array(weights) for at, weights in mixtures]
        script = found[[way.method for way in ways].index(None)]
        return {way.method: _summary(x, script) for way, x in zip(ways, found, strict=True)}

    def _mixture(self, method: Method | None) -> Iterator[tuple[float, Callable[[], object]]]:
        n = len(self.tasks)
        if method is None:
            yield 1.0, lambda: script_gradient(self.problem, self.theta, self.tasks)
        elif isinstance(method, Roulette):
            yield from ((1 / _OFFSETS, self._roulette(method, (i + 0.5) / _OFFSETS)) for i in range(_OFFSETS))
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

    def _corrected(self, method: Estimator | Debiased, corrected: int) -> Callable[[], object]:
        n = len(self.tasks)
        coins = torch.arange(n, device="cpu") < corrected if 0 < method.q < 1 else None
        return lambda: hypergradient(
            self.problem, self.theta, self.tasks, method, coins=coins, chunk=self.chunk, compile=self.compile
        )

    def _roulette(self, method: Roulette, offset: float) -> Callable[[], object]:
        """One call with evenly spaced u: each level is reached by its mean number of tasks, over the offsets."""
        n = len(self.tasks)
        u, rows = (torch.arange(n, device="cpu") + offset) / n, self.theta.expand(n, -1)
        reached = (u[:, None] < torch.tensor(method.survival, device="cpu")).sum(1)
        return lambda: method.at(self.problem, rows, self.tasks, reached)


def _summary(rounds: Array, script: Array) -> Time:
    """The median; its error is that of the log-ratio to the script in the same round, by the median deviation."""
    ratios = np.log(rounds / script)
    error = 1.858 * np.median(abs(ratios - np.median(ratios))) / math.sqrt(len(rounds))  # of a normal's median
    return Time(float(np.median(rounds)), float(error), "timed")


def _timed(search: Search, path: Path | None, clock: _Clock, seconds: float) -> list[Row]:
    """All rows, the script first, with the soonest of them timed again."""
    points, soonest = len(path.steps) if path else 1, list[Row]()
    script, exact = Row((search.script,) * points, np.ones((points, DRAWS + 1))), search.exact()
    if path is None:
        unknown = np.full_like(script.ratios, np.nan)
        rows = [Row((search.fom,), unknown), *(Row((way,), script.ratios) for way in exact)]
    else:
        rows = search.rows(path)
        by_time = sorted(rows, key=lambda row: row.time(path.weights, {})[0] * (1 + FUSS * row.ways[-1].fuss))
        for row in by_time:  # of coins that differ little one is enough
            last = row.ways[-1]
            if all(
                (last.name, last.sweep, last.proxy) != (x.name, x.sweep, x.proxy) for y in soonest for x in y.ways[-1:]
            ):
                soonest.append(row)
    chosen = {search.script, search.fom, *exact[:1], *(way for row in soonest[:_TIMED] for way in row.ways)}
    search.times.update(clock.time(sorted(chosen, key=repr), seconds))
    return [script, *rows]
