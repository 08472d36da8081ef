"""Where a result that is not finite comes from: one task again by plain autograd, and the first number that is not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import grad

from ufom_runtime.derivatives import (
    Losses,
    count_calls,
    inner_tasks,
    leaf,
    phi_of,
    pulled_back,
    row_losses,
    start,
    watch_losses,
)
from ufom_runtime.problem import BilevelProblem, Tasks, all_finite
from ufom_runtime.steps import Steps
from ufom_theory import UfomError

_GROWN = 1e3  # times as large as at the start: the loop has diverged
_LOSS = (
    "what gives this: the logarithm of 0 or of a negative number, 0/0, a mean over nothing (are all labels ignored?), "
    "overflow, of a large θ or in half precision"
)
_SLOPE = (
    "what gives this where the value is finite: √x, ‖x‖ or a distance at 0, x·log x at 0, the standard deviation of "
    "equal numbers, a torch.where that hides a NaN branch; add a small ε inside the root or the logarithm, or move the "
    "torch.where to its argument"
)


def refuse_non_finite(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Tasks,
    gradients: Sequence[Tensor],
    seen: Losses | None = None,
    names: Sequence[int] | None = None,
    what: str = "the hypergradient",
) -> None:
    """Refuse gradients of rows of θ, shape (n, s), that are not finite, or a loss on the way to them that was not.

    A loss that is NaN may have the gradient 0, as the mean over no labels has: it would pass for a task learnt.

    Args:
        problem: the problem.
        theta: one θ a row, shape (n, s).
        tasks: n stacked tasks.
        gradients: what a sweep gave.
        seen: the losses that it met; if not given, or empty, as of compiled steps, the inner losses at φ_0 are taken.
        names: numbers of the tasks in the batch that they are of; 0 … n − 1 if not given.
        what: what the message calls them.

    Raises:
        UfomError: it says where the first number that is not finite stands.
    """
    total = None if seen is None else seen.total
    if total is None:
        with torch.no_grad():
            phi = phi_of(problem, theta, start(problem, theta, tasks), tasks)
            total = row_losses(problem, "inner_loss", theta, phi, inner_tasks(problem, tasks, 0)).sum()
    if not (all_finite(total) and all(map(all_finite, gradients))):
        raise UfomError(where_not_finite(problem, theta, tasks, range(len(tasks)) if names is None else names, what))


@torch.enable_grad()
def where_not_finite(
    problem: BilevelProblem, theta: Tensor, tasks: Tasks, names: Sequence[int], what: str = "the hypergradient"
) -> str:
    """In words: which task, which step j, and what of it is the first that is not finite, and what gives that."""
    with count_calls(), watch_losses(None):
        for i, name in enumerate(names):
            if said := _of_task(problem, theta[i : i + 1].detach(), tasks.take(slice(i, i + 1))):
                return f"{what} is not finite. In task {name} of the batch (from 0), {said}"
    return (
        f"{what} is not finite, though each task by itself is: numbers overflow where tasks are summed or "
        "run together; scale the outer loss down, or take float64"
    )


def _of_task(problem: BilevelProblem, theta: Tensor, task: Tasks) -> str:
    """The first non-finite number of one task: through the loop forwards, then backwards; empty if there is none."""
    data = [k for k, t in enumerate(task.parts) if t.is_floating_point() and not all_finite(t)]
    held = (
        f" (the task itself holds NaN or ±inf, in tensor {data[0]} of {len(task.parts)}: mend the data)" if data else ""
    )
    x = start(problem, theta, task).detach()
    phi, steps = phi_of(problem, theta, x, task), Steps(problem, theta, task)
    first, states = float(phi.norm()), [x]
    if not all_finite(x):
        return f"start returned a φ_0 that is not finite{held}"
    for j in range(problem.r):
        loss, _, slope = _slopes(problem, "inner_loss", theta, phi, inner_tasks(problem, task, j))
        grown = _grown(phi, first)
        if not all_finite(loss):
            return f"inner_loss is {float(loss)} at φ_{j}{held or grown or f', which is finite; {_LOSS}'}"
        if not all_finite(slope):
            said = f"; inner_loss is {float(loss):.3g} there; {_SLOPE}"
            return f"∂L_in/∂φ is not finite at φ_{j}{held or grown or said}"
        x = steps.following(theta, leaf(x), j, graph=False)[0]
        phi = phi_of(problem, theta, x, task)
        if not all_finite(x):
            if problem.update is not None and not grown:
                return f"the inner update made a φ_{j + 1} or a state that is not finite; {_SLOPE}"
            return f"φ_{j + 1} overflows{grown or ': the inner loop diverged; take smaller inner step_sizes'}"
        states.append(x)
    grown = _grown(phi, first)
    loss, b1, b2 = _slopes(problem, "outer_loss", theta, phi, task)
    if not all_finite(loss):
        return f"outer_loss is {float(loss)} at φ_r{held or grown or f', which is finite; {_LOSS}'}"
    if not (all_finite(b1) and all_finite(b2)):
        said = f"; outer_loss is {float(loss):.3g} there; {_SLOPE}"
        return f"the gradient of outer_loss is not finite at φ_r{held or grown or said}"
    if problem.update is not None:
        return _backwards_by_steps(steps, theta, states, steps.outer(x)[1])
    return _backwards(problem, theta, task, states, b2)


def _backwards(problem: BilevelProblem, theta: Tensor, task: Tasks, states: list[Tensor], b2: Tensor) -> str:
    last = float(b2.norm())
    for j in reversed(range(problem.r)):
        theta, phi = leaf(theta), leaf(states[j])
        loss = row_losses(problem, "inner_loss", theta, phi, inner_tasks(problem, task, j))
        (slope,) = grad(loss, phi, create_graph=True)
        if not slope.requires_grad:
            continue
        # also along a fixed direction: the adjoint may have grown, or be zero where the product is not finite
        for direction in (torch.ones_like(b2), b2):
            blocks = grad(slope, (theta, phi), grad_outputs=direction, allow_unused=True, retain_graph=True)
            if not all(x is None or all_finite(x) for x in blocks):
                grown = "" if direction is not b2 else _grown(b2, last, "the adjoint ∂L_out/∂φ")
                return f"the second derivative of inner_loss is not finite at φ_{j}{grown or f'; {_SLOPE}'}"
        if blocks[1] is not None:
            b2 = b2.sub(blocks[1], alpha=problem.alphas[j])
        if not all_finite(b2):
            return f"the backward loop overflows at φ_{j}{_grown(b2, last, 'the adjoint ∂L_out/∂φ')}"
    return ""


def _backwards_by_steps(steps: Steps, theta: Tensor, states: list[Tensor], b2: Tensor) -> str:
    last = float(b2.norm())
    for j in reversed(range(steps.problem.r)):
        theta, x = leaf(theta), leaf(states[j])
        following, _ = steps.following(theta, x, j)
        # also along a fixed direction: the adjoint may have grown, or be zero where the product is not finite
        for direction in (torch.ones_like(b2), b2):
            found = pulled_back(following, theta, x, direction, retain_graph=True)
            if not all(y is None or all_finite(y) for y in found):
                grown = "" if direction is not b2 else _grown(b2, last, "the adjoint ∂L_out/∂φ")
                return f"the derivative of inner step {j + 1} is not finite{grown or f'; {_SLOPE}'}"
        b2 = found[1]
    return ""


def _slopes(
    problem: BilevelProblem, name: str, theta: Tensor, phi: Tensor, task: Tasks
) -> tuple[Tensor, Tensor, Tensor]:
    """A loss and its gradients in θ and in φ, zero where it is free of them."""
    theta, phi = leaf(theta), leaf(phi)
    loss = row_losses(problem, name, theta, phi, task)
    found = grad(loss, (theta, phi), allow_unused=True, materialize_grads=True)
    return loss.detach(), found[0], found[1]


def _grown(x: Tensor, first: float, name: str = "φ") -> str:
    """In words, how a vector has grown on its way, if it has."""
    now = float(x.norm())
    if now <= _GROWN * (1 + first):
        return ""
    said = f"{name} has grown from a norm of {first:.3g} to {now:.3g}"
    return f": {said}, so the inner loop diverged; take smaller inner step_sizes"
