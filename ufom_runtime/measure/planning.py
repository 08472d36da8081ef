"""What to run within a memory, by the time to a given precision (19): the search of `compare`, at one θ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ufom_runtime.estimators import Method
from ufom_runtime.measure.as_run import AsRun
from ufom_runtime.measure.candidates import Row, Search, soonest, time_of
from ufom_runtime.measure.moments import tasks_or_all
from ufom_runtime.measure.parts import measure_parts
from ufom_runtime.measure.path import Measuring, usable
from ufom_runtime.methods.roulette import Roulette
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check, held_identity
from ufom_theory import UfomError
from ufom_theory.checks import byte_count, bytes_text, integer, scalar, typed
from ufom_theory.laws import Outer, exponent_of

_TRIED = 6  # ways that are called and weighed
_QS = tuple(np.geomspace(1e-3, 1.0, 61)[:-1].tolist())  # where the proxy is nearly exact, any small q is as good


@dataclass(frozen=True, eq=False)
class Planned:
    """One way to run that fits, at its best q.

    Attributes:
        estimator: for `hypergradient` and `train`.
        label: it in words.
        q: the probability of a correction; of a roulette one a level.
        seconds: of one call on the batch, timed, the mean over the coins.
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

    The candidates are those of `compare`: FOM, HELD, Truncated(K) and implicit proxies, plain and scaled by
    c* = E⟨G, F⟩/E‖F‖²; all sweeps; all coins; and a roulette. The time is A(q)^m·C(q), with the moments of all tasks;
    the soonest ways by the costs of their parts are called on a batch, timed and weighed. Each proxy and sweep has one
    row, with its best coin, scale and q.

    Args:
        problem: the problem.
        theta: θ, shape (s,).
        tasks: n stacked tasks, at least `batch`; None: the problem's finite Ω. A batch larger than Ω repeats its tasks.
        memory: bytes that the tensors of a call may hold, a number or a text such as "50MB".
        m: exponent of the time to precision; give exactly one of m and outer.
        outer: how the outer steps are taken, as in `optimal_q`.
        batch: tasks an outer step.
        seconds: so long the parts are timed, and as long each way, or three rounds.
        chunk, compile: as in `hypergradient`.

    Raises:
        UfomError: as `measure_moments`, `hypergradient` and `optimal_q`; nothing fits in the memory.
    """
    most, b = byte_count("memory", memory), scalar("batch", batch, integer, 1)
    law = Outer("decay", power=1 / float(scalar("m", exponent_of(m, outer)[0])))
    given, _ = tasks_or_all(problem, tasks)
    every = check(problem, theta, given)
    few = every.take(torch.arange(b, device="cpu") % len(every))
    others, held = usable(problem, theta[None], every), not held_identity(problem)
    parts = measure_parts(problem, theta, few, most, seconds, methods=others, chunk=chunk, compile=compile)
    search = Search(law, b, most, parts, held, compile, _QS)
    if not search.proxies:
        raise UfomError(f"nothing fits in memory = {bytes_text(most)}: raise it, or take a smaller batch")
    path = Measuring(problem, given, law, b, chunk, compile).at(theta.detach(), search.proxies)
    rows = soonest([row for row in search.rows(path) if row.ways[0].q > 0], path.weights)
    run = AsRun(problem, theta, few, chunk, compile)
    fits = {row.ways[0].method: bytes for row, bytes in _weighed(rows, run, most)}
    if not fits:
        raise UfomError(f"nothing fits in memory = {bytes_text(most)}: raise it, or take a smaller batch")
    kept = [row for row in rows if row.ways[0].method in fits]
    search.times.update(run.time([row.ways[0] for row in kept], seconds * len(kept)))
    times = [float(row.time(path.weights, search.times)[0]) for row in kept]
    spent, kept = sorted(times), [kept[i] for i in np.argsort(times, kind="stable")]
    exact = next((i for i, row in enumerate(kept) if row.ways[0].name == "exact"), 0)
    found: list[Planned] = []
    for row, time in zip(kept, spent, strict=True):
        (way,), why = row.ways, f"{time / spent[0]:.3g}× the winner's time"
        if not found:
            why = f"run {way.written}, which holds {bytes_text(fits[way.method])} of {bytes_text(most)}"
            why += f"; {spent[exact] / time:.3g}× sooner than {kept[exact].ways[0].written}" if exact else ""
        assert way.method is not None
        q = way.method.survival if isinstance(way.method, Roulette) else way.q
        at = time_of(way, search.times).seconds
        found.append(Planned(way.method, way.written, q, at, fits[way.method], time / spent[0], why))
    return found


def _weighed(rows: list[Row], run: AsRun, most: int) -> Iterator[tuple[Row, int]]:
    """The first few that fit as they are called, and the first exact gradient that does."""
    found, exact = 0, False
    for row in rows:
        (way,) = row.ways
        if way.method is not None and (found < _TRIED or (way.name == "exact" and not exact)):
            held = run.weigh(way.method)
            if held <= most:
                found, exact = found + 1, exact or way.name == "exact"
                yield row, held
