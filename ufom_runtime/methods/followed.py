"""UFOM around a scaled proxy whose factor follows the run: c* = E⟨G, F⟩/E‖F‖², by the corrected tasks of earlier steps.

c is a function of what is known before the step, never of its tasks or coins: given the past, a step is unbiased.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ufom_runtime.coins import Draws, Parts, estimate, toss, weighed_as
from ufom_runtime.derivatives import Calls
from ufom_runtime.estimators import Direction, Estimator, State
from ufom_runtime.methods.debiased import Debiased
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_theory import UfomError
from ufom_theory.checks import positive, scalar

_ROUNDING = 1e-10  # of ΣF²: a smaller spread within a batch is not told from rounding


@dataclass(frozen=True)
class FollowedScale:
    """c·F + (ξ/q)·(G − c·F) with c = Σ⟨G, F⟩/Σ‖F‖² over the corrected tasks of earlier steps; for `train`.

    UFOM(q, sweep, proxy, scale="followed", coin=coin) makes it. The sums decay by β at each step that corrects a task.
    They are what the coin asks for: with one coin a batch those of the batch's means, with stratified coins covariances
    within a batch, (E⟨G, F⟩ − ⟨g, f⟩)/Var_F, to which a step that corrects one task adds nothing. Before the first of
    them c is the base's scale. The state is two numbers.

    Attributes:
        base: UFOM with a scale of 1.
        beta: β, in (0, 1).

    Raises:
        UfomError: another base, β outside (0, 1).
    """

    base: Estimator | Debiased
    beta: float = 0.95
    gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.base, Estimator | Debiased) or not self.base.q:
            raise UfomError(f"base = {self.base!r:.100}: give UFOM(q, sweep, proxy)")
        if not scalar("beta", self.beta, positive) < 1:
            raise UfomError(f"beta = {self.beta:g} must lie in (0, 1): it is the decay of the averages")

    def calls(self, r: int, s: int = 1) -> Calls:
        """As the base's."""
        return self.base.calls(r, s)

    def states(self, r: int, s: int = 1) -> int:
        """As the base's."""
        return self.base.states(r, s)

    def begin(self) -> State:
        """No sums yet: (0, 0)."""
        return (0.0, 0.0)

    def scale(self, state: State) -> float:
        """The c of the next step."""
        cross, square = (float(x) for x in state)
        return cross / square if square > 0 else self.base.scale

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
        """As `Method.direction`: the estimate at the c in force, a column, and the sums after it.

        Raises:
            UfomError: as `hypergradient`, and a state that is not two numbers, the second ≥ 0.
        """
        now, base = state or self.begin(), self.base
        if len(now) != 2 or not all(torch.as_tensor(x).isfinite().all() for x in now) or float(now[1]) < 0:
            raise UfomError(f"{now} is not a state of this method: give two finite numbers, the second ≥ 0")
        tasks = check(problem, theta, tasks)
        coins, c = toss(len(tasks), base.q, draws, base.coin), self.scale(now)
        parts, columns = base.parts(problem, theta, tasks, coins, chunk, compile)
        sums = _Sums(theta)
        q = weighed_as(coins, base.q, base.coin)
        found = estimate(sums.watch(parts), theta, len(tasks), q, c, per_task)
        later = now if not coins.any() else tuple(
            self.beta * float(old) + new for old, new in zip(now, sums.of(base.coin), strict=True)
        )  # fmt: skip
        return Direction.of(found, int(coins.sum()), later, {**columns, "c": c})


class _Sums:
    """ΣG, ΣF, Σ⟨G, F⟩ and Σ‖F‖² of the corrected tasks that pass."""

    def __init__(self, theta: Tensor) -> None:
        self.exact, self.proxy = (torch.zeros_like(theta, dtype=torch.float64) for _ in range(2))
        self.cross = self.square = 0.0
        self.count = 0

    def watch(self, parts: Parts) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The same parts."""
        for index, proxy, exact in parts:
            if exact is not None:
                f, g = proxy.double(), exact.double()
                self.exact += g.sum(0)
                self.proxy += f.sum(0)
                self.cross += float((f * g).sum())
                self.square += float((f * f).sum())
                self.count += len(f)
            yield index, proxy, exact

    def of(self, coin: str) -> tuple[float, float]:
        """What c is the quotient of, with these coins."""
        means = float(self.exact @ self.proxy) / self.count, float(self.proxy @ self.proxy) / self.count
        if coin == "batch":
            return means
        if coin == "stratified":
            spread = self.square - means[1]  # of one task, or of equal ones, it is rounding alone: c would be anything
            return (self.cross - means[0], spread) if spread > _ROUNDING * self.square else (0.0, 0.0)
        return self.cross, self.square
