"""What the methods of this folder share: one estimate a task, with calls and states declared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ufom_runtime.batching import cut, is_shared, run_each
from ufom_runtime.coins import Draws
from ufom_runtime.derivatives import Calls, Losses, watch_losses
from ufom_runtime.estimators import Direction, State
from ufom_runtime.inspection.draws import refuse_draws
from ufom_runtime.inspection.non_finite import refuse_non_finite
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_runtime.training.seeds import LARGEST_SEED, generator
from ufom_theory import UfomError

Rows = tuple[Tensor, dict[str, Tensor]]  # n estimates, shape (n, s), and columns for the log, each of shape (n,)


class RowMethod(ABC):
    """A stateless `Method` without coins. A new one is a frozen dataclass with the three functions below."""

    gradient: ClassVar[bool] = True

    @abstractmethod
    def rows(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, generator: Generator | None, compile: bool
    ) -> Rows:
        """One estimate a row.

        Args:
            problem: the problem.
            theta: one θ a row, shape (n, s), without a graph.
            tasks: n stacked tasks.
            generator: a CPU generator, for methods that draw.
            compile: whether to compile the `Steps`.

        Returns:
            The estimates, shape (n, s), and columns for the log, each of shape (n,).

        Raises:
            UfomError: a problem for which the method is not valid.
        """

    @abstractmethod
    def calls(self, r: int, s: int = 1) -> Calls:
        """Expected calls for one task, r inner steps and s outer parameters.

        A product of the inner Hessian blocks with a vector counts as one Hessian-vector product, from either side (a
        jvp of ∂L_in/∂φ, too); an outer loss evaluated without its gradient counts as a gradient, though it is cheaper.
        """

    @abstractmethod
    def states(self, r: int, s: int = 1) -> int:
        """The most vectors of length p held for one task, besides those that a step works with; r, s as in `calls`."""

    def begin(self) -> State:
        """The empty state."""
        return ()

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
        """As `estimators.Method.direction`: the estimates of `rows`, and the columns' means.

        Methods that draw do so chunk by chunk; None runs all tasks together. Where processes share the chunks, each
        draws from its own stream.
        """
        tasks = check(problem, theta, tasks)
        if isinstance(draws, Tensor):
            raise UfomError(f"{self!r} tosses no coins: give a generator, if it draws at all")
        n = len(tasks)
        pieces = cut(n, chunk)
        streams = dict(zip((int(piece[0]) for piece in pieces), _streams(draws, len(pieces)), strict=True))
        names: list[str] = []

        def run(piece: Tensor) -> list[Tensor]:
            chosen = tasks if len(piece) == n else tasks.take(piece)
            stream = streams[int(piece[0])]
            rows = theta.detach().expand(len(piece), -1)
            with torch.enable_grad(), watch_losses(seen := Losses()), refuse_draws(stream):
                found, columns = self.rows(problem, rows, chosen, stream, compile)
            refuse_non_finite(problem, rows, chosen, [found], seen, piece.tolist())
            names[:] = columns
            return [found, *columns.values()]

        found = [torch.cat(parts) for parts in zip(*run_each(run, pieces), strict=True)]
        # a process without a chunk knows no names; process 0, which logs them, has one
        columns = {name: float(x.double().mean()) for name, x in zip(names, found[1:], strict=False)}
        return Direction(found[0].mean(0), found[0], columns=columns)


def _streams(draws: Generator | None, n: int) -> list[Generator | None]:
    """What each of n chunks draws from: one generator, in their order, unless other processes run some of them."""
    if not is_shared() or not isinstance(draws, Generator) or draws.device.type != "cpu":
        return [draws] * n
    seed = int(torch.randint(LARGEST_SEED, (), generator=draws, device="cpu"))
    return [generator(seed, chunk, "coins") for chunk in range(n)]
