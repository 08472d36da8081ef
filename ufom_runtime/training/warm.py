"""Warm starts: the last inner state of each task of a finite Ω is where its inner loop starts the next time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor

from ufom_runtime.algorithms import first_state, inner_loop
from ufom_runtime.batching import cut, run_each
from ufom_runtime.derivatives import layout_of
from ufom_runtime.inner import State, Update
from ufom_runtime.problem import BilevelProblem, Task, Tasks
from ufom_runtime.states import Layout
from ufom_runtime.steps import Steps
from ufom_theory import UfomError

States = tuple[Tensor, Tensor]
"""The last x_r of each task of Ω, φ_r and the inner update's state, shape (N, P); and which have one, shape (N,)."""


@dataclass(frozen=True, eq=False)
class WarmStarts:
    """A problem whose inner loops start where they last ended; before a task's first visit at V(θ, T).

    A stored state is a constant of the task: from then on ∂V/∂θ = 0.

    Attributes:
        problem: the problem of tasks that carry their state; its start is torch.where(seen, φ, V(θ, T)), and its
            update's first state likewise.
        known: Ω.
    """

    problem: BilevelProblem
    known: Tasks

    @classmethod
    def of(cls, problem: BilevelProblem) -> WarmStarts:
        """Of a problem with a finite Ω; `UfomError` for another."""
        if problem.tasks is None or problem.sample_tasks is not None:
            raise UfomError(
                "warm_start=True keeps one inner state for each task of a finite Ω, but this problem samples them: "
                "give it tasks instead of sample_tasks"
            )
        inner, outer, start, known = problem.inner_loss, problem.outer_loss, problem.start, Tasks.of(problem.tasks)

        def plain(task: Task) -> Task:
            return known.form(tuple(task[:-2]))

        def warm(theta: Tensor, task: Task) -> Tensor:
            phi = start(theta, plain(task))
            return torch.where(task[-1], task[-2][: len(phi)], phi)

        batch = problem.inner_batch
        kept = {field.name: getattr(problem, field.name) for field in fields(BilevelProblem) if field.init}
        changed = {
            # with an inner_batch the inner loop sees only what that makes of the plain task
            "inner_loss": inner if batch else lambda theta, phi, task: inner(theta, phi, plain(task)),
            "outer_loss": lambda theta, phi, task: outer(theta, phi, plain(task)),
            "start": warm,
            "inner_batch": batch and (lambda task, j: batch(plain(task), j)),
            "update": problem.update and _WarmUpdate(problem.update, plain, batch is None),
        }
        return cls(BilevelProblem(**{**kept, **changed}), known)

    def begin(self, theta: Tensor, problem: BilevelProblem) -> States:
        """No task has a state; `problem` is the plain one."""
        one = self.known.take(slice(0, 1))
        x = first_state(problem, theta[None], one)
        if isinstance(self.problem.update, _WarmUpdate):
            self.problem.update.layout = layout_of(problem, theta[None], one)
        n = len(self.known)
        return x.new_zeros(n, x.shape[1]), torch.zeros(n, dtype=torch.bool, device=x.device)

    def sample(self, n: int, generator: Generator, states: States) -> tuple[Tensor, Task]:
        """n indices into Ω, those that `BilevelProblem.sample` draws, and the tasks with their states."""
        index = torch.randint(len(self.known), (n,), generator=generator, device="cpu")
        own = tuple(x[index.to(x.device)] for x in states)
        return index, (*self.known.take(index).parts, *own)

    def after(self, theta: Tensor, index: Tensor, tasks: Task, states: States, compile: bool) -> States:
        """The states after the inner loops of these tasks at θ: r gradients a task, which are counted."""
        stack = Tasks.of(tasks)

        def run(piece: Tensor) -> list[Tensor]:
            rows, some = theta.expand(len(piece), -1), stack.take(piece)
            steps = Steps(self.problem, rows, some, compile=compile)
            return [inner_loop(steps, first_state(self.problem, rows, some))]

        x = torch.cat([x for (x,) in run_each(run, cut(len(index), None))])
        found, seen = (x.clone() for x in states)
        found[index.to(found.device)], seen[index.to(seen.device)] = x.detach(), True
        return found, seen


class _WarmUpdate:
    """An inner update whose state starts as the task carries it, once there is one."""

    def __init__(self, update: Update, plain: Callable[[Task], Task], carried: bool) -> None:
        self._update, self._plain, self._carried = update, plain, carried
        self.layout: Layout | None = None

    def init(self, theta: Tensor, phi: Tensor, task: Task) -> State:
        """The state before the first step, or that after the last one."""
        assert self.layout is not None
        fresh = self.layout.join(phi, self._update.init(theta, phi, self._plain(task)))
        return self.layout.split(torch.where(task[-1], task[-2], fresh))[1]

    def update(
        self, theta: Tensor, phi: Tensor, state: State, grad: Tensor, task: Task, j: int
    ) -> tuple[Tensor, State]:
        """The update's own step."""
        return self._update.update(theta, phi, state, grad, self._plain(task) if self._carried else task, j)
