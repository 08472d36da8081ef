"""What the study of hypercleaning runs: its sizes, its problem, and one method at one γ until the budget is charged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from torch import Tensor
from torch.nn.functional import cross_entropy

from studies.shared.training import ADAPTIVE, charged, corrected, rounded
from ufom_runtime import EXACT, FOM, UFOM, adapt, measure_cost, measure_moments, outer_sgd
from ufom_runtime.problem import BilevelProblem, Tasks, one_theta
from ufom_runtime.problems.hypercleaning import HypercleaningProblem, digits_hypercleaning, mnist_hypercleaning
from ufom_theory import CostModel, Sweep, Truncated, optimal_q

METHODS = ("exact", *ADAPTIVE, "UFOM")


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        data: "mnist", or "digits", which is also taken where MNIST is absent.
        n_train: training images, half of them with corrupted labels.
        n_validation: clean images of the outer loss.
        hidden: units of the hidden layer.
        alpha: inner step size.
        gammas: grid of outer step sizes.
        exact_steps: outer steps of the exact gradient; what they cost, recomputed, is everyone's budget.
        proxy: K of the truncated proxy.
        seeds: independent problems and coins.
        log_every: outer steps between logged rows, of the methods that are not always exact.
        r: inner steps.
        device: where to compute.
    """

    data: str
    n_train: int
    n_validation: int
    hidden: int
    alpha: float
    gammas: tuple[float, ...]
    exact_steps: int
    proxy: int
    seeds: int
    log_every: int
    r: int = 100
    device: str = "cpu"


SIZES = {
    "quick": Config(
        data="digits", n_train=120, n_validation=120, hidden=8, alpha=1.0, gammas=(1000.0,), exact_steps=3, proxy=10,
        seeds=4, log_every=8, r=20,
    ),
    "standard": Config(
        data="mnist", n_train=300, n_validation=300, hidden=10, alpha=0.25, gammas=(300.0, 1000.0, 3000.0, 10000.0),
        exact_steps=6, proxy=50, seeds=4, log_every=4,
    ),
}  # fmt: skip


def budget(r: int, exact_steps: int) -> float:
    """Function calls of this many exact gradients, recomputed."""
    cost = CostModel(r=r, as_printed=True)
    return float(exact_steps * (cost.c_det + cost.c_rnd))


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


def run_cell(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One run, until the budget is charged; of the method "clock", C1 and C2 in seconds."""
    problem, r, method = make_problem(cell), cell["r"], cell["method"]
    if method == "clock":
        cost = measure_cost(problem, one_theta(problem), the_task(problem))
        return [{"c1": cost.c1, "c2": cost.c2}]
    theta, limit = one_theta(problem), budget(cell["r"], cell["exact_steps"])
    proxy = cell["proxy"] if method == "UFOM" else 0
    constant: dict[str, float] = {}
    if method == "UFOM":
        moments = measure_moments(problem, theta, None, Truncated(proxy))
        q = float(optimal_q(moments, CostModel(r=r, proxy=Truncated(proxy)), 1.0).q)
        constant = {"q": q, "d2": float(moments.d2), "v2": float(moments.v2)}
        rule: Any = UFOM(q, Sweep.stored(), Truncated(proxy))
    else:
        rule = {"exact": EXACT, "FOM": FOM, **ADAPTIVE}[method]
    least = charged({"step": 1, "hessian_vector_products": proxy}, r, proxy=proxy)
    run = outer_sgd(
        problem,
        theta,
        rule,
        lambda k: cell["gamma"],
        steps=2 if method == "FOM" else math.ceil(limit / least),  # θ stays to the last bit, and so do all later steps
        seed=cell["seed"],
        log_every=1 if method in ("exact", "FOM") else cell["log_every"],
        evaluate=lambda theta: evaluate(problem, theta),
        until=lambda row: charged(row, r, proxy=proxy) >= limit,
    )
    log = run.log
    log["calls"] = charged(log, r, proxy=proxy)
    log["exact_steps_taken"] = corrected(log, r, proxy=proxy)
    start = dict.fromkeys(("step", "calls", "exact_steps_taken", "gradients", "hessian_vector_products"), 0)
    log = pd.concat([pd.DataFrame([{**start, **evaluate(problem, theta)}]), log], ignore_index=True)
    if method == "exact":
        constant = {"q": 1.0}
    if method == "FOM":
        printed = replace(problem, step_sizes=problem.step_sizes * cell["n_train"])
        constant = {"q": 0.0, "printed_sum": evaluate(printed, theta)["validation"]}
        end = {"step": limit // least, "calls": limit, "gradients": limit}
        log = pd.concat([log.iloc[:1], log.iloc[-1:].assign(**end)])
    return rounded(log.drop(columns=["gamma", "exact", "seconds"]).assign(**constant))
