"""Evolution strategies: no derivative of the loop at all (Song et al. 2020), or guided by FOM (Maheswaranathan 2019)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ufom_runtime.algorithms import first_state, inner_gd, sweep_gradients
from ufom_runtime.derivatives import Calls, count_rows, total_losses
from ufom_runtime.estimators import FOM
from ufom_runtime.problem import BilevelProblem, Task, cpu_generator
from ufom_runtime.rivals.method import Method, Rows
from ufom_runtime.steps import Steps
from ufom_theory import UfomError
from ufom_theory.quantities import finite, integer, positive, scalar


def antithetic(problem: BilevelProblem, theta: Tensor, tasks: Task, moves: Tensor) -> Tensor:
    """½(M(θ + d) − M(θ − d)) of each row's outer loss after the inner loop, shape (n,); d = `moves`, (n, s)."""
    ends = []
    for sign in (1, -1):
        at = theta + sign * moves
        phi, _ = inner_gd(Steps(problem, at, tasks), first_state(problem, at, tasks))
        count_rows("gradients", len(theta))
        ends.append(losses("outer_loss", problem.outer_loss, at, phi, tasks).detach())
    return (ends[0] - ends[1]) / 2
