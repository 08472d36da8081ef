"""Evolution strategies (Song et al. 2020), and those guided by FOM (Maheswaranathan et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ufom_runtime.algorithms import first_state, inner_loop, sweep_gradients
from ufom_runtime.derivatives import Calls, count_rows, phi_of, row_losses
from ufom_runtime.methods.method import RowMethod, Rows
from ufom_runtime.problem import BilevelProblem, Tasks, cpu_generator
from ufom_runtime.steps import Steps
from ufom_theory import Sweep, UfomError
from ufom_theory.checks import integer, positive, scalar


@dataclass(frozen=True)
class ES(RowMethod):
    """Antithetic evolution strategies: the mean over pairs of ε·(M(θ + σε) − M(θ − σε))/(2σ), ε ~ N(0, I).

    Unbiased for the gradient of the smoothed objective E M(θ + σε), whose bias for ∇M is O(σ²) and zero where M is
    quadratic. Needs no derivative but the inner gradient, and no states; its variance grows with s.

    Attributes:
        sigma: σ > 0, in units of θ.
        pairs: pairs of inner loops a task, ≥ 1.

    Raises:
        UfomError: values outside these ranges; when it runs, no generator.
    """

    sigma: float = 0.1
    pairs: int = 1

    def __post_init__(self) -> None:
        scalar("sigma", self.sigma, positive)
        scalar("pairs", self.pairs, integer, 1)

    def calls(self, r: int, s: int = 1) -> Calls:
        """Two inner loops a pair, with an outer loss each."""
        return Calls(2 * self.pairs * (r + 1), 0)

    def states(self, r: int, s: int = 1) -> int:
        """None."""
        return 0

    def rows(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, generator: Generator | None, compile: bool
    ) -> Rows:
        """As `RowMethod.rows`."""
        total = torch.zeros_like(theta)
        for _ in range(self.pairs):
            total += antithetic(problem, theta, tasks, self.sigma * _normal(theta, generator), compile)
        return total / (self.sigma**2 * self.pairs), {}


@dataclass(frozen=True)
class GuidedES(RowMethod):
    """Evolution strategies that look along FOM more than elsewhere: the mean of β·ε·(M(θ + ε) − M(θ − ε))/(2σ²).

    Here ε ~ N(0, σ²Σ) with Σ = (a/s)·I + (1 − a)·uuᵀ, and u the direction of the task's own first-order gradient. As
    σ → 0 the mean is β·Σ·∇M: it is biased however small σ is.

    Attributes:
        sigma: σ > 0, in units of θ.
        pairs: pairs of inner loops a task, ≥ 1.
        isotropic: a in (0, 1], the share of the variance that looks everywhere.
        scale: β > 0; 2 and a = ½ are Maheswaranathan et al.'s.

    Raises:
        UfomError: values outside these ranges; when it runs, no generator, or FOM that is zero, which guides nowhere.
    """

    sigma: float = 0.1
    pairs: int = 1
    isotropic: float = 0.5
    scale: float = 2.0

    def __post_init__(self) -> None:
        for name in ("sigma", "isotropic", "scale"):
            scalar(name, getattr(self, name), positive)
        scalar("pairs", self.pairs, integer, 1)
        if self.isotropic > 1:
            raise UfomError(f"isotropic = {self.isotropic:g} must lie in (0, 1]: it is a share of the variance")

    def calls(self, r: int, s: int = 1) -> Calls:
        """Those of `ES`, and FOM's."""
        return Calls((2 * self.pairs + 1) * (r + 1), 0)

    def states(self, r: int, s: int = 1) -> int:
        """None."""
        return 0

    def rows(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, generator: Generator | None, compile: bool
    ) -> Rows:
        """As `RowMethod.rows`."""
        (fom,) = sweep_gradients(problem, theta, tasks, (0,), Sweep.recomputed(), compile=compile)
        length = fom.norm(dim=1, keepdim=True)
        if not (length > 0).all():
            raise UfomError(
                "the first-order gradient of a task is zero and guides nowhere (neither start nor outer loss contains "
                "θ?): use ES"
            )
        everywhere = (self.isotropic / theta.shape[1]) ** 0.5
        along = (1 - self.isotropic) ** 0.5 * fom / length
        total = torch.zeros_like(theta)
        for _ in range(self.pairs):
            moves = everywhere * _normal(theta, generator) + along * _normal(theta[:, :1], generator)
            total += antithetic(problem, theta, tasks, self.sigma * moves, compile)
        return self.scale * total / (self.sigma**2 * self.pairs), {}


def antithetic(problem: BilevelProblem, theta: Tensor, tasks: Tasks, moves: Tensor, compile: bool = False) -> Tensor:
    """d·(M(θ + d) − M(θ − d))/2 of each row's task, for d = `moves`; all of shape (n, s)."""
    ends = []
    for sign in (1, -1):
        at = theta + sign * moves
        steps = Steps(problem, at, tasks, compile=compile, products=False)
        x = inner_loop(steps, first_state(problem, at, tasks))
        count_rows("gradients", len(theta))
        ends.append(row_losses(problem, "outer_loss", at, phi_of(problem, at, x, tasks), tasks).detach())
    return moves * ((ends[0] - ends[1]) / 2).reshape(-1, 1)


def _normal(like: Tensor, generator: Generator | None) -> Tensor:
    cpu_generator(generator)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
