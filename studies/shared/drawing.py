"""What the studies' figures share: shades, plain numbers on axes, legends, and labels that cover nothing."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from ufom_runtime.command.style import GREY, SHADES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE, PER_CHARACTER, LINE = 8, 4.5, 10.0  # points: of a label's type, and what it takes
GAPS = (3, 11, 21, 37, 60)  # points from a mark to its label


def seaborn() -> Any:
    """Seaborn, imported where a figure is drawn; it brings scipy and half a second."""
    import seaborn

    return seaborn


def shades(n: int) -> list[str]:
    """Colours, dark to light, of n things of which none is an estimator."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps[SHADES](np.linspace(1, 0.55, n))]


def plain_number(value: float, _: float | None = None) -> str:
    """As a tick says it: 20000 is 20k."""
    return f"{value:g}" if value < 1e3 else f"{value / 1e3:g}k"


def plain_ticks(axes: Axes) -> None:
    """Plain numbers on both axes, which are logarithmic: at 1, 2, 5 on short ones, at powers of ten on long ones."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
        axis.set_major_formatter(plain_number)
        axis.set_minor_formatter(NullFormatter())


def legend_below(axes: Axes, columns: int, points: float = 36) -> None:
    """The legend under the axes, as many points below as the tick labels and the axis' label take."""
    from matplotlib.transforms import ScaledTranslation

    under = ScaledTranslation(0, -points / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        ncols=columns, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=axes.transAxes + under,
        borderaxespad=0,
    )  # fmt: skip


def place_labels(axes: Axes, points: Any, texts: list[str], colours: list[str], radii: Any = 3.0) -> None:
    """Each text beside its point, shape (n, 2), where it covers least of the points and what was placed before.

    Radii of the points in typographic points, one or n of them.
    """
    radii = np.broadcast_to(radii, len(texts))
    scale = 72 / axes.figure.dpi
    centres = axes.transData.transform(points) * scale
    (left, bottom), (right, top) = axes.bbox.get_points() * scale
    taken = np.hstack([centres - radii[:, None], centres + radii[:, None]])
    for point, text, colour, radius, centre in zip(points, texts, colours, radii, centres, strict=True):
        lines = text.split("\n")
        width, height, places = PER_CHARACTER * max(map(len, lines)), LINE * len(lines), []
        for gap, side, up in product(GAPS, (1, -1), (0, 1, -1, 2, -2)):
            far = gap + radius
            end = centre + np.array([side * far, up * far / 1.5])
            x0 = end[0] if side > 0 else end[0] - width
            box = np.array([[x0, end[1] - height / 2, x0 + width, end[1] + height / 2]])
            way = centre + np.linspace(1.5 * radius / far, 1, 12)[:, None] * (end - centre)
            boxes = np.vstack([box, np.hstack([way - 0.5, way + 0.5])]) if gap > GAPS[0] else box
            over = np.minimum(taken[:, None, 2:], boxes[:, 2:]) - np.maximum(taken[:, None, :2], boxes[:, :2])
            outside = x0 < left or x0 + width > right or box[0, 1] < bottom or box[0, 3] > top
            cost = np.prod(over.clip(min=0), axis=2).sum() + 1e4 * outside + gap / 2
            places.append((cost, side, end - centre, boxes))
        _, side, offset, boxes = min(places, key=lambda place: place[0])
        taken = np.vstack([taken, boxes])
        leader = {"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkA": 0, "shrinkB": radius,
                  "relpos": ((1 - side) / 2, 0.5)}  # fmt: skip
        axes.annotate(
            text, point, offset, textcoords="offset points", fontsize=SIZE, color=colour, va="center",
            ha="left" if side > 0 else "right", arrowprops=leader if len(boxes) > 1 else None,
            bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.3},
        ).set_in_layout(False)  # fmt: skip
