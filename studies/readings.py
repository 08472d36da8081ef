"""Which reading of (19)–(21) does experiment support? The synthetic pair over inner step sizes (Fig. 1d–f).

The readings differ in the exponent m, in where D² and V² are taken and in what a correction costs; READINGS names
them. Each is judged on the outer steps that it is made for: γ_k ∝ k^(−s) for s = 0.5, 0.75 and 1, and constant steps,
tuned to each q or the same for all. The problem is linear near its minimiser, so E‖∇M(θ_k)‖², and with it the time to
E‖∇M‖² ≤ δ, follows exactly from a moment recursion: the times have no sampling error, and no seeds have to choose the
best q. At one α the recursion is held against simulated outer SGD.

Not printed in the paper, hence ours: γ_k = 10/(k + 100) for s = 1 (10/k as released, shifted so that no early step
leaves the quadratic pieces); for s < 1, γ_k = (10/(s·N))·(N/(k + 100))^s, N set so that q = 1 is at δ after about N.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, of_table, silent
from studies.engine.sweep import Store
from studies.readings_cell import DECAYING, PAPERS_ALPHA, PAPERS_Q, READINGS, SAME, TUNED, R, Reading, run_cell
from studies.shared.drawing import SIZE, markdown, new_figure, seaborn
from studies.shared.pair import RANGE
from studies.shared.verdicts import TOLERATED, Verdict
from ufom_runtime.command.style import GREY, LOOKS
from ufom_theory import Moments

if TYPE_CHECKING:
    from matplotlib.figure import Figure


question = "Which reading of the optimal q, with which exponent, does experiment support?"


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        alphas: inner step sizes; Fig. 1f and the simulation are at α = 0.01, which must be among them.
        points: values of q besides those that the readings predict.
        largest_delta: the precision δ is half of FOM's floor at each α, and at most this.
        seeds: of the simulation.
        chains: of each seed.
    """

    alphas: tuple[float, ...]
    points: int
    largest_delta: float
    seeds: int
    chains: int


SIZES = {
    "quick": Config((0.01, 0.02, 0.04), points=9, largest_delta=4e-3, seeds=6, chains=256),
    "standard": Config(
        (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05), points=25, largest_delta=2e-3, seeds=8, chains=1024
    ),
    "paper": Config(
        (*(float(f"{x:.3g}") for x in np.geomspace(1e-3, 5e-2, 35)), PAPERS_ALPHA),
        points=129,
        largest_delta=1e-4,
        seeds=64,
        chains=4096,
    ),
}


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """Rows of three parts, told apart by the column `part`; every row has its α, δ, D² and V² of each kind.

    "exact": for each α, rule and q, `steps` to δ by the recursion, `final` E‖∇M‖² after the last step; q = 0 is FOM.
    "curve": at α = 0.01, `final` after `steps`, for q = 0, 1 and each predicted q*.
    "simulated": for each rule and q, the same as "exact" for each `seed`, and `exact_final` by the recursion.
    """
    sizes = asdict(config)
    alphas = sizes.pop("alphas")
    shared = {"study": "readings", "version": 1, **sizes}
    cells: list[dict[str, Any]] = [
        {**shared, "part": "simulated", "alpha": PAPERS_ALPHA, "rule": rule} for rule in DECAYING
    ]
    cells += [
        {**shared, "part": "exact", "alpha": a, "kind": kind} for a in alphas for kind in ("decaying", "constant")
    ]
    store.run(cells, run_cell, progress=progress)
    return store.table(cells).drop(columns=["study", "version", "kind", *sizes])


def exponent(runs: pd.DataFrame, moments: Moments) -> float:
    """m of the time A(q)^m·(C_det + C_rnd·q), by least squares over q of the log; the cost is known, and cancels."""
    q = runs.q.to_numpy()
    log_a = np.log((1 / q - 1) * moments.d2 + moments.v2)
    log_a -= log_a.mean()
    return float(log_a @ np.log(runs.steps.to_numpy()) / (log_a @ log_a))


def exponents(table: pd.DataFrame, rule: str, reading: Reading) -> pd.Series:
    """The fitted m of a rule at each α, with the moments of a reading."""
    runs = table[(table.part == "exact") & (table.rule == rule) & (table.q > 0)]
    return pd.Series({alpha: exponent(ours, reading.moments(ours.iloc[0])) for alpha, ours in runs.groupby("alpha")})


def outcomes(table: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """For each α: q*, the best q, the log-time regret at q*, the log speed-up over q = 1 and the predicted one."""
    exact, rows = table[(table.part == "exact") & (table.rule == reading.rule) & (table.q > 0)], []
    for alpha, runs in exact.groupby("alpha"):
        prediction = reading.predict(runs.iloc[0])
        times = pd.Series((np.log(runs.steps * (reading.cost.c_det + reading.cost.c_rnd * runs.q))).to_numpy(), runs.q)
        at_q_star = times.iloc[np.abs(np.log(times.index / prediction.q)).argmin()]
        rows.append(
            {
                "alpha": alpha,
                "q_star": prediction.q,
                "best": times.idxmin(),
                "regret": at_q_star - times.min(),
                "gain": times.iloc[-1] - at_q_star,
                "predicted_gain": math.log(prediction.speedup_over_exact),
            }
        )
    return pd.DataFrame(rows).set_index("alpha")


def judge(table: pd.DataFrame) -> list[Verdict]:
    """Each reading's exponent, q* and gain; the paper's 0.08; FOM; the recursion against the simulation."""
    verdicts = []
    for reading in READINGS:
        fits, found = exponents(table, reading.rule, reading), outcomes(table, reading)
        margin = 0.05 * reading.m
        verdicts.append(Verdict.from_paired(f"exponent m, {reading.name}", "=", reading.m, fits, margin, margin))
        worst = float(found.regret.max())
        verdicts.append(_exact(f"worst log-time regret at q*, {reading.name}", "<=", math.log(TOLERATED), worst))
        error = float((found.gain - found.predicted_gain).abs().max())
        verdicts.append(_exact(f"worst error of the log speed-up over q = 1, {reading.name}", "<=", 0.1, error))
        if reading.where == "θ*" and reading.m != 2:
            subject = f"exponent m with moments at θ*, {reading.rule}: the printed 2"
            verdicts.append(Verdict.from_paired(subject, "=", 2.0, fits, widest=0.1, margin=0.1))
    local = READINGS[-1]
    for rule in DECAYING:
        verdicts += _simulation(table, rule, local)
    # a step shorter than the tuned one feels A(q) less than the tuned one does
    worst = float(exponents(table, SAME, local).max())
    verdicts.append(_exact(f"exponent m with moments at θ*, {SAME}", "<=", 1.0, worst))
    at = table[table.alpha == PAPERS_ALPHA].iloc[0]
    for reading in READINGS:
        verdicts.append(_exact(f"q* at α = 0.01, {reading.name}", "=", PAPERS_Q, float(reading.predict(at).q), 0.005))
    fom = table[(table.part == "exact") & (table.q == 0)]
    verdicts.append(_exact("least E‖∇M‖² of FOM over δ", ">=", 1.0, float((fom.final / fom.delta).min())))
    return verdicts


def _simulation(table: pd.DataFrame, rule: str, local: Reading) -> list[Verdict]:
    runs = table[(table.part == "simulated") & (table.rule == rule)]
    seeds = [exponent(ours, local.moments(ours.iloc[0])) for _, ours in runs[runs.q > 0].groupby("seed")]
    ratio = (runs.final / runs.exact_final).groupby(runs.seed).mean()
    m = 1 / DECAYING[rule]
    return [
        Verdict.from_paired(f"exponent m with moments at θ*, {rule}, simulated", "=", m, seeds, 0.1 * m, 0.1 * m),
        Verdict.from_paired(f"E‖∇M‖², simulated over exact, {rule}", "=", 1.0, ratio, 0.05, 0.05),
    ]


def _exact(subject: str, relation: Any, predicted: float, measured: float, margin: float = 0.0) -> Verdict:
    """A verdict on a number without sampling error, "inconclusive" where it is none."""
    return replace(Verdict.from_interval(subject, relation, predicted, measured, margin=margin), tolerance=margin)


def answer(table: pd.DataFrame) -> str:
    """The answer in a sentence."""
    local = {reading.rule: reading for reading in READINGS if reading.where == "θ*"}
    fitted = ", ".join(f"{exponents(table, rule, local[rule]).mean():.2f} for {rule}" for rule in local)
    printed = outcomes(table, READINGS[0])
    regret = max(outcomes(table, reading).regret.max() for reading in local.values())
    ratio = printed.q_star / printed.best
    return (
        f"The local one: with D² and V² at θ*, m = {fitted}, and its q* is at most "
        f"{math.expm1(regret):.1%} slower than the best q; the printed reading's q* is {ratio.min():.2g} to "
        f"{ratio.max():.2g} times the best q, and up to {math.expm1(printed.regret.max()):.0%} slower."
    )


def draw(table: pd.DataFrame) -> Figure:
    """The exponent that the times ask for, at each α, for each kind of outer steps; and the readings' exponents."""
    from matplotlib.lines import Line2D

    rules, local = [*DECAYING, TUNED, SAME], READINGS[-1]
    fits = pd.concat([exponents(table, rule, local).rename(_typeset(rule)) for rule in rules], axis=1)
    figure = new_figure(4.2)
    axes = figure.subplots()
    colour, marks = LOOKS["UFOM"]["color"], fits.melt(var_name="rule", value_name="m")
    seaborn().stripplot(marks, x="rule", y="m", ax=axes, jitter=False, color=colour, alpha=0.6)
    for i, rule in enumerate(rules[:-1]):
        axes.plot([i - 0.3, i + 0.3], [1 / DECAYING.get(rule, 1.0)] * 2, color=colour, lw=1.2)
    for m, name in ((2, "as printed, $m = 2$"), (0.5, "as released, $m = 1/2$")):
        axes.axhline(m, color=GREY, ls="--", lw=1)
        axes.annotate(name, (1, m), (-3, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", color=GREY, fontsize=SIZE)  # fmt: skip
    label = "predicted: $m = 1/s$ for steps $k^{-s}$, 1 if tuned"
    handles = [
        Line2D([], [], color=colour, marker="o", ls="", alpha=0.6, label="measured, a mark for each inner step size"),
        Line2D([], [], color=colour, lw=1.2, label=label),
    ]
    axes.legend(handles=handles, loc="upper right", bbox_to_anchor=(0.99, 0.84))
    axes.set(xlabel="outer steps", ylabel="exponent $m$ of the time in $E\\|G\\|^2$", xlim=(-0.5, 4.6), ylim=(0, 2.3))
    axes.set_title("The exponent is that of the outer steps, not one number")
    return figure


def _typeset(rule: str) -> str:
    """The powers of k in mathematics' type; constant steps on two lines."""
    return re.sub(r"k\^(-[\d.]+)", r"$k^{\1}$", rule).replace(", ", ",\n")


def caption(table: pd.DataFrame, config: Config) -> str:
    """What the figure shows, with its sizes, and what each reading predicts and comes to."""
    simulated, exact = table[table.part == "simulated"], table[table.part == "exact"]
    return (
        f"The synthetic pair (r = {R}, a = (0.5, 1.5), b = (0, 10), A = 400) at {exact.alpha.nunique()} α, θ_0 uniform "
        f"on [{RANGE[0]:g}, {RANGE[1]:g}]: m of the time A(q)^m·(C_det + C_rnd·q) to E‖∇M‖² ≤ δ, with D² and V² at θ*, "
        f"by least squares over {config.points} q. Times are by the exact moment recursion, without sampling error; δ "
        f"is {exact.delta.min():.2g} to {exact.delta.max():.2g}. The simulation that checks it, at α = "
        f"{PAPERS_ALPHA:g}, has {simulated.seed.nunique()} seeds of {config.chains} chains. Below, each reading of "
        "(19)–(21) on the outer steps that it is made for: ranges over α, times over the fastest."
        f"\n\n{markdown(_readings(table))}"
    )


def _readings(table: pd.DataFrame) -> pd.DataFrame:
    """What each reading predicts and comes to, as strings."""
    shown, at = {}, table[table.alpha == PAPERS_ALPHA].iloc[0]
    for reading in READINGS:
        fits, found = exponents(table, reading.rule, reading), outcomes(table, reading)
        times, ratios = np.exp(found.regret), found.q_star / found.best
        shown[reading.name] = {
            "D² and V²": f"at {reading.where}" if reading.where == "θ*" else f"suprema over {reading.where}",
            "m": f"{reading.m:.3g}",
            "m fitted": f"{fits.min():.3g} to {fits.max():.3g}",
            f"q* at α = {PAPERS_ALPHA:g}": f"{float(reading.predict(at).q):.3g}",
            "q* over the fastest q": f"{ratios.min():.2g} to {ratios.max():.2g}",
            "time at q*": f"{times.min():.2f} to {times.max():.2f}",
        }
    return pd.DataFrame.from_dict(shown, orient="index").rename_axis("reading")


study = Study(question, SIZES, measure, of_table(judge), of_table(draw), caption, of_table(answer))
