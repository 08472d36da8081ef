"""A schedule of two methods: one until a given step, the other after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ufom_runtime.coins import Draws
from ufom_runtime.estimators import Direction, Method, State, refuse_other
from ufom_runtime.problem import BilevelProblem, Task, Tasks
from ufom_theory import UfomError
from ufom_theory.checks import integer, scalar


@dataclass(frozen=True)
class Switch:
    """`first` for the outer steps 1 … until, `then` from step until + 1 on; for `train`, which keeps its state.

    The state is the number of steps taken, then the state of each of the two.

    Attributes:
        first: any method that gives a gradient, FOM for example.
        until: the last step of `first`, ≥ 1.
        then: any method that gives a gradient.

    >>> from ufom_runtime import FOM, UFOM
    >>> Switch(FOM, until=100, then=UFOM(0.2)).begin()
    (0,)

    Raises:
        UfomError: what is not a method or gives no gradient, until < 1.
    """

    first: Method
    until: int
    then: Method
    gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "until", scalar("until, the last step of the first method,", self.until, integer, 1))
        for method in (self.first, self.then):
            refuse_other(method)
            if not method.gradient:
                raise UfomError(f"{method!r} gives a direction that is not a gradient: run it by itself")

    def begin(self) -> State:
        """The state before the first step."""
        return (0, *self.first.begin(), *self.then.begin())

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
        """As `Method.direction`: that of the method in force. An empty `state` is `begin()`.

        Raises:
            UfomError: as the method in force, and a state of another length or with a negative step.
        """
        now, middle = state or self.begin(), 1 + len(self.first.begin())
        if len(now) != len(self.begin()) or now[0] < 0:
            raise UfomError(f"{now} is not a state of {self!r}: its first entry is a step ≥ 0, then come the methods'")
        step, before, after = now[0], now[1:middle], now[middle:]
        early = step < self.until
        method, own = (self.first, before) if early else (self.then, after)
        found = method.direction(problem, theta, tasks, own, draws, per_task=per_task, chunk=chunk, compile=compile)
        later = (step + 1, *found.state, *after) if early else (step + 1, *before, *found.state)
        return Direction(found.value, found.per_task, found.corrected, later, found.columns)
