"""Does `compare` say the right thing? Predicted before the runs, against the calls that every choice then took.

A cell is a problem with its outer steps. For two precisions of M, fixed in the configuration, `compare` says what to
run: FOM, UFOM(q), the exact gradient, or FOM and then another. Then all of them are run, with a fixed grid of q: the
regret is the calls to the precision at what was said, over those at the best candidate; and so in seconds, by another
decision, where a step costs its seconds. The even seeds choose the best, the odd ones give both times. A regret whose
95 % interval is wider than ± 10 % counts as "cannot tell", unless all of it is above the goal of 25 %.

Beside them run the two rules of `AdaptiveUFOM`; they are compared at equal calls.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, silent
from studies.engine.sweep import Store
from studies.regret_cell import LEAST, LEVELS, PAPER_RULE, STEP_RULE, Setting
from studies.regret_decision import decide_and_run
from studies.regret_settings import QUICK, STANDARD
from studies.shared.drawing import markdown, seaborn
from studies.shared.training import missing, rounded
from studies.shared.verdicts import Verdict, halves
from ufom_runtime.command.style import GREY, LOOKS, WIDTH
from ufom_runtime.problems.data import mnist, omniglot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERSION = 3  # of the cells
GRID = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7)
WIDE, NEAR = math.log(1.10), math.log(1.10)  # of an interval that decides; of predicted steps that are right
MEDIAN, WORST, RULE = 1.05, 1.25, 1.15
LOADERS: dict[str, Callable[[], object]] = {"mnist-hypercleaning": mnist, "omniglot-maml": omniglot}
question = "Does compare say what is quickest to a precision, and does its rule train as well as the best fixed choice?"


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        settings: the cells.
        grid: values of q, the same everywhere; FOM and the exact gradient are added.
        seeds: independent repetitions; even ones choose the best candidate, odd ones judge.
    """

    settings: tuple[Setting, ...]
    grid: tuple[float, ...] = GRID
    seeds: int = 8


SIZES = {"quick": Config(QUICK, (0.05, 0.2), 4), "standard": Config(STANDARD)}


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """One row for each cell, candidate or rule, and seed; a cell that was left out has one row that says why.

    Columns: setting, candidate, rule, q, until, seed; for each level its steps and calls, nan where the precision was
    not reached; loss, M at equal calls; for each level said and said_seconds, whether `compare` said so, predicted, low
    and high, steps over the exact gradient's, doubt, and seconds to the precision; seconds_most, of the budget;
    skipped.
    """
    base, skipped, kept = {"study": "regret", "version": VERSION}, [], []
    for setting in config.settings:
        if reason := missing(LOADERS.get(setting.problem, lambda: None)):
            warnings.warn(f"{setting.name} is left out: {reason}", stacklevel=2)
            skipped.append({"setting": setting.name, "skipped": reason})
        else:
            kept.append(setting)
    cells = [{**base, "setting": asdict(setting), "grid": list(config.grid), "seeds": config.seeds} for setting in kept]
    store.run(cells, decide_and_run, progress=progress)
    tables = []
    for setting, cell in zip(kept, cells, strict=True):
        if (rows := store.load(cell)) is None:
            skipped.append({"setting": setting.name, "skipped": store.failure(cell) or "not run"})
        else:
            tables.append(pd.DataFrame(rows).assign(setting=setting.name))
    whole = pd.DataFrame(rounded(pd.concat(tables, ignore_index=True))) if tables else pd.DataFrame()
    return pd.concat([whole, pd.DataFrame(skipped, columns=["setting", "skipped"])], ignore_index=True)


def _runs(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of cells that were run."""
    return table[table.skipped.isna()].astype(
        {"seed": int, "rule": bool, **{f"{x}_{level}": bool for x in ("said", "said_seconds") for level in LEVELS}}
    )


def _cells(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Cell, level and the runs of its candidates, where any of them came to the precision."""
    runs = _runs(table)
    for name, mine in runs[~runs.rule].groupby("setting", sort=False):
        for level in LEVELS:
            if mine[f"steps_{level}"].notna().any():
                yield str(name), level, mine


def regrets(table: pd.DataFrame, unit: str = "calls") -> pd.DataFrame:
    """One row a cell and level: calls or seconds to the precision at what was said, over the best candidate's.

    A run that ends above the precision is charged its budget, the least that it takes. In seconds, cells that were not
    timed are left out.

    Columns: setting, level, said, best; regret with its interval low and high; told, whether that decides; doubt, why
    nothing could be said, so that exact is; least, whether a run at what was said ended above the precision; FOM and
    exact, what running either would have lost, ∞ where no seed came to the precision.
    """
    rows = []
    chosen, most = ("said", "budget") if unit == "calls" else (f"said_{unit}", f"{unit}_most")
    for name, level, runs in _cells(table):
        spent = runs.assign(spent=runs[f"{unit}_{level}"].fillna(runs[most]))
        if spent.spent.isna().any():
            continue
        logs = np.log(spent.pivot(index="seed", columns="candidate", values="spent").clip(lower=1e-9))
        reached = runs.groupby("candidate")[f"calls_{level}"].count()
        even, odd = halves(logs)
        best = str(even.mean()[reached[reached > 0].index].idxmin())
        mine = runs[runs[f"{chosen}_{level}"]].iloc[0]
        said, doubt = str(mine.candidate), mine[f"doubt_{level}"]
        lost = Verdict.from_paired(f"{name}, {level}", "<=", math.log(WORST), odd[said] - odd[best])
        others = {x: _factor(odd[x] - odd[best]) if reached[x] else math.inf for x in ("FOM", "exact")}
        rows.append(
            {"setting": name, "level": level, "said": said, "best": best, "regret": math.exp(lost.measured),
             "low": math.exp(lost.measured - lost.tolerance), "high": math.exp(lost.measured + lost.tolerance),
             "told": lost.tolerance <= WIDE or lost.measured - lost.tolerance > math.log(WORST),
             "doubt": doubt if isinstance(doubt, str) else "", "least": bool(reached[said] < len(logs)), **others}
        )  # fmt: skip
    return pd.DataFrame(rows, columns=None if rows else ["told", "regret", "low", "high"])


def _factor(logs: pd.Series[float]) -> float:
    return float(np.exp(logs.mean()))


def predictions(table: pd.DataFrame) -> pd.DataFrame:
    """One row a cell and level: off, the median over FOM and the grid of |log measured − log predicted| steps.

    Steps are over the exact gradient's; q below the least that `compare` recommends are left out. Where no run came to
    the precision, the steps of the budget are the least that were measured: a prediction above that is not off. Cells
    where the exact gradient did not come to the precision, or where nothing was predicted, are left out.
    """
    rows = []
    for name, level, runs in _cells(table):
        steps, predicted = f"steps_{level}", f"predicted_{level}"
        runs = runs.assign(logs=np.log(runs[steps].clip(lower=1)))
        each = runs[(runs.until == 0) & ((runs.q == 0) | (runs.q >= LEAST))].groupby("candidate")
        measured = np.exp(each.logs.mean())
        known, most = each[predicted].first(), each.steps_most.first()
        whole = each[steps].count() == runs.seed.nunique()
        if not whole["exact"] or known.drop("exact").isna().all():
            continue
        with np.errstate(divide="ignore"):  # where no progress was predicted
            over = np.log(measured.where(whole, most) / measured["exact"] / known)
        off = over.abs().where(whole, over.clip(lower=0)).drop("exact").dropna()
        rows.append({"setting": name, "level": level, "off": float(off.median())})
    return pd.DataFrame(rows, columns=["setting", "level", "off"])


def rules(table: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: M at equal calls of each rule, FOM and exact, over that of the best fixed choice.

    The even seeds choose the best among FOM, exact and the grid. Columns: setting, best, step with its interval low and
    high, paper, FOM, exact.
    """
    rows = []
    for name, mine in _runs(table).groupby("setting", sort=False):
        logs = np.log(mine.pivot(index="seed", columns="candidate", values="loss").clip(lower=1e-12, upper=1e12))
        fixed = mine.candidate[~mine.rule & (mine.until == 0)].unique()
        even, odd = halves(logs)
        best = even[fixed].mean().idxmin()
        step = Verdict.from_paired(name, "<=", math.log(RULE), odd[STEP_RULE] - odd[best])
        rows.append(
            {"setting": name, "best": best, "step": math.exp(step.measured),
             "low": math.exp(step.measured - step.tolerance), "high": math.exp(step.measured + step.tolerance),
             "paper": _factor(odd[PAPER_RULE] - odd[best]), "FOM": _factor(odd["FOM"] - odd[best]),
             "exact": _factor(odd["exact"] - odd[best])}
        )  # fmt: skip
    return pd.DataFrame(rows)


def judge(table: pd.DataFrame, config: Config) -> list[Verdict]:
    """The goals that were set before the runs."""
    ours, share = rules(table), predictions(table).off.le(NEAR).mean()
    least = np.log(ours.loc[ours.step.idxmax(), ["step", "high"]].astype(float)).map(float)
    ahead = float((ours.step < ours[["FOM", "exact"]].min(axis=1)).mean())
    of = Verdict.from_interval
    return [
        *_of_regret(regrets(table), ""), *_of_regret(regrets(table, "seconds"), ", in seconds"),
        of("share of cells with steps over exact's within 10 %", ">=", 0.75, float(share)),
        of("greatest log of M by the step rule over the best fixed choice's", "<=", math.log(RULE), least.step,
           least.high - least.step),
        of("share of cells where the step rule is ahead of FOM and of exact", ">=", 1 / 3, ahead),
    ]  # fmt: skip


def _of_regret(lost: pd.DataFrame, unit: str) -> list[Verdict]:
    """Of the median and of the greatest regret; none where there are none."""
    logs = np.log(lost[lost.told][["regret", "low", "high"]].astype(float))
    if logs.empty:
        return []
    middle = [float(logs[x].median()) for x in ("low", "regret", "high")]
    worst = logs.loc[logs.regret.idxmax()].map(float)
    return [
        Verdict.from_interval(f"median log-regret of the decision{unit}", "<=", math.log(MEDIAN), middle[1],
                              (middle[2] - middle[0]) / 2),
        Verdict.from_interval(f"greatest log-regret of the decision{unit}", "<=", math.log(WORST), worst.regret,
                              worst.high - worst.regret),
    ]  # fmt: skip


def draw(table: pd.DataFrame, config: Config) -> Figure:
    """Left, how much each way to choose loses; right, how far from the best fixed choice the rules train."""
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(WIDTH, 3.4))
    left, right = figure.subplots(1, 2)
    lost, ours = regrets(table), rules(table)
    _shares(left, {"what compare said": (lost.regret, "UFOM"), "always FOM": (lost.FOM, "FOM"),
                   "always exact": (lost.exact, "exact")})  # fmt: skip
    left.set(xlabel="calls to the precision, over the best candidate's", ylabel="share of cells")
    left.set_title("Choosing before the run")
    _shares(right, {"law of one step": (ours.step, "adaptive"), "the paper's rule": (ours.paper, "released"),
                    "FOM": (ours.FOM, "FOM"), "exact": (ours.exact, "exact")})  # fmt: skip
    right.set(xlabel="M at equal calls, over the best fixed choice's", ylabel="")
    right.set_title("Choosing q while it trains")
    return figure


def _shares(axes: Axes, found: dict[str, tuple[pd.Series[float], str]]) -> None:
    """For each choice, the share of cells in which it loses no more than a factor."""
    end = 3.0
    for name, (values, look) in found.items():
        style = {key: LOOKS[look][key] for key in ("color", "ls")}
        seaborn().ecdfplot(x=values.clip(upper=2 * end), ax=axes, label=name, **style)
    axes.axvline(1, color=GREY, lw=0.8, ls=":")
    axes.set(xlim=(0.7, end), ylim=(0, 1.02))
    axes.legend(loc="lower right")


def caption(table: pd.DataFrame, config: Config) -> str:
    """What the figure shows, with its sizes, and every cell."""
    lost, off, ours = regrets(table), predictions(table), rules(table)
    unsure = [f"{x.setting} ({x.level})" for x in lost[~lost.told].itertuples()]
    skipped = [f"{x.setting} ({x.skipped})" for x in table[table.skipped.notna()].itertuples()]
    return (
        f"{lost.setting.nunique()} cells, two precisions each, {config.seeds} seeds; the even ones choose the best of "
        f"FOM, exact and {len(config.grid)} values of q, the odd ones give the factors. Left: the share of cells and "
        "precisions in which a choice takes at most this many times the calls of the best; calls with stored states, a "
        "gradient and a Hessian-vector product 1 each; what never came to the precision is beyond the right edge. "
        "Right: M, less its minimum where that is known, over the last quarter of the same calls. Cannot tell (an "
        "interval wider than ± 10 % that is not all above 1.25): "
        f"{', '.join(unsure) or 'none'}. *: compare could not tell, and gave the exact gradient. Seconds are measured "
        f"steps times the seconds of a step. Left out: {', '.join(skipped) or 'none'}.\n\n"
        + markdown(cells(lost, regrets(table, "seconds"), off, ours))
    )


def cells(lost: pd.DataFrame, spent: pd.DataFrame, off: pd.DataFrame, ours: pd.DataFrame) -> pd.DataFrame:
    """Every cell and level in words, for the caption."""
    joined = lost.merge(off, how="left").merge(ours[["setting", "step"]], how="left")
    rows = []
    for x in joined.itertuples():
        clock = spent[(spent.setting == x.setting) & (spent.level == x.level)] if len(spent) else spent
        rows.append(
            {"cell": f"{x.setting}, {x.level}", "said": f"{x.said}{' *' if x.doubt else ''}", "best": x.best,
             "calls over the best": _written(x),
             "steps off by": "" if math.isnan(x.off) else f"{math.expm1(x.off):.0%}",
             "said, by seconds": "".join(y.said for y in clock.itertuples()),
             "seconds over the best": "".join(map(_written, clock.itertuples())), "step rule": f"{x.step:.2f}"}
        )  # fmt: skip
    return pd.DataFrame(rows).set_index("cell")


def _written(x: Any) -> str:
    """A regret with its interval."""
    return f"{'≥ ' if x.least else ''}{x.regret:.2f} [{x.low:.2f}, {x.high:.2f}]"


def answer(table: pd.DataFrame, config: Config) -> str:
    """The answer in a sentence."""
    lost, ours, off = regrets(table), rules(table), predictions(table)
    told = lost[lost.told]
    worst, least = told.loc[told.regret.idxmax()], ours.loc[ours.step.idxmax()]
    return (
        f"What compare says takes {told.regret.median():.2f} times the calls of the best candidate (median of "
        f"{len(told)}; {len(lost) - len(told)} cannot be told), at most {worst.regret:.2f} times ({worst.setting}, "
        f"{worst.level}); always FOM {lost.FOM.median():.2f} times, always exact {lost.exact.median():.2f}. Steps over "
        f"exact's are within 10 % in {off.off.le(NEAR).mean():.0%} of the cells. The rule of one step ends at "
        f"{ours.step.median():.2f} times the best fixed choice's M (median), at most {least.step:.2f} times "
        f"({least.setting}), and ahead of both FOM and exact in "
        f"{(ours.step < ours[['FOM', 'exact']].min(axis=1)).mean():.0%} of the cells."
    )


study = Study(
    question=question, sizes=SIZES, measure=measure, judge=judge, draw=draw, caption=caption, answer=answer, jobs=1
)
