"""Does UFOM pay on sinusoid regression, the field's toy for MAML, and what does FOM's bias cost there?

The problem is `ufom_runtime.problems.sinusoid` in float32 with narrower nets. The outer optimizer is Adam at one
untuned rate for all. The runs of a seed share tasks and coins. Losses are those of the mean θ since the record before,
on the same test tasks for all runs. A method is charged in function calls, once with the recomputed sweep and once with
the stored one. Methods are compared at the calls that FOM takes for all its steps, where the exact gradient has taken
fewer steps, and after equal steps. The rules are told the recomputed sweep's cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, silent
from studies.engine.sweep import Store
from studies.shared.accounts import SWEEPS
from studies.shared.drawing import markdown, new_figure, plain_number, seaborn
from studies.shared.training import interval
from studies.shared.verdicts import Verdict, halves
from studies.sinusoid_cell import run_cell
from ufom_runtime.command.style import LOOKS
from ufom_theory import CostModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

question = "Does UFOM pay on sinusoid regression, and what does FOM's bias cost there?"
RULES = ("adaptive", "law of one step")


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        settings: K and r of each problem.
        grid: fixed probabilities of UFOM.
        seeds: independent runs; even ones choose the grid's best q, odd ones judge.
        steps: outer steps.
        batch: tasks a step.
        width: units of each hidden layer; the source's nets have 40.
        alpha: inner step size, the source's.
        rate: of outer Adam.
        test: tasks on which the loss is measured.
        records: how often the loss is measured.
    """

    settings: tuple[tuple[int, int], ...] = ((10, 1), (10, 5), (10, 10), (5, 1), (5, 5), (5, 10))
    grid: tuple[float, ...] = (0.1, 0.2, 0.4)
    seeds: int = 8
    steps: int = 1000
    batch: int = 4
    width: int = 20
    alpha: float = 0.01
    rate: float = 1e-2
    test: int = 50
    records: int = 20


SIZES = {
    "quick": Config(settings=((5, 2),), grid=(0.3,), seeds=4, steps=40, width=8, test=20, records=4),
    "standard": Config(),
}  # fmt: skip


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """One row for each K, r, method, seed and record.

    Columns: K, r, method ("exact", "UFOM q", "FOM" or a rule), seed, step, loss (none where it is not finite, or once
    a run is lost, since its gradients overflowed), corrected (tasks so far), q in force;
    in the last record gradient_sq (‖∇M‖², a U-statistic), d2 and v2 on the test tasks.
    """
    shared = asdict(config)
    settings, grid, seeds = (shared.pop(name) for name in ("settings", "grid", "seeds"))
    methods = ["exact", *(f"UFOM {q:g}" for q in grid), "FOM", *RULES]
    shared |= {"study": "sinusoid", "version": 2, "methods": methods, "seeds": [*range(seeds)]}
    cells = [{**shared, "shots": k, "r": r} for k, r in settings]
    store.run(cells, run_cell, progress=progress)
    return store.table(cells).rename(columns={"shots": "K"}).drop(columns={*shared} | {"seeds"})


def charged(runs: pd.DataFrame, r: int, sweep: str, batch: int) -> pd.Series:
    """Function calls so far, with one of `SWEEPS`."""
    cost = CostModel(r=r, sweep=SWEEPS[sweep], as_printed=True)
    return batch * runs.step * cost.c_det + runs.corrected * cost.c_rnd


def at_equal_calls(runs: pd.DataFrame, r: int, sweep: str, config: Config) -> pd.DataFrame:
    """log loss of one problem's runs at the calls of all FOM's steps, a row a seed and a column a method."""
    budget = config.batch * config.steps * (r + 1)
    found: dict[str, dict[int, float]] = {}
    for (method, seed), log in runs.groupby(["method", "seed"], sort=False):
        calls = charged(log, r, sweep, config.batch)
        found.setdefault(str(method), {})[seed] = float(np.interp(budget, calls, np.log(log.loss)))
    return pd.DataFrame(found)


def after_equal_steps(runs: pd.DataFrame) -> pd.DataFrame:
    """log loss of one problem's runs after all steps, a row a seed and a column a method."""
    last = runs[runs.step == runs.step.max()]
    return np.log(last.pivot(index="seed", columns="method", values="loss"))


def _problems(table: pd.DataFrame) -> Iterator[tuple[int, int, pd.DataFrame]]:
    for (k, r), runs in table.groupby(["K", "r"], sort=False):
        yield int(k), int(r), runs


def best_q(logs: pd.DataFrame) -> str:
    """The fixed UFOM of the least mean log loss on the even seeds; one that lost a run is the last."""
    means = halves(logs)[0].mean(skipna=False).fillna(math.inf)
    return str(means[[name for name in logs if name.startswith("UFOM")]].idxmin())


def judge(table: pd.DataFrame, config: Config) -> list[Verdict]:
    """Does FOM end above the exact gradient; does UFOM pay at equal calls; do the rules?"""
    verdicts = []
    for k, r, runs in _problems(table):
        at, ends = f"K = {k}, r = {r}", after_equal_steps(runs)
        subject = f"log loss of FOM over exact after equal steps, {at}"
        verdicts.append(Verdict.from_paired(subject, ">=", 0.0, ends.FOM - ends.exact))
        for sweep in SWEEPS:
            logs = at_equal_calls(runs, r, sweep, config)
            odd, best = halves(logs)[1], best_q(logs)
            for rival in ("exact", "FOM"):
                subject = f"log loss of UFOM at the grid's best q over {rival} at equal calls, {sweep}, {at}"
                verdicts.append(Verdict.from_paired(subject, "<=", 0.0, odd[best] - odd[rival]))
                for rule in RULES:
                    subject = f"log loss of {rule} over {rival} at equal calls, {sweep}, {at}"
                    verdicts.append(Verdict.from_paired(subject, "<=", 0.0, logs[rule] - logs[rival]))
    return verdicts


def answer(table: pd.DataFrame, config: Config) -> str:
    """The answer in a few sentences."""
    verdicts = judge(table, config)

    def count(words: str, agrees: str = "yes") -> str:
        found = [v for v in verdicts if words in v.subject]
        return f"{sum(v.agrees == agrees for v in found)} of {len(found)}"

    return (
        f"After {config.steps} equal steps FOM's loss is above the exact gradient's in {count('after equal steps')} "
        "problems. At the calls of FOM's steps UFOM at the grid's best q is ahead of the exact gradient in "
        f"{count('best q over exact at equal calls, recomputed')} problems where the states are recomputed and in "
        f"{count('best q over exact at equal calls, stored')} where they are stored, and ahead of FOM in "
        f"{count('best q over FOM at equal calls, recomputed')} and {count('best q over FOM at equal calls, stored')}; "
        "the other intervals hold 0 or say the opposite."
    )


def draw(table: pd.DataFrame, config: Config) -> Figure:
    """A panel for each r at the most shots: the loss over calls."""
    panels = [(r, runs) for k, r, runs in _problems(table) if k == table.K.max()]
    middle = f"UFOM {config.grid[len(config.grid) // 2]:g}"
    names = {"exact": "exact", middle: "UFOM", "FOM": "FOM", "adaptive": "adaptive"}
    figure = new_figure(3.6)
    several = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (r, runs) in zip(several, panels, strict=True):
        for method, look in names.items():
            own = runs[runs.method == method]
            mean = (
                own.assign(calls=charged(own, r, "recomputed", config.batch))
                .groupby("step")[["calls", "loss"]]
                .mean(skipna=False)
            )
            label = {middle: f"UFOM, q = {middle.split()[1]}", "adaptive": "the paper's adaptive rule"}.get(
                method, method
            )
            seaborn().lineplot(
                mean, x="calls", y="loss", ax=axes, label=label, legend=False, errorbar=None, **LOOKS[look]
            )
        axes.set(xscale="log", xlabel="function calls", ylabel="loss on test tasks", title=f"r = {r}")
        axes.xaxis.set_major_formatter(plain_number)
    handles, labels = several[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def caption(table: pd.DataFrame, config: Config) -> str:
    """What the figure shows, with its sizes, and the losses of every problem."""
    shown = {}
    for k, r, runs in _problems(table):
        for when, logs in (
            ("equal calls, recomputed", at_equal_calls(runs, r, "recomputed", config)),
            ("equal calls, stored", at_equal_calls(runs, r, "stored", config)),
            ("equal steps", after_equal_steps(runs)),
        ):
            best = best_q(logs)
            shown[f"K = {k}, r = {r}, {when}"] = {
                **{name: interval(np.exp(logs[name]), 2) for name in ("exact", "FOM")},
                "UFOM, the grid's best": f"{interval(np.exp(logs[best]), 2)} (q = {best.split()[1]})",
                **{name: interval(np.exp(logs[name]), 2) for name in RULES},
            }
    return (
        f"Sinusoid regression with K = {table.K.max()} shots: the mean loss of {config.seeds} seeds over function "
        f"calls (recomputed sweep). Nets 1 – {config.width} – {config.width} – 1 in float32, α = {config.alpha:g}, "
        f"outer Adam at {config.rate:g}, {config.batch} tasks a step, {config.steps} steps. {_lost(table)}Below, "
        f"losses on {config.test} test tasks, ± 95 % t-intervals over the {config.seeds} seeds, at the calls of FOM's "
        "steps and after equal steps; the verdicts compare pairs of one seed, with q chosen on the even seeds and "
        "judged on the odd ones."
        f"\n\n{markdown(pd.DataFrame.from_dict(shown, orient='index').rename_axis('problem'))}"
    )


def _lost(table: pd.DataFrame) -> str:
    """Which runs were lost, in words."""
    ends = table[(table.step == table.step.max()) & table.loss.isna()]
    counts = ends.groupby(["K", "r", "method"], sort=False).size()
    said = ", ".join(f"{n} of {method} at K = {k}, r = {r}" for (k, r, method), n in counts.items())
    return (
        f"Lost, since their gradients overflowed, so that a curve ends and a – stands below: {said}. " if said else ""
    )


study = Study(question, SIZES, measure, judge, draw, caption, answer, jobs=1)
