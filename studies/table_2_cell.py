"""What the study of Table 2 runs: its sizes, and one method until both budgets are spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from studies.shared.accounts import SWEEPS, UNROLLED, Price, budgets, clock, now, run_until_spent
from ufom_runtime import FOM, REPTILE, UFOM, AdaptiveUFOM, measure_moments, train
from ufom_runtime.algorithms import inner_loop
from ufom_runtime.measure.chances import draws
from ufom_runtime.problem import Task, Tasks, one_theta
from ufom_runtime.problems.few_shot import FewShotProblem, cifar100_few_shot, digits_few_shot, omniglot_few_shot
from ufom_runtime.steps import Steps
from ufom_theory import CostModel, Sweep, optimal_q
from ufom_theory.laws import break_even

METHODS = ("exact", "FOM", "UFOM", "adaptive ×0.1", "step rule", "Reptile")


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        data: "omniglot", "cifar100" or "digits".
        ways: classes in a task.
        filters: of each convolution.
        rotations: whether the training classes are turned by 90°, 180° and 270°, too.
        alpha: inner step size.
        rate: Adam's learning rate.
        reptile: SGD's learning rate for Reptile, Nichol et al.'s ε, chosen on a seed that does not judge.
        batch: tasks an outer step.
        recomputed: outer steps of the exact gradient whose calls are the budget where states are recomputed.
        stored: outer steps of the exact gradient whose calls are the budget where states are stored; these are run.
        test_tasks: from the held-out classes, the same for all methods of a seed.
        fixed_tasks: for the moments at θ_0.
        seeds: independent nets, tasks and coins.
        points: logged rows of a run, about.
        r: inner steps.
        device: where to compute.
        bias: FOM's steps before its bias is measured, and on how many tasks.
    """

    data: str
    ways: int
    filters: int
    rotations: bool
    alpha: float
    rate: float
    batch: int
    recomputed: int
    stored: int
    test_tasks: int
    fixed_tasks: int
    seeds: int
    points: int
    r: int = 10
    device: str = "cpu"
    reptile: float = 0.3
    bias: tuple[int, int] = (300, 256)


SIZES = {
    "quick": Config(
        data="digits", ways=3, filters=2, rotations=False, alpha=0.05, rate=3e-3, batch=2, recomputed=2, stored=4,
        test_tasks=4, fixed_tasks=4, seeds=2, points=2, r=3, bias=(2, 4),
    ),
    "standard": Config(
        data="omniglot", ways=5, filters=32, rotations=True, alpha=0.1, rate=3e-3, batch=4, recomputed=400,
        stored=1200, test_tasks=200, fixed_tasks=32, seeds=3, points=24,
    ),
    "wide": Config(
        data="omniglot", ways=20, filters=32, rotations=True, alpha=0.1, rate=3e-3, batch=4, recomputed=200,
        stored=600, test_tasks=100, fixed_tasks=16, seeds=2, points=12,
    ),
    "paper": Config(
        data="omniglot", ways=30, filters=64, rotations=False, alpha=0.005, rate=1e-3, batch=4, recomputed=5000,
        stored=5000, test_tasks=200, fixed_tasks=64, seeds=3, points=50, device="cuda",
    ),
}  # fmt: skip


def make_problem(cell: Mapping[str, Any]) -> FewShotProblem:
    """The problem of one cell; its seed draws the net."""
    shared = {name: cell[name] for name in ("ways", "r", "alpha", "filters", "seed", "device")}
    if cell["data"] == "digits":
        return digits_few_shot(**shared)
    if cell["data"] == "cifar100":  # 30 ways need 30 held-out classes
        return cifar100_few_shot(**shared, held_out=max(20, cell["ways"]))
    return omniglot_few_shot(**shared, rotations=cell["rotations"])


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


def _rule(cell: Mapping[str, Any], problem: FewShotProblem) -> tuple[Any, dict[str, float]]:
    """The method, and the columns that do not change over its run."""
    cost, sweep = CostModel(r=cell["r"], as_printed=True), Sweep.stored()
    if cell["method"] != "UFOM":
        fixed: dict[str, tuple[Any, dict[str, float]]] = {
            "exact": (UNROLLED, {"q": 1.0}),
            "FOM": (FOM, {"q": 0.0}),
            "adaptive ×0.1": (AdaptiveUFOM(scale=0.1, sweep=sweep, cost=cost), {}),
            "step rule": (AdaptiveUFOM(law="step", outer=f"adam:{cell['rate']}", sweep=sweep, cost=cost), {}),
            "Reptile": (REPTILE, {}),
        }
        return fixed[cell["method"]]
    tasks = problem.sample(cell["fixed_tasks"], torch.Generator().manual_seed(1000 * cell["seed"] + 1))
    moments = measure_moments(problem, one_theta(problem), tasks)
    q = float(optimal_q(moments, cost, outer=f"adam:{cell['rate']}", batch=cell["batch"]).q)
    return UFOM(q, sweep), {"q": q, "d2": float(moments.d2), "v2": float(moments.v2)}


def reptiles(problem: FewShotProblem) -> FewShotProblem:
    """The problem as Reptile learns on it: of a task it sees the training and the test images, in turns.

    Gradients of one batch alone would move θ as joint training does, and Reptile has no other use for the test images.
    """

    def seen(task: Task, j: int) -> Task:
        images, labels, others, other_labels = task
        return task if j % 2 else (others, other_labels, images, labels)

    return replace(problem, inner_batch=seen)


def fom_leads(cell: Mapping[str, Any], problem: FewShotProblem) -> dict[str, float]:
    """N_b after some steps of FOM, for both accounts; and ‖E d‖², FOM's squared bias, with its standard error.

    Averaged over fewer than N_b tasks, FOM's gradient is nearer to ∇M than the exact one at the same cost.
    """
    steps, n = cell["bias"]
    run = train(
        problem, one_theta(problem), FOM, steps=steps, optimizer=f"adam:{cell['rate']}", seed=cell["seed"],
        batch=cell["batch"], log_every=steps,
    )  # fmt: skip
    tasks = problem.sample(n, torch.Generator().manual_seed(1000 * cell["seed"] + 3))
    moments = measure_moments(problem, run.theta, tasks)
    measured = draws(moments, None)  # entry 0
    costs = {f"n_b_{a}": CostModel(cell["r"], sweep=sweep, as_printed=True) for a, sweep in SWEEPS.items()}
    found = {name: float(np.asarray(break_even(measured, cost, 1.0))[0]) for name, cost in costs.items()}
    return {**found, "bias_sq": moments.bias_sq, "bias_sq_sem": moments.bias_sq_sem}


def run_cell(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One run; of the method "clock", the seconds of a gradient and of a product; of "N_b", `fom_leads`."""
    began, problem, r, batch, method = now(), make_problem(cell), cell["r"], cell["batch"], cell["method"]
    if method == "clock":
        return [clock(problem, one_theta(problem), Tasks.of(problem.sample(batch, torch.Generator().manual_seed(0))))]
    reptile = method == "Reptile"
    if method == "N_b":
        return [fom_leads(cell, problem)]
    rule, constant = _rule(cell, problem)
    price = Price.reptile(r) if reptile else Price.truncated(r)
    test = problem.sample_test_tasks(cell["test_tasks"], torch.Generator().manual_seed(1000 * cell["seed"] + 2))
    guess, most = 0.0 if reptile else constant.get("q", 0.1), batch * price.gradients
    each = {"stored": most + batch * guess * r, "recomputed": most + batch * guess * r * (r + 1) / 2}
    steps = max(limit / each[account] for account, limit in budgets(cell).items())  # only how often to log hangs on it
    return run_until_spent(
        reptiles(problem) if reptile else problem,
        rule,
        price,
        cell,
        constant,
        lambda theta: accuracy(problem, theta, test),
        began,
        batch,
        optimiser=lambda p: (torch.optim.SGD if reptile else torch.optim.Adam)(p, lr=cell["rate"]),
        log_every=max(1, round(steps / cell["points"])),
    )
