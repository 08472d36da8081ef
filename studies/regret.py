"""What does running the predicted q cost, off the toy? Quadratics in 50 dimensions, hypercleaning, few-shot Omniglot.

Regret is the time to a precision at the q that a reading of the theory asks for, over that at the best q of a grid. A
reading says where D² and V² are taken and with which exponent m; all were fixed before the run. Outer SGD takes
γ_k = γ·k0/(k + k0), the same for every q. Time is charged with the recomputed sweep, in function calls as the paper
does and in seconds by the measured C1 and C2 (their ratio is what matters); the gradients, the same ones, are computed
with the stored sweep.

A pilot run at q = 1, on a separate seed, gives the moments at its start, along it and at its end, and the precision
δ: where it ends (the geometric mean of its last quarter). For quadratics E‖∇M(θ_k)‖² is known exactly, over tasks and
coins, and a seed is a start; for hypercleaning ‖∇M(θ_k)‖² is an exact sum, of one run; for few-shot the precision is
M(θ_k) on fixed tasks. Between two evaluations the time is interpolated in the precision's logarithm. Every q has the
same budget of function calls; a run that ends it above δ is charged the budget, the least that it takes.

The proxy alone (q = 0) is run beside and reported apart. On these quadratics it is not biased where it stops: all tasks
share H, so its stationary point is M's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.engine.study import Progress, Study, of_table, silent
from studies.engine.sweep import Store
from studies.regret_cell import READINGS, VERSION, Setting, pilot, run
from studies.shared.drawing import plain_number, shades
from studies.shared.training import missing
from studies.shared.verdicts import TOLERATED, Verdict, halves, log_regret
from ufom_runtime.command.style import GREY, LOOKS, WIDTH
from ufom_runtime.problems.data import mnist, omniglot
from ufom_theory import CostModel, Truncated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


UNITS = ("calls", "seconds")
ALWAYS = "q = 1"  # what running the exact gradient would have lost
COLUMNS = 3  # of the figure's panels, a problem each
LOADERS: dict[str, Callable[[], object]] = {"mnist-hypercleaning": mnist, "omniglot": omniglot}
question = "How much time is lost by running the predicted q on problems other than the paper's pair?"


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        settings: the problems.
        grid: values of q; each reading's own, half of the smallest of these, 0 (the proxy alone) and 1 are added.
        seeds: independent repetitions; even ones choose the rival, odd ones judge.
        budget: function calls of each run, over the pilot's.
    """

    settings: tuple[Setting, ...]
    grid: tuple[float, ...]
    seeds: int = 8
    budget: float = 2.0


def _quadratic(alpha: float, steps: int) -> Setting:
    arguments = {"dim": 50, "alpha": alpha}
    return Setting(f"quadratic, α = {alpha:g}", "quadratic", arguments, gamma=0.1, delay=100, steps=steps)


_CLEANING = Setting(
    "hypercleaning, digits", "digits-hypercleaning", {"n_train": 200, "n_validation": 200, "hidden": 16, "r": 20},
    gamma=30.0, delay=100, steps=100, every=5, proxy=5,
)  # fmt: skip
_TINY_CLEANING = replace(_CLEANING, arguments={**_CLEANING.arguments, "r": 10}, proxy=3, steps=10, every=2)
_OMNIGLOT = Setting(
    "few-shot, Omniglot", "omniglot", {"ways": 5, "filters": 16, "alpha": 0.05},
    gamma=0.2, delay=100, steps=32, every=4, batch=4, tasks=16,
)  # fmt: skip
SIZES = {
    "quick": Config(
        settings=(_quadratic(0.02, 200), _TINY_CLEANING),
        grid=(0.1,),
        seeds=4,
        budget=2.0,
    ),
    "standard": Config(
        settings=(_quadratic(0.005, 2000), _quadratic(0.02, 2000), _quadratic(0.05, 2000), _CLEANING, _OMNIGLOT),
        grid=(0.06, 0.12, 0.24, 0.5),
    ),
    "paper": Config(
        settings=(
            *(_quadratic(alpha, 20_000) for alpha in (0.005, 0.01, 0.02, 0.03, 0.05)),
            Setting(
                "hypercleaning, MNIST", "mnist-hypercleaning", {"device": "cuda"},
                gamma=300.0, delay=100, steps=1000, every=10, proxy=20,
            ),
            Setting(
                "few-shot, Omniglot", "omniglot", {"ways": 20, "filters": 64, "device": "cuda"},
                gamma=0.1, delay=1000, steps=2000, every=50, batch=8, tasks=256,
            ),
        ),
        grid=(0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7),
        seeds=16,
    ),
}  # fmt: skip


def measure(config: Config, store: Store, progress: Progress = silent) -> pd.DataFrame:
    """One row for each problem, q and seed; a problem whose data are missing has one row, and a warning, that say so.

    Columns: name, q (0: the proxy alone), seed; steps to δ, or those that the budget allows where reached is False;
    calls and seconds, what these steps are charged; ended, the error of a run that diverged; device; r, proxy, batch,
    delta, c1 and c2 in seconds; for each reading its q, D² and V² in "q: …", "d2: …", "v2: …"; skipped, a reason.
    """
    base, skipped, pilots = {"study": "regret", "version": VERSION}, [], []
    for setting in config.settings:
        if reason := missing(LOADERS.get(setting.problem, lambda: None)):
            warnings.warn(f"{setting.name} is left out: {reason}", stacklevel=2)
            skipped.append({"name": setting.name, "skipped": reason})
        else:
            device = setting.arguments.get("device", "cpu")
            pilots.append({**base, "part": "pilot", "setting": asdict(setting), "device": device})
    store.run(pilots, pilot, progress=lambda share: progress(0.1 * share))
    found = [store.table([cell]).iloc[0] for cell in pilots]
    cells = [
        {**cell, "part": "run", "q": q, "delta": f.delta, "seeds": config.seeds, "budget": config.budget}
        for cell, f in zip(pilots, found, strict=True)
        for q in _grid(config.grid, [f[f"q: {reading}"] for reading in READINGS])
    ]
    store.run(cells, run, progress=lambda share: progress(0.1 + 0.9 * share))
    columns = ["name", "q", "seed", "steps", "reached", "ended"]
    if not cells:
        return pd.DataFrame(skipped, columns=[*columns, "skipped"])
    runs = store.table(cells)[columns]
    table = runs.merge(pd.DataFrame(found).drop(columns=[*base, "part", "setting"]), on="name")
    for unit, c1, c2 in (("calls", 1.0, 1.0), ("seconds", table.c1, table.c2)):
        costs = [
            CostModel(r=r, proxy=Truncated(k), c1=x, c2=y, as_printed=True)
            for r, k, x, y in np.broadcast(table.r, table.proxy, c1, c2)
        ]
        table[unit] = [
            steps * batch * (cost.c_det + q * cost.c_rnd)
            for steps, batch, q, cost in zip(table.steps, table.batch, table.q, costs, strict=True)
        ]
    return pd.concat([table, pd.DataFrame(skipped)], ignore_index=True)


def _grid(grid: tuple[float, ...], predicted: list[float]) -> list[float]:
    """Every q that is run, ascending: also one below all that are predicted, so that the best is not at the edge."""
    return sorted({0.0, 1.0, *grid, *predicted, min(predicted) / 2})


def judge(table: pd.DataFrame) -> list[Verdict]:
    """For each problem, unit of time and reading: is its q within 5 % of the best of the grid, on held-out seeds?

    The rival is the fastest q on the even seeds. Where it is the smallest of the grid, the true best may be faster
    still: a "no" stands, a "yes" does not. Where a run at the rival ended above δ, its time is not known.
    """
    return [verdict for _, verdict in _judged(table)]


def regrets(table: pd.DataFrame) -> pd.DataFrame:
    """The verdicts as a table of factors: one row a problem, unit and strategy, a reading or q = 1.

    Columns: name, unit, strategy, q, best (the rival q), regret (time over the rival's), low, high (95 %), agrees,
    least (the run ended above δ at a seed, so the regret is at least this).
    """
    rows = []
    for key, v in _judged(table, (ALWAYS,)):
        low, high = (math.exp(v.measured + sign * v.tolerance) for sign in (-1, 1))
        rows.append({**key, "regret": math.exp(v.measured), "low": low, "high": high, "agrees": v.agrees})
    return pd.DataFrame(rows)


def _judged(table: pd.DataFrame, besides: tuple[str, ...] = ()) -> Iterator[tuple[dict[str, Any], Verdict]]:
    for name, runs in _measured(table).groupby("name", sort=False):
        ours, strategies = (
            runs[runs.q > 0],
            {r: runs[f"q: {r}"].iloc[0] for r in READINGS} | dict.fromkeys(besides, 1.0),
        )
        reached = halves(ours)[1].groupby("q").reached.all()
        for unit in UNITS:
            logs = np.log(ours.pivot(index="seed", columns="q", values=unit))
            for strategy, q in strategies.items():
                subject = f"log-time regret in {unit} of {strategy} (q = {q:.3g}), {name}"
                verdict, best, at_the_edge = log_regret(subject, logs, q)
                if not reached[best] or (verdict.agrees == "yes" and at_the_edge):
                    verdict = replace(verdict, agrees="inconclusive")
                key = {"name": name, "unit": unit, "strategy": strategy, "q": q, "best": best, "least": not reached[q]}
                yield key, verdict


def _measured(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of problems that were run; a stored table has nan where a problem was not left out."""
    return table[table.q.notna()].astype({"reached": bool, "seed": int})


def draw(table: pd.DataFrame) -> Figure:
    """Above, the regret of each reading on each problem; below, for each problem the time over q."""
    from matplotlib.figure import Figure as NewFigure

    names = list(_measured(table).name.unique())
    rows = [names[i : i + COLUMNS] for i in range(0, len(names), COLUMNS)]
    below = [row + ["."] * (COLUMNS - len(row)) for row in rows]
    figure = NewFigure(figsize=(WIDTH, 3.5 + 2.3 * len(rows)))
    axes = figure.subplot_mosaic([["regret"] * COLUMNS, *below], height_ratios=(1.3, *[1] * len(rows)))
    _draw_regrets(axes["regret"], regrets(table), names)
    for name in names:
        _draw_times(axes[name], table[table.name == name])
        axes[name].set_title(name)
    for first, *_ in rows:
        axes[first].set_ylabel("calls to $\\delta$, over the best")
    handles, labels = axes["regret"].get_legend_handles_labels()
    title = "exponent $m$ of the reading, and where it takes $D^2$ and $V^2$"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), title=title)
    return figure


def _draw_regrets(axes: Axes, found: pd.DataFrame, names: list[str]) -> None:
    strategies = list(found.strategy.unique())
    colours = dict(zip(READINGS, shades(len(READINGS)), strict=True)) | {ALWAYS: LOOKS["exact"]["color"]}
    for i, strategy in enumerate(strategies):
        colour, reached = colours[strategy], LOOKS["exact"]["marker"] if strategy == ALWAYS else "o"
        for unit, shift, filled in (("calls", -0.03, True), ("seconds", 0.03, False)):
            rows = found[(found.strategy == strategy) & (found.unit == unit)]
            x = rows.name.map(names.index) + 0.17 * (i - (len(strategies) - 1) / 2) + shift
            axes.errorbar(
                x, rows.regret, yerr=(rows.regret - rows.low, rows.high - rows.regret), fmt="none", ecolor=colour, lw=1
            )
            for least, marker in ((False, reached), (True, "$↑$")):
                some = rows.least == least
                axes.plot(
                    x[some], rows.regret[some], ls="", marker=marker, color=colour, ms=6,
                    mfc=colour if filled else "white", label=strategy if filled and not least else None,
                )  # fmt: skip
    axes.axhline(1, color=GREY, lw=0.8)
    axes.axhline(TOLERATED, color=GREY, lw=0.8, ls=":")
    top = min(found.high.max(), 2 * found.regret.max())  # an interval of two seeds would hide all else
    axes.set_yscale("log")
    axes.set_ylim(0.9 * max(min(found.low.min(), 1), 0.7 * min(found.regret.min(), 1)), 1.1 * top)
    axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    axes.set(xlim=(-0.5, len(names) - 0.5), ylabel="time at the predicted $q$, over the best")
    axes.set_title("Regret in function calls (filled) and seconds (hollow)")
    _plain(axes.yaxis)


def _draw_times(axes: Axes, runs: pd.DataFrame) -> None:
    logs = np.log(_measured(runs).query("q > 0").pivot(index="seed", columns="q", values="calls"))
    relative = logs.sub(logs[logs.mean().idxmin()], axis=0)
    mean, sem = np.exp(relative.mean()), relative.sem()
    axes.errorbar(mean.index, mean, yerr=1.96 * mean * sem, fmt="o-", color=LOOKS["UFOM"]["color"], ms=3, lw=0.8)
    for i, (reading, colour) in enumerate(zip(READINGS, shades(len(READINGS)), strict=True)):
        q = runs[f"q: {reading}"].iloc[0]
        axes.axvline(q, color=colour, lw=0.8, ls="--")
        axes.plot(q, 0.96 - 0.07 * i, "o", color=colour, ms=5, transform=axes.get_xaxis_transform())  # equal q are seen
    axes.set(xscale="log", yscale="log", xlabel="probability $q$")
    _plain(axes.xaxis)
    _plain(axes.yaxis)


def _plain(axis: Axis) -> None:
    """Plain numbers: at 1, 2, 5 on a long axis, evenly on a short one."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 5 else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(plain_number)


def caption(table: pd.DataFrame) -> str:
    """What the figure shows, with its sizes; and how the proxy alone fared."""
    runs, best = _measured(table), regrets(table).query("unit == 'calls'").groupby("name").best.first()
    alone = []
    for name, group in runs.groupby("name", sort=False):
        fom, rival = group[group.q == 0], group[group.q == best[name]]
        ratio = math.exp(np.log(fom.calls.to_numpy() / rival.calls.to_numpy()).mean())
        alone.append(f"{name} {fom.reached.sum()} of {len(fom)} ({ratio:.2g}×)")
    skipped = "".join(f" {row['name']} was left out: {row.skipped}." for _, row in _skipped(table).iterrows())
    return (
        "Above: time to the precision δ at the q of each reading (and at q = 1) over that at the best q of the grid, "
        "which the even seeds chose, on the odd seeds, with 95 % t-intervals of the paired logarithms; dotted: 1.05; "
        "↑: a run ended above δ, the regret is at least this. Below: function calls over q, all seeds; dashed, with "
        f"its mark: the q of each reading. Charged with the recomputed sweep. {runs.seed.nunique()} seeds; "
        + "; ".join(f"{name}: r = {g.r.iloc[0]:g}, K = {g.proxy.iloc[0]:g}, batch {g.batch.iloc[0]:g}, "
                    f"δ = {g.delta.iloc[0]:.3g}" for name, g in runs.groupby("name", sort=False))
        + f". Seeds at which the proxy alone (q = 0) came to δ (its calls over the best q's): {'; '.join(alone)}. "
        + ", ".join(sorted(runs.device.unique())).upper() + "."
        + skipped
    )  # fmt: skip


def answer(table: pd.DataFrame) -> str:
    """The answer in a sentence: the reading whose greatest regret is least, and what the others lose."""
    found = regrets(table).query("unit == 'calls' and strategy != @ALWAYS")
    worst = found.loc[found.groupby("strategy").regret.idxmax()].sort_values("regret")
    counts = pd.crosstab(found.strategy, found.agrees).reindex(columns=["yes", "no", "inconclusive"], fill_value=0)
    each = [
        f"{row.strategy}: at most {row.regret:.2f}× the best ({row['name']}); within 5 %: "
        + ", ".join(f"{word} {n}" for word, n in counts.loc[row.strategy].items())
        for _, row in worst.iterrows()
    ]
    left_out = ", ".join(_skipped(table).name)
    return f"Greatest regret in function calls, by reading. {'. '.join(each)}." + (
        f" Left out: {left_out}." if left_out else ""
    )


def _skipped(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.q.isna()]


study = Study(
    question=question,
    sizes=SIZES,
    measure=measure,
    judge=of_table(judge),
    draw=of_table(draw),
    caption=of_table(caption),
    answer=of_table(answer),
)
