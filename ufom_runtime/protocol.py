"""The one protocol for what gives an outer direction, and what is not one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import ClassVar, Protocol, Self

from torch import Tensor

from ufom_runtime.batching import refuse_divergence
from ufom_runtime.coins import Draws
from ufom_runtime.problem import BilevelProblem, Task, Tasks
from ufom_theory import Sweep, Truncated, UfomError

State = tuple[float | Tensor, ...]
"""What a method remembers between outer steps: plain numbers and flat tensors, so that a checkpoint can hold them."""


@dataclass(frozen=True, eq=False)
class Direction:
    """What a method gives at one θ for one batch of tasks.

    Attributes:
        value: the mean over the batch, shape (s,), finite.
        per_task: each task's own direction, shape (n, s); None where it was not asked for.
        corrected: tasks whose coin ξ was 1.
        state: what the method remembers for its next step; empty for a stateless one.
        columns: what else it reports, for the log of a run.
    """

    value: Tensor
    per_task: Tensor | None = None
    corrected: int = 0
    state: State = ()
    columns: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_divergence(self.value if self.per_task is None else self.per_task)

    @classmethod
    def of(
        cls, estimates: Tensor, corrected: int, state: State = (), columns: Mapping[str, float] | None = None
    ) -> Self:
        """From the mean over the batch, shape (s,), or from each task's estimate, shape (n, s)."""
        each = estimates if estimates.ndim == 2 else None
        return cls(estimates if each is None else each.mean(0), each, corrected, state, columns or {})


class Method(Protocol):
    """Whatever gives an outer direction; `train` runs any of them.

    FOM, EXACT, UFOM(q) and the methods of `ufom_runtime.methods` are stateless; AdaptiveUFOM keeps a state.
    """

    gradient: ClassVar[bool]
    """Whether the direction stands for a gradient, of M or of another objective; Reptile's does not."""

    def begin(self) -> State:
        """The state before the first step; empty for a stateless method."""

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
        """The direction at θ, shape (s,), for n stacked tasks.

        `draws` must not be the generator that drew the tasks (Theorem 1).

        Raises:
            UfomError: as `hypergradient`, or a problem for which the method is not valid.
        """


_INSTEAD = {
    str: "is a name, and not the method itself",
    Sweep: "is a sweep, how the exact gradient recovers its states (Estimator(1.0, sweep) is that gradient)",
    Truncated: "is a proxy, which an estimator debiases (Estimator(0.0, proxy=proxy) is the proxy alone)",
    int | float: "is a number, and q goes into an estimator",
    FunctionType: "is a function that makes a method, and has to be called",
}


def refuse_other(method: object) -> None:
    """`UfomError` for what is not a `Method`."""
    if isinstance(method, type):
        raise UfomError(f"{method.__name__} is a class: make a method of it, {method.__name__}(...)")
    if is_method(type(method)):  # type: ignore[arg-type]
        return
    why = next((said for kind, said in _INSTEAD.items() if isinstance(method, kind)), "is not a method")
    shown = getattr(method, "__name__", repr(method))
    raise UfomError(f"{shown} {why}: give FOM, EXACT, UFOM(q, sweep, proxy), or METHODS[name].make(r)")


@cache
def is_method(kind: type) -> bool:
    """Whether objects of this type follow `Method`; `isinstance` with a protocol takes longer than a small gradient."""
    return hasattr(kind, "gradient") and all(callable(getattr(kind, name, None)) for name in ("begin", "direction"))
