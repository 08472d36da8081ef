"""Algorithms 2–4 as functions of a problem, one θ a row and one task a row.

θ has shape (n, s), φ and b2 (n, p), tasks are n stacked tasks. Rows never mix, so the gradient of the sum of the n
losses is the n gradients: the losses alone are vmapped, and autograd works around them (reverse over reverse).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from ufom_runtime.checkpointing import backwards
from ufom_runtime.problem import BilevelProblem, Loss, Task, count, parts, single
from ufom_theory import Sweep, UfomError


@dataclass
class Calls:
    """Calls counted the paper's way: gradients (inner and outer) and Hessian-vector products (both blocks at once)."""

    gradients: int = 0
    hessian_vector_products: int = 0


_tally: ContextVar[Calls | None] = ContextVar("tally", default=None)


@contextmanager
def count_calls() -> Iterator[Calls]:
    """Count the gradients and Hessian-vector products made inside the block; a batch of n tasks counts n."""
    token = _tally.set(calls := Calls())
    try:
        yield calls
    finally:
        _tally.reset(token)


def _count(rows: int, kind: str) -> None:
    if (calls := _tally.get()) is not None:
        setattr(calls, kind, getattr(calls, kind) + rows)


def _rows(name: str, function: Callable[..., Tensor], *stacks: Task) -> Tensor:
    """`function` of each row; a single row goes without vmap, which is quicker and asks less of the function."""
    try:
        if count(stacks[0]) == 1:
            return function(*(single(x) for x in stacks))[None]
        return torch.func.vmap(function)(*stacks)
    except (UfomError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # it is the user's function: whatever it raises, say where
        shapes = ", ".join(str(tuple(t[0].shape)) for x in stacks for t in parts(x))
        remedy = "" if count(stacks[0]) == 1 else "; if it works on one task, run one at a time (chunk=1), without vmap"
        said = f"{type(error).__name__}: {error}"
        raise UfomError(f"{name} failed on arguments of shapes {shapes}: {said}{remedy}") from error


def leaf(tensor: Tensor) -> Tensor:
    """The same numbers as a leaf of a new graph; nothing is copied."""
    return tensor.detach().requires_grad_()


def total_loss(name: str, loss: Loss, theta: Tensor, phi: Tensor, tasks: Task) -> Tensor:
    """Sum of the rows' losses, refused where a loss is no scalar or does not depend on φ."""
    losses = _rows(name, loss, theta, phi, tasks)
    if losses.ndim != 1:
        raise UfomError(f"{name} returned shape {tuple(losses.shape[1:])}: it must return a scalar")
    if not losses.is_floating_point():
        raise UfomError(f"{name} returned {losses.dtype}: it must return a real floating-point number")
    if not losses.requires_grad:
        raise UfomError(_IGNORES_PHI.format(name))
    return losses.sum()


def _derivative(name: str, of: Tensor, inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor | None, ...]:
    """`grad`, None where there is no dependence; an operation without a derivative is named."""
    try:
        return grad(of, inputs, allow_unused=True, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UfomError(f"{name} cannot be differentiated (twice): {error}; use operations that can") from error


_IGNORES_PHI = "{} does not depend on φ: compute it from its second argument, without detach or no_grad"


def _inner_gradient(problem: BilevelProblem, theta: Tensor, phi: Tensor, tasks: Task, graph: bool) -> Tensor:
    total = total_loss("inner_loss", problem.inner_loss, theta, phi, tasks)
    g = _derivative("inner_loss", total, (phi,), create_graph=graph)[0]
    if g is None:
        raise UfomError(_IGNORES_PHI.format("inner_loss"))
    return g


def inner_gradient(problem: BilevelProblem, theta: Tensor, phi: Tensor, tasks: Task) -> Tensor:
    """∂L_in/∂φ, shape (n, p)."""
    _count(len(phi), "gradients")
    return _inner_gradient(problem, theta.detach(), leaf(phi), tasks, graph=False)


def outer_gradients(problem: BilevelProblem, theta: Tensor, phi: Tensor, tasks: Task) -> tuple[Tensor | None, Tensor]:
    """∂L_out/∂θ, shape (n, s), None where L_out is free of θ; and ∂L_out/∂φ, shape (n, p)."""
    _count(len(phi), "gradients")
    theta, phi = leaf(theta), leaf(phi)
    total = total_loss("outer_loss", problem.outer_loss, theta, phi, tasks)
    b1, b2 = _derivative("outer_loss", total, (theta, phi))
    if b2 is None:
        raise UfomError(_IGNORES_PHI.format("outer_loss"))
    return b1, b2


def hessian_vector_products(
    problem: BilevelProblem, theta: Tensor, phi: Tensor, tasks: Task, b2: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(∂²L_in/∂θ∂φ)ᵀb2, shape (n, s), and (∂²L_in/∂φ²)ᵀb2, shape (n, p); None where the block is identically zero."""
    _count(len(phi), "hessian_vector_products")
    theta, phi = leaf(theta), leaf(phi)
    g = _inner_gradient(problem, theta, phi, tasks, graph=True)
    if not g.requires_grad:
        _refuse_hidden_curvature(problem, theta, phi, tasks, g)
        return None, None
    h1, h2 = _derivative("inner_loss", g, (theta, phi), grad_outputs=b2)
    return h1, h2


def _refuse_hidden_curvature(problem: BilevelProblem, theta: Tensor, phi: Tensor, tasks: Task, g: Tensor) -> None:
    """A gradient without a graph is that of a loss linear in φ, or of an operation that hides its second derivative.

    Taking the second for the first would silently give the first-order gradient, so a small step tells them apart.
    """
    step = 1e-4 * (1 + phi.detach().abs())
    if not torch.equal(g, _inner_gradient(problem, theta.detach(), leaf(phi + step), tasks, graph=False)):
        raise UfomError(
            "inner_loss cannot be differentiated twice: its gradient depends on φ but autograd does not see how (a "
            "once_differentiable function?); use operations that can"
        )


def start(problem: BilevelProblem, theta: Tensor, tasks: Task) -> Tensor:
    """φ_0 = V(θ, T), shape (n, p), with its graph if θ asks for one."""
    phi = _rows("start", problem.start, theta, tasks)
    if not phi.is_floating_point():
        raise UfomError(f"start returned {phi.dtype}: φ_0 must be a vector of floating-point numbers")
    if phi.ndim != 2:
        raise UfomError(f"start returned shape {tuple(phi.shape[1:])}: it must return φ_0 as a vector, shape (p,)")
    if phi.device != theta.device:
        raise UfomError(f"theta is on {theta.device} but start returned φ_0 on {phi.device}: move both to one device")
    return phi


def inner_step(problem: BilevelProblem, theta: Tensor, phi: Tensor, tasks: Task, j: int) -> Tensor:
    """φ_{j+1} from φ_j, (3); j counts from 0."""
    return phi - problem.alphas[j] * inner_gradient(problem, theta, phi, tasks)


def inner_gd(problem: BilevelProblem, theta: Tensor, tasks: Task, keep: int = 0) -> tuple[Tensor, list[Tensor]]:
    """φ_r and the last `keep` states before it, [φ_{r−keep}, …, φ_{r−1}]."""
    phi, kept = start(problem, theta.detach(), tasks).detach(), []
    for j in range(problem.r):
        if j >= problem.r - keep:
            kept.append(phi)
        phi = inner_step(problem, theta, phi, tasks, j)
    return phi, kept


@torch.enable_grad()
def first_order_vanishes(problem: BilevelProblem, theta: Tensor, tasks: Task) -> bool:
    """Whether G_FO is identically zero, since neither the start nor the outer loss contains θ."""
    with count_calls():  # a question of structure, not a call of any estimator
        phi = start(problem, leaf(theta), tasks)
        return not phi.requires_grad and outer_gradients(problem, theta, phi, tasks)[0] is None


def pull_back(problem: BilevelProblem, theta: Tensor, tasks: Task, b1: Tensor | None, b2: Tensor) -> Tensor:
    """b1 + (∂V/∂θ)ᵀb2, shape (n, s)."""
    theta = leaf(theta)
    phi = start(problem, theta, tasks)
    through_start = _derivative("start", phi, (theta,), grad_outputs=b2)[0] if phi.requires_grad else None
    terms = [t for t in (b1, through_start) if t is not None]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(theta)


@torch.enable_grad()
def sweep_gradients(
    problem: BilevelProblem, theta: Tensor, tasks: Task, lengths: Sequence[int], sweep: Sweep, ring: int = 0
) -> list[Tensor]:
    """G_K for each K in `lengths` (ascending): the gradient that keeps the last K backward steps.

    K = 0 is FOM (Algorithm 3), K = r the exact gradient; the proxies fall out on the way, from one backward loop. The
    last `ring` states are kept from the forward loop; those before come by `sweep`: stored (Algorithm 2), or from φ_0
    again with the sweep's slots (Algorithm 4 with none).

    Returns:
        One tensor of shape (n, s) for each length.
    """
    last = lengths[-1]
    if sweep.kind == "unrolled":
        return _unrolled(problem, theta, tasks, lengths)
    keep = last if sweep.kind == "stored" else min(ring, last)
    phi, kept = inner_gd(problem, theta, tasks, keep)
    b1, b2 = outer_gradients(problem, theta, phi, tasks)
    del phi  # the backward loop holds one state at a time
    earlier = chain((kept.pop() for _ in range(keep)), _again(problem, theta, tasks, last - keep, sweep.slots))
    gradients = []
    for k in range(last + 1):
        if k in lengths:
            gradients.append(pull_back(problem, theta, tasks, b1, b2))
        if k < last:
            alpha = problem.alphas[problem.r - 1 - k]
            h1, h2 = hessian_vector_products(problem, theta, next(earlier), tasks, b2)
            b1 = _minus(b1, alpha, h1)
            b2 = b2 if h2 is None else b2 - alpha * h2
    return gradients


def _again(problem: BilevelProblem, theta: Tensor, tasks: Task, states: int, slots: int) -> Iterator[Tensor]:
    """φ_{states−1} … φ_0, recomputed from φ_0 with `slots` checkpoints."""
    if states:
        first = start(problem, theta.detach(), tasks).detach()
        yield from backwards(lambda phi, j: inner_step(problem, theta, phi, tasks, j), first, states, slots)


def _minus(b1: Tensor | None, alpha: float, h1: Tensor | None) -> Tensor | None:
    if h1 is None:
        return b1
    return -alpha * h1 if b1 is None else b1 - alpha * h1


def _unrolled(problem: BilevelProblem, theta: Tensor, tasks: Task, lengths: Sequence[int]) -> list[Tensor]:
    """The same gradients from the graph of the last steps, each inner gradient evaluated once.

    A new leaf for θ begins where the proxy of each length begins, so that one backward pass tells the stretches apart.
    """
    r, rows = problem.r, len(theta)
    phi = start(problem, theta.detach(), tasks).detach()
    for j in range(r - lengths[-1]):
        phi = inner_step(problem, theta, phi, tasks, j)
    phi, leaves, states = leaf(phi), [], []
    for j in range(r - lengths[-1], r + 1):
        if r - j in lengths:
            leaves.append(leaf(theta))
            states.append(phi)
        if j < r:
            _count(rows, "gradients")
            phi = phi - problem.alphas[j] * _inner_gradient(problem, leaves[-1], phi, tasks, graph=True)
    _count(rows, "gradients")
    _count(rows * lengths[-1], "hessian_vector_products")  # one backward pass through a step is one product
    total = total_loss("outer_loss", problem.outer_loss, leaves[-1], phi, tasks)
    adjoints = _derivative("the unrolled loop", total, (*leaves, *states))
    del phi, total
    b1, gradients = None, []
    for by_theta, b2 in reversed(list(zip(adjoints[: len(leaves)], adjoints[len(leaves) :], strict=True))):
        if b2 is None:
            raise UfomError(_IGNORES_PHI.format("outer_loss"))
        b1 = by_theta if b1 is None else b1 if by_theta is None else b1 + by_theta
        gradients.append(pull_back(problem, theta, tasks, b1, b2))
    return gradients
