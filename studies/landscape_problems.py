"""The problems of `landscape`, each with a finite Ω, and the methods that are run on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ufom_runtime import EXACT, REPTILE, UFOM, Roulette, hypergradient
from ufom_runtime.estimators import Coined, Method
from ufom_runtime.measure.moments import measure_moments, moments_by_proxy
from ufom_runtime.methods import ES, METHODS, GuidedES, Implicit, RootCheckpointing, Telescoping
from ufom_runtime.methods.telescoping import powers_of_two
from ufom_runtime.problem import BilevelProblem, Task, Tasks, one_theta
from ufom_runtime.problems.few_shot import omniglot_few_shot
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.problems.quadratic import QuadraticProblem, quadratic
from ufom_runtime.problems.synthetic import SyntheticProblem, synthetic
from ufom_theory import (
    Choice,
    CostModel,
    Moments,
    Sweep,
    Truncated,
    UfomError,
    counted_candidates,
    optimal_q,
    optimal_survival,
    plan,
)  # fmt: skip

F64 = torch.float64
PLANNED = "ufom-truncated-checkpointed"  # where METHODS has the planned member of the debiased family
IMPLICIT, BACKWARD = "ufom-implicit", "backward-roulette"  # of this study alone
KINDS: dict[str, str] = {name: str(entry.kind) for name, entry in METHODS.items()}
KINDS |= dict.fromkeys((IMPLICIT, BACKWARD), "unbiased")
TINY = 1e-30  # of V²: noise for `plan`, which refuses 0, where there is none
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


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class TunedQuadratic(BilevelProblem):
    """L_in = ½(φ − θ)ᵀH(φ − θ) from φ_0 = 0, L_out = ½(φ − c)ᵀH(φ − c), c ~ N(0, I): hyperparameters.

    ∇M = (I − P)H(φ_r − E c) with φ_r = (I − P)θ, P = ∏(I − α_jH).

    Attributes:
        hessian: H, that of `quadratic`, free of θ.
    """

    hessian: Tensor

    @property
    def map_(self) -> Tensor:
        """I − P."""
        eye = product = torch.eye(len(self.hessian), dtype=F64)
        for alpha in self.alphas:
            product = product - alpha * self.hessian @ product
        return eye - product


def tuned_quadratic(dim: int = 20, r: int = 10, alpha: float = 0.3, seed: int = 0) -> TunedQuadratic:
    """The problem, with θ, φ and c of `dim` numbers."""
    known = quadratic(dim, r, alpha, seed=seed)

    def inner_loss(theta: Tensor, phi: Tensor, task: Task) -> Tensor:
        value: Tensor = (phi - theta) @ known.hessian @ (phi - theta) / 2
        return value

    return TunedQuadratic(
        inner_loss=inner_loss,
        outer_loss=known.outer_loss,
        start=lambda theta, task: torch.zeros(dim, dtype=F64),
        step_sizes=known.step_sizes,
        sample_tasks=known.sample_tasks,
        initial=known.initial,
        hessian=known.hessian,
    )


def minimiser(problem: BilevelProblem) -> Tensor | None:
    """θ* with ∇M(θ*) = 0, where it is known in closed form."""
    if isinstance(problem, SyntheticProblem):
        return torch.tensor([problem.pair.theta_star], dtype=F64)
    if isinstance(problem, QuadraticProblem | TunedQuadratic):
        assert isinstance(problem.tasks, Tensor)
        centre = problem.tasks.mean(0)
        return centre if isinstance(problem, QuadraticProblem) else torch.linalg.solve(problem.map_, centre)
    return None


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

    def cut(method: Telescoping | Roulette, drawn: int) -> Rows:
        def run(tasks: Tasks) -> Tensor:
            index = torch.full((len(tasks),), drawn) if isinstance(method, Roulette) else drawn
            with torch.enable_grad():
                return method.at(problem, theta.expand(len(tasks), -1), tasks, index)  # type: ignore[arg-type]

        return run

    if method is REPTILE:
        moved: Rows = lambda tasks: REPTILE.direction(problem, theta, tasks).value[None]  # noqa: E731
        return [Draw(1.0, moved, moved)]
    quick = replace(method, sweep=Sweep.stored()) if hasattr(method, "sweep") else method
    if isinstance(method, Coined) and 0 < method.q < 1:
        chances = ((False, 1 - method.q), (True, method.q))
        every = [(p, rows(method, coin), rows(quick, coin)) for coin, p in chances]
    elif isinstance(method, Telescoping | Roulette):
        chosen = method.probabilities if isinstance(method, Telescoping) else _stops(method.survival)
        every = [(p, cut(method, i), cut(quick, i)) for i, p in enumerate(chosen or ()) if p > 0]
    else:
        every = [(1.0, rows(method), rows(quick))]
    return [Draw(p, run, run if quick is method else stored) for p, run, stored in every]


def _stops(survival: tuple[float, ...]) -> tuple[float, ...]:
    """The probability to stop at each level, by those to reach each level after the first."""
    return tuple(x - y for x, y in pairwise((1.0, *survival, 0.0)))


def memory(r: int) -> int:
    """Inner states that √r checkpoints hold; what is planned may hold as many."""
    return int(RootCheckpointing(r).states(r))


@dataclass(frozen=True)
class Known:
    """What the methods are chosen by: exact sums over Ω at θ.

    Attributes:
        problem, theta: of the setting.
        exact: the exact gradients, shape (n, s).
        moments: of each proxy K, with the exact gradient's variance in the place of V²: the noise that debiasing adds
            to. On one task it is 0, and every q is then 1.
        sigma: of evolution strategies.
    """

    problem: BilevelProblem
    theta: Tensor
    exact: Tensor
    moments: dict[Truncated, Moments]
    sigma: float

    @classmethod
    def of(cls, setting: Setting, problem: BilevelProblem, theta: Tensor) -> Known:
        """All of it, measured."""
        assert problem.tasks is not None
        exact = hypergradient(problem, theta, problem.tasks, EXACT, per_task=True)
        lengths = [Truncated(k) for k in (0, *powers_of_two(problem.r)[:-1])]
        measured = moments_by_proxy(problem, theta, proxies=lengths)
        noise = max(float((exact - exact.mean(0)).square().sum(1).mean()), TINY * measured[lengths[0]].v2)
        known = {proxy: Moments(m.d2, noise) for proxy, m in measured.items()}
        return cls(problem, theta, exact, known, setting.sigma)

    @property
    def noise(self) -> float:
        """E‖G − ∇M‖²."""
        return float(self.moments[Truncated(0)].v2)

    def candidates(self, slots: int, lengths: Iterable[Truncated] | None = None) -> list[Choice]:
        """What fits, the soonest first: variance times function calls, (19) with m = 1."""
        moments, r = {k: self.moments[k] for k in lengths or self.moments}, self.problem.r
        return plan(counted_candidates(moments, r, 1.0, 1.0, min(slots, r)), min(slots, r), m=1.0)

    @cached_property
    def cuts(self) -> list[Tensor]:
        """The exact gradients of the loop that ends at each horizon of the telescopes, shape (n, s) each."""
        problem, tasks = self.problem, self.problem.tasks
        assert tasks is not None
        return [
            hypergradient(problem.cut(h), self.theta, tasks, EXACT, per_task=True) for h in powers_of_two(problem.r)
        ]


def make_method(name: str, known: Known) -> Method:
    """The method of this name, with what it may choose chosen for the least variance times calls.

    UFOM has its own q*, the planned member of its family the best (K, s, q) in the memory of √r checkpoints, UFOM on an
    implicit proxy and the roulette over the backward loop have √r checkpoints, the roulettes and the single sample the
    best probabilities, and evolution strategies their σ.

    Raises:
        UfomError: where a method cannot be tuned.
    """
    r, problem, theta = known.problem.r, known.problem, known.theta
    root = RootCheckpointing(r).sweep
    if name == "ufom":
        return UFOM(_q(known.candidates(1, [Truncated(0)])[0].q))
    if name == PLANNED:
        best = known.candidates(memory(r))[0]
        return UFOM(_q(best.q), best.label.sweep, best.label.proxy)
    if name == IMPLICIT:
        proxy = Implicit("neumann", steps=20)
        moments = Moments(measure_moments(problem, theta, proxy=proxy).d2, known.noise)
        calls = (found.calls(r, len(theta)) for found in (proxy, RootCheckpointing(r)))
        cost = CostModel.of(*(x.gradients + x.hessian_vector_products for x in calls))
        return UFOM(_q(optimal_q(moments, cost, m=1.0).q), root, proxy=proxy)
    if name == BACKWARD:
        levels = (0, *powers_of_two(r))
        costs = Roulette(levels, (1.0,) * (len(levels) - 1), root).costs()
        d2 = [known.moments[Truncated(k)].d2 for k in levels[:-1]]
        return Roulette(levels, _survival(d2, known, costs), root)
    if name == "roulette":
        horizons = powers_of_two(r)
        left = [float((known.exact - cut).square().sum(1).mean()) for cut in known.cuts[:-1]]
        steps = [2 * (h - before) + 1 for before, h in pairwise((0, *horizons))]  # with an outer gradient
        return Telescoping(horizons, _stops(_survival(left, known, steps)))
    if name == "single-sample":
        return Telescoping(powers_of_two(r), _single(known), "single")
    made = METHODS[name].make(r)
    return replace(made, sigma=known.sigma) if isinstance(made, ES | GuidedES) else made


def _q(q: Any) -> float:
    assert isinstance(q, float)
    if q == 0:
        raise UfomError("the proxy is exact (D² = 0): there is nothing to debias")
    return q


def _survival(d2: list[Any], known: Known, costs: Any) -> tuple[float, ...]:
    """The probabilities to reach each level after the first."""
    q = optimal_survival(d2, known.noise, costs).q
    if not q.all():
        raise UfomError("between two of the levels no gradient changes: there is nothing to debias")
    return tuple(q.tolist())


def _single(known: Known) -> tuple[float, ...]:
    """P(N = i) for the least variance times steps, (Σ E‖Δ_i‖²/p_i − ‖∇M‖²)·Σ p_i·h_i.

    It is stationary where p_i ∝ √(E‖Δ_i‖²/(h_i + x)); the best of a grid of x is taken.
    """
    h = torch.tensor(powers_of_two(known.problem.r), dtype=F64)
    before = [torch.zeros_like(known.exact), *known.cuts]
    squares = torch.stack([(x - y).square().sum(1).mean() for x, y in zip(known.cuts, before, strict=False)])
    if not squares.all():
        raise UfomError("between two of the horizons no gradient changes: there is nothing to debias")
    every = (squares / (h + torch.cat([torch.zeros(1), torch.logspace(-2, 6, 81)])[:, None])).sqrt()
    every = every / every.sum(1, keepdim=True)
    times = ((squares / every).sum(1) - known.exact.mean(0).square().sum()) * (every @ h)
    return tuple(every[times.argmin()].tolist())
