"""The verdicts of `performance`: the same gradients, in no more time than the others', and the promises kept."""

from __future__ import annotations

from typing import Any

import pandas as pd

from studies.shared.verdicts import Agreement, Verdict

SAME = 1e-6  # two gradients in float64 with a larger relative difference are not of the same function


def judge(table: pd.DataFrame) -> list[Verdict]:
    """Do all compute the same gradient, and are the promises kept?"""
    verdicts = []
    compared = table[table.difference.notna()]
    for (workload, r), rows in compared.groupby(["workload", "r"]):
        worst = rows.difference.max()
        subject = f"largest difference of {len(rows)} gradients, {workload}, r = {r:g}"
        verdicts.append(Verdict.from_interval(subject, "<=", SAME, worst))
    verdicts += _judge_turns(table)
    for row in table[table.group == "promises"].itertuples():
        subject = f"{row.method}, {row.workload}"
        if row.method.startswith("growth"):
            verdicts.append(Verdict.from_interval(subject, "<=", 0.0, row.live_bytes))
        elif row.method.startswith("memory"):
            verdicts.append(Verdict(subject, "<=", 1.0, row.ratio, 0.01, "yes" if row.ratio <= 1.01 else "no"))
        elif row.method.startswith("bytes"):
            verdicts.append(Verdict.from_interval(subject, "=", 1.0, row.ratio, margin=0.2))
        elif row.method.startswith("time"):
            bar = 0.25 if "at once" in row.method else 0.2 if "forecast" in row.method else 0.1
            half = (row.high - row.low) / 2
            agrees: Agreement = "yes" if abs(row.ratio - 1) <= bar else "inconclusive" if not half <= bar else "no"
            verdicts.append(Verdict(subject, "=", 1.0, row.ratio, half, agrees))
    return verdicts


def _judge_turns(table: pd.DataFrame) -> list[Verdict]:
    """Is ours as quick as the quickest of the others that compute the same gradient?"""
    named = ["workload", "library", "method"]
    right = table[(table.group == "hypergradients") & (table.difference <= SAME)][named].drop_duplicates()
    turns = table[(table.group == "in turns") & table.ratio.notna()].merge(right, on=named)
    verdicts = []
    for (workload, r), rows in turns.groupby(["workload", "r"]):
        for method, bar in (("first-order", 1.03), ("exact, unrolled", 1.05), ("exact, unrolled, compiled", 1.0),
                            ("exact, stored, compiled", 1.0)):  # fmt: skip
            others = rows[rows.method.str.startswith(method.partition(",")[0]) & (rows.library != "ufom")]
            if not method.endswith("compiled"):
                others = others[others.library != "jax"]
            if others.empty:
                continue
            for ours in rows[(rows.library == "ufom") & (rows.method == method)].itertuples():
                best = others.loc[others.ratio.idxmin()]
                subject = f"time of ours, {method}, over the quickest of the others, {workload}, r = {r:g}"
                verdicts.append(no_slower(subject, bar, ours, best, "ratio"))
    return verdicts


def no_slower(subject: str, bar: float, ours: Any, theirs: Any, time: str) -> Verdict:
    """Is our median at most `bar` times theirs? A miss by less than the quartiles of both is inconclusive."""
    mine, other = getattr(ours, time), getattr(theirs, time)
    over = mine / other
    half = over * ((ours.high - ours.low) / mine + (theirs.high - theirs.low) / other) / 2
    agrees: Agreement = "yes" if over <= bar else "inconclusive" if over - half <= bar else "no"
    return Verdict(subject, "<=", bar, over, half, agrees)
