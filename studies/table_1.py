"""Table 1 again: does UFOM pay in data hypercleaning, against exact and FOM, in both accounts?

The reading is fixed before the run. MNIST with half of the training labels corrupted, r = 100, plain outer steps
θ_k = θ_{k−1} − γ·G. The paper has 5000 images and α = 1; with 500 images and 16 units α = 1 is chaotic, and ‖G‖ reached
2·10⁷ within two steps. So "standard" takes α = 0.5 and 64 units, where ‖G‖ is 0.03 at θ_0. The inner loss is the mean
over the images, since the printed sum diverges at α = 1; the paper does not name the width of its net. Seed 0 chooses
each method's γ from a short grid by the validation cross entropy at the end of its run; the seeds after it judge. The
steps of adaptive ×0.1 are 1/q times as long, with a q that is known beforehand, so its grid is that of γ·q.

FOM's gradient is zero at every θ, so FOM is the start and costs nothing to run. The paper's rules debias it: D² = V²,
and (21) gives q* = 1. With the factor 0.1 they take q = 0.142, whatever the data. UFOM debiases a proxy that
keeps K backward steps, or one by implicit differentiation, at its q* by (21) with m = 1 and moments at θ_0, at the cost
of recomputed states; the step rule (law="step") chooses q on the way, at the cost of stored states, on the truncated
proxy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, silent
from studies.engine.sweep import Store
from studies.shared.accounts import budgets
from studies.shared.drawing import markdown
from studies.shared.paying import compare_table, draw_paying, judge_paying, said_of, said_of_curves, said_of_runs
from studies.shared.training import interval, missing
from studies.shared.verdicts import Verdict
from studies.table_1_cell import METHODS, RULES, SIZES, Config, run_cell
from ufom_runtime.problems.data import mnist
from ufom_theory import CostModel, Moments, optimal_q

if TYPE_CHECKING:
    from matplotlib.figure import Figure


question = "Does UFOM pay in data hypercleaning, against the exact gradient and against FOM, in both accounts?"
UFOMS = tuple(method for method in METHODS if method != "exact")
SHOWN = ("exact", "UFOM", "step rule", "adaptive ×0.1", "FOM")
PAPER_TABLE = {  # Table 1: accuracy on the uncorrupted part of the training set, on the test set; cross entropy there
    "exact": (94.07, 90.82, 0.4795),
    "FOM": (92.04, 90.83, 0.3187),
    "adaptive ×0.1": (95.27, 92.24, 0.2811),
}
TEST = {method: row[1] for method, row in PAPER_TABLE.items()}


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """The logs of all runs, one row a logged step; at step 0 every weight is ½. Seed 0 chose γ.

    Columns: data, method, gamma, seed; step, corrected (tasks so far), stored and recomputed (calls so far in either
    account), seconds (CPU, of the calls made, at this machine's clock); q, d2, v2 (at θ_0 for UFOM, the rule's for the
    others); validation (the outer loss), train (accuracy on the uncorrupted training images), test and test_cce,
    separation (mean weight of the uncorrupted minus that of the corrupted images), moved (‖θ − θ_0‖); cpu and wall, the
    seconds of the whole run with its evaluations. Of "printed sum", where the inner loss is the sum, the validation at
    θ_0 alone.
    """
    config = replace(config, data=present(config.data))
    clock = next(_cells(config, "clock", [config.gammas[0]], [0]))
    tuning = [cell for m in METHODS if m in config.tuned for cell in _cells(config, m, _grid(config, m), [0])]
    _run(store, [clock, *tuning], lambda share: progress(share / 2))
    table = store.table([clock, *tuning])
    judged = list(_cells(config, "printed sum", [config.gammas[0]], range(1, config.seeds + 1)))
    ends = table.groupby(["method", "gamma"]).validation.last()
    chosen = {m: int(ends.loc[m].argmin()) for m in config.tuned if len(ends.get(m, ())) == len(config.gammas)}
    first = ("FOM", "exact", "UFOM", "adaptive ×0.1")  # on all seeds, before the others
    for methods in (first, [m for m in METHODS if m not in first]):
        for seed in range(1, config.seeds + 1):
            for method in methods:
                at = chosen.get(method if method in config.tuned else "exact")
                judged += _cells(config, method, [] if at is None else [_grid(config, method)[at]], [seed])
    _run(store, judged, lambda share: progress((1 + share) / 2))
    c1, c2 = table.loc[table.method == "clock", ["c1", "c2"]].iloc[0]
    table = pd.concat(
        [table[table.method != "clock"].drop(columns=["c1", "c2", "threads"], errors="ignore"), store.table(judged)]
    )
    table["seconds"] = c1 * table.pop("gradients") + c2 * table.pop("hessian_vector_products")
    table.loc[(table.method == "FOM") & (table.stored > 0), "seconds"] = table.seconds.max()  # θ_0 at every budget
    given = asdict(config).keys() - {"data", "gammas", "seeds", "recomputed", "stored", "tuned"}
    return table.drop(columns=["study", *given]).reset_index(drop=True)


def present(data: str) -> str:
    """The data, or the embedded digits where MNIST is absent, with a warning."""
    if data == "mnist" and (reason := missing(mnist)):
        warnings.warn(f"{reason}; the embedded digits are taken instead", stacklevel=3)
        return "digits"
    return data


def _grid(config: Config, method: str) -> list[float]:
    """The step sizes that are tried."""
    scale = settled_q(method, config.r) if method == "adaptive ×0.1" else 1.0
    return sorted(gamma * scale for gamma in config.gammas)


def settled_q(method: str, r: int) -> float:
    """q* by (21) of a printed rule where D² = V²: of the scale and of r alone."""
    return float(optimal_q(Moments(RULES[method].scale, 1.0), CostModel(r=r), outer="paper").q)


def _run(store: Store, cells: list[dict[str, Any]], progress: Progress) -> None:
    outcome = store.run(cells, run_cell, progress=progress)
    outcome.refuse_failed(lambda cell: f"{cell['method']}, γ = {cell['gamma']:g}")


def _cells(config: Config, method: str, gammas: Any, seeds: Any) -> Iterator[dict[str, Any]]:
    shared = {k: v for k, v in asdict(config).items() if k not in ("gammas", "seeds", "tuned")}
    for seed in seeds:
        for gamma in gammas:
            yield {"study": "table_1", **shared, "method": method, "gamma": gamma, "seed": seed}


def _judging(table: pd.DataFrame) -> pd.DataFrame:
    """The runs of the seeds that judge."""
    return table[(table.seed > 0) & (table.method != "printed sum")]


def judge(table: pd.DataFrame, config: Config) -> list[Verdict]:
    """Does UFOM pay, by test accuracy, in each account?

    Does FOM move nothing, is the rules' q as without data, and does the inner loop diverge with the printed sum?
    """
    judged = _judging(table)
    verdicts = judge_paying(judged, UFOMS, "test", "test accuracy (points)", budgets(config), TEST)
    moved = judged[judged.method == "FOM"].groupby("seed").moved.max()
    if len(moved) > 1:
        verdicts.append(Verdict.from_paired("‖θ − θ_0‖ of FOM: its row is that of no cleaning", "=", 0.0, moved))
    for method in ("adaptive", "adaptive ×0.1"):
        q = judged[(judged.method == method) & judged.d2.notna()].groupby("seed").q.last()  # after its first update
        if len(q) > 1:
            subject = f"q of {method}, by (21) without data"
            verdicts.append(Verdict.from_paired(subject, "=", settled_q(method, config.r), q, 1e-5, 1e-5))
    log_sum = np.log(table.validation[table.method == "printed sum"] / math.log(10))
    if len(log_sum) > 1:
        subject = "log validation CE of the printed sum at θ_0, over that of guessing"
        verdicts.append(Verdict.from_paired(subject, ">=", 0.0, log_sum, widest=0.1))
    return verdicts


def summary(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Table 1's columns in each account, mean ± 95 % t-interval over the judging seeds; strings."""
    judged, paper = (
        _judging(table),
        pd.DataFrame.from_dict(PAPER_TABLE, orient="index", columns=["train", "test", "CCE"]),
    )
    scores = {"train": ("train", 1), "test": ("test", 1), "test_cce": ("CCE", 3)}
    found = compare_table(judged, ("FOM", *METHODS), scores, budgets(config))
    ends = judged.groupby(["method", "seed"]).last()
    found.insert(0, "γ", [f"{g:g}" for g in judged.groupby("method").gamma.first()[found.index]])
    found.insert(1, "q", [interval(ends.loc[method].q, 3) for method in found.index])
    for name in paper:
        found.insert(
            list(paper).index(name) + 3, f"paper's {name}", [_paper(paper, method, name) for method in found.index]
        )
    return found


def _paper(paper: pd.DataFrame, method: str, name: str) -> str:
    return f"{paper.loc[method, name]:g}" if method in paper.index else "–"


def draw(table: pd.DataFrame, config: Config) -> Figure:
    """Test accuracy over the calls, with the states recomputed and stored (Fig. 3)."""
    return draw_paying(_judging(table), SHOWN, "test", "test accuracy (%)", budgets(config))


def caption(table: pd.DataFrame, config: Config) -> str:
    """What the figure shows, with its sizes; Table 1 measured again; whether UFOM pays; what has been run."""
    c, (data,) = config, table.data.unique()
    judged = _judging(table)
    grid = ", ".join(f"{g:g}" for g in c.gammas)
    whose = "each method" if {*METHODS} <= {*c.tuned} else f"{', '.join(c.tuned)}; the others take the γ of exact"
    reduced = " The paper has 5000 images of each kind and α = 1." if c.n_train < 5000 else ""
    return (
        f"{said_of_curves(judged)} {data}: "
        f"{c.n_train} training images, half of the labels corrupted, {c.n_validation} validation images, {c.hidden} "
        f"hidden units, r = {c.r}, α = {c.alpha:g}, the mean inner loss.{reduced} Every run is charged twice. Budgets: "
        f"{c.recomputed} exact gradients with the states recomputed, {c.stored} with the states stored. "
        f"γ from {grid} (adaptive ×0.1: times its q), chosen on a seed that does not judge, for {whose}. "
        f"UFOM keeps {c.proxy} backward steps; UFOM, implicit: "
        f"a Neumann series of {c.iterations} products; step rule: q on the way, on UFOM's proxy. FOM is zero at every "
        "θ: its row is the start's. train: accuracy on the uncorrupted training images; CCE: test cross entropy. "
        f"{said_of_runs(table, judged, METHODS, c)}"
        f"\n\n{markdown(summary(table, config))}\n\n" + said_of(judge(table, config))
    )


def answer(table: pd.DataFrame, config: Config) -> str:
    """The answer in a sentence."""
    found = {account: list[str]() for account in ("recomputed", "stored")}
    for verdict in judge(table, config):
        method, _, rest = verdict.subject.rpartition(", equal calls, states ")
        account = rest.partition(" (")[0]
        if verdict.agrees == "yes" and account in found and method.endswith(" − exact"):
            found[account].append(method.rpartition("(points), ")[2].removesuffix(" − exact"))
    said = "; ".join(f"with the states {account} {', '.join(ahead) or 'none'}" for account, ahead in found.items())
    return f"Ahead of the exact gradient in test accuracy at equal calls, beyond its interval: {said}."


study = Study(question, SIZES, measure, judge, draw, caption, answer, jobs=1)
