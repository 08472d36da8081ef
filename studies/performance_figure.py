"""The figure of `performance`: the quickest exact gradient of each library, in time and memory, a panel a workload."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from studies.shared.drawing import SIZE, markdown, new_figure, seaborn
from ufom_runtime.command.style import GREY, LOOKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(table: pd.DataFrame) -> Figure:
    """Few-shot learning, and hypercleaning at its longest loop."""
    panels = list(_panels(table))
    figure = new_figure(3.6)
    for axes, (workload, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _bars(axes, quickest(rows))
        axes.set_title(f"{workload}, r = {rows.r.iloc[0]:g}")
        axes.set(xlabel="time of an exact gradient,\nover $r + 1$ bare gradients (dotted)", ylabel="")
    return figure


def _panels(table: pd.DataFrame) -> Any:
    measured = table[(table.group == "hypergradients") & table.ratio.notna() & ~table.method.str.contains("coin")]
    for workload, rows in measured.groupby("workload"):
        longest = rows[(rows.r == rows.r.max()) & (rows.method != "floor")]
        memory = longest.resident_bytes.fillna(longest.live_bytes) / 2**20
        yield workload, longest.assign(memory=memory)


def quickest(rows: pd.DataFrame) -> pd.DataFrame:
    """The quickest exact gradient of each library, of this package one compiled and one not; the quickest first."""
    exact = rows[rows.method.str.startswith("exact")].sort_values("ratio")
    compiled = exact.method.str.endswith("compiled").map({True: " compiled", False: ""})
    return exact.assign(name=exact.library.replace("torch", "torch by hand") + compiled).drop_duplicates("name")


def _bars(axes: Axes, rows: pd.DataFrame) -> None:
    """A bar a library, blue for this package, with its memory at the end."""
    ours = {True: LOOKS["UFOM"]["color"], False: GREY}
    seaborn().barplot(
        rows.assign(ours=rows.library == "ufom"), x="ratio", y="name", hue="ours", palette=ours, orient="h", ax=axes,
        legend=False, errorbar=None, width=0.7,
    )  # fmt: skip
    for place, row in enumerate(rows.itertuples()):
        axes.annotate(f"{row.ratio:.2f}×, {row.memory:.0f} MiB", (row.ratio, place), (4, 0), va="center",
                      textcoords="offset points", fontsize=SIZE)  # fmt: skip
    axes.axvline(1, color=GREY, lw=1, ls=":")
    axes.set_xlim(0, 1.55 * rows.ratio.max())


def caption(table: pd.DataFrame) -> str:
    """What the figure shows, what could not be measured, and the numbers of every method."""
    missing = table[(table.group == "hypergradients") & table.ratio.isna()]
    absent = ", ".join(sorted({f"{row.library} ({row.method})" for row in missing.itertuples()}))
    tables = []
    for workload, rows in _panels(table):
        shown = {
            f"{row.library}: {row.method}": {
                "time": f"{row.ratio:.3g}", "quartiles": f"{row.low:.3g} to {row.high:.3g}", "MiB": f"{row.memory:.3g}",
            }
            for row in rows.sort_values("ratio").itertuples()
        }  # fmt: skip
        whole = pd.DataFrame.from_dict(shown, orient="index").rename_axis("library and method")
        tables.append(f"{workload}, r = {rows.r.iloc[0]:g}\n\n{markdown(whole)}")
    return (
        "The quickest exact gradient of each library (blue: this package; torch: plain autograd through the unrolled "
        "loop): the time of one hypergradient over that of r + 1 bare gradients of the inner loss (medians of "
        "alternated runs), and the most by which a call raises resident memory. Every gradient was compared with plain "
        "autograd's in float64 before it was timed"
        + (f"; not measured, for the reasons in the table: {absent}." if absent else ".")
        + " All methods:\n\n"
        + "\n\n".join(tables)
    )
