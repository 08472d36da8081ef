"""The decision: FOM, UFOM or exact, for this problem, these outer steps, this memory and this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.estimators import FOM, Estimator, Method, hypergradient
from ufom_runtime.measure.candidates import Row, Search, Time
from ufom_runtime.measure.chances import DRAWS, Path
from ufom_runtime.measure.moments import tasks_or_all
from ufom_runtime.measure.parts import Parts, alternated, binomial, measure_parts, script_gradient
from ufom_runtime.measure.path import CannotTell, measure_path, pilot_points
from ufom_runtime.measure.verdict import decide, outcomes, table_of
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check, held_identity
from ufom_theory import Sweep, UfomError
from ufom_theory.checks import byte_count, integer, positive, scalar, typed
from ufom_theory.laws import parse_outer

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
_TIMED = 3  # rows that are timed again, besides FOM, the quickest exact gradient and the script


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What `compare` found; it prints as its sentence.

    Attributes:
        table: one row a way to compute the gradient, the soonest first. method, q, sweep; proxy ("" for FOM, "held", or
            K), coin; ms of an outer step and clock, "timed" or "predicted"; bytes at most; steps_over_exact, outer
            steps over those of the exact gradient for the same progress; time_over_plain, the time for it over the
            plain script's, with its 95 % interval low, high. ∞ where the method makes no progress, nan where that
            cannot be told.
        best: what to run, for `train`; the quickest exact gradient where the answer is "keep your script" or "cannot
            tell".
        why: what to run, in a sentence.
    """

    table: pd.DataFrame
    best: Method
    why: str

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
    parts = measure_parts(problem, here, some, limit, budget / 4, chunk=chunk, compile=compile)
    if limit is not None and parts.bytes_forward > limit:
        held = f"a step of FOM holds {parts.bytes_forward} bytes at most"
        raise UfomError(f"memory = {memory!r}: {held}; give more memory, or a smaller batch or chunk")
    search = Search(chosen, batch, limit, parts, not held_identity(problem))
    search.times[None] = Time(parts.script)
    horizon = _horizon(steps, seconds, pilot, parts)
    if horizon > 1 and theta.ndim == 1 and chosen.rate is None:
        raise UfomError(
            f"outer = '{chosen}' has no rate that a pilot run could follow: give sgd:γ, adam:γ or decay:s:γ₁; or θ at "
            "several points of a run, shape (k, s)"
        )
    clock = _Clock(problem, here, some, chunk, compile)
    exact = (search.exact() or [Estimator(1.0, Sweep.unrolled())])[0]
    path, doubt, vanishes = None, "", False
    try:
        if theta.ndim == 2:
            if horizon < len(theta):
                raise UfomError(f"theta has shape {tuple(theta.shape)}: give steps=, at which the last of them was")
            thetas, at = theta.detach(), tuple(np.linspace(0, horizon, len(theta), dtype=int).tolist())
        else:
            most = horizon if pilot is None else scalar("pilot", pilot, integer, 1)
            fits = most if pilot is not None else int(budget / 4 / search.predict(exact).seconds)
            thetas, at = pilot_points(problem, here, exact, chosen, batch, min(horizon, most, fits), seed)
        path, vanishes = measure_path(
            problem, thetas, at, horizon, given, chosen, batch, search.proxies, search.shortlist, chunk, compile
        )
    except CannotTell as reason:
        doubt = str(reason)
    found = outcomes(search, path, _timed(search, path, clock, budget / 2))
    best, why = decide(search, path, found, doubt)
    said = f"{why}. {_FOM_VANISHES}" if vanishes else f"{why}."
    return Comparison(table_of(search, found), best, said)


_FOM_VANISHES = "FOM is identically zero here: neither the start nor the outer loss contains θ."


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

    def time(self, kinds: Sequence[Estimator | None], seconds: float) -> dict[Estimator | None, Time]:
        """Each of them, the script among them, alternately; coins as their mean number of corrected tasks has them."""
        calls: list[Callable[[], object]] = []
        mixtures = []
        for kind in kinds:
            mixture = [(1.0, self._script)] if kind is None else self._mixture(kind)
            mixtures.append((len(calls), [weight for weight, _ in mixture]))
            calls += [call for _, call in mixture]
        rounds = alternated(calls, self.theta.device, seconds)
        found = [rounds[:, at : at + len(weights)] @ np.array(weights) for at, weights in mixtures]
        script = found[kinds.index(None)]
        return {kind: _summary(x, script) for kind, x in zip(kinds, found, strict=True)}

    def _script(self) -> object:
        return script_gradient(self.problem, self.theta, self.tasks)

    def _mixture(self, e: Estimator) -> list[tuple[float, Callable[[], object]]]:
        batch = len(self.tasks)
        if e.q in (0.0, 1.0):
            return [(1.0, self._call(e, None))]
        none = 1 - e.q if e.coin == "batch" else float(binomial(batch, e.q)[0])
        mean = batch if e.coin == "batch" else batch * e.q / (1 - none)  # corrected tasks where there are some
        low = math.floor(min(mean, batch))
        share = min(mean, batch) - low
        weights = {0: none, low: (1 - none) * (1 - share), low + 1: (1 - none) * share}
        return [(weight, self._call(e, corrected)) for corrected, weight in weights.items() if weight]

    def _call(self, e: Estimator, corrected: int | None) -> Callable[[], object]:
        coins = None if corrected is None else torch.arange(len(self.tasks), device="cpu") < corrected
        return lambda: hypergradient(
            self.problem, self.theta, self.tasks, e, coins=coins, chunk=self.chunk, compile=self.compile
        )


def _summary(rounds: Array, script: Array) -> Time:
    """The median; its error is that of the log-ratio to the script in the same round, by the median deviation."""
    ratios = np.log(rounds / script)
    error = 1.858 * np.median(abs(ratios - np.median(ratios))) / math.sqrt(len(rounds))  # of a normal's median
    return Time(float(np.median(rounds)), float(error), "timed")


def _timed(search: Search, path: Path | None, clock: _Clock, seconds: float) -> list[Row]:
    """All rows, the script first, with the soonest of them timed again."""
    points = len(path.steps) if path else 1
    script = Row((None,) * points, np.ones((points, DRAWS + 1)))
    exact = search.exact()[:1]
    if path is None:
        unknown = np.full_like(script.ratios, np.nan)
        search.predict(FOM)
        rows = [Row((FOM,), unknown), *(Row((e,), script.ratios) for e in search.exact())]
        chosen = {None, FOM, *exact}
    else:
        rows = search.rows(path)
        soonest = sorted(rows, key=lambda row: row.time(path.weights, search.times)[0])[:_TIMED]
        chosen = {None, FOM, *exact, *(kind for row in soonest for kind in row.kinds)}
    search.times.update(clock.time(sorted(chosen, key=repr), seconds))
    return [script, *rows]
