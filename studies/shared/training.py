"""What the studies that train on real data share: methods by name, what they are charged, values at a budget, curves.

Charge is not compute: every method computes with the stored sweep and is charged the recomputed one, in function calls
(C1 = C2 = 1), as the paper does. The gradients are the same to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ufom_runtime import AdaptiveUFOM
from ufom_theory import CostModel, Sweep, Truncated, UfomError
from ufom_theory.quantities import t_interval


@dataclass(frozen=True)
class Charged(AdaptiveUFOM):
    """Adaptive UFOM that computes with the stored sweep and chooses q by the cost of the recomputed one."""

    sweep: Sweep = field(default_factory=Sweep.stored)

    def costs(self, r: int) -> CostModel:
        """The paper's cost, with C1 = C2 = 1."""
        return CostModel(r=r, as_printed=True)


# q_min = 0.05, β = 0.99 and ε = 0 (m = 2) are the paper's; ×0.1 is its modification of (22)
ADAPTIVE = {
    "adaptive": Charged(),
    "adaptive ×0.1": Charged(scale=0.1),
    "released": Charged(variant="released"),
    "released ×0.1": Charged(scale=0.1, variant="released"),
}


def missing(load: Callable[[], object]) -> str:
    """Why data cannot be had, by what loads them; nothing where they can."""
    try:
        load()
    except UfomError as error:
        return str(error)
    return ""


def corrected(log: Any, r: int, batch: int = 1, proxy: int = 0) -> Any:
    """Tasks whose coin was 1 so far: each task pays K Hessian-vector products, with coin 1 it pays r; log or row."""
    return (log["hessian_vector_products"] - proxy * batch * log["step"]) / (r - proxy)


def charged(log: Any, r: int, batch: int = 1, proxy: int = 0) -> Any:
    """Function calls so far with the recomputed sweep, of a log or of a row of one."""
    cost = CostModel(r=r, proxy=Truncated(proxy), as_printed=True)
    return batch * log["step"] * cost.c_det + corrected(log, r, batch, proxy) * cost.c_rnd


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


def ahead(points: pd.Series) -> str:
    """By how many points of test accuracy one of two is ahead of the other, or behind it, from their differences."""
    mean, half = t_interval(points.to_numpy(dtype=float))
    low, high = sorted((math.copysign(1, mean) * (mean - half), math.copysign(1, mean) * (mean + half)))
    size, way = f"{abs(mean):.1f} points of test accuracy", "ahead of" if mean > 0 else "behind"
    return f"{size} (95 % interval {low:.1f} to {high:.1f}, n = {len(points)}) {way}"
