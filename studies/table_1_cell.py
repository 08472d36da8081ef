"""What the study of Table 1 runs: its sizes, and one method at one γ until both budgets are spent."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from studies.shared.accounts import UNROLLED, OnZero, Price, budgets, clock, now, run_until_spent, start_row
from studies.shared.training import rounded
from ufom_runtime import UFOM, AdaptiveUFOM, Estimator, Implicit, adapt, hypergradient, losses
from ufom_runtime.problem import BilevelProblem, Tasks, one_theta
from ufom_runtime.problems.hypercleaning import HypercleaningProblem, digits_hypercleaning, mnist_hypercleaning
from ufom_theory import CostModel, Moments, Sweep, Truncated, optimal_q

RULES = {
    "adaptive": OnZero(),
    "adaptive ×0.1": OnZero(scale=0.1),
    "released ×0.1": OnZero(scale=0.1, variant="released"),
}
METHODS = ("exact", "UFOM", "adaptive ×0.1", "step rule", "UFOM, implicit", "adaptive", "released ×0.1")


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        data: "mnist", or "digits", which is also taken where MNIST is absent.
        n_train: training images, half of them with corrupted labels.
        n_validation: clean images of the outer loss.
        hidden: units of the hidden layer.
        alpha: inner step size.
        gammas: grid of outer step sizes; adaptive ×0.1 has them times its q, since its steps are 1/q times as long.
        recomputed: exact gradients whose calls are the budget where states are recomputed.
        stored: exact gradients whose calls are the budget where states are stored; these are run.
        proxy: K of the truncated proxy.
        iterations: of the implicit proxy's Neumann series.
        seeds: that judge: 1, 2, …; seed 0 chooses γ.
        log_every: outer steps between logged rows, for the exact gradient and for a UFOM whose every step moves θ.
        tuned: methods whose γ is chosen; the others take the exact gradient's.
        r: inner steps.
        device: where to compute.
    """

    data: str
    n_train: int
    n_validation: int
    hidden: int
    alpha: float
    gammas: tuple[float, ...]
    recomputed: int
    stored: int
    proxy: int
    iterations: int
    seeds: int
    log_every: tuple[int, int]
    tuned: tuple[str, ...] = METHODS
    r: int = 100
    device: str = "cpu"


SIZES = {
    "quick": Config(
        data="digits", n_train=60, n_validation=60, hidden=4, alpha=1.0, gammas=(100.0, 1000.0), recomputed=2,
        stored=6, proxy=5, iterations=3, seeds=2, log_every=(2, 4), r=10,
    ),
    "standard": Config(
        data="mnist", n_train=500, n_validation=500, hidden=64, alpha=0.5, gammas=(300.0, 1e3, 3e3), recomputed=2,
        stored=12, proxy=50, iterations=10, seeds=3, log_every=(2, 6),
    ),
    "paper": Config(
        data="mnist", n_train=5000, n_validation=5000, hidden=64, alpha=1.0, gammas=(3e3, 1e4, 3e4), recomputed=6,
        stored=40, proxy=50, iterations=10, seeds=3, log_every=(2, 6),
    ),
}  # fmt: skip


def make_problem(cell: Mapping[str, Any]) -> HypercleaningProblem:
    """The problem of one cell; its seed draws the images, the corruption and φ_0."""
    factory = mnist_hypercleaning if cell["data"] == "mnist" else digits_hypercleaning
    names = ("n_train", "n_validation", "hidden", "r", "alpha", "seed", "device")
    return factory(**{name: cell[name] for name in names})


def the_task(problem: BilevelProblem) -> Tasks:
    """The one task there is."""
    assert problem.tasks is not None
    return Tasks.of(problem.tasks)


def evaluate(problem: HypercleaningProblem, theta: Tensor) -> dict[str, float]:
    """The columns of Table 1 and the outer loss at θ."""
    tasks, weights, clean = the_task(problem), theta.sigmoid(), ~problem.corrupted.to(theta.device)
    phi = adapt(problem, theta, tasks)[0]
    images, labels, *_ = task = tasks.one()
    test = problem.logits(phi, problem.test_images)
    right = problem.logits(phi, images[clean]).argmax(1) == labels[clean]
    return {
        "validation": float(problem.outer_loss(theta, phi, task)),
        "train": 100 * float(right.double().mean()),
        "test": 100 * float((test.argmax(1) == problem.test_labels).double().mean()),
        "test_cce": float(cross_entropy(test, problem.test_labels)),
        "separation": float(weights[clean].mean() - weights[~clean].mean()),
        "moved": float((theta - one_theta(problem)).norm()),
    }


def of_printed_sum(cell: Mapping[str, Any]) -> float:
    """The outer loss at θ_0 where the inner loss is the sum that is printed; the largest float32 if it overflows."""
    problem = make_problem({**cell, "alpha": cell["alpha"] * cell["n_train"]})
    _, (found,) = losses(problem, one_theta(problem), the_task(problem))
    most = torch.finfo(torch.float32).max
    return float(found.nan_to_num(most, most))


def local_q(problem: BilevelProblem, theta: Tensor, proxy: Any, cost: CostModel) -> dict[str, float]:
    """q* by (21) with m = 1 of UFOM on a proxy, with D² and V² measured at θ, the one task there is."""
    tasks = the_task(problem)
    exact, found = hypergradient(problem, theta, tasks, UNROLLED), proxy.direction(problem, theta, tasks).value
    d2, v2 = (float(x.double().square().sum()) for x in (exact - found, exact))
    return {"q": float(optimal_q(Moments(d2, v2), cost, m=1.0).q), "d2": d2, "v2": v2}


def _rule(cell: Mapping[str, Any], problem: BilevelProblem, theta: Tensor) -> tuple[Any, Price, dict[str, float]]:
    """The method, its price, and the columns that do not change over its run."""
    r, method, kept = cell["r"], cell["method"], Truncated(cell["proxy"])
    if method == "exact":
        return UNROLLED, Price.truncated(r), {"q": 1.0}
    if method in RULES:
        return RULES[method], Price.truncated(r), {}
    if method == "step rule":
        price = Price.truncated(r, kept.steps)
        cost = CostModel.of(float(r + 1 + kept.steps), float(r - kept.steps))
        rule = AdaptiveUFOM(law="step", outer=f"sgd:{cell['gamma']}", sweep=Sweep.stored(), proxy=kept, cost=cost)
        return rule, price, {}
    if method == "UFOM":
        proxy: Any = Estimator(0.0, Sweep.unrolled(), kept)
        price = Price.truncated(r, kept.steps)
        found = local_q(problem, theta, proxy, price.cost)
        return UFOM(found["q"], Sweep.stored(), kept), price, found
    implicit = Implicit("neumann", steps=cell["iterations"], warn_above=1e9)
    price = Price.debiased(r, *vars(implicit.calls(r)).values())
    found = local_q(problem, theta, implicit, price.cost)
    return UFOM(found["q"], Sweep.unrolled(), proxy=implicit), price, found


def run_cell(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One run; of FOM, θ_0, where it stays.

    Of the method "clock", the seconds of a gradient and of a product; of "printed sum", the outer loss at θ_0.
    """
    began, problem, method = now(), make_problem(cell), cell["method"]
    theta = one_theta(problem)
    if method == "clock":
        return [clock(problem, theta, the_task(problem))]
    if method == "printed sum":
        return [{"step": 0, "validation": of_printed_sum(cell)}]
    if method == "FOM":
        start = start_row(evaluate(problem, theta))
        return rounded(pd.DataFrame([start, {**start, **budgets(cell)}]).assign(q=0.0, cpu=0.0, wall=0.0))
    rule, price, constant = _rule(cell, problem, theta)
    last: tuple[Tensor, dict[str, float]] | None = None

    def scores(theta: Tensor) -> dict[str, float]:
        nonlocal last
        if last is None or not torch.equal(theta, last[0]):  # a step whose coin was 0 on a proxy of zero moves nothing
            last = theta.clone(), evaluate(problem, theta)
        return last[1]

    every = {"exact": cell["log_every"][0]}.get(method, 1 if method in RULES else cell["log_every"][1])
    warnings.filterwarnings("ignore", "the Neumann series diverges")  # it is a proxy: it is debiased
    gamma: Any = lambda k: cell["gamma"]  # noqa: E731
    return run_until_spent(problem, rule, price, cell, constant, scores, began, step_sizes=gamma, log_every=every)
