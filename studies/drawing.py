"""What the studies' figures share: plain numbers on logarithmic axes, and labels that cover nothing."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from ufom_runtime.style import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PER_CHARACTER, LINE = 3.9, 9.0  # points that a label of size 7 takes


def plain_ticks(axes: Axes) -> None:
    """Plain numbers on both axes, which are logarithmic: at 1, 2, 5 on short ones, at powers of ten on long ones."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


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
