"""Reptile (Nichol et al. 2018): the mean of θ − φ_r, an update direction that is no gradient of M."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ufom_runtime.algorithms import first_state, inner_gd
from ufom_runtime.derivatives import Calls
from ufom_runtime.estimators import refuse_divergence
from ufom_runtime.problem import BilevelProblem, Task, check, count, take
from ufom_runtime.steps import Steps
from ufom_theory import UfomError
from ufom_theory.checks import integer


@dataclass(frozen=True)
class Reptile:
    """θ − φ_r, averaged over the tasks; for `outer_sgd`, where γ_k is Nichol et al.'s step size ε.

    It is the sum of the inner steps, Σ_j α_j·∂L_in/∂φ(φ_{j−1}), and so points from θ to the tasks' minimisers. It never
    sees the outer loss: it is not an estimate of ∇M, biased or not, and its length grows with r and α.
    """

    def calls(self, r: int, s: int = 1) -> Calls:
        """Calls for one task: r gradients, one fewer than FOM, and no Hessian-vector product, whatever s."""
        return Calls(gradients=r)

    def states(self, r: int, s: int = 1) -> int:
        """None is held, whatever r and s."""
        return 0

    def begin(self) -> tuple[float, ...]:
        """It remembers nothing."""
        return ()

    @torch.enable_grad()
    def direction(
        self,
        problem: BilevelProblem,
        theta: Tensor,
        tasks: Task,
        state: tuple[float, ...] = (),
        generator: Generator | None = None,
        chunk: int | None = None,
        compile: bool = False,
    ) -> tuple[Tensor, int, tuple[float, ...], dict[str, float]]:
        """The mean of θ − φ_r.

        Args:
            problem: the problem; its start must be θ itself, V(θ, T) = θ.
            theta: outer parameters, shape (s,).
            tasks: n stacked tasks.
            state: empty.
            generator: not used; there are no coins.
            chunk: tasks run together; None: all of them.
            compile: as in `hypergradient`.

        Returns:
            The direction, shape (s,); 0 exact gradients; the empty state; no columns.

        Raises:
            UfomError: as `hypergradient`, or a start that is not θ.
        """
        check(problem, theta, tasks)
        n = count(tasks)
        total = torch.zeros_like(theta)
        for index in torch.split(torch.arange(n), n if chunk is None else integer("chunk", chunk, 1)):
            rows, piece = theta.detach().expand(len(index), -1), take(tasks, index)
            phi = first_state(problem, rows, piece)
            if not torch.equal(phi, rows):
                raise UfomError("Reptile moves θ towards φ_r, so the inner loop must start at θ: use a V(θ, T) = θ")
            total += (rows - inner_gd(Steps(problem, rows, piece, compile=compile), phi)[0]).sum(0) / n
        return refuse_divergence(total), 0, state, {}


REPTILE = Reptile()
"""The update direction of Nichol et al. (2018)."""
