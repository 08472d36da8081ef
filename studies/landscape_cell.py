"""What `landscape` measures on one problem at one r: every method's bias, variance, cost and memory; a cell's rows."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from studies.landscape_problems import PLANNED, Draw, Rows, Setting, candidates, make_method, memory, outcomes, proxies
from ufom_runtime import EXACT, hypergradient
from ufom_runtime.derivatives import Calls, count_calls
from ufom_runtime.measure.moments import Estimate, moments_by_proxy
from ufom_runtime.memory import peak_bytes
from ufom_runtime.methods import METHODS
from ufom_runtime.problem import BilevelProblem, Tasks, one_theta
from ufom_runtime.problems.quadratic import QuadraticProblem
from ufom_theory import Moments, Truncated, UfomError
from ufom_theory.two_tasks import second_moment

SAMPLED = ("es", "guided-es")
NO_GRADIENT = ("reversible", "reptile")  # of another objective, or none: no bias is stated


def run(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All methods on one problem at one r."""
    setting = Setting(**cell["setting"])
    problem, theta = setting.make()
    assert problem.tasks is not None
    exact = hypergradient(problem, theta, problem.tasks, EXACT, per_task=True)
    moments: dict[Truncated, Moments] = dict(moments_by_proxy(problem, theta, proxies=proxies(setting.r)))
    about = {"name": setting.name, "r": setting.r, "s": len(theta), "tasks": len(exact)}
    rows = []
    for name, entry in METHODS.items():
        row: dict[str, Any] = {"part": "method", **about, "method": name, "kind": entry.kind}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                row |= _method(name, setting, problem, theta, exact, moments, cell["patience"])
            except UfomError as error:
                row["refused"] = str(error)
        row["note"] = "; ".join(sorted({str(w.message) for w in caught}))
        rows.append(row)
    stored = next(row for row in rows if row["method"] == "stored")
    for row in rows:
        if "second" in row:
            time = row["second"] * row["calls"] / (stored["second"] * stored["calls"])
            row["error"] = (max(row["bias_sq"], 0.0) + 0.01 * time) ** 0.5
            if row["kind"] in ("exact", "unbiased"):
                row |= {"time": time, "time_sem": time * row["second_sem"] / row["second"]}
    if setting.law:
        for row in (row for row in rows if row["kind"] == "unbiased" and row.get("own", 0.0) > 1e-12):
            row["law"] = law(problem, make_method(row["method"], setting, problem, theta, moments), row["calls"])
    return rows + [{"part": "family", **about, **row} for row in family(moments, setting.r)]


def _method(
    name: str, setting: Setting, problem: BilevelProblem, theta: Tensor, exact: Tensor,
    moments: Mapping[Truncated, Moments], patience: float,
) -> dict[str, Any]:  # fmt: skip
    if name == "adaptive-ufom":
        raise UfomError("its q is chosen along a run of outer_sgd: the study few_shot compares such runs")
    method: Any = make_method(name, setting, problem, theta, dict(moments))
    expected = method.calls(setting.r, len(theta))
    declared = expected.gradients + expected.hessian_vector_products
    if declared > setting.limit:
        raise UfomError(f"left out: {declared:.0f} calls a task, more than {setting.limit}")
    draws = outcomes(method, problem, theta)
    assert problem.tasks is not None
    tasks, row = Tasks.of(problem.tasks), {"states": method.states(setting.r, len(theta)), "declared": declared}
    row |= {"q": getattr(method, "q", None)}
    if name == PLANNED:
        row |= {"proxy": method.proxy.steps, "sweep": str(method.sweep)}
    row |= costs(draws, tasks.take(slice(1)), patience)
    if name in NO_GRADIENT:
        return row
    if name not in SAMPLED:
        return row | statistics([(d.probability, d.quick(tasks)) for d in draws], exact, sampled=False)
    again = draws[0].quick(tasks.take(torch.arange(len(exact)).repeat(setting.draws)))  # independent in every row
    rows = again.view(setting.draws, *exact.shape)
    return row | statistics([(1 / len(rows), x) for x in rows], exact, sampled=True)


def costs(draws: list[Draw], task: Tasks, patience: float) -> dict[str, float]:
    """Counted calls, median seconds and peak bytes of one task, expected over the outcomes; bytes are the most."""
    calls, seconds, variance, most, difference = Calls(), 0.0, 0.0, 0, 0.0
    for one in draws:
        share, found = one.probability, list[Tensor]()
        with count_calls() as counted:
            most = max(most, peak_bytes(partial(_keep, found, one.run, task), task.parts))
        if one.run is not one.quick:
            stored = one.quick(task)
            difference = max(difference, float((found[0] - stored).norm() / stored.norm().clamp(min=1e-300)))
        calls.gradients += share * counted.gradients
        calls.hessian_vector_products += share * counted.hessian_vector_products
        median, sem = clock(one, task, patience)
        seconds, variance = seconds + share * median, variance + (share * sem) ** 2
    return {
        "calls": calls.gradients + calls.hessian_vector_products,
        "gradients": calls.gradients,
        "products": calls.hessian_vector_products,
        "bytes": most,
        "seconds": seconds,
        "seconds_sem": variance**0.5,
        "difference": difference,
    }


def _keep(found: list[Tensor], run: Rows, task: Tasks) -> None:
    found.append(run(task))


def clock(one: Draw, task: Tasks, patience: float) -> tuple[float, float]:
    """Median seconds of at least two calls and its standard error, by the quartiles of what is nearly normal."""
    times: list[float] = []
    while len(times) < 2 or (sum(times) < patience and len(times) < 100):
        begin = time.perf_counter()
        one.run(task)
        times.append(time.perf_counter() - begin)
    low, median, high = np.percentile(times, (25, 50, 75))
    return float(median), float(1.2533 * (high - low) / 1.349 / len(times) ** 0.5)


def statistics(drawn: list[tuple[float, Tensor]], exact: Tensor, sampled: bool) -> dict[str, float]:
    """Relative squared bias, second moment and variances, with standard errors where outcomes are sampled.

    Args:
        drawn: probability and rows, shape (n, s), of each outcome, for all n tasks of Ω.
        exact: the exact gradients, shape (n, s).
        sampled: whether the outcomes are independent draws, not all that there are.
    """
    truth = exact.mean(0)
    unit = float(truth @ truth)
    p = torch.tensor([x for x, _ in drawn], dtype=exact.dtype)
    centre = sum(x * rows for x, rows in drawn)
    means = torch.stack([rows.mean(0) for _, rows in drawn])  # one a draw
    second = torch.stack([rows.square().sum(1).mean() for _, rows in drawn])
    own = torch.stack([(rows - centre).square().sum(1).mean() for _, rows in drawn])
    if sampled:
        b = len(drawn)
        bias, mean = (Estimate.product_of_means(x, x, exact_sums=False) for x in (means - truth, means))
        own = own * b / (b - 1)
        sem = {name: float(x.std()) / b**0.5 for name, x in (("second", second), ("own", own))}
    else:
        bias, mean = (Estimate(float((p @ x).square().sum()), np.zeros(1)) for x in (means - truth, means))
        sem = {"second": 0.0, "own": 0.0}
    total = float(p @ second)
    return {
        "bias_sq": bias.value / unit,
        "bias_sq_sem": bias.sem / unit,
        "second": total / unit,
        "second_sem": sem["second"] / unit,
        "variance": (total - mean.value) / unit,
        "variance_sem": float(np.hypot(sem["second"], mean.sem)) / unit,
        "own": float(p @ own) / unit,
        "own_sem": sem["own"] / unit,
    }


def family(moments: dict[Truncated, Moments], r: int) -> list[dict[str, Any]]:
    """The planner's best (K, s, q) in 2, √r and r states: the paper's UFOM's time over its, and that of q = 1."""
    found = []
    for slots in sorted({2, memory(r), r}):
        rows = candidates(moments, r, slots)
        (proxy, sweep), exact = rows[0].label, [c for c in rows if c.label.proxy is None]
        of_fom = [c for c in rows if c.label.proxy in (Truncated(0), None)]
        found.append({
            "memory": slots, "proxy": proxy.steps if proxy else 0, "sweep": str(sweep), "q": rows[0].q,
            "gain_paper": next(c.slower for c in of_fom if str(c.label.sweep) == "recomputed"),
            "gain_exact": exact[0].slower,
        })  # fmt: skip
    return found


def law(problem: BilevelProblem, method: Any, calls: float, steps: int = 2000) -> float:
    """Calls of outer SGD to the precision that the exact gradient has after `steps`, over the exact gradient's calls.

    On the MAML quadratic every outcome is a linear map of θ − c with H's eigenvectors. Its eigenvalues b are read off
    the method's own gradients at tasks c = θ − v_i, and E‖∇M(θ_k)‖² follows by E u_k² = E(1 − γ_k·b)²·E u_{k−1}² +
    γ_k²·E b²·Var c for u = θ − E c, exactly. Steps are γ·k0/(k + k0), the same for all methods.
    """
    assert isinstance(problem, QuadraticProblem)
    _, basis = torch.linalg.eigh(problem.hessian)
    assert isinstance(problem.tasks, Tensor)
    theta = one_theta(problem)
    probes = Tasks.of(theta - basis.T)
    spread = (problem.tasks @ basis).var(0, correction=0).numpy()

    def slopes(method: Any) -> tuple[Any, Any]:
        found = [(d.probability, (d.quick(probes) * basis.T).sum(1).numpy())
                 for d in outcomes(method, problem, theta)]  # fmt: skip
        return sum(p * b for p, b in found), sum(p * b**2 for p, b in found)

    true = slopes(EXACT)[0]
    gamma = 0.1 / true.max()
    delay = 4 / (gamma * true.min())

    def path(of: tuple[Any, Any], most: int, delta: float = 0.0) -> tuple[int, float]:
        square = np.ones(len(true))
        for k in range(1, most + 1):
            slope, slope_sq = of
            square = second_moment(square, gamma * delay / (k + delay), slope, slope_sq, slope_sq * spread)
            if (precision := float(true**2 @ square)) <= delta:
                break
        return k, precision

    _, delta = path((true, true**2), steps)
    taken, reached = path(slopes(method), 20 * steps, delta)
    return taken * calls / (steps * (2 * problem.r + 1)) if reached <= delta else float("inf")
