"""Algorithms 2–4: inner gradient descent, and one backward loop from which every proxy and the exact gradient fall out.

θ has shape (n, s), φ and b2 (n, p), tasks are n stacked tasks; rows never mix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ufom_runtime.checkpointing import backwards, checkpoints
from ufom_runtime.derivatives import (
    IGNORES_PHI,
    count_rows,
    derivative,
    graph_of_inner_gradient,
    inner_tasks,
    layout_of,
    leaf,
    outer_gradients,
    phi_of,
    pull_back,
    start,
    total_loss,
    updated,
)
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_runtime.steps import Record, Steps
from ufom_theory import Sweep, UfomError

HELD = -1
"""Among lengths: no backward step is kept, and the inner gradients are held constant."""


def first_state(problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> Tensor:
    """x_0, shape (n, P), without a graph."""
    return start(problem, theta.detach(), tasks).detach()


def inner_loop(steps: Steps, x: Tensor, begin: int = 0) -> Tensor:
    """x_r from x_begin."""
    for j in range(begin, steps.problem.r):
        x = steps.inner(x, j)
    return x


@torch.enable_grad()
def first_order_vanishes(problem: BilevelProblem, theta: Tensor, tasks: Tasks, held: bool = False) -> bool:
    """Whether the first-order gradient is identically zero, since θ stands in nothing that it differentiates.

    That is the start and the outer loss; with `held`, also the inner update, its gradient held constant.
    """
    theta = leaf(theta)
    x = start(problem, theta, tasks)
    reached = x.requires_grad
    layout = layout_of(problem, theta, tasks)
    if held and layout is not None and not reached:
        seen = inner_tasks(problem, tasks, 0)
        g = graph_of_inner_gradient(problem, theta.detach(), leaf(x)[:, : layout.p], seen, graph=False)
        reached = updated(problem, layout, theta, x, g, seen, 0).requires_grad
    return not reached and outer_gradients(problem, theta, x, tasks)[0] is None


@dataclass
class _Part:
    """Rows that take the same backward steps, K_first + 1 … K_last, and what the forward loop keeps of them.

    `rows` are their indices, None for all; `held` are pairs (j, what is kept of step j + 1).
    """

    rows: Tensor | None
    first: int
    last: int
    marks: frozenset[int]
    held: list[tuple[int, Record]] = field(default_factory=list)

    def of(self, x: Any) -> Any:
        """The rows of a tensor."""
        return x if self.rows is None or x is None else x[self.rows.to(x.device)]


def _parts(r: int, stops: Tensor, shared: int, sweep: Sweep) -> list[_Part]:
    """All rows for the steps that they share, then the rows that go on, by how far they go."""
    parts = [_Part(None, 0, shared, frozenset(range(r - shared, r)))]
    for stop in sorted(set(stops.tolist())):
        n = stop - shared
        if n > 0:
            rows = torch.nonzero(stops == stop)[:, 0]
            marks = range(n) if sweep.keeps_steps else checkpoints(n, sweep.slots)
            everyone = len(rows) == len(stops)
            parts.append(_Part(None if everyone else rows, shared, stop, frozenset(r - stop + j for j in marks)))
    return parts


@torch.enable_grad()
def sweep_gradients(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Tasks,
    lengths: Sequence[int],
    sweep: Sweep,
    ring: int = 0,
    compile: bool = False,
    stops: Tensor | None = None,
) -> list[Tensor]:
    """G_K for each K in `lengths` (ascending): the gradient that keeps the last K backward steps.

    A length `HELD` before all others asks for the first-order gradient that holds the inner gradients constant.

    K = 0 is FOM (Algorithm 3), K = r the exact gradient; the proxies fall out on the way, from one backward loop. All
    rows go forward together once, and each goes back by as many steps as `stops` says. The last `ring` of them are
    recorded on the way forward; what those before need is kept on that way too, by `sweep`: all of it (stored:
    Algorithm 2), or the first state that is needed and the sweep's slots (Algorithm 4 with none), from which the others
    are found again. So no step on the way to φ_r is taken twice. Only an unrolled sweep, whose graph would hold every
    row, goes forward with the rows of each length apart.

    Args:
        problem: the problem.
        theta: one θ a row, shape (n, s).
        tasks: n stacked tasks.
        lengths: which gradients are wanted.
        sweep: how the states are recovered.
        ring: last steps recorded in the forward loop, whatever the sweep.
        compile: as in `hypergradient`; all stops are then equal.
        stops: how many backward steps each row takes, shape (n,), on the CPU; the longest length if not given.

    Returns:
        For each length K the gradients of the rows that go so far, shape (rows, s), in their order.
    """
    last = max(lengths[-1], 0)
    stops = torch.full((len(theta),), last, device="cpu") if stops is None else stops
    if sweep.kind == "unrolled" and not (compile or lengths[0] == HELD):
        return _unrolled_apart(problem, theta, tasks, lengths, stops)
    r, shortest = problem.r, int(stops.min())
    steps = Steps(problem, theta, tasks, sweep.kind == "unrolled", compile, products=bool(stops.any()))
    parts = _parts(r, stops, shortest if sweep.keeps_steps else min(ring, shortest), sweep)
    x, slopes = _forward(steps, first_state(problem, theta, tasks), parts, sweep, lengths[0] == HELD)
    b1, b2 = steps.outer(x)
    del x  # the backward loop holds one state at a time
    found: dict[int, list[tuple[_Part, Tensor]]] = {k: [] for k in lengths}
    if slopes:
        found[HELD].append((parts[0], _held(steps, slopes, b1, b2)))
    if 0 in found:
        found[0].append((parts[0], steps.pull_back(b1, b2)))
    waiting = [(parts[0], b1, b2)]
    del b1, b2
    while waiting:
        part, b1, b2 = waiting.pop(0)
        some, k = steps.take(part.rows), part.first
        for record in backwards(cast(Callable[[Record, int], Record], some.inner), part.held, sweep.slots):
            b1, b2 = some.back(record, r - 1 - k, b1, b2)
            if (k := k + 1) in found:
                found[k].append((part, some.pull_back(b1, b2)))
        if part is parts[0]:
            waiting += [(other, other.of(b1), other.of(b2)) for other in parts[1:]]
    return [_joined(found[k], theta) for k in lengths]


def _forward(
    steps: Steps, x: Tensor, parts: Sequence[_Part], sweep: Sweep, held: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """x_r from x_0, filling what the parts hold; and with `held` every x_j and ∂L_in/∂φ there."""
    slopes = []
    for j in range(steps.problem.r):
        keeping = [part for part in parts if j in part.marks]
        record: Record = x
        if held:
            following, g = steps.held(x, j)
            slopes.append((x, g))
        elif keeping and (sweep.keeps_steps or keeping[0] is parts[0]):
            following, record = steps.record(x, j)
        else:
            following = steps.inner(x, j)
        for part in keeping:
            part.held.append((j, part.of(record)))
        x = following
    return x, slopes


def _held(steps: Steps, slopes: list[tuple[Tensor, Tensor]], b1: Tensor | None, b2: Tensor) -> Tensor:
    """The first-order gradient that holds every ∂L_in/∂φ constant."""
    for j in reversed(range(steps.problem.r)):
        b1, b2 = steps.held_back(*slopes.pop(), j, b1, b2)
    return steps.pull_back(b1, b2)


def _joined(found: list[tuple[_Part, Tensor]], theta: Tensor) -> Tensor:
    """The gradients of all parts, in the order of their rows."""
    if len(found) <= 1:
        return found[0][1] if found else theta.new_empty(0, theta.shape[1])
    rows = torch.cat([part.rows for part, _ in found if part.rows is not None])
    return torch.cat([g for _, g in found])[rows.argsort().to(theta.device)]


def _unrolled_apart(
    problem: BilevelProblem, theta: Tensor, tasks: Tasks, lengths: Sequence[int], stops: Tensor
) -> list[Tensor]:
    """`_unrolled` for the rows of each stop."""
    found: dict[int, list[tuple[_Part, Tensor]]] = {k: [] for k in lengths}
    for stop in sorted(set(stops.tolist())):
        rows = torch.nonzero(stops == stop)[:, 0]
        part = _Part(rows if len(rows) < len(stops) else None, 0, stop, frozenset())
        some, wanted = Steps(problem, theta, tasks).take(part.rows), [k for k in lengths if k <= stop]
        for k, g in zip(wanted, _unrolled(problem, some.theta, some.tasks, wanted), strict=True):
            found[k].append((part, g))
    return [_joined(found[k], theta) for k in lengths]


def _unrolled(problem: BilevelProblem, theta: Tensor, tasks: Tasks, lengths: Sequence[int]) -> list[Tensor]:
    """The same gradients from the graph of the last steps, each inner gradient evaluated once.

    A new leaf for θ begins where the proxy of each length begins, so that one backward pass tells the stretches apart.
    """
    r, rows, steps = problem.r, len(theta), Steps(problem, theta, tasks)
    x = first_state(problem, theta, tasks)
    for j in range(r - lengths[-1]):
        x = steps.inner(x, j)
    x, leaves, states = leaf(x), [], []
    for j in range(r - lengths[-1], r + 1):
        if r - j in lengths:
            leaves.append(leaf(theta))
            states.append(x)
        if j < r:
            count_rows("gradients", rows)
            x = steps.following(leaves[-1], x, j)[0]
    count_rows("gradients", rows)
    count_rows("hessian_vector_products", rows * lengths[-1])  # one backward pass through a step is one product
    total = total_loss(problem, "outer_loss", leaves[-1], phi_of(problem, theta, x, tasks), tasks)
    adjoints = derivative("the unrolled loop", total, (*leaves, *states))
    del x, total
    b1, gradients = None, []
    for by_theta, b2 in reversed(list(zip(adjoints[: len(leaves)], adjoints[len(leaves) :], strict=True))):
        if b2 is None:
            raise UfomError(IGNORES_PHI.format("outer_loss"))
        b1 = by_theta if b1 is None else b1 if by_theta is None else b1 + by_theta
        gradients.append(pull_back(problem, theta, tasks, b1, b2))
    return gradients
