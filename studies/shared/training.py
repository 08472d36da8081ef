"""What the studies that train on real data share: rows of a table, values at a budget, intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ufom_theory import UfomError
from ufom_theory.quantities import t_interval


def missing(load: Callable[[], object]) -> str:
    """Why data cannot be had, by what loads them; nothing where they can."""
    try:
        load()
    except UfomError as error:
        return str(error)
    return ""


def rounded(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with six digits: a table is committed, and no figure shows more."""
    records = rows.to_dict("records")
    return [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in records]


def at(table: pd.DataFrame, keys: Sequence[str], x: str, budget: float | Mapping[Any, float]) -> pd.DataFrame:
    """Every numeric column of every run where `x` reaches the budget, interpolated; nan where a run ended sooner.

    Args:
        table: logs of many runs, x growing within each.
        keys: the columns that name a run; the last is the seed.
        x: "calls" or "seconds".
        budget: one for all runs, or one a seed.

    Returns:
        One row a run, indexed by `keys`.
    """
    numbers = [c for c in table.select_dtypes("number").columns if c not in (*keys, x)]
    found = {}
    for run, log in table.groupby(list(keys)):
        where = budget[run[-1]] if isinstance(budget, Mapping) else budget
        inside = where <= log[x].iloc[-1] * (1 + 1e-9)
        found[run] = {c: np.interp(where, log[x], log[c]) if inside else np.nan for c in numbers}
    return pd.DataFrame.from_dict(found, orient="index").rename_axis(index=list(keys))


def interval(values: pd.Series, digits: int) -> str:
    """The mean and its 95 % t-interval, 1.2 ± 0.3; one value alone has none; a dash where a run ended too soon."""
    if values.isna().any() or not len(values):
        return "–"
    mean, half = t_interval(values.to_numpy(dtype=float))
    return f"{mean:.{digits}f}" if len(values) < 2 else f"{mean:.{digits}f} ± {half:.{digits}f}"
