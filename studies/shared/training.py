"""What the studies that train on real data share: methods by name, what they are charged, values at a budget, curves.

Charge is not compute: every method computes with the stored sweep and is charged the recomputed one, in function calls
(C1 = C2 = 1), as the paper does. The gradients are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.shared.drawing import plain_number
from ufom_runtime import AdaptiveUFOM
from ufom_runtime.command.style import LOOKS
from ufom_theory import CostModel, Sweep, Truncated, UfomError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def draw_curves(axes: Axes, table: pd.DataFrame, y: str, end: float, step: bool = False) -> None:
    """Mean over the seeds of each method's y over the calls, with a band of one standard error; `step` for what jumps.

    The marks are staggered, so that methods which coincide are all seen.
    """
    grid = np.linspace(0, end, 200)
    for i, method in enumerate(m for m in LOOKS if m in set(table.method)):
        runs = [log for _, log in table[table.method == method].groupby("seed") if log[y].notna().any()]
        if not runs:
            continue
        curves = []
        for log in (log[log[y].notna()] for log in runs):
            inside = (grid >= log.calls.iloc[0]) & (grid <= log.calls.iloc[-1] * (1 + 1e-9))
            places = np.searchsorted(log.calls.to_numpy(), grid, side="right").clip(1) - 1
            values = log[y].to_numpy()[places] if step else np.interp(grid, log.calls, log[y])
            curves.append(np.where(inside, values, np.nan))
        stacked = np.stack(curves)
        mean, sem = stacked.mean(0), stacked.std(0, ddof=min(1, len(stacked) - 1)) / len(stacked) ** 0.5
        axes.plot(grid, mean, label=method, markevery=(5 * i % 24, 24), **LOOKS[method])
        axes.fill_between(grid, mean - sem, mean + sem, color=LOOKS[method]["color"], alpha=0.15, lw=0)
    axes.set(xlabel="function calls (recomputed sweep)", xlim=(0, end))
    axes.xaxis.set_major_formatter(plain_number)


def legend(figure: Figure) -> None:
    """One legend for all axes, below them."""
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    ordered = sorted(handles, key=[*LOOKS].index)
    figure.legend([handles[m] for m in ordered], ordered, loc="outside lower center", ncols=4)


def markdown(table: pd.DataFrame) -> str:
    """A table of strings as Markdown, its index as the first column."""
    rows = [[str(table.index.name or ""), *table.columns], ["---"] * (1 + table.shape[1])]
    rows += [[str(name), *map(str, row)] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean_sem(values: pd.Series, digits: int) -> str:
    """mean ± standard error, or a dash where a run ended before the budget."""
    return "–" if values.isna().any() else f"{values.mean():.{digits}f} ± {values.sem():.{digits}f}"
