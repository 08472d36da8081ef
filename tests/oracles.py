"""Slow and independent: gradients by autodiff through the whole unrolled loop, one task at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ufom_runtime.problem import BilevelProblem, Tasks


def unrolled_gradient(problem: BilevelProblem, theta: Tensor, tasks, kept: int | None = None) -> Tensor:
    """G_K of each task, shape (n, s): d/dθ of the outer loss after the loop, by one backward pass through its graph.

    Where only the last K steps are kept, φ_{r−K} enters with its value but with V's derivative.
    """
    r = problem.r
    kept = r if kept is None else kept
    found = []
    tasks = Tasks.of(tasks)
    for i in range(len(tasks)):
        task = tasks.form(tuple(t[i] for t in tasks.parts))
        leaf = theta.clone().requires_grad_()
        phi = problem.start(leaf, task)
        for j in range(r):
            if j == r - kept:
                phi = problem.start(leaf, task) + (phi - problem.start(leaf, task)).detach()
            state = phi if phi.requires_grad else phi.requires_grad_()
            loss = problem.inner_loss(leaf, state, task)
            (slope,) = torch.autograd.grad(loss, state, create_graph=True)
            phi = state - problem.step_sizes[j] * slope
        if kept == 0:
            phi = problem.start(leaf, task) + (phi - problem.start(leaf, task)).detach()
        (g,) = torch.autograd.grad(problem.outer_loss(leaf, phi, task), leaf, allow_unused=True)
        found.append(torch.zeros_like(theta) if g is None else g.detach())
    return torch.stack(found)
