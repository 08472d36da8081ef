"""Does FOM stay away from the stationary points while UFOM reaches one? Theorem 2's counterexample (Fig. 1a–c).

The reading: `diverging_problem` is built for a given D such that FOM's own stationary point θ_FO has ‖∇M(θ_FO)‖² = 2D,
so that FOM's limit is 2D and the theorem's floor D. The paper's q = 0.1, r = 10, α = 0.1 and a = (0.5, 1.5) are kept;
its outer steps are not printed: here γ_k = 10/(k + 100), one task a step. The starts lie on both sides of the quadratic
pieces, and the gradients are those of the whole piecewise polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from studies.engine.study import Progress, Study, silent
from studies.engine.sweep import Store
from studies.shared.drawing import legend_below, new_figure, shades
from studies.shared.pair import outer_sgd, pieces
from studies.shared.verdicts import Verdict
from ufom_runtime.command.style import GREY, LOOKS
from ufom_theory import TwoTaskProblem, diverging_problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
ESTIMATORS = ("FOM", "UFOM")
COLUMNS = ["step", "estimator", "start", "theta", "gradient_norm"]
DRAWN = 6  # runs of each estimator whose lines are drawn; the mean is over all

question = "Does first-order meta-learning stall where Theorem 2 says, and does UFOM get through?"


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        starts: independent runs of each estimator, from as many θ_0, evenly spread.
        steps: outer steps of each.
        D: of Theorem 2.
        q: UFOM's probability of the exact correction.
        alpha: inner step size.
        r: inner steps.
        low: the least θ_0.
        high: the largest θ_0.
        cells: the number of cells that the starts are split over.
    """

    starts: int
    steps: int
    D: float = 0.06
    q: float = 0.1
    alpha: float = 0.1
    r: int = 10
    low: float = -30.0
    high: float = 40.0
    cells: int = 2


SIZES = {
    "quick": Config(starts=32, steps=10_000),
    "standard": Config(starts=256, steps=100_000, cells=4),
    "paper": Config(starts=4096, steps=1_000_000, cells=64),
}


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """One row for each estimator, start and logged step (about 25 a decade).

    Columns: estimator, start (its number), step, theta, gradient_norm (|∇M(θ_k)|, exact).
    """
    cells = [{"study": "divergence", "version": 1, **asdict(config), "seed": i} for i in range(config.cells)]
    store.run(cells, run_cell, progress=progress)
    return store.table(cells)[COLUMNS].sort_values(["estimator", "start", "step"], ignore_index=True)


def run_cell(cell: Mapping[str, Any]) -> pd.DataFrame:
    """Every `cells`-th start, from the cell's seed on."""
    pair = diverging_problem(cell["D"], cell["r"], cell["alpha"])
    numbers = np.arange(cell["starts"])[cell["seed"] :: cell["cells"]]
    theta = np.linspace(cell["low"], cell["high"], cell["starts"])[numbers]
    logged = np.unique(
        np.geomspace(1, cell["steps"], 1 + math.ceil(25 * math.log10(cell["steps"]))).round().astype(int)
    )
    thetas = simulate(pair, theta, cell["q"], logged, np.random.default_rng([20260102, cell["seed"]]))
    norms = np.abs(pair.gradients(thetas)[1].mean(axis=0))
    index = pd.MultiIndex.from_product([logged, ESTIMATORS, numbers.tolist()], names=["step", "estimator", "start"])
    return pd.DataFrame({"theta": thetas.ravel(), "gradient_norm": norms.ravel()}, index).reset_index()


def simulate(pair: TwoTaskProblem, start: Array, q: float, logged: Array, rng: np.random.Generator) -> Array:
    """θ of FOM and of UFOM(q) at the logged steps, shape (len(logged), 2, len(start)); the tasks are the same."""
    run, wanted = outer_sgd(pieces(pair), start, np.array([0.0, q]), rng), set(logged.tolist())
    return np.array([theta.copy() for k, theta in enumerate(islice(run, int(logged[-1])), 1) if k in wanted])


def judge(table: pd.DataFrame, config: Config) -> list[Verdict]:
    """Does FOM end above the floor, at 2D and at θ_FO; does UFOM end below the floor and at θ_*?"""
    D, pair = config.D, diverging_problem(config.D, config.r, config.alpha)
    ends = {name: runs[runs.step == runs.step.max()] for name, runs in table.groupby("estimator")}
    fom, ufom = ends["FOM"], ends["UFOM"]
    bias = abs(pair.theta_fo - pair.theta_star)
    name = f"UFOM (q = {config.q:g})"
    fom_sq, ufom_sq = fom.gradient_norm**2 / D, ufom.gradient_norm**2 / D
    off = {"widest": 0.02, "margin": 0.02}
    return [
        Verdict.from_paired("E‖∇M‖² over D at FOM's end: Theorem 2's floor", ">=", 1.0, fom_sq, widest=0.1),
        Verdict.from_paired("E‖∇M‖² over D at FOM's end: its limit", "=", 2.0, fom_sq, widest=0.05, margin=0.05),
        Verdict.from_paired(f"E‖∇M‖² over D at the end of {name}", "<=", 1.0, ufom_sq, widest=0.1),
        Verdict.from_paired(
            "FOM's end from θ_FO, over |θ_FO − θ_*|", "=", 0.0, (fom.theta - pair.theta_fo) / bias, **off
        ),
        Verdict.from_paired(
            f"end of {name} from θ_*, over |θ_FO − θ_*|", "=", 0.0, (ufom.theta - pair.theta_star) / bias, **off
        ),
    ]


def answer(table: pd.DataFrame, config: Config) -> str:
    """The answer in a sentence."""
    final = table[table.step == table.step.max()]
    mean_sq = (final.gradient_norm**2).groupby(final.estimator).mean() / config.D
    yes = "Yes" if mean_sq["FOM"] >= 1 > mean_sq["UFOM"] else "No"
    return (
        f"{yes}: from {final.start.nunique()} starts FOM ends with E‖∇M‖² = {mean_sq['FOM']:.3g}·D (predicted: 2·D), "
        f"UFOM (q = {config.q:g}) with {mean_sq['UFOM']:.2g}·D, after {final.step.iloc[0]} steps."
    )


def draw(table: pd.DataFrame, config: Config) -> Figure:
    """The two tasks (Fig. 1a), M with the ends of the runs (1b), gradient norms over steps with the floor (1c)."""
    figure = new_figure(7.2)
    panels = figure.subplot_mosaic([["tasks", "objective"], ["norms", "norms"]])
    tasks, objective, norms = panels.values()
    pair = diverging_problem(config.D, config.r, config.alpha)
    phi, theta = np.linspace(-12, 24, 401), np.linspace(pair.theta_star - 3, pair.theta_fo + 3, 401)
    for loss, colour, style, number in zip(losses(pair, phi)[1], shades(2), ("-", "--"), (1, 2), strict=True):
        tasks.plot(phi, loss, style, color=colour, label=f"$f_{number}$")
    tasks.set(xlabel="inner parameter $\\phi$", ylabel="loss", title="Two equally likely tasks")
    objective.plot(theta, losses(pair, theta)[0].mean(axis=0), color=GREY, label="$M(\\theta)$")
    final = table[table.step == table.step.max()]
    for name in ESTIMATORS:
        ends = final[final.estimator == name].theta.to_numpy()
        objective.plot(
            ends, losses(pair, ends)[0].mean(axis=0), **LOOKS[name] | {"ls": ""}, label=f"{len(ends)} ends of {name}"
        )  # fmt: skip
    for x, label in ((pair.theta_fo, "$\\theta_{FO}$, predicted"), (pair.theta_star, "$\\theta_*$, predicted")):
        colour = LOOKS["FOM" if x == pair.theta_fo else "UFOM"]["color"]
        objective.axvline(x, color=colour, lw=0.9, ls="--", label=label)
    objective.set(xlabel="outer parameter $\\theta$", ylabel="$M(\\theta)$, mean loss", title="Where outer SGD ends")
    _draw_norms(norms, table, config)
    for axes in (tasks, objective, norms):
        legend_below(axes, 2)
    return figure


def _draw_norms(axes: Axes, table: pd.DataFrame, config: Config) -> None:
    D = config.D
    shown = np.unique(np.linspace(0, table.start.max(), DRAWN).astype(int))
    for name in ESTIMATORS:
        runs, colour = table[table.estimator == name], LOOKS[name]["color"]
        for _, run in runs[runs.start.isin(shown)].groupby("start"):
            axes.loglog(run.step, run.gradient_norm, color=colour, lw=0.5, alpha=0.35)
        rms = (runs.gradient_norm**2).groupby(runs.step).mean() ** 0.5
        label = name if name == "FOM" else f"{name}, $q={config.q:g}$"
        axes.loglog(rms.index, rms, **LOOKS[name], lw=2, markevery=(0.05, 0.1), label=f"{label}, root mean square")
    axes.axhline(math.sqrt(2 * D), color=GREY, lw=1, ls=":", label="$\\sqrt{2D}$, FOM's limit")
    axes.axhline(math.sqrt(D), color=GREY, lw=1, ls="--", label="$\\sqrt{D}$, the floor")
    axes.set(xlabel="outer step $k$", ylabel="$|\\nabla M(\\theta_k)|$", title="Convergence (thin lines: single runs)")
    axes.set_ylim(bottom=math.sqrt(D) / 300)


def losses(pair: TwoTaskProblem, theta: Array) -> tuple[Array, Array]:
    """Each task's loss at the end of inner GD from θ, and at θ itself; shapes (2, n)."""
    import torch

    from ufom_runtime.problems.synthetic import synthetic

    problem = synthetic(**pair.parameters)
    assert isinstance(problem.tasks, torch.Tensor)

    def both(x: torch.Tensor, task: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        phi = problem.start(x, task)
        for alpha in problem.alphas:
            phi = phi - alpha * torch.func.grad(problem.inner_loss, argnums=1)(x, phi, task)
        return problem.outer_loss(x, phi, task), problem.outer_loss(x, x, task)

    points = torch.tensor(theta)[:, None]
    end, begin = torch.vmap(lambda task: torch.vmap(lambda x: both(x, task))(points))(problem.tasks)
    return end.numpy(), begin.numpy()


def caption(table: pd.DataFrame, config: Config) -> str:
    """What the figure shows, with its sizes."""
    return (
        f"Theorem 2's counterexample for D = {config.D:g} (r = {config.r}, α = {config.alpha:g}, a = (0.5, 1.5)). "
        "Above: the two tasks; M, the ends of FOM and UFOM and where theory puts them. Below: |∇M(θ_k)|, exact at each "
        f"θ_k; thin lines: {DRAWN} single runs. n = {table.start.nunique()} starts evenly over [{config.low:g}, "
        f"{config.high:g}], one run each, {table.step.max()} outer steps of 10/(k + 100), one task a step. CPU."
    )


study = Study(question, SIZES, measure, judge, draw, caption, answer)
