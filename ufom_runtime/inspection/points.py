"""A point of a problem, and all derivatives there that a sweep is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ufom_runtime.derivatives import (
    gradient_and_products,
    inner_tasks,
    layout_of,
    leaf,
    next_state,
    outer_gradients,
    phi_of,
    pull_back,
    pulled_back,
    start,
)
from ufom_runtime.problem import BilevelProblem, Tasks

Found = dict[str, Tensor | None]
"""Derivatives by name; None where one is identically zero."""


@dataclass(frozen=True)
class Point:
    """Rows of θ, shape (n, s), of φ (or whole states x), shape (n, p), and of b2, shape (n, p), with their tasks.

    The inner step that is looked at is j + 1.
    """

    problem: BilevelProblem
    theta: Tensor
    phi: Tensor
    b2: Tensor
    tasks: Tasks
    j: int = 0

    def row(self, i: int) -> Point:
        """One row of them."""
        one = slice(i, i + 1)
        return replace(self, theta=self.theta[one], phi=self.phi[one], b2=self.b2[one], tasks=self.tasks.take(one))

    def moved(self, seed: int, by: float = 1e-3) -> Point:
        """A generic point near this one."""
        theta, phi = (
            x + by * (x.abs() + scale(x)) * noise(x, 2 * seed + k) for k, x in enumerate((self.theta, self.phi))
        )
        return replace(self, theta=theta, phi=phi)

    def by_row(self, products: bool) -> list[Found]:
        """The derivatives of each row alone."""
        return [self.row(i).derivatives(products) for i in range(len(self.theta))]

    def derivatives(self, products: bool) -> Found:
        """All that a sweep is made of, by the very functions that it calls."""
        problem = self.problem
        outer1, outer2 = outer_gradients(problem, self.theta, self.phi, self.tasks)
        found: Found = {
            "start": start(problem, self.theta, self.tasks),
            "the derivative of start": pull_back(problem, self.theta, self.tasks, None, self.b2),
            "∂L_out/∂θ": outer1,
            "∂L_out/∂φ": outer2,
        }
        layout, seen = layout_of(problem, self.theta, self.tasks), inner_tasks(problem, self.tasks, self.j)
        theta, x = leaf(self.theta), leaf(self.phi)
        following, g = next_state(problem, layout, theta, x, seen, self.j, 1.0, graph=products)
        found["the gradient of inner_loss"] = g.detach()
        if layout is not None:
            found["the inner update"] = following.detach()
        if products and layout is None:
            _, mixed, second = gradient_and_products(problem, self.theta, self.phi, seen, self.b2)
            found |= {"∂²L_in/∂θ∂φ": mixed, "∂²L_in/∂φ²": second}
        elif products:
            by_theta, by_x = pulled_back(following, theta, x, self.b2)
            found |= {"the inner step's derivative by θ": by_theta, "the inner step's derivative by φ": by_x}
        return found

    def of_loss(self, name: str) -> Point:
        """The point as a loss sees it: φ without the update's state, and of the tasks what the step sees."""
        phi = phi_of(self.problem, self.theta, self.phi, self.tasks)
        tasks = inner_tasks(self.problem, self.tasks, self.j) if name == "inner_loss" else self.tasks
        return replace(self, phi=phi, b2=self.b2[:, : phi.shape[1]], tasks=tasks)


def noise(like: Tensor, seed: int) -> Tensor:
    """Standard normal numbers that draw from no global generator."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)


def scale(x: Tensor) -> Tensor:
    """The root mean square of all numbers, 1 where all are zero."""
    size = x.square().mean().sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))
