"""What `landscape` measures on one problem at one r: every method's bias, variance, cost and memory; a cell's rows."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from studies.landscape_problems import (
    KINDS,
    PLANNED,
    Draw,
    Known,
    Setting,
    make_method,
    memory,
    minimiser,
    outcomes,
)  # fmt: skip
from ufom_runtime import EXACT, hypergradient
from ufom_runtime.derivatives import Calls, count_calls
from ufom_runtime.measure.moments import Estimate
from ufom_runtime.memory import peak_bytes
from ufom_runtime.problem import BilevelProblem, Tasks, one_theta
from ufom_runtime.problems.quadratic import QuadraticProblem
from ufom_theory import Choice, Truncated, UfomError
from ufom_theory.two_tasks import second_moment

SAMPLED = ("es", "guided-es")
TRACED = 1000  # calls
NO_GRADIENT = ("reversible", "reptile")  # of another objective, or none: no bias is stated


def run(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All methods on one problem at one r."""
    setting, eta = Setting(**cell["setting"]), cell["eta"]
    problem, theta = setting.make()
    known = Known.of(setting, problem, theta)
    about = {"name": setting.name, "r": setting.r, "s": len(theta), "tasks": len(known.exact)}
    rows, methods = [], {}
    for name, kind in KINDS.items():
        row: dict[str, Any] = {"part": "method", **about, "method": name, "kind": kind}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if name == "adaptive-ufom":
                    raise UfomError("its q is chosen along a run of outer_sgd: the study few_shot compares such runs")
                methods[name] = make_method(name, known)
                row |= _measured(name, methods[name], setting, known, cell["patience"])
            except UfomError as error:
                row["refused"] = str(error)
        notes = {str(w.message) for w in caught}
        if len(known.exact) == 1 and kind == "unbiased" and row.get("own", 1) < 1e-12:
            notes.add("q = 1: on one task the exact gradient has no noise")
        rows.append(row | {"note": "; ".join(sorted(notes))})
    stored = next(row for row in rows if row["method"] == "stored")
    tails = tail(problem, methods)
    for row in (row for row in rows if "variance" in row):
        n, sem = averaged(row, eta)
        unit = averaged(stored, eta)[0]
        row["effort"], row["effort_seconds"] = (n * row[x] / (unit * stored[x]) for x in ("calls", "seconds"))
        row["effort_sem"] = sem * row["calls"] / (unit * stored["calls"])
        if row["kind"] in ("exact", "unbiased"):
            row["tail"] = tails[row["method"]] * row["calls"] / stored["calls"] if tails else None
            if setting.law and row["own"] > 1e-12:
                row["law"] = law(problem, methods[row["method"]], row["calls"])
    return rows + [{"part": "family", **about, **row} for row in family(known, eta)]


def _measured(name: str, method: Any, setting: Setting, known: Known, patience: float) -> dict[str, Any]:
    problem, theta, exact = known.problem, known.theta, known.exact
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


def averaged(row: Mapping[str, Any], eta: float) -> tuple[float, float]:
    """N = max(1, variance/(η − bias²)), the estimates whose mean is off by η, relative and squared; and its error.

    It is ∞ where bias² ≥ η: no mean comes that near.
    """
    room = eta - max(row["bias_sq"], 0.0)
    if room <= 0:
        return math.inf, 0.0
    n = row["variance"] / room
    sem = math.hypot(row["variance_sem"] / room, n / room * row["bias_sq_sem"])
    return (n, sem) if n > 1 else (1.0, 0.0)


def tail(problem: BilevelProblem, methods: Mapping[str, Any]) -> dict[str, float]:
    """E‖Ĝ(θ*)‖² of the exact and unbiased methods over that of the exact gradient; empty where θ* is not known.

    Raises:
        UfomError: ∇M does not vanish at θ*.
    """
    theta = minimiser(problem)
    if theta is None:
        return {}
    assert problem.tasks is not None
    tasks = Tasks.of(problem.tasks)
    exact = hypergradient(problem, theta, tasks, EXACT, per_task=True)
    unit, left = float(exact.square().sum(1).mean()), float(exact.mean(0).square().sum())
    if left > 1e-20 * unit:
        raise UfomError(f"‖∇M(θ*)‖² = {left:g} is not 0 beside V² = {unit:g}: θ* is not the minimiser")
    found = {name: 1.0 for name in methods if KINDS[name] == "exact"}
    for name in (name for name in methods if KINDS[name] == "unbiased"):
        drawn = [(d.probability, d.quick(tasks)) for d in outcomes(methods[name], problem, theta)]
        found[name] = sum(p * float(rows.square().sum(1).mean()) for p, rows in drawn) / unit
    return found


def costs(draws: list[Draw], task: Tasks, patience: float) -> dict[str, float | None]:
    """Counted calls and CPU seconds of one task, expected over the outcomes, and the peak bytes of the longest outcome.

    Bytes are not traced where that takes more than `TRACED` calls: it would take minutes.
    """
    calls, seconds, variance, difference, longest = Calls(), 0.0, 0.0, 0.0, (0.0, draws[0])
    for one in draws:
        share, begin = one.probability, time.process_time()
        with count_calls() as counted:
            found = one.run(task)
        median, sem = clock(one, task, patience, time.process_time() - begin)
        longest = max(longest, (counted.gradients + counted.hessian_vector_products, one), key=lambda pair: pair[0])
        if one.run is not one.quick:
            stored = one.quick(task)
            difference = max(difference, float((found - stored).norm() / stored.norm().clamp(min=1e-300)))
        calls.gradients += share * counted.gradients
        calls.hessian_vector_products += share * counted.hessian_vector_products
        seconds, variance = seconds + share * median, variance + (share * sem) ** 2
    return {
        "calls": calls.gradients + calls.hessian_vector_products,
        "gradients": calls.gradients,
        "products": calls.hessian_vector_products,
        "bytes": peak_bytes(partial(longest[1].run, task), task.parts) if longest[0] <= TRACED else None,
        "seconds": seconds,
        "seconds_sem": variance**0.5,
        "difference": difference,
    }


def clock(one: Draw, task: Tasks, patience: float, first: float) -> tuple[float, float]:
    """Median CPU seconds of a call and its standard error, by the quartiles of what is nearly normal; 0 of one call."""
    times = [first]
    while sum(times) < patience and len(times) < 100:
        begin = time.process_time()
        one.run(task)
        times.append(time.process_time() - begin)
    low, median, high = np.percentile(times, (25, 50, 75))
    return float(median), float(1.2533 * (high - low) / 1.349 / len(times) ** 0.5)


def statistics(drawn: list[tuple[float, Tensor]], exact: Tensor, sampled: bool) -> dict[str, float]:
    """Relative squared bias and variances, with standard errors where outcomes are sampled.

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
        "variance": (total - mean.value) / unit,
        "variance_sem": float(np.hypot(sem["second"], mean.sem)) / unit,
        "own": float(p @ own) / unit,
        "own_sem": sem["own"] / unit,
    }


def family(known: Known, eta: float) -> list[dict[str, Any]]:
    """The planner's best (K, s, q) in 2, √r and r states: the paper's UFOM's effort over its, and that of q = 1."""
    found, r = [], known.problem.r
    unit = float(known.exact.mean(0).square().sum())

    def effort(choice: Choice) -> float:
        return max(1.0, choice.second_moment / (eta * unit)) * choice.cost

    paper = effort(known.candidates(1, [Truncated(0)])[0])
    for slots in sorted({2, memory(r), r}):
        rows = known.candidates(slots)
        (proxy, sweep), exact = rows[0].label, next(c for c in rows if c.label.proxy is None)
        found.append({
            "memory": slots, "proxy": proxy.steps if proxy else 0, "sweep": str(sweep), "q": rows[0].q,
            "gain_paper": paper / effort(rows[0]), "gain_exact": effort(exact) / effort(rows[0]),
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
