"""Does averaging n estimates divide their variance by n? A study to copy: `python -m studies template`.

The reading is fixed before the run: the estimates are independent, so the variance of their mean is σ²/n exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, silent
from studies.engine.sweep import Store
from studies.shared.drawing import new_figure, seaborn
from studies.shared.verdicts import Verdict
from ufom_runtime.command.style import GREY, LOOKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        numbers: n, estimates in a mean.
        sigma: standard deviation of an estimate.
        seeds: independent repetitions.
        means: of each seed, over which the variance is taken.
    """

    numbers: tuple[int, ...] = (1, 4, 16)
    sigma: float = 2.0
    seeds: int = 8
    means: int = 2000


SIZES = {"quick": Config(), "standard": Config(numbers=(1, 4, 16, 64), seeds=16, means=20_000)}


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """One row for each n and seed; columns: number, seed, variance."""
    shared = {"study": "template", "version": 1, "sigma": config.sigma, "means": config.means}
    cells = [{**shared, "number": n, "seed": seed} for n in config.numbers for seed in range(config.seeds)]
    store.run(cells, run_cell, progress=progress)
    return store.table(cells)[["number", "seed", "variance"]]


def run_cell(cell: Mapping[str, Any]) -> list[dict[str, float]]:
    """One n and seed."""
    rng = np.random.default_rng([cell["number"], cell["seed"]])
    estimates = rng.normal(0.0, cell["sigma"], (cell["means"], cell["number"]))
    return [{"variance": float(estimates.mean(axis=1).var(ddof=1))}]


def judge(table: pd.DataFrame, config: Config) -> list[Verdict]:
    """Is the variance σ²/n, within 5 % of it?"""
    return [
        Verdict.from_paired(
            f"variance of the mean of {n}, over σ²/n", "=", 1.0, runs.variance * n / config.sigma**2,
            widest=0.05, margin=0.05,
        )
        for n, runs in table.groupby("number")
    ]  # fmt: skip


def draw(table: pd.DataFrame, config: Config) -> Figure:
    """The variance over n, each seed, with the line that theory draws."""
    figure = new_figure(4)
    axes = figure.subplots()
    seaborn().scatterplot(table, x="number", y="variance", ax=axes, label="measured", color=LOOKS["UFOM"]["color"])
    numbers = np.array(config.numbers)
    axes.plot(numbers, config.sigma**2 / numbers, color=GREY, label="$\\sigma^2/n$")
    axes.set(xscale="log", yscale="log", xlabel="estimates $n$ in a mean", ylabel="variance of the mean")
    axes.legend()
    return figure


def caption(table: pd.DataFrame, config: Config) -> str:
    """What the figure shows, with its sizes."""
    return (
        f"Variance of the mean of n estimates with σ = {config.sigma:g}; {config.seeds} seeds of {config.means} means."
    )


def answer(table: pd.DataFrame, config: Config) -> str:
    """The answer in a sentence."""
    kept = sum(verdict.agrees == "yes" for verdict in judge(table, config))
    return f"Yes, within 5 %, for {kept} of {len(config.numbers)} numbers of estimates."


study = Study("Does averaging n estimates divide their variance by n?", SIZES, measure, judge, draw, caption, answer)
