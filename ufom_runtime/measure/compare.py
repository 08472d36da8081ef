"""The decision: FOM, UFOM or exact, for this problem, these outer steps, this memory and this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.estimators import EXACT, Estimator, Method
from ufom_runtime.measure.as_run import AsRun
from ufom_runtime.measure.candidates import Row, Search, soonest
from ufom_runtime.measure.chances import Path
from ufom_runtime.measure.moments import tasks_or_all
from ufom_runtime.measure.parts import Parts, measure_parts
from ufom_runtime.measure.path import CannotTell, Measuring, pilot_points, usable
from ufom_runtime.measure.verdict import along, decide, opened_at, outcomes, table_of
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
        budget: seconds for the timing, the pilot run and the curvatures, which are measured on fewer tasks (eight at
            least) where all would take longer; their error is in the intervals. Each row that is timed is called once
            at least, and the moments take an exact gradient of each task at each θ.
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
    clock, exact = AsRun(problem, here, some, chunk, compile), search.exact()[:1]
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
        gradients = budget / 4 / (parts.alone(batch, EXACT.sweep) / batch)  # those that a quarter of it pays for
        measuring = Measuring(problem, given, chosen, batch, chunk, compile, gradients)
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


def _timed(search: Search, path: Path | None, clock: AsRun, seconds: float) -> list[Row]:
    """All rows, with the soonest of them timed again."""
    rows = search.rows(path)
    first = soonest(rows[1:], path.weights)[:_TIMED] if path else []  # the script is timed in any case
    ways = {search.script, search.fom, *search.exact()[:1], *(way for row in first for way in row.ways)}
    search.times.update(clock.time(sorted(ways, key=repr), seconds))
    return rows
