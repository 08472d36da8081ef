"""What the study of few-shot learning runs: its sizes, its problems, and one method until the budget is charged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from studies.shared.training import ADAPTIVE, charged, corrected, rounded
from ufom_runtime import EXACT, FOM, REPTILE, UFOM, hypergradient, measure_moments, outer_sgd
from ufom_runtime.algorithms import inner_loop
from ufom_runtime.problem import Task, Tasks, one_theta
from ufom_runtime.problems.few_shot import FewShotProblem, cifar100_few_shot, digits_few_shot, omniglot_few_shot
from ufom_runtime.steps import Steps
from ufom_theory import CostModel, Moments, Sweep, optimal_q

METHODS = ("exact", "Reptile", "FOM", *ADAPTIVE, "UFOM")
BLOCKS, DRAWS = 64, 64  # an estimator's mean is taken over DRAWS of all coins; its error over BLOCKS of such means


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        settings: data set and ways of each; a data set that is absent is skipped, with a warning.
        filters: of each convolution.
        alpha: inner step size.
        rate: Adam's learning rate.
        batch: tasks an outer step.
        exact_steps: outer steps of the exact gradient; what they cost, recomputed, is everyone's budget.
        test_tasks: from the held-out classes, the same for all methods of a seed.
        fixed_tasks: for the moments at θ_0 and for the gradients at the end point.
        seeds: independent nets, tasks and coins.
        points: logged rows of a run, about.
        r: inner steps.
        device: where to compute.
    """

    settings: tuple[tuple[str, int], ...]
    filters: int
    alpha: float
    rate: float
    batch: int
    exact_steps: int
    test_tasks: int
    fixed_tasks: int
    seeds: int
    points: int
    r: int = 10
    device: str = "cpu"


SIZES = {
    "quick": Config(
        settings=(("digits", 5),), filters=4, alpha=0.03, rate=3e-3, batch=2, exact_steps=4, test_tasks=10,
        fixed_tasks=8, seeds=2, points=2, r=4,
    ),
    "standard": Config(
        settings=(("omniglot", 5),), filters=16, alpha=0.03, rate=3e-3, batch=4, exact_steps=30, test_tasks=60,
        fixed_tasks=32, seeds=3, points=6,
    ),
    "paper": Config(
        settings=(("omniglot", 30), ("omniglot", 40), ("cifar100", 20), ("cifar100", 30)), filters=64, alpha=0.005,
        rate=1e-3, batch=4, exact_steps=5000, test_tasks=200, fixed_tasks=64, seeds=3, points=50, device="cuda",
    ),
}  # fmt: skip


def make_problem(cell: Mapping[str, Any]) -> FewShotProblem:
    """The problem of one cell; its seed draws the net."""
    shared = {name: cell[name] for name in ("ways", "r", "alpha", "filters", "seed", "device")}
    if cell["data"] == "cifar100":  # 30 ways need 30 held-out classes
        return cifar100_few_shot(**shared, held_out=max(20, cell["ways"]))
    return omniglot_few_shot(**shared) if cell["data"] == "omniglot" else digits_few_shot(**shared)


def accuracy(problem: FewShotProblem, theta: Tensor, tasks: Task) -> dict[str, float]:
    """Accuracy on the tasks' test shots after the inner loop, in %, and its standard error over the tasks."""
    shares = []
    for task in zip(*(t.split(16) for t in tasks), strict=True):
        rows = theta.expand(len(task[0]), -1)
        phi = inner_loop(Steps(problem, rows, Tasks.of(task)), rows)
        right = torch.func.vmap(problem.net)(phi, task[2]).argmax(-1) == task[3]
        shares.append(100 * right.double().mean(1))
    each = torch.cat(shares)
    return {"accuracy": float(each.mean()), "accuracy_sem": float(each.std() / len(each) ** 0.5)}


def agreement(
    problem: FewShotProblem, theta: Tensor, tasks: Task, method: str, q: float, seed: int
) -> dict[str, float]:
    """How near the mean estimate comes to the mean exact gradient of the same tasks, and the moments there.

    UFOM's mean is taken over `DRAWS` draws of all coins: cosine and error are the mean and the root mean square of
    `BLOCKS` such means, and the expected error is √((1/q − 1)·D²/(n·DRAWS)) over the length of the gradient.
    """
    exact, first = (hypergradient(problem, theta, tasks, e, per_task=True) for e in (EXACT, FOM))
    n, truth, difference = len(exact), exact.mean(0), exact - first
    d2, v2 = (float(x.square().sum(1).mean()) for x in (difference, exact))
    expected = 0.0
    if method == "Reptile":
        means = REPTILE.direction(problem, theta, tasks).value[None]
    else:
        weights = torch.tensor([[q]])
        if 0 < q < 1:
            coin = torch.Generator().manual_seed(1000 * seed + METHODS.index(method))
            weights = (torch.rand(BLOCKS, DRAWS, n, generator=coin, dtype=torch.float64) < q).double().mean(1) / q
            expected = math.sqrt((1 / q - 1) * d2 / (n * DRAWS)) / float(truth.norm())
        means = first.mean(0) + weights.expand(-1, n).to(theta) @ difference / n
    return {
        "cosine": float((means @ truth / (means.norm(dim=1) * truth.norm())).mean()),
        "error": float((means - truth).square().sum(1).mean().sqrt() / truth.norm()),
        "expected_error": expected,
        "end_d2": d2,
        "end_v2": v2,
        "end_q": float(optimal_q(Moments(d2, v2), CostModel(r=problem.r), outer="paper").q),
    }


def run_cell(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One run, until the budget is charged."""
    problem, r, batch, method = make_problem(cell), cell["r"], cell["batch"], cell["method"]
    theta, cost = one_theta(problem), CostModel(r=r, as_printed=True)
    fixed, held_out = (torch.Generator().manual_seed(1000 * cell["seed"] + i) for i in (1, 2))
    tasks, test = problem.sample(cell["fixed_tasks"], fixed), problem.sample_test_tasks(cell["test_tasks"], held_out)
    constant = {"q": {"exact": 1.0}.get(method, 0.0)}
    if method == "UFOM":
        moments = measure_moments(problem, theta, tasks)
        constant = {
            "q": float(optimal_q(moments, cost, outer="paper").q),
            "d2": float(moments.d2),
            "v2": float(moments.v2),
        }
    rules: dict[str, Any] = {"exact": EXACT, "FOM": FOM, "Reptile": REPTILE, **ADAPTIVE}
    limit = cell["exact_steps"] * batch * (cost.c_det + cost.c_rnd)

    def calls(log: Any) -> Any:
        return log["step"] * batch * r if method == "Reptile" else charged(log, r, batch)

    guess = 0.3 if method in ADAPTIVE else constant["q"]  # only how often to log hangs on it
    steps = limit / (batch * (cost.c_det + guess * cost.c_rnd))
    run = outer_sgd(
        problem,
        theta,
        UFOM(constant["q"], Sweep.stored()) if method == "UFOM" else rules[method],
        optimiser=lambda p: torch.optim.Adam(p, lr=cell["rate"]),
        steps=math.ceil(limit / (batch * r)),
        seed=cell["seed"],
        batch=batch,
        log_every=max(1, round(steps / cell["points"])),
        evaluate=lambda theta: accuracy(problem, theta, test),
        until=lambda row: calls(row) >= limit,
    )
    log = run.log
    log["calls"], log["exact_tasks"] = calls(log), corrected(log, r, batch)
    start = {"step": 0, "calls": 0, "exact_tasks": 0, **accuracy(problem, theta, test)}
    log = pd.concat([pd.DataFrame([start]), log], ignore_index=True)
    if method not in ADAPTIVE:
        log = log.assign(**constant)
    log = log.assign(**agreement(problem, run.theta, tasks, method, float(log.q.iloc[-1]), cell["seed"]))
    return rounded(log.drop(columns=["gamma", "exact", "gradients", "hessian_vector_products", "seconds"]))
