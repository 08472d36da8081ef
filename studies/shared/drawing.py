"""What the studies' figures share: shades, plain numbers on axes, legends, and labels that cover nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ufom_runtime.command.style import GREY, LOOKS, SHADES, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, PER_CHARACTER, LINE = 8, 4.5, 10.0  # points: of a label's type, and what it takes
GAPS = (3, 11, 21, 37, 60)  # points from a mark to its label


def seaborn() -> Any:
    """Seaborn, imported where a figure is drawn; it brings scipy and half a second."""
    import seaborn

    return seaborn


def new_figure(height: float) -> Figure:
    """An empty figure as wide as all of them, in inches; no window is opened for it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


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


def markdown(table: pd.DataFrame) -> str:
    """A table of strings as Markdown, its index as the first column."""
    rows = ([str(name), *map(str, row)] for name, row in zip(table.index, table.to_numpy(), strict=True))
    return markdown_rows([str(table.index.name or ""), *table.columns], rows)


def markdown_rows(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown, by its rows."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


def legend_below(axes: Axes, columns: int) -> None:
    """The legend under the axes, half an inch below, which the tick labels and the axis' label take."""
    from matplotlib.transforms import ScaledTranslation

    under = ScaledTranslation(0, -0.5, axes.figure.dpi_scale_trans)
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


def draw_learning(axes: Axes, table: pd.DataFrame, x: str, y: str, end: float) -> None:
    """Each method's y over x, the mean over the seeds, with a thin line a seed; methods that coincide share a label.

    The methods are named at the ends of their curves, so that no legend is needed.
    """
    grid = np.linspace(0, end, 150)
    curves = []
    for (method, seed), log in table.groupby(["method", "seed"], sort=False):
        log = log[log[y].notna()]
        value = np.interp(grid, log[x], log[y], right=np.nan)
        curves.append(pd.DataFrame({"x": grid, "y": value, "method": method, "seed": seed}))
    drawn = pd.concat(curves)
    methods = [m for m in LOOKS if m in set(drawn.method)]
    palette, lines = ({m: LOOKS[m][key] for m in methods} for key in ("color", "ls"))
    sns = seaborn()
    sns.lineplot(
        drawn, x="x", y="y", hue="method", hue_order=methods, palette=palette, units="seed", estimator=None,
        lw=0.5, alpha=0.3, legend=False, ax=axes,
    )  # fmt: skip
    means = drawn.groupby(["method", "x"], sort=False).y.agg(lambda v: v.mean() if v.notna().all() else np.nan)
    labels: list[tuple[float, float, list[str]]] = []
    for method in methods:
        mean = means[method].dropna()
        sns.lineplot(
            x=mean.index.to_numpy(),
            y=mean.to_numpy(),
            ax=axes,
            color=palette[method],
            ls=lines[method],
            lw=2.2,
            legend=False,
        )
        last = (float(mean.index[-1]), float(mean.iloc[-1]))
        same = next((label for label in labels if label[:2] == last), None)
        if same:
            same[2].append(method)
        else:
            labels.append((*last, [method]))
    axes.set_xlim(0, end)
    axes.xaxis.set_major_formatter(plain_number)
    low, high = axes.get_ylim()
    heights = _spread([label[1] for label in labels], 0.055 * (high - low))
    for (at, value, names), height in zip(labels, heights, strict=True):
        axes.annotate(
            ", ".join(names), (at, value), (end * 1.02, height), fontsize=SIZE, color=palette[names[-1]], va="center",
            annotation_clip=False, arrowprops={"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip


def _spread(values: list[float], gap: float) -> list[float]:
    """The values moved apart, as little as may be, until neighbours are a `gap` apart."""
    order, places = np.argsort(values), np.array(values, dtype=float)
    for _ in range(200):
        moved = places[order]
        close = np.maximum(gap - np.diff(moved), 0) / 2
        if not close.any():
            break
        moved[:-1] -= close
        moved[1:] += close
        places[order] = moved
    return [float(place) for place in places]
