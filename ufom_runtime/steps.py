"""One inner step, one backward step and the outer gradient of a sweep: plain, or traced once and compiled.

`torch.compile` cannot be differentiated twice, so the functions below, which take the derivatives themselves, are what
is traced and compiled.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ufom_runtime.compiled.graphs import Graphs
from ufom_runtime.compiled.trace import Found
from ufom_runtime.derivatives import (
    count_rows,
    gradient_and_products,
    hessian_vector_products,
    inner_gradient,
    outer_gradients,
)
from ufom_runtime.first_use import check_first_use
from ufom_runtime.problem import BilevelProblem, Tasks

Record = Tensor | list[Tensor]
"""What is kept of an inner step for its backward step: its state, or a compiled step's residuals."""


def inner_step(problem: BilevelProblem, theta: Tensor, tasks: Tasks, phi: Tensor, alpha: Tensor) -> Found:
    """φ − α·∂L_in/∂φ."""
    return (phi - alpha * inner_gradient(problem, theta, phi, tasks),)


def outer_step(problem: BilevelProblem, theta: Tensor, tasks: Tasks, phi: Tensor) -> Found:
    """∂L_out/∂θ and ∂L_out/∂φ."""
    return outer_gradients(problem, theta, phi, tasks)


def backward_step(
    problem: BilevelProblem, theta: Tensor, tasks: Tasks, phi: Tensor, alpha: Tensor, b2: Tensor
) -> Found:
    """(∂²L_in/∂θ∂φ)ᵀb2 and b2 − α·(∂²L_in/∂φ²)ᵀb2."""
    h1, h2 = hessian_vector_products(problem, theta, phi, tasks, b2)
    return h1, None if h2 is None else b2 - alpha * h2


def joint_step(problem: BilevelProblem, theta: Tensor, tasks: Tasks, phi: Tensor, alpha: Tensor, b2: Tensor) -> Found:
    """An inner step and its backward step from one gradient: φ − α·∂L_in/∂φ, and what `backward_step` gives."""
    g, h1, h2 = gradient_and_products(problem, theta, phi, tasks, b2)
    return phi - alpha * g, h1, None if h2 is None else b2 - alpha * h2


class Steps:
    """The steps of a sweep at rows of θ, shape (n, s), and their tasks; they are counted here.

    With `compile` they are traced and compiled where they are first used; with `unrolled`, `record` then keeps a step's
    residuals, whatever their size. `products` says whether there will be backward steps. The first ones for a problem
    and a shape check it, as `first_use` says.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        theta: Tensor,
        tasks: Tasks,
        unrolled: bool = False,
        compile: bool = False,
        *,
        products: bool = True,
    ) -> None:
        check_first_use(problem, theta, tasks, products)
        self.problem, self._theta, self._tasks = problem, theta.detach(), tasks
        self._graphs = Graphs(problem, theta, tasks, unrolled) if compile else None
        if compile:
            self._alphas = torch.tensor(problem.alphas, dtype=theta.dtype, device=theta.device).unbind()

    def inner(self, phi: Tensor, j: int) -> Tensor:
        """φ_{j+1} from φ_j, (3); j counts from 0."""
        count_rows("gradients", len(phi))
        if self._graphs:
            return cast(Tensor, self._graphs.run(inner_step, phi, self._alphas[j])[0])
        g = inner_gradient(self.problem, self._theta, phi, self._tasks)
        return phi.sub(g, alpha=self.problem.alphas[j])

    def record(self, phi: Tensor, j: int) -> tuple[Tensor, Record]:
        """φ_{j+1} from φ_j, and what `back` will need of this step.

        That is φ_j; or a compiled step's residuals, if they take no more bytes than φ_j or the sweep is unrolled.
        """
        if self._graphs and (found := self._graphs.first(joint_step, phi, self._alphas[j])):
            count_rows("gradients", len(phi))
            return found
        return self.inner(phi, j), phi

    def outer(self, phi: Tensor) -> tuple[Tensor | None, Tensor]:
        """b1 = ∂L_out/∂θ, None where L_out is free of θ, and b2 = ∂L_out/∂φ."""
        count_rows("gradients", len(phi))
        if self._graphs:
            b1, b2 = self._graphs.run(outer_step, phi)
            return b1, cast(Tensor, b2)
        return outer_gradients(self.problem, self._theta, phi, self._tasks)

    def back(self, record: Record, j: int, b2: Tensor) -> tuple[Tensor | None, Tensor]:
        """(∂²L_in/∂θ∂φ)ᵀb2, None where it is identically zero, and b2 − α_{j+1}(∂²L_in/∂φ²)ᵀb2, both at φ_j.

        `record` is φ_j, or what `record` kept of the step from it.
        """
        count_rows("hessian_vector_products", len(b2))
        if self._graphs is None:
            h1, h2 = hessian_vector_products(self.problem, self._theta, cast(Tensor, record), self._tasks, b2)
            return h1, b2 if h2 is None else b2.sub(h2, alpha=self.problem.alphas[j])
        if isinstance(record, Tensor):
            h1, earlier = self._graphs.run(backward_step, record, self._alphas[j], b2)
        else:
            h1, earlier = self._graphs.second(joint_step, self._alphas[j], b2, record)
        return h1, b2 if earlier is None else earlier
