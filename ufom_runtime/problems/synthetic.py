"""The paper's synthetic pair of tasks (section 5.1): convex piecewise polynomials on the line, V(θ) = θ, L_out = L_in.

f(x) is a·z²/2 for z = |x − b/a| ≤ A, bends in a cubic piece for A < z ≤ A + 1 and is linear beyond: convex and C².
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ufom_runtime.problem import BilevelProblem, Task
from ufom_theory import Moments, UfomError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class SyntheticProblem(BilevelProblem):
    """The pair, and its closed forms (in numpy, with the inner loop as a scalar recursion).

    Attributes:
        a: curvatures of the two tasks.
        b: a times the minimisers.
        A: where the quadratic piece ends.
    """

    a: Array
    b: Array
    A: float

    @property
    def centres(self) -> Array:
        """Minimisers b/a of the two tasks, shape (2,)."""
        return self.b / self.a

    def slope(self, x: ArrayLike, task: int | NDArray[np.int64]) -> tuple[Array, Array]:
        """f'(x) and f''(x) of the given task(s) 0 or 1, broadcast."""
        a = self.a[task]
        u = np.asarray(x) - self.centres[task]
        z = np.abs(u)
        t = np.clip(z - self.A, 0.0, 1.0)
        return np.copysign(a * (np.minimum(z, self.A) + t - t * t / 2), u), a * (1 - t)

    def hypergradients(self, theta: ArrayLike, task: int | NDArray[np.int64]) -> tuple[Array, Array]:
        """(G_FO, G): f'(φ_r), and f'(φ_r)·∏_j (1 − α_j·f''(φ_{j−1})), at θ for task(s) 0 or 1, broadcast."""
        x = np.asarray(theta, dtype=np.float64) + 0 * self.a[task]
        factor = np.ones_like(x)
        for alpha in self.alphas:
            slope, curvature = self.slope(x, task)
            factor = factor * (1 - alpha * curvature)
            x = x - alpha * slope
        first_order = self.slope(x, task)[0]
        return first_order, factor * first_order

    def mean_gradient(self, theta: ArrayLike) -> Array:
        """∇M(θ), the mean over both tasks; the shape of θ."""
        theta = np.asarray(theta, dtype=np.float64)
        return (self.hypergradients(theta, 0)[1] + self.hypergradients(theta, 1)[1]) / 2

    def moments(self, thetas: ArrayLike) -> Moments:
        """D² and V² as suprema over the given θ, exact sums over the two tasks."""
        theta = np.atleast_1d(np.asarray(thetas, dtype=np.float64))[:, None]
        first_order, exact = self.hypergradients(theta, np.array([0, 1]))
        d2, v2 = ((first_order - exact) ** 2).mean(1), (exact**2).mean(1)
        return Moments(d2.max(), v2.max(), mean_gradient_sq=exact.mean(1)[v2.argmax()] ** 2)

    @property
    def contractions(self) -> Array:
        """p_i = ∏_j (1 − α_j·a_i), shape (2,): φ_r − b/a = p·(θ − b/a) while the quadratic piece is not left."""
        return np.asarray(np.prod(1 - np.asarray(self.alphas)[:, None] * self.a, axis=0))

    def _stationary(self, weights: Array) -> float:
        theta = float(weights @ self.centres / weights.sum())
        if np.any(np.abs(theta - self.centres) > self.A):
            raise UfomError(
                f"the stationary point {theta:g} leaves the quadratic pieces (A = {self.A:g}): take a larger A"
            )
        return theta

    @property
    def theta_fom(self) -> float:
        """Where the mean of G_FO vanishes: FOM's end point."""
        return self._stationary(self.a * self.contractions)

    @property
    def theta_star(self) -> float:
        """Where ∇M vanishes."""
        return self._stationary(self.a * self.contractions**2)


def synthetic(
    alpha: float = 0.01,
    r: int = 10,
    a: tuple[float, float] = (0.5, 1.5),
    b: tuple[float, float] = (0.0, 10.0),
    A: float = 400.0,
    device: str | torch.device = "cpu",
) -> SyntheticProblem:
    """The pair of Fig. 1d–f (defaults), or any other of the family: s = p = 1, float64.

    Args:
        alpha: inner step size, the same at every step.
        r: inner steps.
        a: curvatures, > 0.
        b: a times the minimisers.
        A: where the quadratic pieces end, > 0.
        device: where the two tasks live.

    Returns:
        The problem; `.tasks` holds both tasks, (a_i, b_i/a_i), shape (2, 2).

    Raises:
        UfomError: a curvature, A or α that is not > 0, or r < 1.
    """
    if not (len(a) == len(b) == 2 and all(math.isfinite(x) for x in (*a, *b)) and min(*a, A) > 0 and math.isfinite(A)):
        raise UfomError(f"a = {a}, b = {b}, A = {A}: give two finite a > 0, two finite b and one finite A > 0")
    if r < 1:
        raise UfomError(f"r = {r} inner steps: give r ≥ 1")

    def loss(theta: Tensor, phi: Tensor, task: Task) -> Tensor:
        assert isinstance(task, Tensor)
        curvature, centre = task.unbind()
        u = phi[0] - centre
        core, beyond = u.clamp(-A, A), (u.abs() - A).clamp(min=0.0)
        t = beyond.clamp(max=1.0)
        height: Tensor = core**2 / 2 + A * beyond + t**2 / 2 - t**3 / 6 + (beyond - t) / 2
        return curvature * height

    curvatures, offsets = np.array(a, dtype=np.float64), np.array(b, dtype=np.float64)
    return SyntheticProblem(
        inner_loss=loss,
        outer_loss=loss,
        start=lambda theta, task: theta,
        step_sizes=torch.full((r,), alpha, dtype=torch.float64),
        tasks=torch.tensor(np.stack([curvatures, offsets / curvatures], axis=1), device=device),
        initial=torch.linspace(-50, 50, 1001, dtype=torch.float64, device=device)[:, None],
        a=curvatures,
        b=offsets,
        A=float(A),
    )
