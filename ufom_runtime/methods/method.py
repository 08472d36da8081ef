"""What every rival is: one estimate a task, calls and states declared, for `hypergradient` and `outer_sgd` alike."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor

from ufom_runtime.derivatives import Calls
from ufom_runtime.estimators import refuse_divergence
from ufom_runtime.problem import BilevelProblem, Task, check, count, take
from ufom_theory.checks import integer

Rows = tuple[Tensor, dict[str, Tensor]]  # n estimates, shape (n, s), and columns for the log, each of shape (n,)


class Method(ABC):
    """A way to ∇M that is not a proxy and a coin. A new one is a frozen dataclass with the three functions below."""

    @abstractmethod
    def rows(
        self, problem: BilevelProblem, theta: Tensor, tasks: Task, generator: Generator | None, compile: bool
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

    def per_task(
        self,
        problem: BilevelProblem,
        theta: Tensor,
        tasks: Task,
        generator: Generator | None = None,
        chunk: int | None = None,
        compile: bool = False,
    ) -> Rows:
        """The estimates of all tasks at one θ.

        Args:
            problem: the problem.
            theta: outer parameters, shape (s,).
            tasks: n stacked tasks.
            generator: a CPU generator, for methods that draw; not the one that draws the tasks.
            chunk: tasks run together; None: all of them. Methods that draw do so chunk by chunk.
            compile: as in `hypergradient`; a method ignores it where it takes no plain inner steps.

        Returns:
            As `rows`.

        Raises:
            UfomError: as `hypergradient`, or a problem for which the method is not valid.
        """
        check(problem, theta, tasks)
        n = count(tasks)
        found = []
        with torch.enable_grad():
            for piece in torch.split(torch.arange(n), n if chunk is None else integer("chunk", chunk, 1)):
                chosen = tasks if len(piece) == n else take(tasks, piece)
                rows = theta.detach().expand(len(piece), -1)
                found.append(self.rows(problem, rows, chosen, generator, compile))
        gradients = refuse_divergence(torch.cat([g for g, _ in found]))
        return gradients, {name: torch.cat([columns[name] for _, columns in found]) for name in found[0][1]}

    def begin(self) -> tuple[float, ...]:
        """The state before the first step of `outer_sgd`: nothing is remembered."""
        return ()

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
        """For `outer_sgd`: the mean estimate, shape (s,); no coins; the empty state; the columns' means."""
        gradients, columns = self.per_task(problem, theta, tasks, generator, chunk, compile)
        return gradients.mean(0), 0, (), {name: float(column.double().mean()) for name, column in columns.items()}
