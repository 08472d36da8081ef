"""Does Adaptive UFOM clean data sooner than the exact gradient (Table 1, Fig. 3), and what does it owe to its steps?

The reading is fixed before the run. The inner loss is the mean over the images: the printed sum diverges at α = 1, and
its value is in the table. Outer steps are plain, θ_k = θ_{k−1} − γ·G, over a grid of γ. Methods are compared at one γ
for all, the exact gradient's own, and at the γ of each, the best of the grid by validation cross entropy; the even
seeds choose γ, the odd ones judge.

The first-order gradient is identically zero here, since neither the start nor the outer loss contains θ. Then D² = V²,
(20) fails, and (21) gives q* = 1; with D² times 0.1 it gives a q* below 1 that knows nothing of the data. UFOM(q) is
then the exact gradient times 1/q with probability q: at the same γ it makes 1/q times longer steps, and costs
C_det/q + C_rnd for each. At its own best γ it should be slower than the exact gradient by just
(C_det/q + C_rnd)/(C_det + C_rnd), which is (19) with m = 1. A proxy that keeps K backward steps differs: it is
run at its own q*, m = 1 and moments at θ_0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, silent
from studies.engine.sweep import Store
from studies.hypercleaning_cell import METHODS, SIZES, Config, budget, run_cell
from studies.shared.drawing import draw_learning, markdown, new_figure
from studies.shared.paying import judge_paying, said_of
from studies.shared.training import ADAPTIVE, ahead, at, interval, missing
from studies.shared.verdicts import Verdict, halves
from ufom_runtime.problems.data import mnist
from ufom_theory import CostModel, Moments, Truncated, optimal_q

if TYPE_CHECKING:
    from matplotlib.figure import Figure


question = "Does Adaptive UFOM clean data sooner than the exact gradient, and is it more than a longer step?"
RUN = ("method", "gamma", "seed")
PAPER_TABLE = {  # Table 1: accuracy on the uncorrupted part of the training set, on the test set; cross entropy there
    "exact": (94.07, 90.82, 0.4795),
    "FOM": (92.04, 90.83, 0.3187),
    "adaptive ×0.1": (95.27, 92.24, 0.2811),
}


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """The logs of all runs, one row a logged step; at step 0 θ is zero, and every weight ½.

    Columns: data, method, gamma, seed; step, calls (charged, recomputed), seconds (of the calls that the
    stored sweep makes, by the medians of C1 and C2 on this machine), exact_steps_taken; q, d2, v2 (of θ_0 for UFOM,
    the rule's estimates for the adaptive ones); validation (the outer loss), train (accuracy on the uncorrupted
    training images), test and test_cce, separation (mean weight of the uncorrupted minus that of the corrupted
    images), moved (‖θ − θ_0‖), printed_sum (FOM's rows: the validation cross entropy at θ_0 where the inner loss is
    the sum that is printed).
    """
    cells = list(_cells(replace(config, data=present(config.data))))
    clock = {**cells[0], "method": "clock"}
    outcome = store.run([clock, *cells], run_cell, progress=progress)
    outcome.refuse_failed(lambda cell: f"{cell['method']}, γ = {cell['gamma']:g}")
    (times,), table = store.load(clock) or [{}], store.table(cells)
    seconds = times["c1"] * table.pop("gradients") + times["c2"] * table.pop("hessian_vector_products")
    shared = asdict(config).keys() - {"data", "gammas", "seeds"}
    return table.drop(columns=["study", *shared]).assign(seconds=seconds)


def present(data: str) -> str:
    if data == "mnist" and (reason := missing(mnist)):
        warnings.warn(f"{reason}; the embedded digits are taken instead", stacklevel=3)
        return "digits"
    return data


def _cells(config: Config) -> Any:
    shared = {k: v for k, v in asdict(config).items() if k not in ("gammas", "seeds")}
    for seed in range(config.seeds):
        yield {"study": "hypercleaning", **shared, "method": "FOM", "gamma": config.gammas[0], "seed": seed}
        for method in METHODS:
            for gamma in config.gammas:
                yield {"study": "hypercleaning", **shared, "method": method, "gamma": gamma, "seed": seed}


def settled_q(method: str, r: int) -> float:
    """q* by (21) of a printed rule where D² = V²: of the scale and of r alone."""
    return float(optimal_q(Moments(ADAPTIVE[method].scale, 1.0), CostModel(r=r), outer="paper").q)


def own_gamma(table: pd.DataFrame, config: Config) -> tuple[dict[str, float], set[str]]:
    """γ of each method by its validation cross entropy at the budget on the even seeds; those at an end of the grid."""
    limit = _limit(config)
    runs = at(halves(table)[0], RUN, "calls", limit).validation
    means = runs.groupby(["method", "gamma"]).mean().unstack("gamma").loc[[*METHODS]]
    best = means.idxmin(axis=1)
    return dict(best), {m for m in METHODS if best[m] in (means.columns[0], means.columns[-1])}


def _limit(config: Config) -> float:
    return budget(config.r, config.exact_steps)


def _chosen(table: pd.DataFrame, gammas: Mapping[str, float]) -> pd.DataFrame:
    """The runs of each method at its γ, and FOM's."""
    return table[table.gamma == table.method.map(gammas).fillna(table.gamma)]


def judge(table: pd.DataFrame, config: Config) -> list[Verdict]:
    """Is FOM no cleaning; does the paper's order hold at one γ, and at each its own; are q and time as predicted?"""
    limit, r = _limit(config), config.r
    own, ends = own_gamma(table, config)
    fom, held_out = table[table.method == "FOM"], halves(table)[1]
    log_sum = np.log(fom.groupby("seed").printed_sum.first() / math.log(10))
    verdicts = [
        Verdict.from_paired("‖θ − θ_0‖ of FOM: its row is that of no cleaning", "=", 0.0, fom.moved),
        Verdict.from_paired(
            "log validation CE of the printed sum at θ_0, over that of guessing", ">=", 0.0, log_sum, widest=0.1
        ),
    ]
    common = dict.fromkeys(METHODS, own["exact"])
    for words, gammas in (("the exact gradient's γ", common), ("its own γ", own)):
        values = at(_chosen(held_out, gammas), ("method", "seed"), "calls", limit)
        for better, worse in (("adaptive ×0.1", "exact"), ("released ×0.1", "exact"), ("adaptive ×0.1", "FOM")):
            verdicts.append(_ahead(values, better, worse, "test", f"each at {words}"))
        if gammas is own:
            verdicts.append(_ahead(values, "exact", "FOM", "test_cce", f"each at {words}"))
    for method in ("adaptive", "adaptive ×0.1"):
        updated = table[(table.method == method) & table.d2.notna()]
        last = updated.groupby(["gamma", "seed"]).q.last()
        q = last if len(last) > 1 else [math.nan, math.nan]
        verdicts.append(
            Verdict.from_paired(f"q of {method}, by (21) without data", "=", settled_q(method, r), q, 1e-5, 1e-5)
        )
    for method in ("adaptive ×0.1", "UFOM"):
        measured, predicted = log_time_over_exact(_chosen(held_out, own), method, config)
        subject = f"log time of {method} over exact, each at its own γ"
        verdict = Verdict.from_paired(subject, "=", predicted, measured, widest=0.1, margin=0.1)
        verdicts.append(replace(verdict, agrees="inconclusive") if ends & {method, "exact"} else verdict)
    return verdicts + _paying(_chosen(held_out, own), config)


def _paying(runs: pd.DataFrame, config: Config) -> list[Verdict]:
    """Does UFOM pay, each method at its own γ, at the calls of the exact gradient's run in either account?"""
    kept = config.proxy * (runs.method == "UFOM")
    stored = runs.step * (config.r + 1 + kept) + runs.exact_steps_taken * (config.r - kept)
    stored = stored.mask((runs.method == "FOM") & (runs.step > 0), _limit(config))  # θ_0 at every budget
    charged = runs.assign(recomputed=runs.calls, stored=stored)
    budgets = {"recomputed": _limit(config), "stored": float(config.exact_steps * (2 * config.r + 1))}
    test = {method: row[1] for method, row in PAPER_TABLE.items()}
    return judge_paying(
        charged.drop(columns="seconds"), ("UFOM", "adaptive ×0.1"), "test", "test accuracy (points)", budgets, test
    )


def _ahead(values: pd.DataFrame, better: str, worse: str, column: str, where: str) -> Verdict:
    """The paper's order of two methods: more test accuracy, or, of the exact gradient and FOM, more cross entropy."""
    name, widest = {"test": ("test accuracy (points)", 1.0), "test_cce": ("test cross entropy", 0.01)}[column]
    subject = f"{name}, {better} − {worse}, {where}"
    if better in PAPER_TABLE:
        place = {"test": 1, "test_cce": 2}[column]
        subject += f" (paper {PAPER_TABLE[better][place] - PAPER_TABLE[worse][place]:+.3g})"
    return Verdict.from_paired(subject, ">=", 0.0, values.loc[better, column] - values.loc[worse, column], widest)


def log_time_over_exact(table: pd.DataFrame, method: str, config: Config) -> tuple[pd.Series, float]:
    """Log of the calls to the validation CE that the exact gradient has at half the budget, over its own calls.

    Returns:
        One measured value a seed, nan where the method does not come so far, and the value of (19) with m = 1.
    """
    limit, r = _limit(config), config.r
    exact = at(table[table.method == "exact"], ("method", "seed"), "calls", limit / 2).validation.droplevel(0)
    runs = table[table.method == method]
    times = {}
    for seed, log in runs.groupby("seed"):
        lowest = log.validation.cummin().to_numpy()
        reached = lowest[-1] <= exact[seed] < lowest[0]
        times[seed] = float(np.interp(-exact[seed], -lowest, log.calls)) if reached else math.nan
    proxy = config.proxy if method == "UFOM" else 0
    ours, theirs = CostModel(r=r, proxy=Truncated(proxy)), CostModel(r=r)
    ratio = 1.0
    q = settled_q(method, r) if method in ADAPTIVE else float(runs.q.mean())
    if method == "UFOM":
        ratio = float((runs.d2 / runs.v2).mean())
    predicted = math.log(ours.time(q, Moments(ratio, 1.0), 1.0) / theirs.time(1.0, Moments(1.0, 1.0), 1.0))
    return np.log(pd.Series(times) / (limit / 2)), predicted


def summary(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Table 1's columns, mean ± 95 % t-interval over the seeds, at equal calls and at equal seconds; strings."""
    own, _ = own_gamma(table, config)
    common = dict.fromkeys(METHODS, own["exact"])
    rows = {}
    for words, gammas in (("exact's γ", common), ("own γ", own)):
        chosen = _chosen(table, gammas)
        spent = chosen[chosen.method != "FOM"].groupby(["seed", "method"]).seconds.max()
        seconds = spent.groupby("seed").min().to_dict()  # the soonest to have spent the calls
        by_calls = at(chosen, ("method", "seed"), "calls", _limit(config))
        by_seconds = at(chosen, ("method", "seed"), "seconds", seconds)
        for method in ("FOM", *METHODS):
            if gammas is {"FOM": common, "exact": own}.get(method):
                continue
            rows[method if method in ("FOM", "exact") else f"{method}, {words}"] = {
                "γ": "any" if method == "FOM" else f"{gammas[method]:g}",
                "q at the end": f"{by_calls.loc[method].q.mean():.3f}",
                "exact steps": f"{(by_calls.loc[method].exact_steps_taken / by_calls.loc[method].step).mean():.1%}",
                **{
                    f"{name}, equal {unit}": interval(values.loc[method][column], digits)
                    for unit, values in (("calls", by_calls), ("seconds", by_seconds))
                    for name, column, digits in (("train", "train", 2), ("test", "test", 2), ("CCE", "test_cce", 4))
                },
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def draw(table: pd.DataFrame, config: Config) -> Figure:
    """Test accuracy over the calls, each method at its own γ (Fig. 3)."""
    figure = new_figure(4)
    axes = figure.subplots()
    draw_learning(axes, _chosen(table, own_gamma(table, config)[0]), "calls", "test", _limit(config))
    axes.set(xlabel="function calls (states recomputed)", ylabel="test accuracy (%)")
    axes.set_title("Data hypercleaning: accuracy after cleaning, at equal calls")
    return figure


def caption(table: pd.DataFrame, config: Config) -> str:
    """What the figure shows, with its sizes, and Table 1 measured again."""
    c, (data,) = config, table.data.unique()
    _, ends = own_gamma(table, config)
    reduced = " The paper has 5000 images and α = 1." if c.n_train < 5000 else ""
    at_end = f" At an end of the grid of γ: {', '.join(sorted(ends))}." if ends else ""
    return (
        f"Data hypercleaning, {data}: {c.n_train} training images (half of the labels corrupted), "
        f"{c.n_validation} validation images, {c.hidden} hidden units, r = {c.r}, α = {c.alpha:g}; the mean inner loss."
        f"{reduced} {table.seed.nunique()} seeds (images, corruption, φ_0 and coins), {c.device}. Thick: the mean, "
        "thin: a seed, each method at its own γ; ± in the table: the 95 % t-interval over the seeds. "
        f"Budget: {c.exact_steps} exact gradients, {_limit(config):.0f} calls; computed with the "
        "stored sweep, charged the recomputed one; seconds are those of the stored sweep's calls, until the first "
        f"method has spent the budget. Plain outer steps, γ from {', '.join(f'{g:g}' for g in config.gammas)}, "
        f"chosen by validation cross entropy on the even seeds.{at_end} UFOM keeps the last {c.proxy} backward steps, "
        "at its own q*. "
        "FOM is zero at every θ: its row is the start's. adaptive: (22)–(24) as printed; released: as the authors' "
        "code has them; ×0.1: with the paper's factor of D². train: accuracy on the uncorrupted training images; CCE: "
        f"cross entropy on the test images.\n\n{markdown(summary(table, config))}\n\n{said_of(judge(table, config))}"
    )


def answer(table: pd.DataFrame, config: Config) -> str:
    """The answer in a sentence."""
    own, _ = own_gamma(table, config)
    held_out = halves(table)[1]
    gains = []
    for gammas in (dict.fromkeys(METHODS, own["exact"]), own):
        values = at(_chosen(held_out, gammas), ("method", "seed"), "calls", _limit(config)).test
        gains.append(values["adaptive ×0.1"] - values["exact"])
    q = settled_q("adaptive ×0.1", config.r)
    return (
        f"At equal calls Adaptive UFOM (×0.1) is {ahead(gains[0])} the exact gradient at one γ, and "
        f"{ahead(gains[1])} it at the γ of each. With a vanishing FOM its q is {q:.3f} whatever the data, and its "
        f"steps are {1 / q:.1f} times as long."
    )


study = Study(question, SIZES, measure, judge, draw, caption, answer)
