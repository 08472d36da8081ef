"""What a problem computes at θ_0: by it a resumed run knows its problem again, and a start that changes is found."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ufom_runtime.algorithms import first_state, inner_loop
from ufom_runtime.derivatives import count_calls, inner_tasks, phi_of, row_losses
from ufom_runtime.estimators import Estimator, hypergradient
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_runtime.steps import Steps
from ufom_theory import Sweep, UfomError


@dataclass(frozen=True, eq=False)
class Identity:
    """Values at θ_0 on the first task drawn.

    Attributes:
        start: φ_0 and the first state of the inner update, shape (1, P).
        losses: L_in and L_out at (θ_0, φ_0), shape (2,).
        end: φ_r and the last state, shape (1, P).
        gradient: the exact hypergradient, shape (s,); zeros where it cannot be computed, as for losses without second
            derivatives.
    """

    start: Tensor
    losses: Tensor
    end: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, problem: BilevelProblem, theta: Tensor, task: Tasks) -> Identity:
        """At θ, shape (s,), on a stack of one task; the calls are not counted."""
        with count_calls(), torch.no_grad():
            x, rows = first_state(problem, theta[None], task), theta[None]
            phi, seen = (
                phi_of(problem, rows, x, task),
                {"inner_loss": inner_tasks(problem, task, 0), "outer_loss": task},
            )
            losses = torch.stack([row_losses(problem, name, rows, phi, of).reshape(()) for name, of in seen.items()])
        with count_calls(), torch.enable_grad():
            end = inner_loop(Steps(problem, rows, task, products=False), x)
            try:
                exact = Estimator(1.0, Sweep.checkpointed(math.isqrt(problem.r)))
                gradient = hypergradient(problem, theta, task, exact)
            except (UfomError, RuntimeError):
                gradient = torch.zeros_like(theta)
        return cls(x, losses.to(theta.dtype), end.detach(), gradient)

    def tensors(self) -> dict[str, Tensor]:
        """As a checkpoint stores them."""
        return {f"problem.{field.name}": getattr(self, field.name) for field in fields(self)}

    def refuse_other(self, tensors: dict[str, Tensor], where: str) -> None:
        """Refuse stored values that differ by more than another chunk, compiler or machine accounts for.

        Raises:
            UfomError: a difference beyond 10·√eps, relative.
        """
        said = {
            "start": "φ_0",
            "end": "φ_r at θ_0",
            "losses": "pair of losses at (θ_0, φ_0)",
            "gradient": "exact hypergradient at θ_0",
        }
        for name, value in self.tensors().items():
            found, here = tensors[name].double().nan_to_num(), value.detach().cpu().double().nan_to_num()
            tolerance = 10 * torch.finfo(value.dtype).eps ** 0.5
            if found.shape != here.shape or float((found - here).norm()) > tolerance * float(found.norm()):
                raise UfomError(
                    f"{where} is of another run: on the first task it has another {said[name.partition('.')[2]]} "
                    "than this problem; give checkpoint= another folder, or remove this one"
                )


@dataclass(frozen=True, eq=False)
class Watch:
    """The start at θ_0 on the first task, taken again now and then: it must be a function of θ and the task."""

    problem: BilevelProblem
    theta: Tensor
    task: Tasks
    phi: Tensor

    @classmethod
    def of(cls, problem: BilevelProblem, theta: Tensor, task: Tasks) -> Watch:
        """From θ_0 and a stack of one task."""
        return cls(problem, theta, task, first_state(problem, theta[None], task).clone())

    def refuse_changed(self, step: int) -> None:
        """`UfomError` where the start gives another φ_0 than before the first step."""
        now = first_state(self.problem, self.theta[None], self.task)
        if not torch.equal(now, self.phi):
            raise UfomError(
                f"start(θ_0, T) gave another φ_0 after step {step} than before the first: it reads something that the "
                "run changes, and a resumed run would start elsewhere; make it a function of θ and "
                "the task, or train(warm_start=True)"
            )
