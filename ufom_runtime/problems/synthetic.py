"""The paper's synthetic pair of tasks (section 5.1): convex piecewise polynomials on the line, V(θ) = θ, L_out = L_in.

f(x) is a·z²/2 for z = |x − b/a| ≤ A, bends in a cubic piece for A < z ≤ A + 1 and is linear beyond: convex and C².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ufom_runtime.problem import BilevelProblem, Task
from ufom_theory import AssumptionConstants
from ufom_theory.two_tasks import TwoTaskProblem


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SyntheticProblem(BilevelProblem):
    """The pair in torch.

    Attributes:
        pair: the same pair in numpy, with all that is known of it in closed form: gradients, D² and V² at any θ, the
            stationary points of FOM and of M, the constants of Assumption 1.
    """

    pair: TwoTaskProblem

    @property
    def constants(self) -> AssumptionConstants:
        """The constants of Assumption 1, `pair.constants`."""
        return self.pair.constants


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
        The problem; `.tasks` holds both tasks, (a_i, b_i/a_i), shape (2, 2). `.initial` is a grid on [−50, 50].

    Raises:
        UfomError: a curvature, A or α that is not > 0, or r < 1.
    """
    pair = TwoTaskProblem(alpha, r, a, b, A)

    def loss(theta: Tensor, phi: Tensor, task: Task) -> Tensor:
        assert isinstance(task, Tensor)
        curvature, centre = task.unbind()
        u = phi[0] - centre
        core = u.clamp(-A, A)
        # not a second clamp: at |u| = A both would pass the derivative on
        beyond = torch.where(u.abs() > A, u.abs() - A, 0.0)
        t = beyond.clamp(max=1.0)
        height: Tensor = core**2 / 2 + A * beyond + t**2 / 2 - t**3 / 6 + (beyond - t) / 2
        return curvature * height

    return SyntheticProblem(
        inner_loss=loss,
        outer_loss=loss,
        start=lambda theta, task: theta,
        step_sizes=torch.full((r,), alpha, dtype=torch.float64, device="cpu"),
        tasks=torch.tensor(
            [(x, y / x) for x, y in zip(pair.a, pair.b, strict=True)], dtype=torch.float64, device=device
        ),
        initial=torch.linspace(-50, 50, 1001, dtype=torch.float64, device=device)[:, None],
        pair=pair,
    )
