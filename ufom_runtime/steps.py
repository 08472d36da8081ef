"""One inner step, one backward step and the outer gradient of a sweep: plain, or traced once and compiled.

`torch.compile` cannot be differentiated twice, so the functions below, which take the derivatives themselves, are what
is traced and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ufom_runtime.compiled.graphs import Graphs
from ufom_runtime.compiled.trace import Found, differ
from ufom_runtime.derivatives import (
    count_rows,
    gradient_and_products,
    hessian_vector_products,
    inner_tasks,
    layout_of,
    leaf,
    next_state,
    outer_gradients,
    pull_back,
    pulled_back,
    updated,
)
from ufom_runtime.inspection.first_use import check_first_use
from ufom_runtime.problem import BilevelProblem, Tasks, kept
from ufom_runtime.states import Layout

Record = Tensor | list[Tensor]
"""What is kept of an inner step for its backward step: its state, or a compiled step's residuals."""


@dataclass(frozen=True)
class Step:
    """A function of the problem, θ, the tasks that step j + 1 sees, and other tensors, as it is traced."""

    function: Callable[..., Found]
    j: int = 0
    layout: Layout | None = field(default=None, compare=False)  # follows from the shapes

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, *tensors: Tensor) -> Found:
        return self.function(problem, self, theta, tasks, *tensors)


def inner_step(problem: BilevelProblem, at: Step, theta: Tensor, tasks: Tasks, x: Tensor, alpha: Tensor) -> Found:
    """The next state."""
    return next_state(problem, at.layout, theta.detach(), leaf(x), tasks, at.j, alpha, graph=False)[:1]


def outer_step(problem: BilevelProblem, at: Step, theta: Tensor, tasks: Tasks, x: Tensor) -> Found:
    """∂L_out/∂θ and ∂L_out/∂x."""
    return outer_gradients(problem, theta, x, tasks)


def backward_step(
    problem: BilevelProblem, at: Step, theta: Tensor, tasks: Tasks, x: Tensor, alpha: Tensor, b2: Tensor
) -> Found:
    """What `joint_step` gives besides the next state."""
    return joint_step(problem, at, theta, tasks, x, alpha, b2)[1:]


def joint_step(
    problem: BilevelProblem, at: Step, theta: Tensor, tasks: Tasks, x: Tensor, alpha: Tensor, b2: Tensor
) -> Found:
    """The next state, and b2 pulled back through the step: to θ, None where it is identically zero, and to x.

    For gradient descent that to θ is (∂²L_in/∂θ∂φ)ᵀb2, without its factor −α, and that to x None for b2 itself.
    """
    if at.layout is None:
        g, h1, h2 = gradient_and_products(problem, theta, x, tasks, b2)
        return x - alpha * g, h1, None if h2 is None else b2 - alpha * h2
    theta, x = leaf(theta), leaf(x)
    following, _ = next_state(problem, at.layout, theta, x, tasks, at.j, alpha)
    return (following.detach(), *pulled_back(following, theta, x, b2))


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
        self.problem, self.theta, self.tasks = problem, theta.detach(), tasks
        self._layout = layout_of(problem, theta, tasks)
        self._alphas = problem.alphas if problem.update is None else (1.0,) * problem.r
        self._graphs = Graphs(problem, theta, unrolled) if compile else None
        if compile:
            self._rates = torch.tensor(self._alphas, dtype=theta.dtype, device=theta.device).unbind()

    def take(self, rows: Tensor | None) -> Steps:
        """The plain steps of some of the rows, by their indices on the CPU; of all for None."""
        if rows is None:
            return self
        assert self._graphs is None, "compiled steps are for the rows that they were compiled for"
        some = copy(self)
        alike = self.theta.stride(0) == 0  # one θ for all rows
        some.theta = self.theta[: len(rows)] if alike else self.theta[rows.to(self.theta.device)]
        some.tasks = self.tasks.take(rows)
        return some

    def pull_back(self, b1: Tensor | None, b2: Tensor) -> Tensor:
        """b1 + (∂x_0/∂θ)ᵀb2, shape (n, s)."""
        return pull_back(self.problem, self.theta, self.tasks, b1, b2)

    def following(self, theta: Tensor, x: Tensor, j: int, graph: bool = True) -> tuple[Tensor, Tensor]:
        """x_{j+1} and ∂L_in/∂φ from x_j, which requires grad; j counts from 0. Not counted."""
        return next_state(self.problem, self._layout, theta, x, self._seen(j), j, self._alphas[j], graph)

    def inner(self, x: Tensor, j: int) -> Tensor:
        """x_{j+1} from x_j; j counts from 0."""
        count_rows("gradients", len(x))
        if self._graphs:
            return cast(Tensor, self._graphs.run(self._step(inner_step, x, j), self._seen(j), x, self._rates[j])[0])
        return self.following(self.theta, leaf(x), j, graph=False)[0]

    def record(self, x: Tensor, j: int) -> tuple[Tensor, Record]:
        """x_{j+1} from x_j, and what `back` will need of this step.

        That is x_j; or a compiled step's residuals: x_j in a list where those take more bytes, unless the sweep is
        unrolled.
        """
        if self._graphs:
            step, outer = self._step(joint_step, x, j), Step(outer_step, layout=self._layout)
            if found := self._graphs.first(step, self._seen(j), x, self._rates[j], (outer, self.tasks)):
                count_rows("gradients", len(x))
                return found
        return self.inner(x, j), x

    def outer(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """b1 = ∂L_out/∂θ, None where L_out is free of θ, and b2 = ∂L_out/∂x."""
        count_rows("gradients", len(x))
        if self._graphs:
            b1, b2 = self._graphs.run(Step(outer_step, layout=self._layout), self.tasks, x)
            return b1, cast(Tensor, b2)
        return outer_gradients(self.problem, self.theta, x, self.tasks)

    def back(self, record: Record, j: int, b1: Tensor | None, b2: Tensor) -> tuple[Tensor | None, Tensor]:
        """b1, with what b2 gives it through θ in step j + 1, and b2 pulled back to x_j: (8)–(9).

        `record` is x_j, or what `record` kept of the step from it.
        """
        count_rows("hessian_vector_products", len(b2))
        h1: Tensor | None
        earlier: Tensor | None
        if self._graphs is None and self._layout is None:
            h1, h2 = hessian_vector_products(self.problem, self.theta, cast(Tensor, record), self._seen(j), b2)
            earlier = None if h2 is None else b2.sub(h2, alpha=self._alphas[j])
        elif self._graphs is None:
            theta, x = leaf(self.theta), leaf(cast(Tensor, record))
            h1, earlier = pulled_back(self.following(theta, x, j)[0], theta, x, b2)
        elif isinstance(record, Tensor):
            step = self._step(backward_step, record, j)
            h1, earlier = self._graphs.run(step, self._seen(j), record, self._rates[j], b2)
        else:
            step = self._step(joint_step, b2, j)
            h1, earlier = self._graphs.second(step, self._seen(j), self._rates[j], b2, record)
        scale = self._alphas[j] if self._layout is None else -1.0
        return minus(b1, scale, h1), b2 if earlier is None else earlier

    def held(self, x: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """x_{j+1} from x_j, and ∂L_in/∂φ at x_j."""
        count_rows("gradients", len(x))
        return self.following(self.theta, leaf(x), j, graph=False)

    def held_back(self, x: Tensor, g: Tensor, j: int, b1: Tensor | None, b2: Tensor) -> tuple[Tensor | None, Tensor]:
        """As `back`, with the gradient g of the step held constant; neither a gradient nor a product is taken."""
        if self._layout is None:
            return b1, b2
        theta, x = leaf(self.theta), leaf(x)
        following = updated(self.problem, self._layout, theta, x, g, self._seen(j), j)
        h1, b2 = pulled_back(following, theta, x, b2)
        return minus(b1, -1.0, h1), b2

    def _seen(self, j: int) -> Tasks:
        return inner_tasks(self.problem, self.tasks, j)

    def _step(self, function: Callable[..., Found], x: Tensor, j: int) -> Step:
        """The step to trace; all j share one where the update does the same at each."""
        if self._layout is None:
            return Step(function)
        return Step(function, j if self._numbered(x) else 0, self._layout)

    def _numbered(self, x: Tensor) -> bool:
        """Whether the update uses j, by its traces at every j; found once for each shape."""
        known, key = kept(self.problem, "numbered"), (x.dtype, x.device, x.shape[1:])
        if key not in known:
            tasks, layout = inner_tasks(self.problem, self.tasks.take(slice(1)), 0), cast(Layout, self._layout)

            def step(theta: Tensor, x: Tensor, g: Tensor, *parts: Tensor, j: int) -> Found:
                return (updated(self.problem, layout, theta, x, g, Tasks(parts, tasks.form), j),)

            given = (self.theta[:1], x[:1], x[:1, : layout.p], *tasks.parts)
            known[key] = differ([partial(step, j=j) for j in range(self.problem.r)], given)
        return bool(known[key])


def minus(b1: Tensor | None, alpha: float, h1: Tensor | None) -> Tensor | None:
    """b1 − α·h1, where None stands for an identical zero."""
    if h1 is None:
        return b1
    return -alpha * h1 if b1 is None else b1.sub(h1, alpha=alpha)
