"""Forward differentiation (Franceschi et al. 2017): dφ_j/dθ is carried along with φ_j, and no state is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ufom_runtime.derivatives import Calls, count_rows, derivative, leaf, start
from ufom_runtime.methods.method import RowMethod, Rows
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_runtime.steps import Steps
from ufom_theory.checks import integer, scalar


@dataclass(frozen=True)
class Forward(RowMethod):
    """The exact gradient by s tangents dφ_j/dθ_i, each multiplied by the inner Hessian blocks at every step.

    For few outer parameters: it takes r·s products, where the backward loop takes r. The products are taken by reverse
    mode twice, v ↦ d(uᵀJ)/du·v, so that what a loss detaches is a constant here as in every sweep.

    Attributes:
        chunk: tangents carried together, each a vector of length p; the loop is run again for every such part of the
            basis. None: all s of them.

    Raises:
        UfomError: chunk is not an integer ≥ 1; when it runs, an operation that cannot be differentiated three times.
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
        steps = Steps(problem, theta, tasks, compile=compile)
        basis = torch.eye(s, dtype=theta.dtype, device=theta.device)
        columns: list[Tensor] = []
        b1: Tensor | None = None
        for part in torch.split(basis, self.chunk or s):
            theta = leaf(theta)
            state = start(problem, theta, tasks)
            x, tangents = leaf(state), along("start", state, (theta,), [(v.expand(n, s),) for v in part])
            for j in range(problem.r):
                count_rows("gradients", n)
                count_rows("hessian_vector_products", n * len(part))
                following, _ = steps.following(theta, x, j)
                moves = [(v.expand(n, s), tangent) for v, tangent in zip(part, tangents, strict=True)]
                tangents = along("the inner step", following, (theta, x), moves)
                x = leaf(following)
            if not columns:
                b1, b2 = steps.outer(x.detach())
            columns += [(tangent * b2).sum(1) for tangent in tangents]
        gradient = torch.stack(columns, dim=1)
        return gradient if b1 is None else gradient + b1, {}


def along(name: str, of: Tensor, at: tuple[Tensor, ...], moves: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The derivative of `of`, shape (n, p), a function of `at`, along each move: one tensor for each of `at`."""
    if not of.requires_grad:
        return [torch.zeros_like(of) for _ in moves]
    u = torch.zeros_like(of, requires_grad=True)
    pulled = derivative(name, of, at, grad_outputs=u, create_graph=True)  # linear in u, and its derivative the product
    used = {i: x for i, x in enumerate(pulled) if x is not None and x.requires_grad}
    if not used:
        return [torch.zeros_like(of) for _ in moves]
    linear = torch.cat(list(used.values()), dim=1)
    found = []
    for move in moves:
        (product,) = derivative(
            name, linear, (u,), grad_outputs=torch.cat([move[i] for i in used], dim=1), retain_graph=True
        )
        found.append(torch.zeros_like(of) if product is None else product)
    return found
