"""Warm starts: the last inner state of each task of a finite Ω is where its inner loop starts the next time."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor

from ufom_runtime.algorithms import first_state, inner_gd
from ufom_runtime.problem import BilevelProblem, Task, Tasks
from ufom_runtime.steps import Steps
from ufom_theory import UfomError

States = tuple[Tensor, Tensor]
"""The last φ_r of each task of Ω, shape (N, p), and which of them have one, boolean, shape (N,)."""


@dataclass(frozen=True, eq=False)
class WarmStarts:
    """A problem whose inner loops start where they last ended; before a task's first visit at V(θ, T).

    A stored state is a constant of the task: from then on ∂V/∂θ = 0.

    Attributes:
        problem: the problem of tasks that carry their state; its start is torch.where(seen, φ, V(θ, T)).
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

        kept = {field.name: getattr(problem, field.name) for field in fields(BilevelProblem) if field.init}
        changed = {
            "inner_loss": lambda theta, phi, task: inner(theta, phi, plain(task)),
            "outer_loss": lambda theta, phi, task: outer(theta, phi, plain(task)),
            "start": lambda theta, task: torch.where(task[-1], task[-2], start(theta, plain(task))),
        }
        return cls(BilevelProblem(**{**kept, **changed}), known)

    def begin(self, theta: Tensor, problem: BilevelProblem) -> States:
        """No task has a state; `problem` is the plain one."""
        phi = first_state(problem, theta[None], self.known.take(slice(0, 1)))
        states = phi.new_zeros(len(self.known), phi.shape[1])
        return states, torch.zeros_like(states[:, 0], dtype=torch.bool)

    def sample(self, n: int, generator: Generator, states: States) -> tuple[Tensor, Task]:
        """n indices into Ω, those that `BilevelProblem.sample` draws, and the tasks with their states."""
        index = torch.randint(len(self.known), (n,), generator=generator, device="cpu")
        own = tuple(x[index.to(x.device)] for x in states)
        return index, (*self.known.take(index).parts, *own)

    def after(self, theta: Tensor, index: Tensor, tasks: Task, states: States, compile: bool) -> States:
        """The states after the inner loops of these tasks at θ: r gradients a task, which are counted."""
        rows, stack = theta.expand(len(index), -1), Tasks.of(tasks)
        steps = Steps(self.problem, rows, stack, compile=compile)
        phi, _ = inner_gd(steps, first_state(self.problem, rows, stack))
        found, seen = (x.clone() for x in states)
        found[index.to(found.device)], seen[index.to(seen.device)] = phi.detach(), True
        return found, seen
