"""Is the predicted q as fast as the best q of a grid? The paper's synthetic pair over inner step sizes (Fig. 1d, 1e).

The reading is fixed before the run. The outer steps are γ_k = 10/(k + 100), which is 1/k near the minimiser, so the
time to precision is A(q)·(C_det + C_rnd·q), exponent m = 1, with D² and V² taken at θ*. Time is charged as the paper
does, in function calls with the recomputed sweep. It is measured as the first k at which E‖∇M(θ_k)‖² ≤ δ, the
expectation over the chains of one seed; all q see the same starts, tasks and coins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, silent
from studies.engine.sweep import Store
from studies.shared.drawing import SIZE, legend_below, plain_ticks, shades
from studies.shared.pair import RANGE, exact_run, simulate
from studies.shared.verdicts import TOLERATED, Verdict, halves, log_regret
from ufom_runtime.command.style import GREY, LOOKS, WIDTH
from ufom_theory import CostModel, Moments, UfomError, optimal_q
from ufom_theory.two_tasks import TwoTaskProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXPONENT = 1.0
FACTORS = (1 / 4, 1 / 2, 1 / math.sqrt(2), 1, math.sqrt(2), 2, 4)  # the grid of q over q*; q = 1 is added


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        alphas: inner step sizes.
        delta: the precision δ, below FOM's floor ‖∇M(θ_FO)‖² at every α.
        seeds: independent repetitions; even ones choose the rival, odd ones judge.
        chains: of each seed, over which E‖∇M‖² is taken.
        r: inner steps.
    """

    alphas: tuple[float, ...]
    delta: float
    seeds: int
    chains: int
    r: int = 10


SIZES = {
    "quick": Config(alphas=(0.01, 0.022, 0.05), delta=1e-3, seeds=8, chains=256),
    "standard": Config(alphas=(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05), delta=1.2e-4, seeds=16, chains=400),
    "paper": Config(
        alphas=tuple(float(f"{x:.3g}") for x in np.geomspace(1e-3, 5e-2, 35)), delta=1.2e-4, seeds=16, chains=4000
    ),
}


def predict(alpha: float, r: int) -> tuple[TwoTaskProblem, dict[str, float]]:
    """The pair at one α, with D², V² and q* under this study's reading and under the paper's (suprema, m = 2)."""
    pair = TwoTaskProblem(alpha, r, a=(0.5, 1.5), b=(0.0, 10.0), A=400.0)
    d2, v2 = (float(x) for x in pair.moments(pair.theta_star))
    sup_d2, sup_v2 = (float(x.max()) for x in pair.moments(np.linspace(*RANGE, 10_000)))
    return pair, {
        "alpha": alpha,
        "d2": d2,
        "v2": v2,
        "q_star": float(optimal_q(Moments(d2, v2), CostModel(r=r), EXPONENT).q),
        "sup_d2": sup_d2,
        "sup_v2": sup_v2,
        "q_star_paper": float(optimal_q(Moments(sup_d2, sup_v2), CostModel(r=r), 2.0).q),
        "fom_floor": pair.gradient**2,
    }


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """One row for each α, q and seed; q = 0 is FOM, run beside the others for as many steps.

    Columns: alpha, q, seed; steps to δ, nan where it was not reached; log_time, what these steps are charged; final and
    exact_final, E‖∇M‖² after the last step, simulated and by the exact moment recursion; and the predictions at that α.
    """
    sizes = asdict(config)
    alphas = sizes.pop("alphas")
    cells = [
        {"study": "optimal_q", "version": 1, **sizes, "alpha": alpha, "number": i} for i, alpha in enumerate(alphas)
    ]
    store.run(cells, run_cell, progress=progress)
    return store.table(cells).drop(columns=["study", "version", "number", *asdict(config).keys() - {"alphas"}])


def run_cell(cell: Mapping[str, Any]) -> pd.DataFrame:
    """One α; its number keeps its random numbers apart from the others'."""
    alpha, r, delta, seeds = cell["alpha"], cell["r"], cell["delta"], cell["seeds"]
    pair, prediction = predict(alpha, r)
    if delta >= prediction["fom_floor"]:
        raise UfomError(f"δ = {delta:g} is above FOM's floor {prediction['fom_floor']:g} at α = {alpha:g}")
    grid = np.array([0.0, *sorted({min(1.0, f * prediction["q_star"]) for f in FACTORS} | {1.0})])
    length, exact = exact_run(pair, grid, delta)
    rng = np.random.default_rng([20260101, cell["number"]])
    steps, final = simulate(pair, grid, delta, length, rng, (seeds, cell["chains"]))
    index = pd.MultiIndex.from_product([grid, range(seeds)], names=["q", "seed"])
    table = pd.DataFrame({"steps": steps.ravel(), "final": final.ravel()}, index).reset_index()
    table["exact_final"] = np.repeat(exact, seeds)
    cost = CostModel(r=r, as_printed=True)
    table["log_time"] = np.log(table.steps * (cost.c_det + cost.c_rnd * table.q))
    return table.assign(**prediction)


question = "Is the predicted q as fast as the best q of a grid, on the paper's synthetic pair?"


def answer(table: pd.DataFrame, config: Config) -> str:
    """The answer in a sentence."""
    regrets = [v for v in judge(table, config) if v.subject.startswith("log-time regret")]
    worst, yes = math.exp(max(v.measured for v in regrets)), sum(v.agrees == "yes" for v in regrets)
    return (
        f"At {yes} of {len(regrets)} inner step sizes it is, within 5 %, on held-out seeds; at worst it took "
        f"{worst:.3f} times as long as the best of the grid."
    )


def judge(table: pd.DataFrame, config: Config) -> list[Verdict]:
    """Is q* as fast as the best q, as much faster than q = 1 as predicted; is FOM stuck; is the simulation right?"""
    verdicts, cost, near = [], CostModel(r=config.r, as_printed=True), {"widest": 0.1, "margin": 0.1}
    for alpha, runs in table.groupby("alpha"):
        at, q_star, ours = f"α = {alpha:g}", runs.q_star.iloc[0], runs[runs.q > 0]
        moments = Moments(runs.d2.iloc[0], runs.v2.iloc[0])
        logs = ours.pivot(index="seed", columns="q", values="log_time")
        verdict, _, at_the_edge = log_regret(f"log-time regret at q*, {at}", logs, q_star)
        verdicts.append(replace(verdict, agrees="inconclusive") if at_the_edge else verdict)
        gain = math.log(optimal_q(moments, cost, EXPONENT).speedup_over_exact)
        held_out = halves(logs)[1]
        measured = held_out[1.0] - held_out[q_star]
        verdicts.append(Verdict.from_paired(f"log speed-up over q = 1, {at}", "=", gain, measured, **near))
        fom = runs[runs.q == 0].final / config.delta
        verdicts.append(Verdict.from_paired(f"E‖∇M‖² of FOM over δ, {at}", ">=", 1.0, fom, widest=0.1))
        ratio = (runs.final / runs.exact_final).groupby(runs.seed).mean()
        verdicts.append(Verdict.from_paired(f"E‖∇M‖², simulated over exact, {at}", "=", 1.0, ratio, **near))
    return verdicts


def draw(table: pd.DataFrame, config: Config) -> Figure:
    """Moments over α (Fig. 1d), q* predicted and measured over α (Fig. 1e), and the time over q for each α."""
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(WIDTH, 7))
    panels = figure.subplot_mosaic([["moments", "optima"], ["times", "times"]])
    moments, optima, times = panels.values()
    _draw_moments(moments, table)
    _draw_optima(optima, table)
    _draw_times(times, table, config)
    return figure


def _draw_moments(axes: Axes, table: pd.DataFrame) -> None:
    by_alpha = table.groupby("alpha")[["d2", "v2", "sup_d2", "sup_v2"]].first()
    for column, name, label in (("v2", "exact", "$V^2$"), ("d2", "FOM", "$D^2$")):
        for prefix, style, where in (
            ("", {"ls": "-"}, "at $\\theta^*$"),
            ("sup_", {"ls": "--", "mfc": "white"}, "sup over $[-50, 50]$"),
        ):
            axes.loglog(by_alpha.index, by_alpha[prefix + column], **LOOKS[name] | style, label=f"{label}, {where}")
    axes.set(xlabel="inner step size $\\alpha$", ylabel="squared gradient norm")
    axes.set_title("Bias $D^2$ and second moment $V^2$")
    plain_ticks(axes)
    legend_below(axes, 2)


def _draw_optima(axes: Axes, table: pd.DataFrame) -> None:
    predicted = table.groupby("alpha")[["q_star", "q_star_paper"]].first()
    colour, mark = LOOKS["UFOM"]["color"], LOOKS["UFOM"]["marker"]
    axes.loglog(predicted.index, predicted.q_star, color=colour, label="predicted, $m=1$, at $\\theta^*$")
    axes.loglog(predicted.index, predicted.q_star_paper, "--", color=GREY, label="predicted, $m=2$, suprema")
    mean = table[table.q > 0].groupby(["alpha", "q"]).log_time.mean()
    for i, (alpha, logs) in enumerate(mean.groupby("alpha")):
        logs = logs.droplevel("alpha")
        near = logs.index[logs <= logs.min() + math.log(TOLERATED)]
        axes.plot(alpha, logs.idxmin(), mark, color=colour, label="measured best" if i == 0 else None)
        axes.plot([alpha, alpha], [near.min(), near.max()], "-", color=colour, lw=6, alpha=0.25,
                  label="within 5 % of it" if i == 0 else None)  # fmt: skip
    axes.set(xlabel="inner step size $\\alpha$", ylabel="probability $q$", title="Optimal $q$, predicted and measured")
    plain_ticks(axes)
    legend_below(axes, 2)


def _draw_times(axes: Axes, table: pd.DataFrame, config: Config) -> None:
    cost = CostModel(r=config.r)
    groups = list(table[table.q > 0].groupby("alpha"))
    for colour, (alpha, runs) in zip(shades(len(groups)), groups, strict=True):
        logs = runs.pivot(index="seed", columns="q", values="log_time")
        relative = logs.sub(logs[1.0], axis=0)
        axes.errorbar(
            relative.columns, np.exp(relative.mean()), yerr=1.96 * np.exp(relative.mean()) * relative.sem(), fmt="o",
            color=colour, ms=4,
        )  # fmt: skip
        first = relative.columns.min()
        axes.annotate(f"$\\alpha$ = {alpha:g}", (first, math.exp(relative[first].mean())), (0, 9), ha="center",
                      textcoords="offset points", fontsize=SIZE, color=colour)  # fmt: skip
        moments = Moments(runs.d2.iloc[0], runs.v2.iloc[0])
        curve = np.geomspace(relative.columns.min(), 1, 200)
        axes.loglog(curve, cost.time(curve, moments, EXPONENT) / cost.time(1.0, moments, EXPONENT), color=colour, lw=1)
    axes.axhline(1, color=GREY, lw=0.8, ls=":")
    axes.set(
        xlabel="probability $q$", ylabel="time to precision $\\delta$, over that of $q=1$",
        title="Time at each inner step size $\\alpha$: measured (points) and predicted (lines)",
    )  # fmt: skip
    axes.margins(y=0.15)
    plain_ticks(axes)


def caption(table: pd.DataFrame, config: Config) -> str:
    """What the figure shows, with its sizes."""
    return (
        f"The synthetic pair (r = {config.r}, a = (0.5, 1.5), b = (0, 10), A = 400). Above: D² and V²; "
        "q* predicted, and the best q of the grid. Below: time to E‖∇M‖² ≤ δ in function calls (recomputed sweep), "
        "points with 95 % intervals, lines by theory (m = 1, moments at θ*). "
        f"δ = {config.delta:g}, {config.seeds} seeds of {config.chains} chains, outer steps "
        "10/(k + 100), θ_0 uniform on [−50, 50]. CPU."
    )


study = Study(
    question=question,
    sizes=SIZES,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=caption,
    answer=answer,
)
