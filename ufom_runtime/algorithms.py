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
    leaf,
    outer_gradients,
    pull_back,
    start,
    total_loss,
)
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_runtime.steps import Record, Steps
from ufom_theory import Sweep, UfomError


def first_state(problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> Tensor:
    """φ_0, shape (n, p), without a graph."""
    return start(problem, theta.detach(), tasks).detach()


def inner_gd(steps: Steps, phi: Tensor, begin: int = 0, keep: int = 0) -> tuple[Tensor, list[Record]]:
    """φ_r from φ_begin, and the records of the last `keep` steps."""
    records, r = [], steps.problem.r
    for j in range(begin, r - keep):
        phi = steps.inner(phi, j)
    for j in range(max(begin, r - keep), r):
        phi, record = steps.record(phi, j)
        records.append(record)
    return phi, records


@torch.enable_grad()
def first_order_vanishes(problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> bool:
    """Whether G_FO is identically zero, since neither the start nor the outer loss contains θ."""
    phi = start(problem, leaf(theta), tasks)
    return not phi.requires_grad and outer_gradients(problem, theta, phi, tasks)[0] is None


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

    K = 0 is FOM (Algorithm 3), K = r the exact gradient; the proxies fall out on the way, from one backward loop. The
    last `ring` steps are recorded in the forward loop; those before come by `sweep`: recorded too (stored: Algorithm 2,
    and unrolled), or from φ_0 again with the sweep's slots (Algorithm 4 with none), in one pass already on the way to
    φ_r.

    Returns:
        One tensor of shape (n, s) for each length.
    """
    last = lengths[-1]
    unrolled = sweep.kind == "unrolled"
    if unrolled and not compile:
        return _unrolled(problem, theta, tasks, lengths)
    steps = Steps(problem, theta, tasks, unrolled, compile, products=last > 0)
    keep = last if sweep.keeps_steps else min(ring, last)
    phi, begin = first_state(problem, theta, tasks), 0
    earlier: Iterator[Tensor] = iter(())
    if again := last - keep:
        earlier = backwards(steps.inner, phi, again, sweep.slots)
        if sweep.one_pass:
            phi, begin = next(earlier), again - 1
            earlier = chain((phi,), earlier)
    phi, recorded = inner_gd(steps, phi, begin, keep)
    b1, b2 = steps.outer(phi)
    del phi  # the backward loop holds one state at a time
    records: Iterator[Record] = chain((recorded.pop() for _ in range(keep)), earlier)
    gradients = []
    for k in range(last + 1):
        if k in lengths:
            gradients.append(pull_back(problem, theta, tasks, b1, b2))
        if k < last:
            j = problem.r - 1 - k
            h1, b2 = steps.back(next(records), j, b2)
            b1 = minus(b1, problem.alphas[j], h1)
    return gradients


def minus(b1: Tensor | None, alpha: float, h1: Tensor | None) -> Tensor | None:
    """b1 − α·h1, where None stands for an identical zero."""
    if h1 is None:
        return b1
    return -alpha * h1 if b1 is None else b1.sub(h1, alpha=alpha)


def _unrolled(problem: BilevelProblem, theta: Tensor, tasks: Tasks, lengths: Sequence[int]) -> list[Tensor]:
    """The same gradients from the graph of the last steps, each inner gradient evaluated once.

    A new leaf for θ begins where the proxy of each length begins, so that one backward pass tells the stretches apart.
    """
    r, rows, steps = problem.r, len(theta), Steps(problem, theta, tasks)
    phi = first_state(problem, theta, tasks)
    for j in range(r - lengths[-1]):
        phi = steps.inner(phi, j)
    phi, leaves, states = leaf(phi), [], []
    for j in range(r - lengths[-1], r + 1):
        if r - j in lengths:
            leaves.append(leaf(theta))
            states.append(phi)
        if j < r:
            count_rows("gradients", rows)
            phi = phi.sub(graph_of_inner_gradient(problem, leaves[-1], phi, tasks), alpha=problem.alphas[j])
    count_rows("gradients", rows)
    count_rows("hessian_vector_products", rows * lengths[-1])  # one backward pass through a step is one product
    total = total_loss(problem, "outer_loss", leaves[-1], phi, tasks)
    adjoints = derivative("the unrolled loop", total, (*leaves, *states))
    del phi, total
    b1, gradients = None, []
    for by_theta, b2 in reversed(list(zip(adjoints[: len(leaves)], adjoints[len(leaves) :], strict=True))):
        if b2 is None:
            raise UfomError(IGNORES_PHI.format("outer_loss"))
        b1 = by_theta if b1 is None else b1 if by_theta is None else b1 + by_theta
        gradients.append(pull_back(problem, theta, tasks, b1, b2))
    return gradients
