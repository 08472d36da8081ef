"""Implicit differentiation (Pedregosa 2016; Rajeswaran et al. 2019; Lorraine et al. 2019): no backward loop.

Where ∂L_in/∂φ(θ, φ*) = 0, the implicit function theorem gives ∇M = ∂L_out/∂θ − (∂²L_in/∂θ∂φ)ᵀ(∂²L_in/∂φ²)⁻¹ ∂L_out/∂φ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Generator, Tensor

from ufom_runtime.algorithms import first_state, inner_loop
from ufom_runtime.derivatives import Calls, count_rows, derivative, graph_of_inner_gradient, leaf
from ufom_runtime.methods.method import RowMethod, Rows
from ufom_runtime.problem import BilevelProblem, Task, Tasks, refuse_update
from ufom_runtime.steps import Steps
from ufom_theory import UfomError
from ufom_theory.checks import finite, integer, positive, scalar

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Implicit(RowMethod):
    """The gradient of the problem (1) at a stationary point, with φ_r in its place; the system is solved inexactly.

    Biased for M^(r), by how far φ_r is from a stationary point and by the residual; both are reported for each task:
    `residual` is ‖b − (H + λI)x‖/‖b‖ and `stationarity` ‖∂L_in/∂φ(φ_r)‖/‖∂L_in/∂φ(φ_0)‖. The start is forgotten: φ* is
    not moved by it, so no derivative of V comes in.

    Attributes:
        solver: "cg", conjugate gradient (Pedregosa; Rajeswaran et al.), for a positive definite H + λI, or "neumann",
            x = η·Σ_{k≤steps} (I − η(H + λI))ᵏ·b (Lorraine et al.), which converges where its eigenvalues are in
            (0, 2/η).
        steps: Hessian-vector products of the solver, ≥ 1.
        damping: λ ≥ 0, added to the Hessian H = ∂²L_in/∂φ².
        step: η of the Neumann series; None: the last inner step size, as Lorraine et al. take it.
        warn_above: a `UserWarning` is given where a task's `stationarity` is above it.

    Raises:
        UfomError: values outside these ranges; when it runs, an inner loss that is free of θ (plain MAML: the formula
            gives zero; `proximal` makes it iMAML's problem) or linear in φ, or negative curvature met by CG.
    """

    solver: Literal["cg", "neumann"] = "cg"
    steps: int = 10
    damping: float = 0.0
    step: float | None = None
    warn_above: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.solver, str) or self.solver not in ("cg", "neumann"):
            raise UfomError(f"solver {self.solver!r} is unknown: use cg or neumann")
        scalar("steps", self.steps, integer, 1)
        scalar("damping", self.damping, finite, "a finite number ≥ 0", 0.0)
        scalar("warn_above", self.warn_above, positive)
        if self.step is not None:
            scalar("step, η of the Neumann series,", self.step, positive)
            if self.solver == "cg":
                raise UfomError(f"step = {self.step:g} goes with solver='neumann': conjugate gradient takes none")

    def calls(self, r: int, s: int = 1) -> Calls:
        """r + 2 gradients, one of them ∂L_in/∂φ(φ_r); a product a step of the solver, and one for the mixed block."""
        return Calls(r + 2, self.steps + 1)

    def states(self, r: int, s: int = 1) -> int:
        """None: the solver's vectors do not grow with r."""
        return 0

    def rows(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, generator: Generator | None, compile: bool
    ) -> Rows:
        """As `RowMethod.rows`."""
        refuse_update(
            problem,
            "implicit differentiation",
            "it takes φ_r for a stationary point of inner_loss, which other steps need not approach; use EXACT",
        )
        steps, n = Steps(problem, theta, tasks, compile=compile), len(theta)
        first = first_state(problem, theta, tasks)
        phi = steps.inner(first, 0)
        g0 = (first - phi).norm(dim=1) / problem.alphas[0]
        phi = inner_loop(steps, phi, 1)
        b1, b = steps.outer(phi)
        theta, phi = leaf(theta), leaf(phi)
        count_rows("gradients", n)
        g = graph_of_inner_gradient(problem, theta, phi, tasks)  # one graph for all products
        if not g.requires_grad:
            raise UfomError("inner_loss is linear in φ, and has no stationary point: use EXACT")

        def product(x: Tensor) -> tuple[Tensor, Tensor]:
            """(∂²L_in/∂θ∂φ)ᵀx and (H + λI)x."""
            count_rows("hessian_vector_products", n)
            mixed, image = derivative("inner_loss", g, (theta, phi), grad_outputs=x, retain_graph=True)
            if mixed is None:
                raise UfomError(
                    "inner_loss is free of θ, so φ* does not move with it and implicit differentiation gives zero: use "
                    "another method, or iMAML's proximal form, proximal(problem, strength)"
                )
            return mixed, self.damping * x if image is None else image + self.damping * x

        def hessian(x: Tensor) -> Tensor:
            return product(x)[1]

        if self.solver == "cg":
            x = conjugate_gradient(hessian, b, self.steps)
        else:
            x = neumann_series(hessian, b, self.steps, problem.alphas[-1] if self.step is None else self.step)
        mixed, image = product(x)
        residual, stationarity = _ratio((b - image).norm(dim=1), b.norm(dim=1)), _ratio(g.detach().norm(dim=1), g0)
        self._warn(float(residual.max()), float(stationarity.max()))
        return -mixed if b1 is None else b1 - mixed, {"residual": residual, "stationarity": stationarity}

    def _warn(self, residual: float, stationarity: float) -> None:
        if stationarity > self.warn_above:
            warnings.warn(
                f"φ_r is not near a stationary point: ‖∂L_in/∂φ‖ is {stationarity:.2g} of the start's, above "
                f"{self.warn_above:g}; implicit differentiation is then biased: take more inner steps",
                stacklevel=3,
            )
        if self.solver == "neumann" and residual > 1:
            warnings.warn(
                f"the Neumann series diverges, its residual is {residual:.2g}: take a smaller step, or more damping",
                stacklevel=3,
            )


def conjugate_gradient(product: Product, b: Tensor, steps: int) -> Tensor:
    """x with Ax ≈ b, one system a row, after `steps` products with the positive definite A; from x = 0.

    Raises:
        UfomError: negative curvature, pᵀAp < 0, is met.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    square = b.square().sum(1, keepdim=True)
    done = square * torch.finfo(b.dtype).eps ** 2  # beyond it directions are rounding errors
    for _ in range(steps):
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        going = square > done
        if (bad := going & (curvature <= 0)).any():
            least = (curvature / direction.square().sum(1, keepdim=True))[bad].min().item()
            raise UfomError(
                f"conjugate gradient met the curvature {least:.3g}: H + λI must be positive definite; raise damping by "
                f"more than {-least:.3g}"
            )
        length = torch.where(going, square / curvature, 0.0)
        x, residual = x + length * direction, residual - length * image
        smaller = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(going, smaller / square, 0.0) * direction
        square = torch.where(going, smaller, square)
    return x


def neumann_series(product: Product, b: Tensor, steps: int, eta: float) -> Tensor:
    """η·Σ_{k≤steps} (I − ηA)ᵏb, whose residual is (I − ηA)^{steps+1}·b."""
    term = total = b
    for _ in range(steps):
        term = term - eta * product(term)
        total = total + term
    return eta * total


def proximal(problem: BilevelProblem, strength: float) -> BilevelProblem:
    """iMAML's problem (Rajeswaran et al. 2019): the inner loss with ½·strength·‖φ − θ‖² added; s = p is needed.

    Raises:
        UfomError: a strength that is not a finite number > 0.
    """
    half, inner = scalar("strength", strength, positive) / 2, problem.inner_loss

    def inner_loss(theta: Tensor, phi: Tensor, task: Task) -> Tensor:
        value: Tensor = inner(theta, phi, task) + half * (phi - theta).square().sum()
        return value

    kept = {field.name: getattr(problem, field.name) for field in fields(BilevelProblem)}
    return BilevelProblem(**{**kept, "inner_loss": inner_loss})  # bare: what a subclass knows is of the other problem


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp(min=torch.finfo(whole.dtype).tiny)
