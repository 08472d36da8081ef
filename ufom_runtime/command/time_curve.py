"""The time curve of (19): what each q costs, where q* lies and how surely, and what its competitors take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ufom_runtime.command.style import LOOKS, SHEET
from ufom_theory import CostModel, Prediction, Sweep, UfomError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_time_curve(prediction: Prediction) -> Figure:
    """Time to a given precision against q, in units of that at q*; both axes logarithmic.

    Competitors: the exact gradient (q = 1) with the same sweep, with one stored state and with all of them. The
    proxy alone is biased and stops short of most precisions: its line is the time if D² were 0, a floor for every q.

    Raises:
        UfomError: matplotlib is missing, or the prediction holds arrays.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError as error:
        raise UfomError("--plot needs matplotlib: pip install '.[runtime]' from a checkout of ufom") from error
    moments, cost, m = prediction.moments, prediction.cost, float(prediction.m)
    if any(np.ndim(x) for x in (moments.d2, moments.v2, cost.r, prediction.q)):
        raise UfomError("the time curve is drawn for single values: give scalar moments and costs")
    q_star, (low, high) = float(prediction.q), (float(end) for end in prediction.interval)
    left = min(0.01, (low if low > 0 else q_star) / 3 or 0.01)
    grid = np.geomspace(left, 1, 400)
    best = float(cost.time(max(q_star, left), moments, m))
    without_bias = float(cost.time(1.0, moments, m)) * float(cost.c_det / (cost.c_det + cost.c_rnd))

    with rc_context(SHEET):
        figure = Figure(figsize=(7, 5))
        axes = figure.subplots()
        blue = LOOKS["UFOM"]["color"]
        times = np.asarray(cost.time(grid, moments, m)) / best
        axes.loglog(grid, times, color=blue, lw=2, label=f"UFOM, {cost.sweep} sweep")
        if high > low:
            axes.axvspan(max(low, left), high, color=blue, alpha=0.15, lw=0, label="95 % interval of q*")
        axes.plot(max(q_star, left), 1, **LOOKS["UFOM"], ms=8, lw=0, label=f"q* = {q_star:.3g}")
        axes.plot(
            1, cost.time(1.0, moments, m) / best, **LOOKS["exact"], ms=7, lw=0, clip_on=False, label="exact, same sweep"
        )
        for name, sweep, label in (
            ("exact, checkpoints", Sweep.checkpointed(1), "exact, one stored state"),
            ("exact, all states", Sweep.stored(), f"exact, all {cost.r} states stored"),
        ):
            rival = CostModel(r=cost.r, c1=cost.c1, c2=cost.c2, sweep=sweep)
            axes.axhline(
                float(rival.time(1.0, moments, m)) / best, color=LOOKS[name]["color"], ls=LOOKS[name]["ls"], label=label
            )
        alone = f"K = {cost.proxy.steps} alone" if cost.proxy.steps else "FOM alone"
        axes.axhline(
            without_bias / best,
            color=LOOKS["FOM"]["color"],
            ls=LOOKS["FOM"]["ls"],
            lw=2,
            label=f"{alone}, were it not biased",
        )
        axes.set(
            xlim=(left, 1), xlabel="q, probability of the exact correction", ylabel="time to a given precision, q* = 1"
        )
        axes.set_title(f"D² = {moments.d2:.4g}, V² = {moments.v2:.4g}, r = {cost.r}, m = {m:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def save_time_curve(prediction: Prediction, path: Path) -> None:
    """Draw and write the time curve; the ending names the format.

    Raises:
        UfomError: an ending that matplotlib does not know, or a folder that is not there.
    """
    figure = draw_time_curve(prediction)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise UfomError(f"--plot {path}: unknown ending {path.suffix!r}; use one of {', '.join(sorted(known))}")
    if not path.parent.is_dir():
        raise UfomError(f"--plot {path}: the folder {path.parent} does not exist; make it first")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UfomError(f"--plot {path} cannot be written: {error.strerror or error}") from error
