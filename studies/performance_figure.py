"""The figure of `performance`: time over the floor against peak memory, a panel a workload, each method labelled."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"this package": "#0072B2", "this package, compiled": "#D55E00", "others": "#009E73"}  # Okabe and Ito's
GREY = "#777777"
MARKERS = {"exact": "o", "first-order": "^", "UFOM": "s"}
PER_CHARACTER, LINE = 3.9, 9.0  # points that a label of size 7 takes


def draw(table: pd.DataFrame) -> Figure:
    """Few-shot learning, and hypercleaning at its longest loop."""
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(13, 6.2), layout="constrained")
    panels = list(_panels(table))
    several = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (workload, rows) in zip(several, panels, strict=True):
        _points(axes, rows)
        axes.set(title=f"{workload}, r = {rows.r.iloc[0]:g}", xlabel="peak extra memory of a call, MiB")
        axes.set_ylabel("time of a call, over the floor")
    _legend(figure)
    figure.draw_without_rendering()  # the labels are placed in the final layout
    for axes, (_, rows) in zip(several, panels, strict=True):
        _labels(axes, rows)
    return figure


def _panels(table: pd.DataFrame) -> Any:
    measured = table[(table.group == "hypergradients") & table.ratio.notna() & ~table.method.str.contains("coin")]
    for workload, rows in measured.groupby("workload"):
        longest = rows[rows.r == rows.r.max()]
        kind = longest.method.str.extract(f"({'|'.join(MARKERS)})")[0]
        compiled = longest.method.str.endswith("compiled").map({True: ", compiled", False: ""})
        whose = ("this package" + compiled).where(longest.library == "ufom", "others")
        memory = longest.resident_bytes.fillna(longest.live_bytes).clip(lower=4096) / 2**20
        yield workload, longest.assign(kind=kind, whose=whose, memory=memory)


def _points(axes: Axes, rows: pd.DataFrame) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    floor, methods = rows[rows.method == "floor"], rows[rows.method != "floor"]
    for row in methods.itertuples():
        axes.errorbar(row.memory, row.ratio, [[row.ratio - row.low], [row.high - row.ratio]],
                      fmt=MARKERS[row.kind], color=COLOURS[row.whose], ms=6, lw=1)  # fmt: skip
    axes.axhline(1, color=GREY, lw=1, ls=":")
    for memory in floor.memory:
        axes.axvline(memory, color=GREY, lw=1, ls=":")
    axes.set(xscale="log", yscale="log")
    axes.margins(0.14)
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", ls="", color=c, label=name) for name, c in COLOURS.items()]
    handles += [Line2D([], [], marker=m, ls="", color=GREY, mfc="none", label=name) for name, m in MARKERS.items()]
    handles.append(Line2D([], [], color=GREY, lw=1, ls=":", label="floor: r + 1 bare gradients"))
    figure.legend(handles=handles, ncols=len(handles), loc="outside lower center", frameon=False, fontsize=8)


def _labels(axes: Axes, rows: pd.DataFrame) -> None:
    rows = rows[rows.method != "floor"].sort_values(["ratio", "memory"])
    texts = [row.method if row.library == "ufom" else f"{row.library}: {row.method}" for row in rows.itertuples()]
    place_labels(axes, rows[["memory", "ratio"]].to_numpy(), texts, [COLOURS[whose] for whose in rows.whose])


def place_labels(axes: Axes, points: Any, texts: list[str], colours: list[str], radii: Any = 3.0) -> None:
    """Each text beside its point, shape (n, 2), at the first place that covers no point and no text before it.

    Radii of the points in typographic points, one or n of them.
    """
    radii = np.broadcast_to(radii, len(texts))
    scale = 72 / axes.figure.dpi
    centres = axes.transData.transform(points) * scale
    (left, bottom), (right, top) = axes.bbox.get_points() * scale
    taken = np.hstack([centres - radii[:, None], centres + radii[:, None]])
    for point, text, colour, radius, (x, y) in zip(points, texts, colours, radii, centres, strict=True):
        width, places = PER_CHARACTER * len(text), []
        for gap, side, up in product((3, 11, 21, 37), (1, -1), (0, 1, -1, 2, -2)):
            far = gap + radius
            x0 = x + far if side > 0 else x - far - width
            y0 = y + up * far / 1.5 - LINE / 2
            box = np.array([x0, y0, x0 + width, y0 + LINE])
            over = np.minimum(taken[:, 2:], box[2:]) - np.maximum(taken[:, :2], box[:2])
            outside = x0 < left or box[2] > right or y0 < bottom or box[3] > top
            places.append((np.prod(over.clip(min=0), axis=1).sum() + 1e4 * outside, far, side, box))
        _, far, side, box = min(places, key=lambda place: place[:2])
        taken = np.vstack([taken, box])
        axes.annotate(
            text, point, ((box[0] if side > 0 else box[2]) - x, box[1] + LINE / 2 - y),
            textcoords="offset points", fontsize=7, color=colour, va="center",
            ha="left" if side > 0 else "right", arrowprops={"arrowstyle": "-", "lw": 0.4, "color": GREY},
        ).set_in_layout(False)  # fmt: skip


def caption(table: pd.DataFrame) -> str:
    """What the figure shows, and what could not be measured."""
    missing = table[(table.group == "hypergradients") & table.ratio.isna()]
    absent = ", ".join(sorted({f"{row.library} ({row.method})" for row in missing.itertuples()}))
    return (
        "Time of one hypergradient over that of r + 1 bare gradients of the inner loss (medians and quartiles of "
        "alternated runs), against the most by which a call raises resident memory. Left and below is better. Dotted: "
        "the floor's time and memory. Every gradient was compared with plain autograd's in float64 before it was timed"
        + (f"; not measured, for the reasons in the table: {absent}." if absent else ".")
    )
