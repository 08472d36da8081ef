"""The problems of `landscape`, each with a finite Ω, and the methods that are run on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ufom_runtime import REPTILE, UFOM, Estimator, hypergradient
from ufom_runtime.estimators import Method
from ufom_runtime.methods import ES, METHODS, GuidedES, RootCheckpointing, Telescoping
from ufom_runtime.problem import BilevelProblem, Task, Tasks, one_theta
from ufom_runtime.problems.few_shot import omniglot_few_shot
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory import Choice, Moments, Sweep, Truncated, UfomError, counted_candidates, plan

F64 = torch.float64
PLANNED = "ufom-truncated-checkpointed"  # where METHODS has the planned member of the debiased family
Rows = Callable[[Tasks], Tensor]  # n tasks → one gradient a task, shape (n, s)


@dataclass(frozen=True)
class Setting:
    """A problem at one length of the inner loop.

    Attributes:
        name: in tables and figures, the same for all r.
        problem: one of `MAKERS`.
        r: inner steps.
        arguments: of its maker.
        tasks: drawn once, they are Ω; 0 where the problem itself has a finite Ω.
        limit: a method that takes more calls a task is left out.
        draws: of evolution strategies, each on every task.
        sigma: their σ.
        law: whether the time to a precision is also computed without the theory; quadratics.
    """

    name: str
    problem: str
    r: int
    arguments: dict[str, Any] = field(default_factory=dict)
    tasks: int = 0
    limit: int = 25_000
    draws: int = 400
    sigma: float = 0.1
    law: bool = False

    def make(self) -> tuple[BilevelProblem, Tensor]:
        """The problem with its finite Ω, in float64, and the θ that everything is measured at."""
        problem: BilevelProblem = MAKERS[self.problem](r=self.r, **self.arguments)
        if self.tasks:
            drawn = problem.sample(self.tasks, torch.Generator().manual_seed(0))
            problem = replace(problem, sample_tasks=None, tasks=drawn)
        return problem, one_theta(problem)


def tuned_quadratic(dim: int = 20, r: int = 10, alpha: float = 0.3, seed: int = 0) -> BilevelProblem:
    """Hyperparameters: L_in = ½(φ − θ)ᵀH(φ − θ) from φ_0 = 0, L_out = ½(φ − c)ᵀH(φ − c), c ~ N(0, I).

    H is that of `quadratic`, free of θ, and ∇M = (I − P)H(φ_r − E c) with φ_r = (I − P)θ, P = (I − αH)^r.
    """
    known = quadratic(dim, r, alpha, seed=seed)

    def inner_loss(theta: Tensor, phi: Tensor, task: Task) -> Tensor:
        value: Tensor = (phi - theta) @ known.hessian @ (phi - theta) / 2
        return value

    return BilevelProblem(
        inner_loss=inner_loss,
        outer_loss=known.outer_loss,
        start=lambda theta, task: torch.zeros(dim, dtype=F64),
        step_sizes=known.step_sizes,
        sample_tasks=known.sample_tasks,
        initial=known.initial,
    )


MAKERS: dict[str, Callable[..., BilevelProblem]] = {
    "synthetic": synthetic,
    "quadratic": quadratic,
    "tuned-quadratic": tuned_quadratic,
    "hypercleaning": lambda **arguments: digits_hypercleaning(**arguments, dtype=F64),
    "omniglot": lambda **arguments: omniglot_few_shot(**arguments, dtype=F64),
}


@dataclass(frozen=True)
class Draw:
    """One outcome of a method's own randomness: with this probability it returns these rows.

    Attributes:
        probability: of the outcome; evolution strategies, whose outcomes cannot be listed, have one: a fresh sample.
        run: the method as it is.
        quick: the same gradients, for many tasks: where the sweep repeats steps, the states are stored instead.
    """

    probability: float
    run: Rows
    quick: Rows


def outcomes(method: Any, problem: BilevelProblem, theta: Tensor) -> list[Draw]:
    """Every outcome of the coin or of the random horizon."""

    def rows(estimator: Any, coin: bool | None = None) -> Rows:
        def run(tasks: Tasks) -> Tensor:
            coins = None if coin is None else torch.full((len(tasks),), coin)
            generator = torch.Generator().manual_seed(0) if isinstance(estimator, ES | GuidedES) else None
            return hypergradient(problem, theta, tasks, estimator, coins=coins, generator=generator, per_task=True)

        return run

    if method is REPTILE:
        moved: Rows = lambda tasks: REPTILE.direction(problem, theta, tasks).value[None]  # noqa: E731
        return [Draw(1.0, moved, moved)]
    if isinstance(method, Estimator):
        quick = replace(method, sweep=Sweep.stored())
        if method.q in (0.0, 1.0):
            return [Draw(1.0, rows(method), rows(quick))]
        chances = ((False, 1 - method.q), (True, method.q))
        return [Draw(p, rows(method, coin), rows(quick, coin)) for coin, p in chances]
    if isinstance(method, Telescoping):
        assert method.probabilities is not None
        chosen = [(i, p) for i, p in enumerate(method.probabilities) if p > 0]
        return [Draw(p, run, run) for i, p in chosen for run in [_cut(method, problem, theta, i)]]
    return [Draw(1.0, run, run) for run in [rows(method)]]


def _cut(method: Telescoping, problem: BilevelProblem, theta: Tensor, drawn: int) -> Rows:
    def run(tasks: Tasks) -> Tensor:
        with torch.enable_grad():
            return method.at(problem, theta.expand(len(tasks), -1), tasks, drawn)

    return run


def memory(r: int) -> int:
    """Inner states that √r checkpoints hold; what is planned may hold as many."""
    return int(RootCheckpointing(r).states(r))


def candidates(moments: dict[Truncated, Moments], r: int, slots: int) -> list[Choice]:
    """What fits, the quickest first: time by (19) with m = 1 in function calls, as `landscape` has it throughout."""
    return plan(counted_candidates(moments, r, 1.0, 1.0, min(slots, r)), min(slots, r), m=1.0)


def make_method(
    name: str, setting: Setting, problem: BilevelProblem, theta: Tensor, moments: dict[Truncated, Moments]
) -> Method:
    """The method of METHODS with what it may choose chosen for this problem.

    UFOM has its own q*, the planned member of its family the best (K, s, q) in the memory of √r checkpoints, the
    telescopes have the probabilities tuned to the measured differences, and evolution strategies their σ.

    Raises:
        UfomError: where a method cannot be tuned.
    """
    paper = {Truncated(0): moments[Truncated(0)]}
    if name == "ufom":
        return UFOM(_q(candidates(paper, setting.r, 1)[0]))
    if name == PLANNED:
        best = candidates(moments, setting.r, memory(setting.r))[0]
        return UFOM(_q(best), best.label.sweep, best.label.proxy)
    if name in ("roulette", "single-sample"):
        assert problem.tasks is not None
        return Telescoping.tuned(problem, theta, problem.tasks, "roulette" if name == "roulette" else "single")
    made = METHODS[name].make(setting.r)
    return replace(made, sigma=setting.sigma) if isinstance(made, ES | GuidedES) else made


def _q(best: Choice) -> float:
    assert isinstance(best.q, float)
    if best.q == 0:
        raise UfomError("the proxy is exact (D² = 0): there is nothing to debias")
    return best.q


def proxies(r: int) -> list[Truncated]:
    """The truncation lengths that the planner may use."""
    return [Truncated(k) for k in sorted({0, 1, 2, math.ceil(r / 10), math.ceil(r / 5), r // 2} - {r})]
