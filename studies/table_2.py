"""Table 2 to convergence: does UFOM pay in few-shot learning, against exact and FOM, in both accounts?

The reading is fixed before the run: MAML on Omniglot, 5 ways, 1 shot, r = 10, outer Adam with one rate for all, until
the exact gradient's test accuracy stops rising. The training classes are turned, too, as Finn et al. do. UFOM's q is
that of (21) for Adam (m = 1/2) and the batch, at the moments of θ_0 and the cost of recomputed states; adaptive ×0.1 is
the paper's rule with its factor of D², and the step rule (law="step") chooses q on the way by the same cost. FOM's lead
is compared with N_b within a factor of 2, which alone was chosen later: N_b of two seeds on 64 tasks was known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, silent
from studies.engine.sweep import Store
from studies.shared.accounts import budgets
from studies.shared.drawing import markdown
from studies.shared.paying import (
    at_equal,
    compare_table,
    draw_paying,
    judge_paying,
    said_of,
    said_of_curves,
    said_of_runs,
)
from studies.shared.training import interval, missing
from studies.shared.verdicts import Verdict
from studies.table_2_cell import METHODS, SIZES, Config, run_cell
from ufom_runtime.problems.data import omniglot
from ufom_theory import UfomError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


question = "Trained to convergence, does UFOM pay in few-shot learning, against the exact gradient and against FOM?"
LEADS = ("n_b_recomputed", "n_b_stored", "bias_sq", "bias_sq_sem")
UFOMS = ("UFOM", "adaptive ×0.1", "step rule")
PAPER_TABLE = {  # Table 2, test accuracy in %
    ("cifar100", 20): {"exact": 19.9, "Reptile": 18.5, "FOM": 21.3, "adaptive ×0.1": 22.1},
    ("cifar100", 30): {"exact": 13.8, "Reptile": 11.0, "FOM": 12.6, "adaptive ×0.1": 14.7},
    ("omniglot", 30): {"exact": 91.6, "Reptile": 83.1, "FOM": 89.3, "adaptive ×0.1": 92.0},
    ("omniglot", 40): {"exact": 87.5, "Reptile": 78.2, "FOM": 84.88, "adaptive ×0.1": 89.1},
}


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """The logs of all runs, one row a logged step.

    Columns: method, seed; step, corrected (tasks so far), stored and recomputed (calls so far in either account),
    seconds (CPU, of the calls made, at this machine's clock); q, d2, v2 (at θ_0 for UFOM, the rule's for adaptive);
    accuracy (in %, on the test tasks) and accuracy_sem (over them); cpu and wall, the seconds of the whole run with its
    evaluations; of FOM alone n_b_recomputed, n_b_stored, bias_sq and bias_sq_sem, by `fom_leads`.
    """
    if config.data == "omniglot" and (reason := missing(omniglot)):
        raise UfomError(f"{reason}; run `ufom data omniglot`")
    clock, n_b = next(_cells(config, ["clock"], 1)), list(_cells(config, ["N_b"], config.seeds))
    cells = list(_cells(config, METHODS, config.seeds))
    outcome = store.run([clock, *n_b, *cells], run_cell, progress=progress)
    outcome.refuse_failed(lambda cell: cell["method"])
    (times,), table, found = store.load(clock) or [{}], store.table(cells), store.table(n_b)
    table["seconds"] = times["c1"] * table.pop("gradients") + times["c2"] * table.pop("hessian_vector_products")
    found = found.reindex(columns=["method", "seed", *LEADS]).assign(method="FOM")
    table = table.merge(found, on=["method", "seed"], how="left")
    known = {"study", "batches", *asdict(config)} - {"recomputed", "stored"}  # rows have columns of these names
    return table.drop(columns=[*known], errors="ignore")


def _cells(config: Config, methods: Any, seeds: int) -> Iterator[dict[str, Any]]:
    shared = {k: v for k, v in asdict(config).items() if k not in ("seeds", "reptile", "bias")}
    only: dict[str, dict[str, Any]] = {
        "Reptile": {"rate": config.reptile, "batches": "in turns"},
        "N_b": {"bias": list(config.bias)},
    }
    for seed in range(seeds):
        for method in methods:
            yield {"study": "table_2", **shared, **only.get(method, {}), "method": method, "seed": seed}


def _paper(config: Config) -> dict[str, float]:
    return PAPER_TABLE.get((config.data, config.ways), {})


def judge(table: pd.DataFrame, config: Config) -> list[Verdict]:
    """Does UFOM pay, by test accuracy, in each account?

    Has the exact gradient's accuracy stopped rising, and has it done so above FOM's?
    """
    verdicts = judge_paying(table, UFOMS, "accuracy", "test accuracy (points)", budgets(config), _paper(config))
    exact = table[table.method == "exact"]
    if exact.seed.nunique() > 1:
        rise = exact.groupby("seed").apply(_rise, include_groups=False)
        subject = "rise of the exact gradient's accuracy (points) over its last third: it has converged"
        verdicts.append(Verdict.from_paired(subject, "<=", 1.0, rise, widest=1.0))
    ends = plateau(table, config)
    difference = (ends["exact"] - ends["FOM"]).dropna() if {"exact", "FOM"} <= {*ends} else []
    if len(difference) > 1:
        subject = "FOM's bias costs: plateau of the test accuracy (points), exact − FOM, states stored"
        verdicts.append(Verdict.from_paired(subject, ">=", 0.0, difference, widest=1.0))
    for account, (led, predicted) in leads(table, config).items():
        if len(led) > 1:
            subject = f"FOM is ahead for N_b task gradients, states {account}: log2 of the measured over these"
            with np.errstate(all="ignore"):  # where the bias is not above its noise, N_b is ∞
                verdicts.append(Verdict.from_paired(subject, "=", 0.0, np.log2(led / predicted), margin=1.0))
    return verdicts


def leads(table: pd.DataFrame, config: Config) -> dict[str, tuple[pd.Series, pd.Series]]:
    """FOM's task gradients until the exact gradient overtakes it, a seed an entry, and N_b; for each account.

    Measured at 24 budgets: the last at which FOM's accuracy is above the exact gradient's, or the first. N_b speaks of
    averaged gradients at one θ, by their distance to ∇M.
    """
    if not {"exact", "FOM"} <= {*table.method}:
        return {}
    found = {}
    for account, limit in budgets(config).items():
        logs = table.loc[table.method.isin(["exact", "FOM"]), ["method", "seed", account, "accuracy"]]
        ahead = []
        for calls in np.linspace(limit / 24, limit, 24):
            scores = at_equal(logs, account, {account: calls}).accuracy.unstack("method")
            ahead.append((scores.exact < scores.FOM).where(scores.exact.notna()) * calls)
        led = pd.concat(ahead, axis=1).max(axis=1).clip(lower=limit / 24) / (config.r + 1)
        predicted = table[table.method == "FOM"].groupby("seed")[f"n_b_{account}"].first()
        known = (led / predicted).dropna().index
        found[account] = led[known], predicted[known]
    return found


def plateau(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Mean accuracy from two thirds of the stored calls on, a row a seed and a column a method."""
    late = table[table.stored > 2 / 3 * budgets(config)["stored"]]
    return late.groupby(["seed", "method"]).accuracy.mean().unstack("method")


def _rise(log: pd.DataFrame) -> float:
    """Mean accuracy over the last sixth of the steps, minus that over the sixth before."""
    parts = log.step / log.step.max()
    return float(log.accuracy[parts > 5 / 6].mean() - log.accuracy[(parts > 2 / 3) & (parts <= 5 / 6)].mean())


def summary(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Test accuracy in each account, mean ± 95 % t-interval over the seeds; strings."""
    found = compare_table(table, METHODS, {"accuracy": ("accuracy (%)", 1)}, budgets(config))
    ends = table.groupby(["method", "seed"]).last()
    found.insert(0, "q", ["–" if m == "Reptile" else interval(ends.loc[m].q, 3) for m in found.index])
    if paper := _paper(config):
        found.insert(2, "the paper's (%)", [f"{paper[m]:g}" if m in paper else "–" for m in found.index])
    return found


def draw(table: pd.DataFrame, config: Config) -> Figure:
    """Test accuracy over the calls, with the states recomputed and stored (Fig. 2)."""
    return draw_paying(table, METHODS, "accuracy", "test accuracy (%)", budgets(config))


def caption(table: pd.DataFrame, config: Config) -> str:
    """What the figure shows, with its sizes; the accuracies; whether UFOM pays; what has been run."""
    c = config
    turned = ", training classes turned as well" if c.rotations else ""
    return (
        f"{said_of_curves(table)} MAML on "
        f"{c.data}{turned}, {c.ways} ways, 1 shot, {c.filters} filters, r = {c.r}, α = {c.alpha:g}, {c.batch} tasks a "
        f"step, outer Adam, rate {c.rate:g}, untuned; Reptile: outer SGD, rate {c.reptile:g}, chosen on another seed, "
        f"and in its inner loop the training and the test images in turns. Every run is charged twice. Budgets: "
        f"{c.recomputed} steps of the exact gradient with the states recomputed, {c.stored} with the states stored. "
        f"Accuracy on {c.test_tasks} tasks of held-out classes, with batch statistics. "
        f"{said_of_runs(table, table, METHODS, c)}{_said_of_leads(table, config)}"
        f"\n\n{markdown(summary(table, config))}\n\n" + said_of(judge(table, config))
    )


def _said_of_leads(table: pd.DataFrame, config: Config) -> str:
    found = []
    for account, (led, n_b) in leads(table, config).items():
        if len(led):
            known = interval(n_b, 0) if np.isfinite(n_b).all() else "∞ on a seed whose bias is not above its noise"
            found.append(f"{interval(led, 0)} with the states {account} (N_b = {known})")
    steps, tasks = config.bias
    where = f"N_b: at FOM's θ after {steps} steps, by {tasks} tasks"
    return f" FOM is ahead of the exact gradient for {' and '.join(found)} task gradients; {where}." if found else ""


def answer(table: pd.DataFrame, config: Config) -> str:
    """The answer in a sentence."""
    found = []
    for account, said in (("recomputed", "states recomputed"), ("stored", "states stored")):
        values = at_equal(table, account, budgets(config)).accuracy
        points = [f"{m} {interval(values.loc[m], 1)}" for m in METHODS if m in values.index.unique("method")]
        found.append(f"{said}: {', '.join(points)}")
    ends = plateau(table, config)
    last = ", ".join(f"{m} {interval(ends[m].dropna(), 1)}" for m in METHODS if m in ends)
    return f"Test accuracy (%) at equal calls, {'; '.join(found)}. From two thirds of the stored calls on: {last}."


study = Study(question, SIZES, measure, judge, draw, caption, answer, jobs=1)
