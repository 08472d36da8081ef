"""Is the predicted q as fast as the best q of a grid? The paper's synthetic pair over inner step sizes (Fig. 1d, 1e).

The grid is the same at every inner step size and does not know q*; q* and the paper's own q are run beside it. There
are two kinds of outer steps: 10/(k + 100), which is 1/k near the minimiser, and the paper's k^(−1/2), scaled as in
`readings`. The reading is fixed before the run: the time to precision is A(q)^m·(C_det + C_rnd·q) with m = 1 and m = 2
for these steps (1/s for steps k^(−s)), D² and V² at θ*. Time is charged as the paper does, in function calls with the
recomputed sweep, up to the first k at which E‖∇M(θ_k)‖² ≤ δ.

The problem is linear near its minimiser, so E‖∇M(θ_k)‖² follows exactly from a recursion of moments, without sampling
error. Simulated runs check it: seeds of many chains each, in which all q see the same starts, tasks and coins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, silent
from studies.engine.sweep import Store
from studies.shared.drawing import markdown, new_figure, plain_ticks, seaborn
from studies.shared.pair import RANGE, Array, exact_blocks, outer_step_size, simulate
from studies.shared.verdicts import TOLERATED, Verdict, log_regret
from ufom_runtime.command.style import GREY, LOOKS
from ufom_theory import CostModel, Moments, UfomError, optimal_q
from ufom_theory.two_tasks import TwoTaskProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RULES = {"k^-1": 1.0, "k^-0.5": 2.0}  # the outer steps' names and the exponent m of the time to precision


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        alphas: inner step sizes.
        grid: the smallest q of the logarithmic grid, which ends at 1.
        points: of the grid.
        delta: the precision δ, below FOM's floor ‖∇M(θ_FO)‖² at every α.
        patience: a q is given up where it takes this many times as long as the fastest.
        simulated: the α at which the runs are also simulated.
        simulated_delta: their precision, which takes fewer steps.
        seeds: independent repetitions of the simulation; even ones choose the best q, odd ones judge.
        chains: of each seed, over which E‖∇M‖² is taken.
        r: inner steps.
    """

    alphas: tuple[float, ...]
    grid: float = 1e-3
    points: int = 19
    delta: float = 1.2e-4
    patience: float = 2.0
    simulated: tuple[float, ...] = (0.01,)
    simulated_delta: float = 2e-3
    seeds: int = 16
    chains: int = 64
    r: int = 10


SIZES = {
    "quick": Config((0.01, 0.02), delta=5e-3, simulated=(0.02,), simulated_delta=2e-2, seeds=8, chains=32),
    "standard": Config((0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05)),
    "paper": Config(
        tuple(float(f"{x:.3g}") for x in np.geomspace(1e-3, 5e-2, 35)), points=37, simulated=(0.001, 0.05),
        simulated_delta=1.2e-4, chains=1000,
    ),
}  # fmt: skip


def predict(alpha: float, r: int) -> tuple[TwoTaskProblem, dict[str, float]]:
    """The pair at one α, with D², V² at θ* and their suprema over `RANGE`, and the paper's q (suprema, m = 2)."""
    pair = TwoTaskProblem(alpha, r, a=(0.5, 1.5), b=(0.0, 10.0), A=400.0)
    d2, v2 = (float(x) for x in pair.moments(pair.theta_star))
    sup_d2, sup_v2 = (float(x.max()) for x in pair.moments(np.linspace(*RANGE, 10_000)))
    return pair, {
        "alpha": alpha,
        "d2": d2,
        "v2": v2,
        "sup_d2": sup_d2,
        "sup_v2": sup_v2,
        "q_star_paper": float(optimal_q(Moments(sup_d2, sup_v2), CostModel(r=r), 2.0).q),
        "fom_floor": pair.gradient**2,
    }


def step_size(rule: str, pair: TwoTaskProblem, delta: float) -> Callable[[Any], Any]:
    """γ_k of a rule: 10/(k + 100), or (20/N)·√(N/(k + 100)) with N such that q = 1 is at δ after about N steps."""
    if rule == "k^-1":
        return outer_step_size
    horizon = 10 * pair.curvature * float(pair.moments(pair.theta_star)[1]) / delta
    return lambda k: 20 / horizon * np.sqrt(horizon / (k + 100))


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """One row for each part, α, rule, q and seed; the part "exact" is without sampling error and has no seed.

    Columns: q, 0 for FOM; steps to δ, nan where it was not reached in time; log_time, what these steps are charged;
    final, E‖∇M‖² after the last step, and for simulated runs exact_final, the same by the recursion; q_star and the
    other predictions at that α.
    """
    sizes = asdict(config)
    alphas, simulated = sizes.pop("alphas"), sizes.pop("simulated")
    shared = {"study": "optimal_q", "version": 2, **sizes}
    cells = [{**shared, "alpha": a, "rule": rule, "simulated": a in simulated} for a in alphas for rule in RULES]
    store.run(cells, run_cell, progress=progress)
    return store.table(cells).drop(columns=["study", "version", "simulated", *sizes])


def run_cell(cell: Mapping[str, Any]) -> pd.DataFrame:
    """One α and rule: by the recursion, and where it is asked for simulated on those q that arrived in time."""
    alpha, r, rule = cell["alpha"], cell["r"], cell["rule"]
    pair, prediction = predict(alpha, r)
    if cell["delta"] >= prediction["fom_floor"]:
        raise UfomError(f"δ = {cell['delta']:g} is above FOM's floor {prediction['fom_floor']:g} at α = {alpha:g}")
    moments, cost = Moments(prediction["d2"], prediction["v2"]), CostModel(r=r, as_printed=True)
    prediction["q_star"] = float(optimal_q(moments, cost, RULES[rule]).q)
    q = np.unique(
        [0.0, *np.geomspace(cell["grid"], 1, cell["points"]), prediction["q_star_paper"], prediction["q_star"]]
    )
    tables = [exact(pair, q, rule, cost, cell["delta"], cell["patience"])]
    if cell["simulated"]:
        tables.append(_simulated(pair, q, cost, cell))
    table = pd.concat(tables)
    table["log_time"] = np.log(table.steps * (cost.c_det + cost.c_rnd * table.q))
    return table.assign(rule=rule, **prediction)


def exact(pair: TwoTaskProblem, q: Array, rule: str, cost: CostModel, delta: float, patience: float) -> pd.DataFrame:
    """First steps with E‖∇M‖² ≤ δ, nan where that takes `patience` times as long as with the fastest q; last E‖∇M‖².

    Raises:
        UfomError: no q is at δ within a hundred million steps.
    """
    steps, per_step, least = np.full(q.shape, np.nan), cost.c_det + cost.c_rnd * q, np.inf
    for k, norms in exact_blocks(pair, q, step_size(rule, pair, delta)):
        arrived = norms <= delta
        steps = np.where(np.isnan(steps) & arrived.any(0), k[arrived.argmax(0)], steps)
        least = np.nanmin([least, *(steps * per_step)])
        if not (np.isnan(steps) & (q > 0) & (k[-1] * per_step <= patience * least)).any():
            break
        if k[-1] > 10**8:
            raise UfomError(f"δ = {delta:g} is not reached at α = {pair.alpha:g} in {k[-1]} steps: take a larger δ")
    return pd.DataFrame({"part": "exact", "q": q, "steps": steps, "final": norms[-1]})


def _simulated(pair: TwoTaskProblem, q: Array, cost: CostModel, cell: Mapping[str, Any]) -> pd.DataFrame:
    """Those q that arrive in time, simulated for a quarter longer than the slowest of them takes."""
    delta, rule = cell["simulated_delta"], cell["rule"]
    known = exact(pair, q, rule, cost, delta, cell["patience"])
    q = known.q[known.steps.notna() | (known.q == 0)].to_numpy()
    length, gamma = math.ceil(1.25 * known.steps.max()), step_size(rule, pair, delta)
    rng = np.random.default_rng([20260101, round(1e6 * pair.alpha), list(RULES).index(rule)])
    steps, final = simulate(pair, q, delta, length, rng, (cell["seeds"], cell["chains"]), gamma)
    norms = next(norms[length - k[0]] for k, norms in exact_blocks(pair, q, gamma) if k[-1] >= length)
    index = pd.MultiIndex.from_product([q, range(cell["seeds"])], names=["q", "seed"])
    table = pd.DataFrame({"part": "simulated", "steps": steps.ravel(), "final": final.ravel()}, index).reset_index()
    return table.assign(exact_final=np.repeat(norms, cell["seeds"]))


question = "Is the predicted q as fast as the best q of a grid, on the paper's synthetic pair?"
TYPESET = {"k^-1": "$\\gamma_k \\propto 1/k$", "k^-0.5": "$\\gamma_k \\propto k^{-1/2}$"}


def basins(table: pd.DataFrame, r: int) -> pd.DataFrame:
    """For each α and rule, by the exact times: the best q of the grid, and the ends of the basin of all q within 5 %.

    The ends are interpolated between neighbours on the logarithmic scales. Columns: best, low, high; low_predicted and
    high_predicted, where the predicted time is 5 % above its least; regret and regret_paper, the log-times at q* and at
    the paper's q over that of the grid's best, negative where they are faster; q_star, q_star_paper.
    """
    rows, cost = [], CostModel(r=r, as_printed=True)
    for (rule, alpha), runs in table[(table.part == "exact") & (table.q > 0)].groupby(["rule", "alpha"], sort=False):
        arrived = runs[runs.log_time.notna()].sort_values("q")
        first, log_q, logs = runs.iloc[0], np.log(arrived.q.to_numpy()), arrived.log_time.to_numpy()
        fine = np.linspace(log_q[0], 0, 4001)
        second = (np.exp(-fine) - 1) * first.d2 + first.v2
        predicted = RULES[str(rule)] * np.log(second) + np.log(cost.c_det + cost.c_rnd * np.exp(fine))
        beside = arrived.q.isin([first.q_star, first.q_star_paper]) & (arrived.q < 1)  # 1 is on the grid, too
        grid = arrived[~beside].set_index("q").log_time
        found = {"rule": rule, "alpha": alpha, "best": grid.idxmin()}
        for name, values in (("", np.interp(fine, log_q, logs)), ("_predicted", predicted)):
            near = np.exp(fine[values <= values.min() + math.log(TOLERATED)])
            found |= {f"low{name}": near.min(), f"high{name}": near.max()}
        for name in ("q_star", "q_star_paper"):
            at = float(runs.log_time[runs.q == first[name]].iloc[0])
            found |= {name: first[name], name.replace("q_star", "regret"): at - grid.min()}
        rows.append(found)
    return pd.DataFrame(rows)


def answer(table: pd.DataFrame, config: Config) -> str:
    """The answer in a few sentences."""
    found = basins(table, config.r)
    kept, over, width = (
        (found.regret <= math.log(TOLERATED)).sum(), found.q_star_paper / found.best, found.high / found.low
    )  # fmt: skip
    papers = np.exp(found.regret_paper)
    return (
        f"Yes, within 5 % for {kept} of {len(found)} pairs of an inner step size and outer steps; at worst q* took "
        f"{math.exp(found.regret.max()):.3f} times as long as the best q of the grid. The basin is flat: the q within "
        f"5 % of the best span a factor of {width.min():.2g} to {width.max():.2g}. The paper's own reading asks for "
        f"{over.min():.2g} to {over.max():.2g} times the best q, and takes {papers.min():.2f} to {papers.max():.2f} "
        "times as long."
    )


def judge(table: pd.DataFrame, config: Config) -> list[Verdict]:
    """Is q* as fast as the best q, as much faster than q = 1 as predicted; is FOM stuck; is the simulation right?"""
    verdicts, cost, bound = [], CostModel(r=config.r, as_printed=True), math.log(TOLERATED)
    found = basins(table, config.r).set_index(["rule", "alpha"])
    for (rule, alpha), runs in table[table.part == "exact"].groupby(["rule", "alpha"], sort=False):
        at, one = f"{rule}, α = {alpha:g}", found.loc[(rule, alpha)]
        verdicts.append(Verdict.from_interval(f"log-time regret at q*, {at}", "<=", bound, one.regret))
        predicted, width = (math.log(one[f"high{name}"] / one[f"low{name}"]) for name in ("_predicted", ""))
        subject = f"log width of the 5 % basin, {at}"
        verdicts.append(Verdict.from_interval(subject, "=", predicted, width, margin=0.25))
        moments = Moments(runs.d2.iloc[0], runs.v2.iloc[0])
        gain = math.log(optimal_q(moments, cost, RULES[str(rule)]).speedup_over_exact)
        measured = float(runs.log_time[runs.q == 1].iloc[0] - runs.log_time[runs.q == one.q_star].iloc[0])
        verdicts.append(Verdict.from_interval(f"log speed-up over q = 1, {at}", "=", gain, measured, margin=0.1))
        over = float(runs.final[runs.q == 0].iloc[0]) / config.delta
        verdicts.append(Verdict.from_interval(f"E‖∇M‖² of FOM over δ, {at}", ">=", 1.0, over))
    for (rule, alpha), runs in table[table.part == "simulated"].groupby(["rule", "alpha"], sort=False):
        at = f"{rule}, α = {alpha:g}"
        logs = runs[runs.q > 0].pivot(index="seed", columns="q", values="log_time").dropna(axis=1)
        verdicts.append(log_regret(f"simulated log-time regret at q*, {at}", logs, runs.q_star.iloc[0])[0])
        ratio = (runs.final / runs.exact_final).groupby(runs.seed).mean()
        subject = f"simulated E‖∇M‖² over that of the recursion, {at}"
        verdicts.append(Verdict.from_paired(subject, "=", 1.0, ratio, widest=0.1, margin=0.1))
    return verdicts


def draw(table: pd.DataFrame, config: Config) -> Figure:
    """A panel for each kind of outer steps: the best q with its basin, the prediction, and the paper's q."""
    figure = new_figure(4.2)
    several, found = figure.subplots(1, 2, sharey=True), basins(table, config.r)
    for axes, rule in zip(several, RULES, strict=True):
        _draw_optima(axes, found[found.rule == rule])
        axes.set_title(f"outer steps {TYPESET[rule]}, so $m = {RULES[rule]:g}$")
    several[1].set_ylabel("")
    handles, labels = several[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _draw_optima(axes: Axes, found: pd.DataFrame) -> None:
    look = LOOKS["UFOM"]
    axes.errorbar(
        found.alpha, found.best, [found.best - found.low, found.high - found.best], fmt=look["marker"],
        color=look["color"], label="measured: fastest $q$ (bar: within 5 %)",
    )  # fmt: skip
    for column, colour, style, name in (
        ("q_star", look["color"], "-", "predicted: $q^*$"),
        ("q_star_paper", GREY, "--", "as the paper reads it: $m = 2$, suprema"),
    ):
        seaborn().lineplot(found, x="alpha", y=column, ax=axes, color=colour, ls=style, label=name, legend=False)
    axes.set(xscale="log", yscale="log", xlabel="inner step size $\\alpha$", ylabel="probability $q$")
    plain_ticks(axes)


def caption(table: pd.DataFrame, config: Config) -> str:
    """What the figure shows, with its sizes, and the numbers behind it."""
    shown = {}
    for row in basins(table, config.r).itertuples():
        shown[f"{row.rule}, α = {row.alpha:g}"] = {
            "q*": f"{row.q_star:.3g}", "fastest q": f"{row.best:.3g}", "within 5 %": f"{row.low:.3g} to {row.high:.3g}",
            "within 5 %, predicted": f"{row.low_predicted:.3g} to {row.high_predicted:.3g}",
            "time at q*": f"{math.exp(row.regret):.3f}", "the paper's q": f"{row.q_star_paper:.3g}",
            "time there": f"{math.exp(row.regret_paper):.3f}",
        }  # fmt: skip
    simulated = " and ".join(f"{alpha:g}" for alpha in config.simulated)
    return (
        f"The synthetic pair (r = {config.r}, a = (0.5, 1.5), b = (0, 10), A = 400): the q that reaches E‖∇M‖² ≤ δ = "
        f"{config.delta:g} with the fewest function calls (recomputed sweep), of {config.points} fixed q from "
        f"{config.grid:g} to 1, q* and the paper's q. θ_0 is uniform on [−50, 50]. Times are by the exact recursion of "
        f"moments, without sampling error. At α = {simulated} simulations check it: {config.seeds} seeds of "
        f"{config.chains} chains, to δ = {config.simulated_delta:g}; 95 % t-intervals, n = {config.seeds // 2} odd "
        "seeds, for the regret, whose best q the even ones choose. FOM never reaches δ. Times in the table are over "
        f"the fastest.\n\n{markdown(pd.DataFrame.from_dict(shown, orient='index').rename_axis('outer steps'))}"
    )


study = Study(question, SIZES, measure, judge, draw, caption, answer)
