"""Algorithms 2–4: inner gradient descent, and one backward loop from which every proxy and the exact gradient fall out.

θ has shape (n, s), φ and b2 (n, p), tasks are n stacked tasks; rows never mix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from ufom_runtime.checkpointing import backwards
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


def inner_loop(steps: Steps, x: Tensor, begin: int = 0, keep: int = 0) -> tuple[Tensor, list[Record]]:
    """x_r from x_begin, and the records of the last `keep` steps."""
    records, r = [], steps.problem.r
    for j in range(begin, r - keep):
        x = steps.inner(x, j)
    for j in range(max(begin, r - keep), r):
        x, record = steps.record(x, j)
        records.append(record)
    return x, records


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


@torch.enable_grad()
def sweep_gradients(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Tasks,
    lengths: Sequence[int],
    sweep: Sweep,
    ring: int = 0,
    compile: bool = False,
) -> list[Tensor]:
    """G_K for each K in `lengths` (ascending): the gradient that keeps the last K backward steps.

    A length `HELD` before all others asks for the first-order gradient that holds the inner gradients constant.

    K = 0 is FOM (Algorithm 3), K = r the exact gradient; the proxies fall out on the way, from one backward loop. The
    last `ring` steps are recorded in the forward loop; those before come by `sweep`: recorded too (stored: Algorithm 2,
    and unrolled), or from φ_0 again with the sweep's slots (Algorithm 4 with none), in one pass already on the way to
    φ_r.

    Returns:
        One tensor of shape (n, s) for each length.
    """
    held, last = lengths[0] == HELD, max(lengths[-1], 0)
    unrolled = sweep.kind == "unrolled"
    if unrolled and not (compile or held):
        return _unrolled(problem, theta, tasks, lengths)
    steps = Steps(problem, theta, tasks, unrolled, compile, products=last > 0)
    keep = last if sweep.keeps_steps else min(ring, last)
    x, begin = first_state(problem, theta, tasks), 0
    earlier: Iterator[Tensor] = iter(())
    if again := last - keep:
        earlier = backwards(steps.inner, x, again, sweep.slots)
        if sweep.one_pass and not held:
            x, begin = next(earlier), again - 1
            earlier = chain((x,), earlier)
    gradients: list[Tensor] = []
    recorded: list[Record]
    if held:
        first, (b1, b2), states = _held(steps, x, tasks)
        gradients.append(first)
        recorded = list(states[problem.r - keep :])
        del states
    else:
        x, recorded = inner_loop(steps, x, begin, keep)
        b1, b2 = steps.outer(x)
    del x  # the backward loop holds one state at a time
    records: Iterator[Record] = chain((recorded.pop() for _ in range(keep)), earlier)
    for k in range(last + 1):
        if k in lengths:
            gradients.append(pull_back(problem, theta, tasks, b1, b2))
        if k < last:
            j = problem.r - 1 - k
            b1, b2 = steps.back(next(records), j, b1, b2)
    return gradients


def _held(steps: Steps, x: Tensor, tasks: Tasks) -> tuple[Tensor, tuple[Tensor | None, Tensor], list[Tensor]]:
    """The first-order gradient that holds every ∂L_in/∂φ constant; ∂L_out/∂θ and ∂L_out/∂x; and x_0 … x_{r−1}."""
    states, slopes = [], []
    for j in range(steps.problem.r):
        states.append(x)
        x, g = steps.held(x, j)
        slopes.append(g)
    outer = b1, b2 = steps.outer(x)
    for j in reversed(range(steps.problem.r)):
        b1, b2 = steps.held_back(states[j], slopes.pop(), j, b1, b2)
    return pull_back(steps.problem, steps.theta, tasks, b1, b2), outer, states


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
