"""Reptile (Nichol et al. 2018): the mean of θ − φ_r, an update direction that is not a gradient of M."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ufom_runtime.algorithms import first_state, inner_loop
from ufom_runtime.derivatives import Calls, phi_of
from ufom_runtime.methods.method import RowMethod, Rows
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_runtime.steps import Steps
from ufom_theory import UfomError


@dataclass(frozen=True)
class Reptile(RowMethod):
    """θ − φ_r, averaged over the tasks; for `train`, where γ_k is Nichol et al.'s step size ε.

    It is the sum of the inner steps, Σ_j α_j·∂L_in/∂φ(φ_{j−1}), and so points from θ to the tasks' minimisers. It never
    sees the outer loss: it is not an estimate of ∇M, biased or not, and its length grows with r and α.
    """

    gradient: ClassVar[bool] = False

    def calls(self, r: int, s: int = 1) -> Calls:
        """Calls for one task: r gradients, one fewer than FOM, and no Hessian-vector product, whatever s."""
        return Calls(gradients=r)

    def states(self, r: int, s: int = 1) -> int:
        """None is held, whatever r and s."""
        return 0

    def rows(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, generator: Generator | None, compile: bool
    ) -> Rows:
        """As `RowMethod.rows`: θ − φ_r; nothing is drawn.

        Raises:
            UfomError: a start V(θ, T) that is not θ.
        """
        x = first_state(problem, theta, tasks)
        if not torch.equal(phi_of(problem, theta, x, tasks), theta):
            raise UfomError("Reptile moves θ towards φ_r, so the inner loop must start at θ: use a V(θ, T) = θ")
        x = inner_loop(Steps(problem, theta, tasks, compile=compile, products=False), x)
        return theta - phi_of(problem, theta, x, tasks), {}


REPTILE = Reptile()
"""The update direction of Nichol et al. (2018)."""
