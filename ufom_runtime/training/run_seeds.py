"""Several methods, several seeds each, in one tidy table: what to draw, and what to print with an interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.coins import Draws
from ufom_runtime.estimators import Method, refuse_other
from ufom_runtime.memory import peak_bytes
from ufom_runtime.methods.adaptive import AdaptiveUFOM
from ufom_runtime.problem import BilevelProblem
from ufom_runtime.training.saving import folder_of
from ufom_runtime.training.seeds import check_seed, generator
from ufom_runtime.training.train import train
from ufom_theory import UfomError
from ufom_theory.checks import integer, typed
from ufom_theory.quantities import t_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class SeedRuns:
    """The logs of several methods, each with several seeds.

    Attributes:
        table: one row a logged step: method, seed, step, calls (gradients and Hessian-vector products so far), seconds,
            bytes (where measured), and what else `train` logs.
    """

    table: pd.DataFrame

    def __repr__(self) -> str:
        runs = self.table.groupby("method", sort=False).seed.nunique()
        return f"SeedRuns({', '.join(f'{name}: {n} seeds' for name, n in runs.items())}; .table, .summary, .plot)"

    def summary(self, y: str, at: float | None = None, x: str = "calls", level: float = 0.95) -> pd.DataFrame:
        """One row a method: the mean of y over the seeds, `low` and `high` of its t-interval, and n.

        Args:
            y: a column of numbers.
            at: the place x at which y is read, interpolated; None: the end of each run. A seed whose rows do not reach
                it gives nan, and so does its method.
            x: "calls", "seconds" or "step".
            level: of the interval.

        Raises:
            UfomError: a column that the table lacks, a level outside (0, 1).
        """
        import pandas as pd

        found = {}
        for name in self.table.method.unique():
            values = self._curves(name, x, y, None if at is None else np.array([float(at)]))[:, 0]
            mean, half = t_interval(values, level)
            found[name] = {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}
        return pd.DataFrame.from_dict(found, orient="index").rename_axis("method").astype({"n": int})

    def latex(self, y: str, at: float | None = None, x: str = "calls", level: float = 0.95, digits: int = 3) -> str:
        """`summary` as a LaTeX table, with mean ± half the interval."""
        rows = self.summary(y, at, x, level)
        values = [f"${m:.{digits}f} \\pm {h - m:.{digits}f}$" for m, h in zip(rows["mean"], rows["high"], strict=True)]
        shown = rows[["n"]].assign(**{y: values})[[y, "n"]]
        return str(shown.reset_index().to_latex(index=False, escape=False))

    def plot(self, y: str, x: str = "calls", axes: Axes | None = None, level: float = 0.95) -> Axes:
        """Each method's mean of y over x, with the band of its t-interval; where all its seeds have rows."""
        import matplotlib.pyplot as plt

        axes = axes if axes is not None else plt.subplots(layout="constrained")[1]
        for name in self.table.method.unique():
            runs = self._logs(name, x, y)
            places = np.linspace(max(run[x].iloc[0] for run in runs), min(run[x].iloc[-1] for run in runs), 200)
            mean, half = t_interval(self._curves(name, x, y, places), level)
            (line,) = axes.plot(places, mean, label=name)
            axes.fill_between(places, mean - half, mean + half, color=line.get_color(), alpha=0.2, lw=0)
        axes.set(xlabel=x, ylabel=y)
        axes.legend()
        return axes

    def _logs(self, name: str, x: str, y: str) -> list[pd.DataFrame]:
        """The rows of each seed of a method; `UfomError` where a column is missing."""
        numbers = [*self.table.select_dtypes("number").columns]
        for column in (x, y):
            if column not in numbers:
                raise UfomError(f"{column!r} is not a column of numbers of the table: it has {numbers}")
        return [run for _, run in self.table[self.table.method == name].groupby("seed")]

    def _curves(self, name: str, x: str, y: str, places: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """y of each seed (a row) at the places, nan where a run does not reach; None: its last value."""
        logs = self._logs(name, x, y)
        if places is None:
            return np.array([[run[y].iloc[-1]] for run in logs], dtype=np.float64)
        return np.stack([np.interp(places, run[x], run[y], left=np.nan, right=np.nan) for run in logs])


@typed
def run_seeds(
    problem: BilevelProblem,
    methods: Mapping[str, Method],
    seeds: int | Sequence[int] = 8,
    *,
    theta: Tensor | None = None,
    memory: bool = False,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> SeedRuns:
    """`train` every method with every seed; with one seed, all methods see the same tasks.

    runs = run_seeds(problem, {"FOM": FOM, "exact": EXACT}, seeds=8, optimizer="sgd:0.05", steps=200, evaluate=loss)
    runs.plot("loss"), runs.latex("loss", at=5000)

    Args:
        problem: the problem.
        methods: by name.
        seeds: how many, 0, 1, …, or the seeds themselves.
        theta: θ_0, shape (s,); the problem's `initial` if not given.
        memory: also measure `bytes`, the peak of the tensors of one direction at θ_0, with every coin 1.
        checkpoint: a folder; each run keeps its state in NAME/SEED within it.
        options: what else `train` takes.

    Raises:
        UfomError: no method, no seed, a seed given twice, or what `train` raises.
    """
    import pandas as pd

    given = seeds.tolist() if isinstance(seeds, np.ndarray) else seeds
    chosen = given if isinstance(given, Sequence) else range(integer("seeds", given, 1))
    if not isinstance(methods, Mapping) or not methods or not chosen:
        raise UfomError(f"methods = {methods!r:.200}, seeds = {seeds!r:.200}: give at least one of each, by name")
    if len({check_seed(seed) for seed in chosen}) < len(chosen):
        raise UfomError(f"seeds = {seeds!r:.200} holds one twice: its runs are the same, so give each once")
    start = problem.initial if theta is None else theta
    if start is None:
        raise UfomError("the problem has no initial: give theta=")
    tables = []
    for name, method in methods.items():
        refuse_other(method)
        if isinstance(method, AdaptiveUFOM):
            method = method.trained_by(options.get("optimizer"))
        folder = None if checkpoint is None else _folder(checkpoint, str(name))
        held = {"bytes": _bytes(problem, start, method, options)} if memory else {}
        for seed in chosen:
            log = train(problem, start, method, seed=seed, checkpoint=folder and folder / str(seed), **options).log
            log.insert(0, "calls", log.gradients + log.hessian_vector_products)
            tables.append(log.assign(**held, method=name, seed=seed))
    table = pd.concat(tables, ignore_index=True)
    return SeedRuns(table[["method", "seed", *(c for c in table.columns if c not in ("method", "seed"))]])


def _folder(checkpoint: str | Path, name: str) -> Path:
    """The folder NAME in `checkpoint`; `UfomError` for a name that leads out of it."""
    inside = Path(name)
    if not inside.parts or inside.is_absolute() or ".." in inside.parts:
        raise UfomError(f"the runs of {name!r} would be kept outside of checkpoint = {checkpoint}: rename the method")
    return folder_of(checkpoint) / inside


def _bytes(problem: BilevelProblem, theta: Tensor, method: Method, options: Mapping[str, Any]) -> int:
    """Peak bytes of one direction with every coin 1."""
    batch, how = options.get("batch", 1), {name: options[name] for name in ("chunk", "compile") if name in options}
    tasks = problem.sample(batch, generator(0, 1, "tasks"))

    def peak(draws: Callable[[], Draws]) -> int:
        def call(drawn: Draws) -> object:
            return method.direction(problem, theta, tasks, method.begin(), drawn, **how)

        call(draws())  # the checks of a first call hold more
        return peak_bytes(partial(call, draws()), (theta,))

    try:
        return peak(lambda: torch.ones(batch, dtype=torch.bool, device="cpu"))
    except UfomError:  # a method that tosses no coins refuses them
        return peak(lambda: generator(0, 1, "coins"))
