"""Quadratics with Gaussian tasks: MAML on ½(φ − c)ᵀH(φ − c), where D², V² and their sampling errors are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from ufom_runtime.problem import BilevelProblem, Task
from ufom_runtime.training.seeds import seeded
from ufom_theory import Moments, UfomError
from ufom_theory.checks import integer, positive


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class QuadraticProblem(BilevelProblem):
    """L_in = L_out = ½(φ − c)ᵀH(φ − c), V(θ) = θ, c ~ N(0, σ²I): G = PHP(θ − c), G_FO = HP(θ − c), P = ∏(I − α_jH).

    Attributes:
        hessian: H, shape (s, s), symmetric positive definite.
        noise: σ.
    """

    hessian: Tensor
    noise: float

    def _maps(self) -> tuple[Tensor, Tensor]:
        """The matrices of G_FO − G and of G, applied to θ − c."""
        eye = torch.eye(len(self.hessian), dtype=self.hessian.dtype, device=self.hessian.device)
        product = eye
        for alpha in self.alphas:
            product = product - alpha * self.hessian @ product
        exact = product @ self.hessian @ product
        return self.hessian @ product - exact, exact

    def moments(self, theta: Tensor, n: int | None = None) -> Moments:
        """The true D², V² and ‖∇M‖² at θ, shape (s,); with n, also the true covariance of their means over n tasks.

        For x = B(θ − c): E‖x‖² = ‖Bθ‖² + σ²‖B‖²_F and Cov(‖x‖², ‖y‖²) = 2σ⁴·tr(SR) + 4σ²·θᵀSRθ, S = BᵀB, R of y.
        """
        grams = [b.T @ b for b in self._maps()]
        d2, v2 = ((theta @ s @ theta + self.noise**2 * s.trace()).item() for s in grams)
        gradient_sq = (theta @ grams[1] @ theta).item()
        if n is None:
            return Moments(d2, v2, mean_gradient_sq=gradient_sq)
        var = self.noise**2
        cov = [[(2 * var**2 * (s @ t).trace() + 4 * var * theta @ s @ t @ theta).item() for t in grams] for s in grams]
        return Moments(d2, v2, np.array(cov) / n, n, mean_gradient_sq=gradient_sq)


def quadratic(
    dim: int = 5,
    r: int = 10,
    alpha: float = 0.05,
    noise: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> QuadraticProblem:
    """A quadratic of dimension `dim` in float64, with eigenvalues of H evenly spaced on [0.2, 2] in a random basis.

    Raises:
        UfomError: dim or r no integer ≥ 1, noise not > 0, or α outside (0, 1), where the inner loop diverges.
    """
    dim, r, noise = integer("dim", dim, 1), integer("r", r, 1), float(positive("noise", noise))
    if not 0 < alpha < 1:
        raise UfomError(f"alpha = {alpha}: give 0 < α < 1, or the inner loop diverges on the eigenvalue 2")
    generator = seeded(seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator, device="cpu"))
    hessian = (basis * torch.linspace(0.2, 2.0, dim, dtype=torch.float64, device="cpu")) @ basis.T
    hessian = hessian.to(device)
    initial = torch.randn(dim, dtype=torch.float64, generator=generator, device="cpu").to(device)

    def loss(theta: Tensor, phi: Tensor, task: Task) -> Tensor:
        assert isinstance(task, Tensor)
        value: Tensor = (phi - task) @ hessian @ (phi - task) / 2
        return value

    def sample_tasks(n: int, generator: Generator) -> Tensor:
        return noise * torch.randn(n, dim, dtype=torch.float64, generator=generator, device="cpu").to(device)

    return QuadraticProblem(
        inner_loss=loss,
        outer_loss=loss,
        start=lambda theta, task: theta,
        step_sizes=torch.full((r,), alpha, dtype=torch.float64, device="cpu"),
        sample_tasks=sample_tasks,
        initial=initial,
        hessian=hessian,
        noise=noise,
    )
