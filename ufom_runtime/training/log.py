"""The log of an outer run: when a row is due, what is in it, which is the best, and what ends the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ufom_runtime.derivatives import count_calls
from ufom_runtime.estimators import Direction, State
from ufom_runtime.training.processes import Processes
from ufom_runtime.training.warm import States
from ufom_theory import UfomError
from ufom_theory.checks import integer, plain

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """The end of a run and its log; printing it gives one line.

    Attributes:
        theta: θ after the last step, or of the best logged row with keep="best"; shape (s,).
        log: one row a logged step: step, gamma (the optimizer's rate), exact (tasks whose coin was 1), gradients and
            hessian_vector_products (calls so far), seconds (so far), gradient_norm (before clipping), what the method
            reports (with AdaptiveUFOM the q of this step and the estimates d2 and v2 it came from), and what `evaluate`
            returned.
        step: the step that `theta` is of.
        steps: steps taken.
        ended: by what: "steps", "until", "patience", or "Ctrl-C".
    """

    theta: Tensor
    log: pd.DataFrame
    step: int
    steps: int
    ended: Literal["steps", "until", "patience", "Ctrl-C"]

    def __repr__(self) -> str:
        said = f"Run of {self.steps} steps, ended by {self.ended}, θ of step {self.step}"
        if not len(self.log):
            return said
        last = self.log.iloc[-1]
        columns = ", ".join(f"{name} {last[name]:.4g}" for name in self.log.columns[6:] if _is_number(last[name]))
        return (
            f"{said}: {last.gradients:.0f} gradients, {last.hessian_vector_products:.0f} Hessian-vector products, "
            f"{last.seconds:.3g} s; {columns}"
        )


class Stopped(KeyboardInterrupt):
    """Ctrl-C during `train`; `run` is what was done until then."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"stopped after step {run.steps}; the exception's `run` has θ and the log")
        self.run = run


@dataclass(frozen=True, eq=False)
class Now:
    """A run after a whole step. Nothing in it is changed in place: Ctrl-C comes at any time."""

    theta: Tensor
    step: int = 0
    state: State = ()
    seconds: float = 0.0
    calls: tuple[tuple[str, float], ...] = ()
    outer: Any = None
    logged: int = 0  # regular rows
    last: Row | None = None  # the row of the last step, where it is not a regular one
    warm: States | None = None  # inner states, with warm_start
    best: tuple[int, float, Tensor] | None = None  # regular row, from 0, its value and its θ


@dataclass(frozen=True)
class Best:
    """Which column is made small, and whether θ is kept by it."""

    keep: bool
    column: str | None

    @classmethod
    def of(cls, keep: str, column: str | None, patience: int | None, evaluate: object) -> Best | None:
        if keep not in ("last", "best"):
            raise UfomError(f"keep = {keep!r} must be 'last' or 'best'")
        if patience is not None:
            integer("patience", patience, 1)
        if keep == "last" and patience is None:
            if column is not None:
                raise UfomError(f"column = {column!r} is for keep='best' and patience: give one of them")
            return None
        if column is None and evaluate is None:
            raise UfomError("keep='best' and patience go by a column: give evaluate, or column='gradient_norm'")
        return cls(keep == "best", column)

    def value(self, row: Row, evaluated: list[str]) -> float:
        """The value that is made small; NaN counts as +inf."""
        name = self.column
        if name is None:
            if len(evaluated) != 1:
                raise UfomError(f"evaluate returned {evaluated}: name the one to go by, column=")
            name = evaluated[0]
        if name not in row or not _is_number(row[name]):
            raise UfomError(f"column = {name!r} is not a column of numbers in the log: it has {list(row)}")
        value = float(row[name])
        return value if value == value else float("inf")


class Rows:
    """The log of a run: when a row is due, what is in it, which is the best, and whether it ends the run."""

    def __init__(self, every: int, steps: int, evaluate: Any, best: Best | None, processes: Processes) -> None:
        self.every, self.steps, self.evaluate, self.best, self.processes = every, steps, evaluate, best, processes
        self.regular: list[Row] = []

    def add(self, now: Now, gamma: float, given: Direction) -> Now:
        """`now` with its row, where one is due."""
        regular = now.step % self.every == 0
        if not regular and now.step != self.steps:
            return now
        row, value = self.processes.first(lambda: self._row(now, gamma, given))
        best = now.best
        if self.best and (best is None or value < best[1]):
            best = (now.logged if regular else -1, value, now.theta)
        if not regular:
            return replace(now, last={**row, "best": bool(self.best and best and best[0] == -1)})
        self.regular.append(row)
        return replace(now, logged=now.logged + 1, best=best)

    def _row(self, now: Now, gamma: float, given: Direction) -> tuple[Row, float | None]:
        """The row after a step, and the value that the best is chosen by."""
        row = {"step": now.step, "gamma": gamma, "exact": given.corrected, **dict(now.calls), "seconds": now.seconds}
        row["gradient_norm"] = float(given.value.norm())
        with count_calls():  # evaluation calls are not counted
            columns = self.evaluate(now.theta) if self.evaluate else {}
        if not isinstance(columns, Mapping):
            raise UfomError(f"evaluate returned {columns!r}: it must return names and numbers, {{'loss': 0.1}}")
        row |= given.columns
        if taken := [name for name in columns if name in row]:
            raise UfomError(f"evaluate returned {taken}, columns that the log has already: give them other names")
        row |= {name: plain(value) for name, value in columns.items()}
        return row, self.best.value(row, list(columns)) if self.best else None

    def stop(self, now: Now, until: Any, patience: int | None) -> Literal["until", "patience"] | None:
        """What ends the run before its next step."""
        if until and now.logged and self.processes.first(lambda: bool(until(self.regular[now.logged - 1]))):
            return "until"
        if patience and now.best and now.logged - 1 - now.best[0] >= patience:
            return "patience"
        return None

    def run(self, now: Now, ended: Any) -> Run:
        """What `train` returns."""
        import pandas as pd

        rows = self.regular[: now.logged]
        theta, step = now.theta, now.step
        last = dict(now.last) if now.last else None
        newest_is_best = last.pop("best") if last else False
        if self.best and self.best.keep and now.best and not newest_is_best:
            theta, step = now.best[2], rows[now.best[0]]["step"]
        return Run(theta, pd.DataFrame([*rows, last] if last else rows), step, now.step, ended)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
