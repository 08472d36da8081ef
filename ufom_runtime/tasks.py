"""Stacks of tasks, and what a loss sees of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ufom_theory import UfomError

Task = Tensor | tuple[Tensor, ...]  # what a loss sees: a tensor, a tuple or a named tuple of tensors
Form = Callable[[tuple[Tensor, ...]], Task]  # makes a task from its tensors


@dataclass(frozen=True, eq=False)
class Tasks:
    """n ≥ 1 tasks, stacked in the leading dimension of every tensor; `len` is n.

    Attributes:
        parts: the stacked tensors.
        form: makes the task that a loss sees from one tensor for each part: alone, in a tuple or in a named tuple.
    """

    parts: tuple[Tensor, ...]
    form: Form = tuple

    @classmethod
    def of(cls, tasks: Task | Tasks) -> Tasks:
        """What a user gives as a stack of tasks; `UfomError` where it is not one."""
        if isinstance(tasks, Tasks):
            return tasks
        parts = tasks if isinstance(tasks, tuple) else (tasks,)
        if not parts or not all(isinstance(t, Tensor) for t in parts):
            inside = f" of {', '.join(sorted({type(t).__name__ for t in parts}))}" if isinstance(tasks, tuple) else ""
            raise UfomError(
                f"tasks must be a tensor or a tuple of tensors, not a {type(tasks).__name__}{inside}: "
                "torch.stack the tasks' inputs, their targets and so on, each in the leading dimension"
            )
        for t in parts:
            if t.is_nested or t.layout is not torch.strided:
                raise UfomError(
                    "a tensor of the tasks is nested or sparse: give dense tensors, with all tasks padded to one size "
                    "and a mask for the losses among them"
                )
        if not all(t.ndim for t in parts):
            raise UfomError("a tensor of the tasks has no dimensions: the leading one numbers the tasks; give t[None]")
        lengths = {len(t) for t in parts}
        if len(lengths) > 1:
            raise UfomError(
                f"the tensors of the tasks have leading dimensions {sorted(lengths)}: stack equally many in each; "
                "a single task is given as t[None], for every tensor t of it"
            )
        if lengths == {0}:
            raise UfomError(
                "there are no tasks: the leading dimension of every tensor is the number of tasks, at least 1"
            )
        return cls(parts, _alone if isinstance(tasks, Tensor) else getattr(type(tasks), "_make", tuple))

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def ranks(self) -> tuple[int, ...]:
        """The number of dimensions of each stacked tensor."""
        return tuple(t.ndim for t in self.parts)

    @property
    def stack(self) -> Task:
        """The stacked tensors in the form that the user gave them in."""
        return self.form(self.parts)

    def take(self, index: Tensor | slice) -> Tasks:
        """The tasks at `index` (on the CPU)."""
        return self._each(lambda t: t[index if isinstance(index, slice) else index.to(t.device)])

    def repeat(self, n: int) -> Tasks:
        """The only task n times, without copies."""
        return self._each(lambda t: t.expand(n, *t.shape[1:]))

    def one(self) -> Task:
        """The only task, as a loss sees it."""
        # squeezed, not indexed: the derivative of an index fills and copies a tensor, that of a view costs nothing
        return self.form(tuple(t.squeeze(0) for t in self.parts))

    def to(self, dtype: torch.dtype) -> Tasks:
        """The same tasks with all floating-point tensors in `dtype`."""
        return self._each(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def map(self, change: Callable[[Task], Task]) -> Tasks:
        """`change` of every task, by vmap; what it returns is stacked again."""
        if len(self) == 1:
            changed = Tasks._of_one(change(self.one()))
            return Tasks(tuple(t[None] for t in changed.parts), changed.form)
        forms = []

        def parts(*row: Tensor) -> tuple[Tensor, ...]:
            changed = Tasks._of_one(change(self.form(row)))
            forms.append(changed.form)
            return changed.parts

        return Tasks(torch.func.vmap(parts)(*self.parts), forms[0])

    @classmethod
    def _of_one(cls, task: Task) -> Tasks:
        """The tensors of one task and its form, not stacked."""
        parts = task if isinstance(task, tuple) else (task,)
        if not parts or not all(isinstance(t, Tensor) for t in parts):
            raise UfomError(f"a task must be a tensor or a tuple of tensors, not a {type(task).__name__}")
        return cls(parts, _alone if isinstance(task, Tensor) else getattr(type(task), "_make", tuple))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Tasks:
        return Tasks(tuple(change(t) for t in self.parts), self.form)


def _alone(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0]
