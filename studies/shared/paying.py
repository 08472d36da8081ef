"""Does UFOM pay? Methods that were run from the same starts, compared at equal calls in both accounts and in seconds.

A table has one row a logged step: method, seed, step, the cost so far in every account of `ACCOUNTS`, and scores. All
intervals are 95 % t-intervals over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from studies.shared.accounts import ACCOUNTS
from studies.shared.drawing import draw_learning, new_figure
from studies.shared.training import at, interval
from studies.shared.verdicts import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADING = "Does UFOM pay? Points of test accuracy by which it is ahead at equal cost, with 95 % t-intervals:"
Budgets = Mapping[str, float]


def at_equal(table: pd.DataFrame, account: str, budgets: Budgets) -> pd.DataFrame:
    """Every method's columns at a budget, one row a (method, seed); seconds: when the first of the seed has ended."""
    if account != "seconds":
        return at(table, ("method", "seed"), account, budgets[account])
    ends = table.groupby(["seed", "method"]).seconds.max().groupby("seed").min()
    return at(table, ("method", "seed"), "seconds", ends.to_dict())


def paired(values: pd.DataFrame, method: str, other: str, score: str) -> pd.Series:
    """The score of one method minus that of another, on the seeds that have both."""
    scores = values[score].unstack("method")
    if not {method, other} <= {*scores}:
        return pd.Series(dtype=float)
    difference: pd.Series = (scores[method] - scores[other]).dropna()
    return difference


def judge_paying(
    table: pd.DataFrame, methods: Sequence[str], score: str, words: str, budgets: Budgets, paper: Mapping[str, float]
) -> list[Verdict]:
    """For each method, against exact and FOM, in each account: "yes" where it is ahead, that is, where UFOM pays.

    A method that has not been run on two seeds is not judged. One point either way would not matter.
    """
    verdicts = []
    for account, said in ACCOUNTS.items():
        if account not in table:
            continue
        values = at_equal(table, account, budgets)
        for method in methods:
            for other in ("exact", "FOM"):
                difference = paired(values, method, other, score)
                if len(difference) < 2:
                    continue
                equal = said if account == "seconds" else f"calls, {said}"
                subject = f"UFOM pays: {words}, {method} − {other}, equal {equal}"
                if account == "recomputed" and {method, other} <= {*paper}:
                    subject += f" (paper {paper[method] - paper[other]:+.3g})"
                verdict = Verdict.from_paired(subject, ">=", 0.0, difference, widest=1.0)
                verdicts.append(verdict if difference.any() else replace(verdict, agrees="no"))  # it is not ahead
    return verdicts


def compare_table(
    table: pd.DataFrame, methods: Sequence[str], scores: Mapping[str, tuple[str, int]], budgets: Budgets
) -> pd.DataFrame:
    """Every method's scores in every account, as strings; `scores` gives each column's heading and digits."""
    rows: dict[str, dict[str, str]] = {method: {} for method in methods if method in set(table.method)}
    for account, said in ACCOUNTS.items():
        values = at_equal(table, account, budgets)
        for method, row in rows.items():
            of = values.loc[method]
            row["n"] = str(len(of))
            for score, (words, digits) in scores.items():
                row[f"{words}, {said}"] = interval(of[score], digits)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def draw_paying(table: pd.DataFrame, methods: Sequence[str], score: str, words: str, budgets: Budgets) -> Figure:
    """One panel an account: the score over its calls or seconds, with the methods named at the ends of their curves.

    Methods that have not been run on all seeds are left out: the means of different seeds cannot be compared.
    """
    figure = new_figure(6.4)
    panels: Any = figure.subplot_mosaic([["recomputed", "stored"], ["seconds", "seconds"]], sharey=True)
    titles = {
        "recomputed": "One state fits: the states are recomputed",
        "stored": "All states fit: they are stored",
        "seconds": "All states fit: the time for these calls",
    }
    seeds = table.groupby("method").seed.nunique()
    shown = table[table.method.isin({*methods} & {*seeds.index[seeds == seeds.max()]})]
    ends = {**budgets, "seconds": float(shown.groupby(["method", "seed"]).seconds.max().min())}
    for account, title in titles.items():
        draw_learning(panels[account], shown, account, score, ends[account])
        unit = "CPU seconds of one core, for the calls" if account == "seconds" else "function calls"
        panels[account].set(title=title, xlabel=unit, ylabel="" if account == "stored" else words)
    return figure


def said_of_curves(table: pd.DataFrame) -> str:
    """How a caption begins: what `draw_paying` draws."""
    n = table.seed.nunique()
    curves = f"thick: the mean of {n} seeds, thin: a seed" if n > 1 else "one seed"
    return f"Test accuracy over function calls and, below, over seconds; {curves}."


def said_of_runs(table: pd.DataFrame, judged: pd.DataFrame, methods: Sequence[str], config: Any) -> str:
    """What the intervals and seconds of a caption mean, and what has been run so far."""
    runs = [column for column in ("method", "gamma", "seed") if column in table]
    spent, done = table.groupby(runs)[["cpu", "wall"]].first().sum(), judged.groupby("method").seed.nunique()
    missing = [f"{m} {done.get(m, 0)} of {config.seeds}" for m in methods if done.get(m, 0) < config.seeds]
    return (
        "± is the 95 % t-interval over the n seeds. seconds: CPU seconds of one core for the calls, until the first "
        f"method of a seed has ended. Runs: {spent.cpu / 60:.0f} CPU minutes, {spent.wall / 60:.0f} minutes on a busy "
        f"machine, {config.device}." + (f" Not yet run: {', '.join(missing)} seeds." if missing else "")
    )


def said_of(verdicts: Sequence[Verdict]) -> str:
    """One line for each method and rival: whether UFOM pays, in each account, with the difference and its interval."""
    lines: dict[str, list[str]] = {}
    word = {"yes": "pays", "no": "does not pay", "inconclusive": "undecided"}
    for v in verdicts:
        if v.subject.startswith("UFOM pays: "):
            pair, _, rest = v.subject.partition(", ")[2].partition(", equal ")
            account = rest.partition(" (")[0].removeprefix("calls, ")
            lines.setdefault(pair, []).append(f"{account}: {word[v.agrees]} ({v.measured:+.1f} ± {v.tolerance:.1f})")
    if not lines:
        return "One seed has no interval: whether UFOM pays is not judged."
    return f"{HEADING}\n\n" + "\n".join(f"- {pair}: {'; '.join(found)}." for pair, found in lines.items())
