"""The derivatives that Algorithms 2–4 are made of, as functions of a problem, one θ a row and one task a row.

θ has shape (n, s), φ (n, p), tasks are n stacked tasks. States x of the inner loop (`ufom_runtime.states`), and b2, the
derivative by them, have shape (n, P); without an inner update x is φ. Rows never mix, so the gradient of the sum of the
n losses is the n gradients: the losses alone are vmapped, and autograd works around them (reverse over reverse).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from ufom_runtime.problem import BilevelProblem, Task, Tasks, kept
from ufom_runtime.states import Layout
from ufom_theory import UfomError
from ufom_theory.cost import Calls as Calls

_tally: ContextVar[Calls | None] = ContextVar("tally", default=None)


@contextmanager
def count_calls() -> Iterator[Calls]:
    """Count the gradients and Hessian-vector products made inside the block; a batch of n tasks counts n."""
    token = _tally.set(calls := Calls())
    try:
        yield calls
    finally:
        _tally.reset(token)


def count_rows(kind: str, rows: int) -> None:
    """Add `rows` calls of one kind to the tally, if there is one."""
    if (calls := _tally.get()) is not None:
        setattr(calls, kind, getattr(calls, kind) + rows)


@dataclass
class Losses:
    """The sum of the losses met, not finite if one of them is not; None where none was."""

    total: Tensor | None = None


_watch: ContextVar[Losses | None] = ContextVar("watch", default=None)


@contextmanager
def watch_losses(watch: Losses | None) -> Iterator[None]:
    """Add the losses that are differentiated inside the block to `watch`; None: to nothing."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


LOOPS = "rows run in a loop"  # kept of a problem whose rows vmap gets wrong; `first_use` finds out


def by_row(problem: BilevelProblem, name: str, function: Callable[..., Any], *vectors: Tensor, tasks: Tasks) -> Any:
    """`function`(vectors, task) of each row; a single row goes without vmap, which is quicker and asks less of it."""
    n, k = len(tasks), len(vectors)
    try:
        if n == 1:  # unsqueezed by the caller, if need be
            return function(*(x.squeeze(0) for x in vectors), tasks.one())
        stacks = (*vectors, *tasks.parts)
        if kept(problem, LOOPS):
            rows = zip(*(x.unbind() for x in stacks), strict=True)
            return torch.stack([function(*row[:k], tasks.form(row[k:])) for row in rows])
        return torch.func.vmap(lambda *row: function(*row[:k], tasks.form(row[k:])))(*stacks)
    except (UfomError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # it is the user's function: whatever it raises, say where
        shapes = ", ".join(str(tuple(t.shape[1:])) for t in (*vectors, *tasks.parts))
        raise UfomError(f"{name} failed on arguments of shapes {shapes}: {type(error).__name__}: {error}") from error


def leaf(tensor: Tensor) -> Tensor:
    """The same numbers as a leaf of a new graph; nothing is copied."""
    return tensor.detach().requires_grad_()


def row_losses(problem: BilevelProblem, name: str, theta: Tensor, phi: Tensor, tasks: Tasks) -> Tensor:
    """The rows' losses, shape (n,), or () for one row; refused where a loss is not a real scalar.

    `name` is "inner_loss" or "outer_loss".
    """
    losses: Tensor = by_row(problem, name, getattr(problem, name), theta, phi, tasks=tasks)
    if not isinstance(losses, Tensor):
        raise UfomError(f"{name} returned a {type(losses).__name__}: return a tensor, without float() or .item()")
    batched = len(phi) > 1
    if losses.ndim != batched:
        raise UfomError(f"{name} returned shape {tuple(losses.shape[batched:])}: it must return a scalar")
    if not losses.is_floating_point():
        raise UfomError(f"{name} returned {losses.dtype}: it must return a real floating-point number")
    return losses


def total_loss(problem: BilevelProblem, name: str, theta: Tensor, phi: Tensor, tasks: Tasks) -> Tensor:
    """Sum of the rows' losses, as `row_losses`; refused where a loss does not depend on φ."""
    losses = row_losses(problem, name, theta, phi, tasks)
    if not losses.requires_grad:
        raise UfomError(IGNORES_PHI.format(name))
    total = losses.sum() if len(phi) > 1 else losses
    if (watch := _watch.get()) is not None:
        watch.total = total.detach() if watch.total is None else watch.total + total.detach()
    return total


def derivative(name: str, of: Tensor, inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor | None, ...]:
    """`grad`, None where `of` does not depend on an input; an operation without a derivative is named."""
    try:
        return grad(of, inputs, allow_unused=True, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        remedy = next((said for part, said in _REMEDIES.items() if part in str(error)), "use operations that can")
        raise UfomError(f"{name} cannot be differentiated (twice): {error}; {remedy}") from error


_REMEDIES = {
    "scaled_dot_product": "for attention, call it within torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or build a "
    "Hugging Face model with attn_implementation='eager'",
    "checkpoint": "switch activation checkpointing off, model.gradient_checkpointing_disable()",
    "cudnn": "switch cuDNN off for it, torch.backends.cudnn.flags(enabled=False)",
}
HIDDEN_CURVATURE = (
    "inner_loss cannot be differentiated twice: its gradient depends on φ or θ in a way that autograd does not see (a "
    "once_differentiable function?); use operations that can"
)
IGNORES_PHI = "{} does not depend on φ: compute it from its second argument, without detach or no_grad"


def graph_of_inner_gradient(
    problem: BilevelProblem, theta: Tensor, phi: Tensor, tasks: Tasks, graph: bool = True
) -> Tensor:
    """∂L_in/∂φ, shape (n, p), at the leaf φ, with its graph."""
    total = total_loss(problem, "inner_loss", theta, phi, tasks)
    g = derivative("inner_loss", total, (phi,), create_graph=graph)[0]
    if g is None:
        raise UfomError(IGNORES_PHI.format("inner_loss"))
    return g


def inner_gradient(problem: BilevelProblem, theta: Tensor, phi: Tensor, tasks: Tasks) -> Tensor:
    """∂L_in/∂φ, shape (n, p)."""
    return graph_of_inner_gradient(problem, theta.detach(), leaf(phi), tasks, graph=False)


def outer_gradients(problem: BilevelProblem, theta: Tensor, x: Tensor, tasks: Tasks) -> tuple[Tensor | None, Tensor]:
    """∂L_out/∂θ, shape (n, s), None where L_out is free of θ; and b2 = ∂L_out/∂x, shape (n, P)."""
    theta, x = leaf(theta), leaf(x)
    total = total_loss(problem, "outer_loss", theta, phi_of(problem, theta, x, tasks), tasks)
    b1, b2 = derivative("outer_loss", total, (theta, x))
    if b2 is None:
        raise UfomError(IGNORES_PHI.format("outer_loss"))
    return b1, b2


def gradient_and_products(
    problem: BilevelProblem, theta: Tensor, phi: Tensor, tasks: Tasks, b2: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """∂L_in/∂φ, and `hessian_vector_products` from its graph."""
    theta, phi = leaf(theta), leaf(phi)
    g = graph_of_inner_gradient(problem, theta, phi, tasks)
    if not g.requires_grad:
        _refuse_hidden_curvature(problem, theta, phi, tasks, g)
        return g, None, None
    h1, h2 = derivative("inner_loss", g, (theta, phi), grad_outputs=b2)
    return g.detach(), h1, h2


def hessian_vector_products(
    problem: BilevelProblem, theta: Tensor, phi: Tensor, tasks: Tasks, b2: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(∂²L_in/∂θ∂φ)ᵀb2, shape (n, s), and (∂²L_in/∂φ²)ᵀb2, shape (n, p); None where the block is identically zero."""
    return gradient_and_products(problem, theta, phi, tasks, b2)[1:]


def _refuse_hidden_curvature(problem: BilevelProblem, theta: Tensor, phi: Tensor, tasks: Tasks, g: Tensor) -> None:
    """A gradient without a graph is that of a loss linear in φ, or of an operation that hides its second derivative.

    Taking the second for the first would silently give the first-order gradient, so a small step tells them apart.
    """
    step = 1e-4 * (1 + phi.detach().abs())
    if not torch.equal(g, inner_gradient(problem, theta, phi + step, tasks)):
        raise UfomError(HIDDEN_CURVATURE)


def layout_of(problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> Layout | None:
    """The layout of the problem's states, found once for every shape of a task; None where x is φ.

    Raises:
        UfomError: a state that is not of tensors, or a hyperparameter whose shape does not fit.
    """
    update, known = problem.update, kept(problem, "layouts")
    if update is None:
        return None
    key = (theta.shape[-1], theta.dtype, theta.device, tasks.form, *((t.shape[1:], t.dtype) for t in tasks.parts))
    if key not in known:

        def found(theta: Tensor, task: Task) -> Layout:
            phi = problem.start(theta, task)
            if check := getattr(update, "check", None):
                check(theta, phi, problem.r)
            return Layout.of(phi, update.init(theta, phi, task))

        with torch.no_grad():
            known[key] = by_row(problem, "update.init", found, theta[:1].detach(), tasks=tasks.take(slice(1)))
    layout: Layout = known[key]
    return layout


def phi_of(problem: BilevelProblem, theta: Tensor, x: Tensor, tasks: Tasks) -> Tensor:
    """φ, shape (n, p), of the states x."""
    layout = layout_of(problem, theta, tasks)
    return x if layout is None else x[:, : layout.p]


def inner_tasks(problem: BilevelProblem, tasks: Tasks, j: int) -> Tasks:
    """What inner step j + 1 sees of the tasks."""
    batch = problem.inner_batch
    if batch is None:
        return tasks
    try:
        return tasks.map(lambda task: batch(task, j + 1))
    except (UfomError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # it is the user's function
        raise UfomError(f"inner_batch(task, {j + 1}) failed: {type(error).__name__}: {error}") from error


def updated(
    problem: BilevelProblem, layout: Layout, theta: Tensor, x: Tensor, g: Tensor, tasks: Tasks, j: int
) -> Tensor:
    """x_{j+1} from x_j and g = ∂L_in/∂φ by the problem's inner update, with its graph; j counts from 0."""
    update = problem.update
    assert update is not None

    def step(theta: Tensor, x: Tensor, g: Tensor, task: Task) -> Tensor:
        phi, state = layout.split(x)
        return layout.join(*update.update(theta, phi, state, g, task, j + 1))

    following: Tensor = by_row(problem, "update.update", step, theta, x, g, tasks=tasks)
    return following[None] if len(theta) == 1 else following


def next_state(
    problem: BilevelProblem,
    layout: Layout | None,
    theta: Tensor,
    x: Tensor,
    tasks: Tasks,
    j: int,
    alpha: float | Tensor,
    graph: bool = True,
) -> tuple[Tensor, Tensor]:
    """x_{j+1} and ∂L_in/∂φ at x_j, which requires grad; with their graphs if asked.

    `tasks` are what this step sees, `alpha` is its step size without an inner update; j counts from 0.
    """
    if layout is None:
        g = graph_of_inner_gradient(problem, theta, x, tasks, graph)
        x = x if graph else x.detach()
        return (x.sub(g, alpha=alpha) if isinstance(alpha, float) else x - alpha * g), g
    g = graph_of_inner_gradient(problem, theta, x[:, : layout.p], tasks, graph)
    with torch.set_grad_enabled(graph):
        return updated(problem, layout, theta, x, g, tasks, j), g


def pulled_back(
    following: Tensor, theta: Tensor, x: Tensor, b2: Tensor, retain_graph: bool = False
) -> tuple[Tensor | None, Tensor]:
    """b2 pulled back through an inner step, by its graph: to θ, None where it is identically zero, and to x."""
    if not following.requires_grad:
        return None, torch.zeros_like(x)
    by_theta, by_x = derivative("the inner step", following, (theta, x), grad_outputs=b2, retain_graph=retain_graph)
    return by_theta, torch.zeros_like(x) if by_x is None else by_x


def start(problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> Tensor:
    """x_0, shape (n, P): φ_0 = V(θ, T) and the state before the first step; with its graph if θ asks for one."""
    phi: Tensor = by_row(problem, "start", problem.start, theta, tasks=tasks)
    if not isinstance(phi, Tensor):
        raise UfomError(f"start returned a {type(phi).__name__}: it must return φ_0 as a tensor, shape (p,)")
    phi = phi[None] if len(theta) == 1 else phi
    if not phi.is_floating_point():
        raise UfomError(f"start returned {phi.dtype}: φ_0 must be a vector of floating-point numbers")
    if phi.ndim != 2:
        raise UfomError(f"start returned shape {tuple(phi.shape[1:])}: it must return φ_0 as a vector, shape (p,)")
    if phi.device != theta.device:
        raise UfomError(f"theta is on {theta.device} but start returned φ_0 on {phi.device}: move both to one device")
    layout, update = layout_of(problem, theta, tasks), problem.update
    if layout is None or update is None:
        return phi

    def joined(theta: Tensor, phi: Tensor, task: Task) -> Tensor:
        return layout.join(phi, update.init(theta, phi, task))

    x: Tensor = by_row(problem, "update.init", joined, theta, phi, tasks=tasks)
    return x[None] if len(theta) == 1 else x


def pull_back(problem: BilevelProblem, theta: Tensor, tasks: Tasks, b1: Tensor | None, b2: Tensor) -> Tensor:
    """b1 + (∂x_0/∂θ)ᵀb2, shape (n, s)."""
    theta = leaf(theta)
    x = start(problem, theta, tasks)
    through_start = derivative("start", x, (theta,), grad_outputs=b2)[0] if x.requires_grad else None
    terms = [t for t in (b1, through_start) if t is not None]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(theta)
