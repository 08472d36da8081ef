"""Reptile (Nichol et al. 2018): the mean of θ − φ_r, an update direction that is not a gradient of M."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ufom_runtime.algorithms import first_state, inner_loop
from ufom_runtime.batching import cut, run_each
from ufom_runtime.coins import Draws
from ufom_runtime.derivatives import Calls, Losses, phi_of, watch_losses
from ufom_runtime.estimators import Direction, State
from ufom_runtime.inspection.draws import refuse_draws
from ufom_runtime.inspection.non_finite import refuse_non_finite
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_runtime.steps import Steps
from ufom_theory import UfomError


@dataclass(frozen=True)
class Reptile:
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

    def begin(self) -> State:
        """The empty state."""
        return ()

    @torch.enable_grad()
    def direction(
        self,
        problem: BilevelProblem,
        theta: Tensor,
        tasks: Task | Tasks,
        state: State = (),
        draws: Draws = None,
        *,
        per_task: bool = False,
        chunk: int | None = None,
        compile: bool = False,
    ) -> Direction:
        """As `Method.direction`: θ − φ_r of each task; there are no coins, and nothing is drawn.

        Raises:
            UfomError: as `hypergradient`, or a start V(θ, T) that is not θ.
        """
        tasks = check(problem, theta, tasks)
        n = len(tasks)

        def run(index: Tensor) -> list[Tensor]:
            rows, piece = theta.detach().expand(len(index), -1), tasks.take(index)
            x = first_state(problem, rows, piece)
            if not torch.equal(phi_of(problem, rows, x, piece), rows):
                raise UfomError("Reptile moves θ towards φ_r, so the inner loop must start at θ: use a V(θ, T) = θ")
            with watch_losses(seen := Losses()), refuse_draws():
                x = inner_loop(Steps(problem, rows, piece, compile=compile, products=False), x)
            moved = rows - phi_of(problem, rows, x, piece)
            refuse_non_finite(problem, rows, piece, [moved], seen, index.tolist())
            return [moved]

        total = torch.zeros_like(theta)
        each = []
        for (moved,) in run_each(run, cut(n, chunk)):
            total += moved.sum(0) / n
            if per_task:
                each.append(moved)
        return Direction(total, torch.cat(each) if per_task else None)


REPTILE = Reptile()
"""The update direction of Nichol et al. (2018)."""
