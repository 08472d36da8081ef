"""`ufom measure`: moments and costs of a problem, and the q* that follow for every sweep and proxy, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ufom_runtime.algorithms import first_state
from ufom_runtime.derivatives import start
from ufom_runtime.measure.clock import measure_cost
from ufom_runtime.measure.constants import compare_bounds
from ufom_runtime.measure.moments import MeasuredMoments, moments_by_proxy
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_runtime.training.processes import Processes
from ufom_runtime.training.seeds import seeded
from ufom_theory import CostModel, Moments, Sweep, Truncated, UfomError, counted_candidates, optimal_q, plan
from ufom_theory.checks import integer, scalar
from ufom_theory.laws import exponent_of
from ufom_theory.optimum import batch_moments

SWEEPS = (
    Sweep.recomputed(),
    Sweep.checkpointed(1),
    Sweep.checkpointed(3),
    Sweep.checkpointed(10),
    Sweep.stored(),
    Sweep.unrolled(),
)
_LENGTHS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
VANISHES = (
    "The first-order gradient is identically zero: neither the start nor the outer loss contains θ. Then D² = V², "
    "condition (20) fails for every m ≥ 1 and q* = 1: UFOM on FOM cannot beat the exact gradient. Use a proxy "
    "that keeps the last K > 0 backward steps (and K states), or spend the memory on checkpoints: the last table "
    "compares them."
)


def measure(
    problem: BilevelProblem,
    n_tasks: int = 64,
    seed: int = 0,
    m: float | None = None,
    outer: str | None = None,
    bounds: bool = False,
    chunk: int | None = None,
    progress: Callable[[float], object] | None = None,
    processes: Processes | None = None,
    compile: bool = False,
    batch: int = 1,
) -> dict[str, Any]:
    """Measure D², V², the bias, C1 and C2 of a problem at its `initial` θ, and predict q* for every sweep and proxy.

    Args:
        problem: with `initial`, shape (s,) or (k, s).
        n_tasks: tasks to draw, where the problem has no finite Ω.
        seed: of the tasks, in [0, 2³²).
        m: exponent of the time to precision; give exactly one of m and outer.
        outer: how the outer steps are taken, as in `optimal_q`.
        bounds: also estimate the constants of Assumption 1, at up to 4 θ and 4 tasks, and compare the bounds.
        chunk: (θ, task) pairs run together, as in `measure_moments`.
        progress: called with the share of the work that is done.
        processes: share the (θ, task) pairs, in chunks that do not depend on how many processes there are, nor on free
            memory: `chunk`, or a 16th of the pairs, 256 at most.
        compile: as in `hypergradient`.
        batch: tasks an outer step, each with its own coin.

    Returns:
        Numbers, strings, lists and dictionaries of them; times in seconds; "relative_time" is (19) over its value for
        the paper's exact gradient, q = 1 with the recomputed sweep. Nothing on processes other than the first, which
        times the costs alone.

    Raises:
        UfomError: a problem without `initial`, more processes than chunks, or what `measure_moments` and `measure_cost`
            raise.
    """
    if problem.initial is None:
        raise UfomError("the problem names no θ to measure at: give BilevelProblem(initial=...), shape (s,) or (k, s)")
    chosen, law = exponent_of(m, outer)
    m = float(scalar("m", chosen))
    thetas = problem.initial if problem.initial.ndim == 2 else problem.initial[None]
    given = problem.tasks if problem.tasks is not None else problem.sample(n_tasks, seeded(seed))
    tasks = Tasks.of(given)
    proxies = [Truncated(k) for k in _LENGTHS if k < problem.r]
    if processes is not None:
        chunk = _shared(len(thetas) * len(tasks), chunk, processes)
    with processes.sharing() if processes else nullcontext():
        moments = moments_by_proxy(problem, thetas, given, proxies, chunk=chunk, compile=compile, progress=progress)
    if processes is not None and processes.rank > 0:
        return {}
    one = tasks.take(slice(1))
    cost = measure_cost(problem, thetas[0], one, compile=compile)
    first_order = moments[proxies[0]]
    of_batch = {p: batch_moments(x, batch) for p, x in moments.items()}
    exact = float(cost.time(1.0, of_batch[proxies[0]], m))
    by_sweep = [
        _row(of_batch[proxies[0]], replace(cost, sweep=sweep), m, exact)
        for sweep in SWEEPS
        if sweep.slots < max(1, problem.r - 1)
    ]
    by_proxy = [_row(of_batch[p], replace(cost, proxy=p), m, exact) for p in proxies]
    by_memory = _by_memory(of_batch, cost, m, exact)
    state = first_state(problem, thetas[:1], one)
    return {
        "s": thetas.shape[1],
        "p": start(problem, thetas[:1], one).shape[1],
        "r": problem.r,
        "thetas": len(thetas),
        "tasks": first_order.n,
        "finite_tasks": problem.tasks is not None,
        "device": str(thetas.device),
        "m": m,
        "law": law,
        "outer": outer,
        "batch": batch,
        "state_bytes": state.shape[1] * state.element_size(),
        **_numbers(first_order),
        "c1": cost.c1,
        "c1_sem": cost.c1_sem,
        "c2": cost.c2,
        "c2_sem": cost.c2_sem,
        "proxy_vanishes": first_order.vanishes,
        "by_sweep": by_sweep,
        "by_proxy": by_proxy,
        "by_memory": by_memory,
        "bounds": _bounds(problem, thetas, tasks, chunk, compile) if bounds else None,
        "why": _why(by_memory, first_order.vanishes),
    }


def _numbers(x: MeasuredMoments) -> dict[str, Any]:
    """The measured moments of the first-order gradient."""
    return {
        "d2": x.d2,
        "d2_sem": x.d2_sem,
        "v2": x.v2,
        "v2_sem": x.v2_sem,
        "cov_d2_v2": float(x.covariance("d2", "v2")[0, 1]),
        "mean_gradient_sq": x.mean_gradient_sq,
        "mean_cross": x.mean_cross,
        "mean_proxy_sq": x.mean_proxy_sq,
        "proxy_sq": x.proxy_sq,
        "bias_sq": x.bias_sq,
        "bias_sq_sem": x.bias_sq_sem,
        "cosine": None if x.cosine != x.cosine else x.cosine,
    }


def _shared(pairs: int, chunk: int | None, processes: Processes) -> int:
    """(θ, task) pairs run together by each of several processes."""
    chunk = min(256, -(-pairs // 16)) if chunk is None else integer("chunk, the tasks run together,", chunk, 1)
    if (chunks := -(-pairs // chunk)) < processes.size:
        raise UfomError(f"{processes.size} processes for {chunks} chunk(s): start no more than those, or --chunk fewer")
    return chunk


def _bounds(
    problem: BilevelProblem, thetas: Tensor, tasks: Tasks, chunk: int | None, compile: bool
) -> list[dict[str, Any]]:
    """`compare_bounds` at no more than 4 θ, evenly spaced among those given, and the first 4 tasks."""
    chosen = thetas[torch.linspace(0, len(thetas) - 1, min(4, len(thetas)), dtype=torch.float32, device="cpu").long()]
    known = getattr(problem, "constants", None)
    return compare_bounds(problem, chosen, tasks.take(slice(4)), known, chunk=chunk, compile=compile)


def _row(moments: Moments, cost: CostModel, m: float, exact: Any) -> dict[str, Any]:
    p = optimal_q(moments, cost, m)
    # at q* = 0 the time's limit: the proxy is exact, and only C_det is paid
    time = cost.time(p.q, moments, m) if p.q else moments.v2**m * cost.c_det
    return {
        "sweep": str(cost.sweep),
        "slots": cost.sweep.slots,
        "proxy": cost.proxy.steps,
        "rho": p.rho,
        "q": p.q,
        "interval": list(p.interval),
        "pays": p.pays,
        "why": p.why,
        "speedup_over_exact": p.speedup_over_exact,
        "cost_over_fom": p.cost_over_fom,
        "relative_time": float(time / exact),
    }


def _by_memory(moments: dict[Truncated, Moments], cost: CostModel, m: float, exact: float) -> list[dict[str, Any]]:
    """The best proxy, sweep and q for budgets of inner states that double from 1 to r."""
    rows: list[dict[str, Any]] = []
    for budget in sorted({2**i for i in range(20) if 2**i < cost.r} | {cost.r}):
        every = counted_candidates(moments, cost.r, float(cost.c1), float(cost.c2), budget, as_printed=True)
        best = plan(every, budget, m)[0]
        proxy, sweep = best.label
        chosen = replace(cost, sweep=sweep, proxy=proxy or Truncated())
        rows.append({"states": best.bytes, **_row(moments[chosen.proxy], chosen, m, exact)})
    return [row for i, row in enumerate(rows) if i == 0 or row["states"] != rows[i - 1]["states"]]


def _why(by_memory: list[dict[str, Any]], vanishes: bool) -> str:
    """What to run, in a few sentences: in the least memory, and in the least that comes near the best time."""
    least, best = by_memory[0], by_memory[-1]
    enough = next(row for row in by_memory if row["relative_time"] <= 1.5 * best["relative_time"])
    said = [VANISHES] if vanishes else []
    said.append(f"Holding one state, {_advice(least)}: {least['why']}.")
    if enough is not least:
        gain = least["relative_time"] / enough["relative_time"]
        least_that = f"Holding {enough['states']} states, the least that come within 1.5× of the best"
        said.append(f"{least_that}, is {gain:.3g}× sooner than that: {_advice(enough)}.")
    return " ".join(said)


def _advice(row: dict[str, Any]) -> str:
    sweep, proxy = _written(row["sweep"]), f"proxy=Truncated({row['proxy']})" if row["proxy"] else ""
    if row["q"] == 0:
        return f"run Estimator(0.0, {proxy}), which is exact here" if proxy else "run FOM, which is exact here"
    exact = {"": "RECOMPUTED", "Sweep.stored()": "EXACT"}.get(sweep, f"UFOM(1, {sweep})")
    arguments = (f"{row['q']:.3g}", sweep, proxy)
    ufom = f"UFOM({', '.join(filter(None, arguments))})"
    if row["pays"] != "cannot tell":
        return f"run the exact gradient, {exact}" if row["q"] == 1 else f"run {ufom}"
    if row["q"] == 1:
        return f"run the exact gradient, {exact}; the data cannot tell whether a smaller q is sooner"
    return f"run {ufom} or the exact gradient, {exact}; both are unbiased, and the data cannot tell which is sooner"


def _written(sweep: str) -> str:
    """The call that makes a sweep, "" for the paper's."""
    if sweep == "recomputed":
        return ""
    kind, *rest = sweep.split(":")
    return f"Sweep.{kind}({', '.join(rest)})"
