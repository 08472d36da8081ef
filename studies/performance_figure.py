"""The figure of `performance`: time over the floor against peak memory, a panel a workload, each method labelled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from studies.shared.drawing import place_labels, plain_ticks
from ufom_runtime.command.style import GREY, LOOKS, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILLS: dict[str, Any] = {"this package": "full", "this package, compiled": "bottom", "others": "none"}
LOOK = {  # the name in LOOKS, by the first of these that is in a method's
    "first-order": "FOM",
    "UFOM": "UFOM",
    "recomputed": "exact",
    "checkpoint": "exact, checkpoints",
    "": "exact, all states",
}


def draw(table: pd.DataFrame) -> Figure:
    """Few-shot learning, and hypercleaning at its longest loop."""
    from matplotlib.figure import Figure as NewFigure

    panels = list(_panels(table))
    figure = NewFigure(figsize=(WIDTH, 0.8 + 4.8 * len(panels)))
    several = figure.subplots(len(panels), 1, squeeze=False).ravel()
    for axes, (workload, rows) in zip(several, panels, strict=True):
        _points(axes, rows)
        axes.set(title=f"{workload}, r = {rows.r.iloc[0]:g}", xlabel="peak extra memory of a call, MiB")
        axes.set_ylabel("time of a call, over that of $r + 1$ bare gradients")
    _legend(figure)
    figure.draw_without_rendering()  # the labels are placed in the final layout
    for axes, (_, rows) in zip(several, panels, strict=True):
        _labels(axes, rows)
    return figure


def _panels(table: pd.DataFrame) -> Any:
    measured = table[(table.group == "hypergradients") & table.ratio.notna() & ~table.method.str.contains("coin")]
    for workload, rows in measured.groupby("workload"):
        longest = rows[rows.r == rows.r.max()]
        look = [next(look for word, look in LOOK.items() if word in method) for method in longest.method]
        compiled = longest.method.str.endswith("compiled").map({True: ", compiled", False: ""})
        whose = ("this package" + compiled).where(longest.library == "ufom", "others")
        memory = longest.resident_bytes.fillna(longest.live_bytes).clip(lower=4096) / 2**20
        yield workload, longest.assign(look=look, whose=whose, memory=memory)


def _points(axes: Axes, rows: pd.DataFrame) -> None:
    floor, methods = rows[rows.method == "floor"], rows[rows.method != "floor"]
    for row in methods.itertuples():
        axes.errorbar(row.memory, row.ratio, [[row.ratio - row.low], [row.high - row.ratio]],
                      **LOOKS[row.look] | {"ls": ""}, fillstyle=FILLS[row.whose], ms=6, lw=1)  # fmt: skip
    axes.axhline(1, color=GREY, lw=1, ls=":")
    for memory in floor.memory:
        axes.axvline(memory, color=GREY, lw=1, ls=":")
    axes.set(xscale="log", yscale="log")
    axes.margins(0.2, 0.14)
    plain_ticks(axes)


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", ls="", color=GREY, fillstyle=f, label=name) for name, f in FILLS.items()]
    names = {"FOM": "first-order", "exact": "exact, recomputed"}
    handles += [Line2D([], [], **LOOKS[look] | {"ls": ""}, label=names.get(look, look)) for look in LOOK.values()]
    handles.append(Line2D([], [], color=GREY, lw=1, ls=":", label="floor: r + 1 bare gradients"))
    figure.legend(handles=handles, ncols=4, loc="outside lower center")


def _labels(axes: Axes, rows: pd.DataFrame) -> None:
    rows = rows[rows.method != "floor"].sort_values(["ratio", "memory"])
    short = rows.method.str.replace("^exact, |, compiled$", "", regex=True)  # as mark and fill say
    theirs = short.where(rows.library == "ufom", rows.library + ": " + short.str.removeprefix("first-order, "))
    texts = list(theirs.str.replace(": (unrolled|first-order)$", "", regex=True))
    place_labels(axes, rows[["memory", "ratio"]].to_numpy(), texts, [LOOKS[look]["color"] for look in rows.look])


def caption(table: pd.DataFrame) -> str:
    """What the figure shows, and what could not be measured."""
    missing = table[(table.group == "hypergradients") & table.ratio.isna()]
    absent = ", ".join(sorted({f"{row.library} ({row.method})" for row in missing.itertuples()}))
    return (
        "Time of one hypergradient over that of r + 1 bare gradients of the inner loss (medians and quartiles of "
        "alternated runs), against the most by which a call raises resident memory. Left and below is better. Dotted: "
        "the floor's time and memory. A library's name alone: the unrolled loop, or first-order. Every gradient "
        "was compared with plain autograd's in float64 before it was timed"
        + (f"; not measured, for the reasons in the table: {absent}." if absent else ".")
    )
