"""How long does a hypergradient take on a GPU, and how much of its memory? `make gpu` on a machine that has one.

Ours run a batch of tasks together; the libraries take one task at a time, jax all of them by vmap. All methods of a
group take turns in one process. What the compiled steps (CUDA graphs) add is seen beside the plain ones. The groups are
measured in the order of their importance, until the time is over; those left have rows that say so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pandas as pd

from studies.engine.study import Progress, Study, of_table, silent
from studies.engine.sweep import Store
from studies.gpu_cell import Config, run_cell
from studies.performance_problems import QUICK
from studies.performance_problems import Config as Images
from studies.performance_problems import images as where_from
from studies.performance_verdicts import SAME, no_slower
from studies.shared.drawing import new_figure, place_labels, plain_ticks
from studies.shared.verdicts import Verdict
from ufom_runtime.command.style import GREY, LOOKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

question = "How long does a hypergradient take on a GPU, and how much of its memory?"
WORKLOADS = {"few-shot": "W1", "hypercleaning": "W2"}
COLUMNS = (
    "workload", "tasks", "r", "library", "version", "method", "seconds", "low", "high", "turns", "first", "bytes",
    "difference", "note",
)  # fmt: skip
SIZES = {
    "quick": Config(
        "cpu", Images(**QUICK), tasks=3, lengths=(2, 3), groups=("ours", "others"), rounds=2, patience=0.0, minutes=60.0
    ),
    "standard": Config("cuda", Images(images=5000), tasks=32, lengths=(10, 100)),
}


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """One row for each method of each workload.

    Columns: workload, tasks, r, library, version, method; seconds, low and high, the median and quartiles of a call;
    turns, how many; first, seconds of the first call, which compiles; bytes, the most that one call holds; difference,
    from plain autograd's gradient in float64, relative; note, why something was not measured.
    """
    rows: list[dict[str, Any]] = []
    end, cells = time.monotonic() + 60 * config.minutes, [*_cells(config)]
    for i, cell in enumerate(cells, 1):
        named = {"workload": f"{WORKLOADS[cell['workload']]}: {cell['workload']}, {where_from(cell['workload'])}"}
        named |= {"tasks": cell["tasks"], "r": cell["r"]}
        if time.monotonic() <= end:
            store.run([cell], run_cell)
        found = store.load(cell)  # what is done already is taken, however late it is
        if found is None:
            why = store.failure(cell) or "no time was left"
            found = [{"method": cell["group"], "library": "ufom", "note": why[:200]}]
        rows += [{**named, **row} for row in found]
        progress(i / len(cells))
    return pd.DataFrame(rows, columns=COLUMNS)


def _cells(config: Config) -> Iterator[dict[str, Any]]:
    shared = {"study": "gpu", "version": 1, "device": config.device, "images": asdict(config.images)}
    shared |= {"rounds": config.rounds, "patience": config.patience}
    for group in config.groups:
        for (workload, tasks), r in zip(
            (("few-shot", config.tasks), ("hypercleaning", 1)), config.lengths, strict=True
        ):
            if workload == "few-shot" or not group.startswith("first-order"):  # which is zero in hypercleaning
                yield {**shared, "group": group, "workload": workload, "tasks": tasks, "r": r}


def judge(table: pd.DataFrame) -> list[Verdict]:
    """Do all compute the same gradients, and is ours as quick as the quickest of the others?"""
    verdicts = []
    for workload, rows in table.groupby("workload"):
        worst = rows.difference.max()
        if worst == worst:
            subject = f"largest difference of {rows.difference.notna().sum()} gradients, {workload}"
            verdicts.append(Verdict.from_interval(subject, "<=", SAME, worst))
        exact = rows[rows.method.str.startswith("exact") & rows.seconds.notna()]
        ours, others = exact[exact.library == "ufom"], exact[exact.library != "ufom"]
        if len(ours) and len(others):
            mine, theirs = (x.loc[x.seconds.idxmin()] for x in (ours, others))
            subject = f"time of our quickest exact gradient over the quickest of the others, {workload}"
            verdicts.append(no_slower(subject, 1.0, mine, theirs, "seconds"))
    return verdicts


def draw(table: pd.DataFrame) -> Figure:
    """Time against memory, a panel a workload."""
    shown = table[table.seconds.notna() & table.bytes.notna()].drop_duplicates(["workload", "library", "method"])
    panels = list(shown.groupby("workload"))
    figure = new_figure(0.4 + 4.2 * len(panels))
    several = figure.subplots(len(panels), 1, squeeze=False).ravel()
    places = []
    for axes, (workload, rows) in zip(several, panels, strict=True):
        ours = rows.library == "ufom"
        colours = [LOOKS["UFOM"]["color"] if mine else GREY for mine in ours]
        x, y = rows["bytes"].clip(lower=4096) / 2**20, 1e3 * rows.seconds
        axes.scatter(x, y, c=colours, s=25)
        tasks = "1 task" if rows.tasks.iloc[0] == 1 else f"{rows.tasks.iloc[0]} tasks"
        axes.set(title=f"{workload}, {tasks}, r = {rows.r.iloc[0]}", xscale="log", yscale="log",
                 xlabel="peak memory of a call, MiB", ylabel="time of a call, ms")  # fmt: skip
        axes.margins(0.25, 0.15)
        plain_ticks(axes)
        texts = list(rows.method.where(ours, rows.library + ": " + rows.method))
        places.append((axes, pd.concat([x, y], axis=1).to_numpy(), texts, colours))
    figure.draw_without_rendering()  # the labels are placed in the final layout
    for place in places:
        place_labels(*place)
    return figure


def caption(table: pd.DataFrame) -> str:
    """What the figure shows, and what is not in it."""
    missing = table[table.seconds.isna()]
    absent = ", ".join(sorted({f"{row.library} ({row.method})" for row in missing.itertuples()}))
    return (
        "Time of one hypergradient of a batch on a GPU (medians of alternated calls) against the most memory that a "
        "call holds. Left and below is better. Ours run all tasks together, the libraries one at a time, jax (whose "
        "memory is not measured) all by vmap"
        + (f"; not measured, for the reasons in the table: {absent}." if absent else ".")
    )


def answer(table: pd.DataFrame) -> str:
    """The times of the quickest exact gradients."""
    parts = []
    for workload, rows in table[table.method.str.startswith("exact") & table.seconds.notna()].groupby("workload"):
        best = rows.loc[rows.groupby(rows.library == "ufom").seconds.idxmin()]
        said = " and ".join(f"{1e3 * row.seconds:.3g} ms by {row.library} ({row.method})" for row in best.itertuples())
        parts.append(f"{workload}: {said}")
    return "; ".join(parts) + "." if parts else "Nothing was measured."


study = Study(question, SIZES, measure, of_table(judge), of_table(draw), of_table(caption), of_table(answer), jobs=1)
