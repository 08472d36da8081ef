"""What a run costs, in two accounts: with all inner states stored, and with each state recomputed, as the paper counts.

θ does not depend on the account: the two sweeps give the same gradients. So one run is charged both ways.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from studies.shared.timing import seconds
from studies.shared.training import rounded
from ufom_runtime import FOM, AdaptiveUFOM, Estimator, hypergradient, outer_sgd
from ufom_runtime.coins import Draws, toss
from ufom_runtime.derivatives import count_rows
from ufom_runtime.estimators import Direction, Method, State
from ufom_runtime.measure.clock import took
from ufom_runtime.methods.adaptive import AdaptiveState
from ufom_runtime.problem import BilevelProblem, Task, Tasks, one_theta
from ufom_theory import CostModel, Sweep, Truncated

UNROLLED = Estimator(1.0, Sweep.unrolled())  # the quickest exact gradient; its calls are those of the stored sweep
SWEEPS = {"recomputed": Sweep.recomputed(), "stored": Sweep.stored()}  # of the accounts of calls
ACCOUNTS = {"recomputed": "states recomputed", "stored": "states stored", "seconds": "seconds"}


@dataclass(frozen=True)
class Price:
    """What one task costs in function calls: gradients of the losses and Hessian-vector products.

    Attributes:
        r: inner steps.
        gradients, products: of every task.
        more_gradients, more_products: of a corrected one besides, with the states stored.
        again: gradients of a corrected one besides, where each state is recomputed.
    """

    r: int
    gradients: int
    products: int
    more_gradients: int
    more_products: int
    again: float

    @classmethod
    def truncated(cls, r: int, kept: int = 0) -> Price:
        """Of UFOM on a proxy that keeps K backward steps; K = 0: of exact, FOM and the paper's rules."""
        cost = CostModel(r=r, proxy=Truncated(kept), as_printed=True)
        return cls(r, r + 1, kept, 0, r - kept, float(cost.c_rnd) - (r - kept))

    @classmethod
    def debiased(cls, r: int, gradients: float, products: float) -> Price:
        """Of UFOM on another proxy, at the calls of that: a corrected task goes through the inner loop again."""
        return cls(r, int(gradients), int(products), r + 1, r, r * (r - 1) / 2)

    @classmethod
    def reptile(cls, r: int) -> Price:
        """Of Reptile: the inner loop alone."""
        return cls(r, r, 0, 0, r, 0.0)

    @property
    def cost(self) -> CostModel:
        """C_det and C_rnd, with the states recomputed."""
        again = self.more_gradients + self.more_products + self.again
        return CostModel.of(float(self.gradients + self.products), float(again))

    def charge(self, log: Any, batch: int = 1) -> dict[str, Any]:
        """The calls so far in both accounts, and the tasks corrected; of a log of `train`, or of a row of one.

        Exact gradients that belong to no step, by which the law of one step measures curvatures, are charged too.
        """
        tasks, made = batch * log["step"], log["gradients"] + log["hessian_vector_products"]
        others = 0.0 if self.more_gradients else (log["gradients"] - self.gradients * tasks) / (self.r + 1)
        corrected = (log["hessian_vector_products"] - self.products * tasks - self.r * others) / self.more_products
        again = self.again * corrected + self.r * (self.r - 1) / 2 * others
        return {"corrected": corrected, "stored": made, "recomputed": made + again}


@dataclass(frozen=True)
class OnZero(AdaptiveUFOM):
    """The paper's rule where the first-order gradient is zero at every θ: a task whose coin is 0 computes nothing.

    Its estimate is the exact gradient times ξ/q. The inner loop of a task with coin 0 is counted, since the rule does
    not know that it need not be run.
    """

    def direction(
        self,
        problem: BilevelProblem,
        theta: Tensor,
        tasks: Task | Tasks,
        state: State = (),
        draws: Draws = None,
        **options: Any,
    ) -> Direction:
        """As `AdaptiveUFOM.direction`, of one task; with no `per_task`."""
        now = AdaptiveState(*(state or self.begin()))  # type: ignore[arg-type]
        columns = dict(zip(("q", "d2", "v2"), (now.q, *self.estimates(now)), strict=True))
        if not toss(1, now.q, draws).item():
            count_rows("gradients", problem.r + 1)
            return Direction(torch.zeros_like(theta), state=now, columns=columns)
        gradient = hypergradient(problem, theta, tasks, UNROLLED, **options)
        square = float(gradient.double().square().sum())
        later = self.update(now, square, square, problem.r)
        return Direction(gradient / now.q, corrected=1, state=later, columns=columns)

    def costs(self, r: int) -> CostModel:
        """The paper's cost, with C1 = C2 = 1 and the states recomputed."""
        return CostModel(r=r, as_printed=True)


def budgets(config: Any) -> dict[str, float]:
    """Function calls to be spent in each account; of a configuration or a cell's.

    `recomputed` and `stored` are outer steps of the exact gradient, each on `batch` tasks, or on one.
    """
    values = config if isinstance(config, Mapping) else vars(config)
    costs = {name: CostModel(values["r"], sweep=sweep, as_printed=True) for name, sweep in SWEEPS.items()}
    batch = values.get("batch", 1)
    return {name: float(values[name] * batch * (cost.c_det + cost.c_rnd)) for name, cost in costs.items()}


def start_row(scores: Mapping[str, float]) -> dict[str, float]:
    """The row of step 0, before anything is spent."""
    spent = ("corrected", "stored", "recomputed", "gradients", "hessian_vector_products")
    return {"step": 0, **dict.fromkeys(spent, 0.0), **scores}


def run_until_spent(
    problem: BilevelProblem,
    rule: Method,
    price: Price,
    cell: Mapping[str, Any],
    constant: Mapping[str, float],
    evaluate: Callable[[Tensor], dict[str, float]],
    began: tuple[float, float],
    batch: int = 1,
    **options: Any,
) -> list[dict[str, Any]]:
    """The logged rows of a run from θ_0 until the budgets of both accounts are spent.

    `cell` has the budgets and the seed, `constant` the columns that do not change, and `began` is `now()` when the cell
    was begun; the options are those of `outer_sgd`.
    """
    limits, theta = budgets(cell), one_theta(problem)
    run = outer_sgd(
        problem,
        theta,
        rule,
        steps=math.ceil(max(limits.values()) / (batch * price.gradients)),
        seed=cell["seed"],
        batch=batch,
        evaluate=evaluate,
        until=lambda row: all(price.charge(row, batch)[account] >= limit for account, limit in limits.items()),
        **options,
    )
    log = run.log.assign(**price.charge(run.log, batch)).drop(columns=["gamma", "exact", "seconds"])
    log = pd.concat([pd.DataFrame([start_row(evaluate(theta))]), log], ignore_index=True).assign(**constant)
    log["cpu"], log["wall"] = (end - begin for begin, end in zip(began, now(), strict=True))
    return rounded(log)


def now() -> tuple[float, float]:
    """CPU and wall seconds."""
    return time.process_time(), time.perf_counter()


def clock(problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> dict[str, float]:
    """Seconds of a gradient, c1, and of a Hessian-vector product, c2, of a task in this batch; the least of three.

    CPU seconds; on a GPU, which the CPU waits for, those of the clock on the wall.
    """

    def least(estimator: Estimator) -> float:
        call = partial(hypergradient, problem, theta, tasks, estimator)
        times = (took(call, theta.device) if theta.is_cuda else seconds(call, time.process_time) for _ in range(3))
        return min(times) / len(tasks)

    first, exact = least(FOM), least(UNROLLED)
    return {"c1": first / (problem.r + 1), "c2": (exact - first) / problem.r}
