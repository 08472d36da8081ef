"""Which way to differentiate through an inner loop is best on which problem: bias, variance, time and memory of each.

Ω is finite in every problem, where need be a few tasks drawn once, so that ∇M and all expectations over tasks are exact
sums. So are those over a method's own randomness, by enumeration of its coin or of its random horizon; for evolution
strategies they are over draws, with standard errors. All is measured at one θ, in float64, for a task at a time.

bias ‖E Ĝ − ∇M‖ and variance E‖Ĝ − E Ĝ‖², over tasks and the method's own randomness, are relative to ‖∇M‖ and ‖∇M‖²;
own is the part of the variance that is the method's, E‖Ĝ − E(Ĝ|T)‖². Calls are counted while the method runs. What a
method may choose (q, K, slots, probabilities) is chosen for the least variance times calls, by measured moments, whose
cost is not charged.

The effort is what an averaged estimate costs that is off by η = 0.01, relative and squared, a tenth of ‖∇M‖: N·calls
with N = max(1, variance/(η − bias²)), over that of the exact gradient with stored states. A method with bias² ≥ η never
gets there. The tail, for problems whose minimiser θ* is known, is the time of outer SGD to a fine precision: (19) with
m = 1, E‖Ĝ(θ*)‖²·calls, over the same. On one quadratic it is computed without the theory, too, from the exact law of
E‖∇M(θ_k)‖² under outer SGD, and the two are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, of_table, silent
from studies.engine.sweep import Store
from studies.landscape_cell import SAMPLED, run
from studies.landscape_figure import WINS, planned
from studies.landscape_figure import answer as answer
from studies.landscape_figure import caption as caption
from studies.landscape_figure import draw as draw
from studies.landscape_figure import guide as guide
from studies.landscape_figure import page as page
from studies.landscape_problems import Setting
from studies.shared.training import missing
from studies.shared.verdicts import Verdict
from ufom_runtime.problems.data import omniglot

VERSION = 4  # of the cells
LOADERS: dict[str, Callable[[], object]] = {"omniglot": omniglot}
SAME = 1e-8  # of ‖∇M‖: a gradient that is exact in float64 is nearer than this
question = "Which way to differentiate through the inner loop is best on which problem, and what does it cost?"


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        settings: the problems, each with its r.
        eta: η, the relative squared error that an averaged estimate is to reach.
        patience: a method is timed until this many CPU seconds are spent, at least once.
    """

    settings: tuple[Setting, ...]
    eta: float = 0.01
    patience: float = 0.1


_SYNTHETIC = Setting("synthetic pair", "synthetic", 10, {"alpha": 0.01}, draws=4000)
_MAML = Setting("quadratic, MAML", "quadratic", 10, {"dim": 20, "alpha": 0.05}, tasks=64, law=True)
_TUNED = Setting("quadratic, hyperparameters", "tuned-quadratic", 10, tasks=64)
_CLEANING = Setting(
    "hypercleaning, digits", "hypercleaning", 10, {"n_train": 200, "n_validation": 200, "hidden": 16}, draws=100
)
_OMNIGLOT = Setting(
    "few-shot, Omniglot", "omniglot", 10, {"ways": 5, "filters": 4, "alpha": 0.05}, tasks=8, draws=8, sigma=0.01
)
SIZES = {
    "quick": Config(
        settings=(
            replace(_SYNTHETIC, r=5),
            replace(_MAML, r=5, arguments={"dim": 5}, tasks=16),
            replace(_TUNED, r=5, arguments={"dim": 5}, tasks=16),
            replace(_CLEANING, r=5, arguments={"n_train": 20, "n_validation": 20, "hidden": 4}),
        ),
        patience=0.01,
    ),
    "standard": Config(
        # where the start is θ, α·r is kept: the same flow in finer steps; else the loop goes on to its stationary point
        settings=(
            _SYNTHETIC,
            replace(_SYNTHETIC, r=100, arguments={"alpha": 0.001}),
            _MAML,
            replace(_MAML, r=100, arguments={"dim": 20, "alpha": 0.005}, law=False),
            _TUNED,
            replace(_TUNED, r=100),
            _CLEANING,
            replace(_CLEANING, r=100, limit=6000),
            _OMNIGLOT,
            replace(
                _OMNIGLOT, r=100, arguments={"ways": 5, "filters": 4, "alpha": 0.005}, tasks=4, draws=4, limit=2000
            ),
        ),
    ),
    "paper": Config(
        settings=tuple(
            replace(setting, r=r, tasks=4 * setting.tasks, draws=4 * setting.draws, law=setting.law and r == 10)
            for r in (10, 100, 1000)
            for setting in (
                _SYNTHETIC, _MAML, _TUNED, replace(_CLEANING, arguments={"n_train": 500, "n_validation": 500}),
                replace(_OMNIGLOT, arguments={"ways": 20, "filters": 64, "alpha": 0.005}, limit=6000),
            )
        ),
        patience=5.0,
    ),
}  # fmt: skip


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """One row for each problem, r and method, and for each memory of the debiased family; missing data have one, too.

    Columns: part ("method" or "family"), name, r, s, tasks, method, kind; for methods: bias_sq, variance, own
    (relative, see above; *_sem their standard errors, over `draws`), calls, gradients, products (counted),
    declared (calls), states, bytes (peak), seconds and seconds_sem (CPU, one thread), difference (of the method's own
    sweep from stored states on the first task, relative), effort, effort_seconds (by calls and by seconds; inf: never),
    tail, law (the tail without the theory); refused, why there are none; note, what it warned of, and why its q is 1.
    For the family: memory, proxy, sweep, q, gain_paper and gain_exact; skipped, why a problem was left out.

    Raises:
        UfomError: a cell failed.
    """
    cells, skipped = list[dict[str, Any]](), []
    for setting in config.settings:
        if reason := missing(LOADERS.get(setting.problem, lambda: None)):
            warnings.warn(f"{setting.name}, r = {setting.r} is left out: {reason}", stacklevel=2)
            skipped.append({"part": "skipped", "name": setting.name, "r": setting.r, "skipped": reason})
        else:
            shared = {"study": "landscape", "version": VERSION, "eta": config.eta, "patience": config.patience}
            cells.append({**shared, "setting": asdict(setting)})
    outcome = store.run(cells, run, progress=progress)
    outcome.refuse_failed(lambda cell: cell["setting"]["name"])
    rows = []
    for cell in cells:
        if (found := store.load(cell)) is None:
            about = {name: cell["setting"][name] for name in ("name", "r")}
            skipped.append({"part": "skipped", **about, "skipped": "it is not run yet"})
        for row in found or ():
            rows.append({**row, "draws": cell["setting"]["draws"] if row.get("method") in SAMPLED else None})
    return pd.DataFrame([*rows, *skipped]).reindex(columns=COLUMNS)


COLUMNS = (
    "part", "name", "r", "s", "tasks", "method", "kind", "draws", "bias_sq", "bias_sq_sem", "variance", "variance_sem",
    "own", "own_sem", "calls", "gradients", "products", "declared", "states", "bytes", "seconds", "seconds_sem",
    "difference", "effort", "effort_sem", "effort_seconds", "tail", "law", "refused", "note", "memory", "proxy",
    "sweep", "q", "gain_paper", "gain_exact", "skipped",
)  # fmt: skip


def judge(table: pd.DataFrame) -> list[Verdict]:
    """Is what is said to be unbiased so; are the calls as declared; does the theory's tail hold; does the family win?

    For every problem and r. A gain is one from a factor of 1.1 on. Expectations are exact sums, so nothing but
    evolution strategies has an interval.
    """
    from scipy.special import stdtrit  # a study's cost, not the import's

    methods, verdicts = table[table.part == "method"], []
    for (name, r), rows in methods.groupby(["name", "r"], sort=False):
        where, ran = f"{name}, r = {r}", rows[rows.refused.isna()]
        true = ran[ran.kind.isin(("exact", "unbiased")) & ran.bias_sq.notna()]
        bias = float(max(np.sqrt(true.bias_sq.clip(lower=0)).max(), true.difference.max()))
        verdicts.append(
            Verdict.from_interval(f"largest bias of {len(true)} exact and unbiased methods, {where}", "<=", SAME, bias)
        )
        off = float((ran.calls / ran.declared - 1).abs().max())
        verdicts.append(
            Verdict.from_interval(
                f"counted calls of {len(ran)} methods, over the declared, −1, {where}", "<=", 1e-9, off
            )
        )
        for row in ran[ran.method == "es"].itertuples():
            half = float(stdtrit(row.draws - 1, 0.975)) * row.bias_sq_sem
            verdicts.append(Verdict.from_interval(f"squared bias of es, {where}", "<=", 0.01, row.bias_sq, half))
        for row in ran[ran.law.notna()].itertuples():
            subject = f"log-time of {row.method} by the exact law, over the theory's, {where}"
            verdicts.append(
                Verdict.from_interval(subject, "=", 0.0, float(np.log(row.law / row.tail)), 0.0, float(np.log(WINS)))
            )
    for (name, method), rows in methods[methods.bias_sq.notna() & methods.method.str.startswith("implicit")].groupby(
        ["name", "method"], sort=False
    ):
        ordered = np.sqrt(rows.sort_values("r").bias_sq.to_numpy())
        if len(ordered) > 1:
            worst = float((ordered[1:] / ordered[:-1]).max())
            verdicts.append(
                Verdict.from_interval(f"bias of {method} over that at the r before, {name}", "<=", 1.0, worst)
            )
    for row in planned(table).itertuples():
        for rival, gain in (("the paper's UFOM", row.gain_paper), ("exact with checkpoints", row.gain_exact)):
            subject = f"gain of the planned (K, s, q) over {rival}, {row.memory:.0f} states, {row.name}, r = {row.r}"
            verdicts.append(Verdict.from_interval(subject, ">=", WINS, gain))
    return verdicts


study = Study(question, SIZES, measure, of_table(judge), of_table(draw), of_table(caption), of_table(answer), jobs=1)
