"""Does Adaptive UFOM learn few-shot classification sooner than exact, FOM and Reptile (Table 2, Fig. 2)?

The reading is fixed before the run: MAML with r = 10, one shot, outer Adam with one learning rate for all, accuracy on
held-out classes at equal function calls. Besides accuracy, the gradient itself is compared at each method's end point:
the mean of its estimates, over fixed tasks and many coins, with the mean exact gradient of the same tasks. UFOM(q*)
has its q from (21) with m = 2, as the adaptive rules, and the moments at θ_0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, silent
from studies.engine.sweep import Store
from studies.few_shot_cell import DRAWS, METHODS, SIZES, Config, run_cell
from studies.shared.drawing import draw_learning, markdown, new_figure
from studies.shared.paying import judge_paying, said_of
from studies.shared.training import at, interval, missing
from studies.shared.verdicts import Verdict
from ufom_runtime.problems.data import cifar100, omniglot
from ufom_theory import CostModel, UfomError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


question = "At equal calls, does Adaptive UFOM learn few-shot classification better than exact, FOM and Reptile?"
RUN = ("data", "ways", "method", "seed")
PAPER_TABLE = {  # Table 2, test accuracy in %
    ("cifar100", 20): {"exact": 19.9, "Reptile": 18.5, "FOM": 21.3, "adaptive ×0.1": 22.1},
    ("cifar100", 30): {"exact": 13.8, "Reptile": 11.0, "FOM": 12.6, "adaptive ×0.1": 14.7},
    ("omniglot", 30): {"exact": 91.6, "Reptile": 83.1, "FOM": 89.3, "adaptive ×0.1": 92.0},
    ("omniglot", 40): {"exact": 87.5, "Reptile": 78.2, "FOM": 84.88, "adaptive ×0.1": 89.1},
}


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """The logs of all runs, one row a logged step.

    Columns: data, ways, method, seed; step, calls (charged, recomputed), exact_tasks (their
    number so far); q, d2, v2 (of θ_0 for UFOM, the rule's estimates for the adaptive ones); accuracy
    (in %, on the test tasks) and accuracy_sem (over them). And of the end point, in every row of a run: cosine and
    error of the mean estimate to the mean exact gradient on the fixed tasks (error relative), expected_error (its
    Monte-Carlo error, were it unbiased), end_d2, end_v2 and end_q, the q* they give.

    Raises:
        UfomError: no data set is there, or a cell failed.
    """
    cells = list(_cells(config, [setting for setting in config.settings if _is_there(setting[0])]))
    if not cells:
        raise UfomError(f"none of the data of {config.settings} is there: run `ufom data omniglot`")
    outcome = store.run(cells, run_cell, progress=progress)
    outcome.refuse_failed(lambda cell: f"{cell['data']}, {cell['method']}")
    return store.table(cells).drop(columns=["study", *(asdict(config).keys() - {"settings", "seeds"})])


def _is_there(data: str) -> bool:
    loaders: dict[str, Callable[[], object]] = {"omniglot": omniglot, "cifar100": cifar100, "digits": lambda: None}
    reason = missing(loaders[data])
    if reason:
        warnings.warn(f"{data} is skipped: {reason}", stacklevel=3)
    return not reason


def _cells(config: Config, settings: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    shared = {k: v for k, v in asdict(config).items() if k not in ("settings", "seeds")}
    for data, ways in settings:
        for seed in range(config.seeds):
            for method in METHODS:
                yield {"study": "few_shot", **shared, "data": data, "ways": ways, "method": method, "seed": seed}


def _limit(config: Config) -> float:
    cost = CostModel(r=config.r)
    return float(config.exact_steps * config.batch * (cost.c_det + cost.c_rnd))


def judge(table: pd.DataFrame, config: Config) -> list[Verdict]:
    """Does Table 2's order hold at equal calls; are UFOM's means the gradient and FOM's not; is q near the local q*?"""
    verdicts = []
    for (data, ways), runs in table.groupby(["data", "ways"], sort=False):
        paper = PAPER_TABLE.get((data, ways), {})
        values = at(runs, ("method", "seed"), "calls", _limit(config)).accuracy
        for other in ("exact", "FOM", "Reptile"):
            subject = f"test accuracy (points), adaptive ×0.1 − {other}, {data}, {ways} ways"
            if paper:
                subject += f" (paper {paper['adaptive ×0.1'] - paper[other]:+.3g})"
            differences = values["adaptive ×0.1"] - values[other]
            verdicts.append(Verdict.from_paired(subject, ">=", 0.0, differences, widest=1.0))
        end = runs.groupby(["method", "seed"]).last()
        debiased = end[end.expected_error > 0]
        ratio = (debiased.error / debiased.expected_error) ** 2
        ratios = ratio if len(ratio) > 1 else [math.nan, math.nan]  # q = 1 everywhere: nothing was debiased
        subject = f"squared error of UFOM's mean gradient over its variance, {data}, {ways} ways"
        verdicts.append(Verdict.from_paired(subject, "=", 1.0, ratios, widest=0.5, margin=0.5))
        subject = f"relative error of FOM's mean gradient, {data}, {ways} ways"
        verdicts.append(Verdict.from_paired(subject, ">=", 0.1, end.loc["FOM"].error, widest=0.02))
        for method in ("adaptive", "released"):
            ratio = np.log(end.loc[method].q / end.loc[method].end_q)
            subject = f"log of q at the end over the local q*, {method}, {data}, {ways} ways"
            verdicts.append(Verdict.from_paired(subject, "=", 0.0, ratio, widest=0.1, margin=0.1))
        verdicts += _paying(runs, config, paper)
    return verdicts


def _paying(runs: pd.DataFrame, config: Config, paper: dict[str, float]) -> list[Verdict]:
    """Does UFOM pay, at the calls of the exact gradient's run in either account?"""
    each = config.r + (runs.method != "Reptile")
    charged = runs.assign(recomputed=runs.calls, stored=config.batch * runs.step * each + config.r * runs.exact_tasks)
    budgets = {"recomputed": _limit(config), "stored": float(config.exact_steps * config.batch * (2 * config.r + 1))}
    return judge_paying(charged, ("UFOM", "adaptive ×0.1"), "accuracy", "test accuracy (points)", budgets, paper)


def summary(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Table 2's accuracy and the agreement of the gradients, mean ± 95 % t-interval over the seeds; strings."""
    rows = {}
    for (data, ways), runs in table.groupby(["data", "ways"], sort=False):
        values = at(runs, ("method", "seed"), "calls", _limit(config))
        for method in METHODS:
            of = values.loc[method]
            paper = PAPER_TABLE.get((data, ways), {}).get(method)
            rows[f"{method}, {data}, {ways} ways"] = {
                "accuracy (%)": interval(of.accuracy, 1),
                "± over test tasks": f"{1.96 * of.accuracy_sem.mean():.1f}",
                **({"paper (%)": f"{paper}" if paper else "–"} if PAPER_TABLE.get((data, ways)) else {}),
                "cosine": interval(of.cosine, 3),
                "relative error": interval(of.error, 3),
                "q at the end": "–" if method == "Reptile" else interval(of.q, 3),
                "local q*": interval(of.end_q, 3),
                "exact tasks": f"{(of.exact_tasks / of.step / config.batch).mean():.1%}",
            }
    return pd.DataFrame.from_dict(rows, orient="index").fillna("–").rename_axis("method")


def draw(table: pd.DataFrame, config: Config) -> Figure:
    """For each setting: test accuracy over the calls (Fig. 2)."""
    settings = list(table.groupby(["data", "ways"], sort=False))
    figure = new_figure(4 * len(settings))
    panels = figure.subplots(len(settings), squeeze=False)[:, 0]
    for axes, ((data, ways), runs) in zip(panels, settings, strict=True):
        draw_learning(axes, runs, "calls", "accuracy", _limit(config))
        axes.set(xlabel="function calls (states recomputed)", ylabel="test accuracy (%)")
        axes.set_title(f"{data.capitalize()}, {ways} ways, 1 shot: accuracy on new classes, at equal calls")
    return figure


def caption(table: pd.DataFrame, config: Config) -> str:
    """What the figure shows, with its sizes, and Table 2 measured again with the gradients' agreement."""
    c = config
    reduced = "" if c.filters >= 64 else " Fewer ways and filters and a larger α than at the paper's scale."
    return (
        f"Few-shot classification by MAML: the four-layer net with {c.filters} filters, r = {c.r}, α = {c.alpha:g}, "
        f"1 shot.{reduced} Accuracy on {c.test_tasks} tasks of held-out classes (batch-norm on batch statistics, so "
        f"transductive); {table.seed.nunique()} seeds (net, tasks and coins), {c.device}; thick: the mean, thin: a "
        f"seed; ± in the table: the 95 % t-interval over the seeds. Outer Adam, rate {c.rate:g}, {c.batch} tasks a "
        f"step. Budget: {c.exact_steps} exact steps, {_limit(config):.0f} calls; computed with the stored sweep, "
        "charged the recomputed one. adaptive: (22)–(24) "
        "as printed; released: as the authors' code has them; ×0.1: with the paper's factor of D²; UFOM: q* with the "
        "moments at θ_0. cosine and relative error: of the mean estimate to the mean exact gradient at the end point, "
        f"on {c.fixed_tasks} fixed tasks, each with {DRAWS} coins: an unbiased estimator's error is its noise.\n\n"
        f"{markdown(summary(table, config))}\n\n{said_of(judge(table, config))}"
    )


def answer(table: pd.DataFrame, config: Config) -> str:
    """The answer in a sentence, for the first setting."""
    (data, ways), runs = next(iter(table.groupby(["data", "ways"], sort=False)))
    values = at(runs, ("method", "seed"), "calls", _limit(config))
    points = {m: interval(values.loc[m].accuracy, 1) for m in ("adaptive ×0.1", "exact", "FOM", "Reptile")}
    return (
        f"On {data}, {ways} ways, at equal calls: "
        + ", ".join(f"{m} {value} %" for m, value in points.items())
        + f"; FOM's mean gradient is off by {interval(values.loc['FOM'].error, 2)} of its length."
    )


study = Study(question, SIZES, measure, judge, draw, caption, answer)
