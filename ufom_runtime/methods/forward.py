"""Forward differentiation (Franceschi et al. 2017): dφ_j/dθ is carried along with φ_j, and no state is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import grad, jvp, vmap
from torch.nn.functional import one_hot

from ufom_runtime.derivatives import Calls, by_row, count_rows
from ufom_runtime.methods.method import RowMethod, Rows
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_runtime.steps import Steps
from ufom_theory.checks import integer, scalar


@dataclass(frozen=True)
class Forward(RowMethod):
    """The exact gradient by s tangents dφ_j/dθ_i, a jvp of ∂L_in/∂φ for each of them and each step.

    For few outer parameters: it takes r·s products, where the backward loop takes r. Valid wherever the losses and the
    start have forward-mode derivatives.

    Attributes:
        chunk: tangents carried together, each a vector of length p; the loop is run again for every such part of the
            basis. None: all s of them.

    Raises:
        UfomError: chunk no integer ≥ 1; when it runs, an operation that has no forward-mode derivative.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None:
            scalar("chunk, the tangents carried together,", self.chunk, integer, 1)

    def calls(self, r: int, s: int = 1) -> Calls:
        """r gradients for every part of the basis and one of the outer loss; r·s products."""
        return Calls(r * -(-s // (self.chunk or s)) + 1, r * s)

    def states(self, r: int, s: int = 1) -> int:
        """The tangents carried together, whatever r."""
        return min(self.chunk or s, s)

    def rows(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, generator: Generator | None, compile: bool
    ) -> Rows:
        """As `RowMethod.rows`."""
        n, s = theta.shape
        inner_gradient = grad(problem.inner_loss, argnums=1)
        pieces: list[Tensor] = []
        b1: Tensor | None = None
        with torch.no_grad(), warnings.catch_warnings():
            # torch loads its forward-mode rules, once, by a part of its own that it has deprecated
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
            for part in torch.split(torch.arange(s, device=theta.device), self.chunk or s):
                basis = one_hot(part, s).to(theta.dtype)
                phi, tangents = _push("start", problem.start, basis, theta, tasks=tasks)
                for alpha in problem.alphas:
                    count_rows("gradients", n)
                    count_rows("hessian_vector_products", n * len(part))
                    slope, turned = _push("inner_loss", inner_gradient, basis, theta, phi, tangents, tasks=tasks)
                    phi, tangents = phi.sub(slope, alpha=alpha), tangents.sub(turned, alpha=alpha)
                if not pieces:
                    with torch.enable_grad():
                        b1, b2 = Steps(problem, theta, tasks, compile=compile).outer(phi)
                pieces.append(torch.einsum("ncp,np->nc", tangents, b2))
        gradient = torch.cat(pieces, dim=1)
        return gradient if b1 is None else gradient + b1, {}


def _push(
    name: str, function: Callable[..., Tensor], basis: Tensor, theta: Tensor, *state: Tensor, tasks: Tasks
) -> tuple[Tensor, Tensor]:
    """`function`(θ, [φ,] task), shape (n, p), and its derivatives along the basis, (n, c, p); state: [φ, dφ]."""

    def one(theta: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *state, task = rest
        phi, along = state[:1], state[1:]

        def push(*tangents: Tensor) -> tuple[Tensor, Tensor]:
            value, along = jvp(lambda *point: function(*point, task), (theta, *phi), tangents)[:2]
            return value, along

        values, derivatives = vmap(push)(basis, *along)
        return values[0], derivatives

    value, derivatives = by_row(name, one, theta, *state, tasks=tasks)
    return (value[None], derivatives[None]) if len(theta) == 1 else (value, derivatives)
