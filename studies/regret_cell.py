"""A setting of the study of regret: its precisions, and the runs of all that `compare` could have said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studies.regret_lanes import Candidate, Charge, Curves, run_lanes
from studies.regret_problems import Made, make
from ufom_runtime import AdaptiveUFOM
from ufom_runtime.measure.candidates import QS
from ufom_theory import Sweep, Truncated
from ufom_theory.laws import parse_outer

Array = NDArray[np.float64]
LEVELS = ("coarse", "fine")
LEAST = QS[0]  # the smallest q that `compare` recommends
PILOT = 1_000_001  # the seed of what is found out before the runs
LAST = 0.75  # M "at equal calls" is its mean over the calls from this share of the budget on
STEP_RULE, PAPER_RULE = "law of one step", "the paper's rule"


@dataclass(frozen=True)
class Setting:
    """A problem and how it is run: a cell of the study.

    Attributes:
        name: in tables and figures.
        problem: one of `regret_problems.MAKERS`.
        outer: as `compare` and `train` take it.
        steps: of the exact gradient, whose calls are the budget of every run.
        levels: the coarse precision of M, to which FOM comes with a quarter of the budget, and the fine one, below
            FOM's floor where it has one; by `levels`, with seeds that no other run has.
        horizons: the steps of the exact gradient to each of them, by the same runs.
        arguments: of the problem's maker.
        batch: tasks a step, each with its own coin.
        proxy: K of the proxy that is called FOM.
        chains: runs of each seed, over which M is averaged.
    """

    name: str
    problem: str
    outer: str
    steps: int
    levels: tuple[float, float] = (0.0, 0.0)
    horizons: tuple[int, int] = (1, 1)
    arguments: dict[str, Any] = field(default_factory=dict)
    batch: int = 4
    proxy: int = 0
    chains: int = 1

    @property
    def every(self) -> int:
        """Outer steps between two evaluations."""
        return max(1, self.steps // 30)

    def make(self) -> Made:
        """The problem."""
        return make(self.problem, self.arguments, self.proxy)

    def run(self, made: Made, kinds: Sequence[Candidate | AdaptiveUFOM], seeds: Sequence[int]) -> Curves:
        """All of these, side by side, until the budget is spent."""
        budget = self.steps * Charge.of(made, self.batch).exact
        outer = parse_outer(self.outer)
        return run_lanes(made, kinds, outer, self.batch, seeds, self.chains, budget, self.every)


def levels(setting: Setting) -> tuple[tuple[float, float], tuple[int, int]]:
    """The precisions and horizons of a setting, from runs of FOM and the exact gradient with seeds of their own.

    The fine precision is halfway, in the logarithm, from FOM's floor to the least M of the exact gradient. Where that
    is neither 5 % lower nor 5 % farther from the start, FOM has no floor here: then the fine precision is what FOM
    comes to with three quarters of its budget.
    """
    made = setting.make()
    curves = setting.run(made, (Candidate(0.0), Candidate(1.0)), range(PILOT, PILOT + 4))
    fom, exact = (smooth(x[:, ~np.isnan(x).any(0)].mean(0)) for x in curves.loss)
    floor, least = float(fom.min()), float(exact.min())
    coarse = float(fom[len(fom) // 4])
    deeper = least < 0.95 * floor or curves.loss[1, 0, 0] - least > 1.05 * (curves.loss[1, 0, 0] - floor)
    fine = (floor * least) ** 0.5 if deeper else float(fom[3 * len(fom) // 4])
    found = [float(f"{x:.3g}") for x in (coarse, fine)]
    at = [steps_to(x, exact, setting.every) for x in found]
    return (found[0], found[1]), tuple(setting.steps if np.isnan(x) else max(1, round(x)) for x in at)  # type: ignore[return-value]


def smooth(loss: Array) -> Array:
    """The mean over three neighbouring evaluations; the ends over two."""
    padded = np.concatenate([loss[:1] * np.nan, loss, loss[:1] * np.nan])
    return np.asarray(np.nanmean([padded[:-2], padded[1:-1], padded[2:]], axis=0))


def steps_to(level: float, loss: Array, every: int) -> float:
    """The step at which M, evaluated every few steps from 0 on, first falls to a level; nan where it does not.

    Between two evaluations its logarithm is taken to be linear.
    """
    below = np.flatnonzero(loss <= level)
    if not len(below):
        return float("nan")
    if (i := int(below[0])) == 0:
        return 0.0
    before, after = np.log(np.maximum(loss[i - 1 : i + 1], np.finfo(float).tiny))
    return every * float(i - 1 + (before - np.log(level)) / (before - after))


def run(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a seed of each candidate, and of the rules where they are asked for.

    Columns: name, q, until; seed; steps_coarse and steps_fine, nan where not reached; calls_coarse, calls_fine; loss,
    M at equal calls; budget, the calls; steps_most, the steps that it paid for.
    """
    setting = Setting(**cell["setting"])
    made = setting.make()
    charge, seeds = Charge.of(made, setting.batch), list(range(cell["seeds"]))
    kinds = [Candidate(q, until) for q, until in cell["candidates"]]
    k, stored = Truncated(setting.proxy), Sweep.stored()
    rules = {
        STEP_RULE: AdaptiveUFOM(law="step", outer=setting.outer, sweep=stored, proxy=k),
        PAPER_RULE: AdaptiveUFOM(sweep=stored, proxy=k),
    }
    rules = rules if cell["rules"] else {}
    curves = setting.run(made, (*kinds, *rules.values()), seeds)
    names, rows = [*(kind.name for kind in kinds), *rules], []
    for i, name in enumerate(names):
        for seed in seeds:
            row: dict[str, Any] = {"candidate": name, "rule": i >= len(kinds), "seed": seed}
            ends = ~np.isnan(curves.loss[i, seed])
            loss, calls = curves.loss[i, seed][ends], curves.calls[i, seed][ends]
            late = calls >= LAST * setting.steps * charge.exact
            row["loss"] = float(loss[late].mean()) if np.isfinite(loss).all() else float("inf")
            row |= {"budget": setting.steps * charge.exact, "steps_most": setting.every * (len(loss) - 1)}
            for level, precision in zip(LEVELS, setting.levels, strict=True):
                steps = steps_to(precision, smooth(loss), setting.every)
                row[f"steps_{level}"] = steps
                row[f"calls_{level}"] = float(np.interp(steps, setting.every * np.arange(len(calls)), calls))
            if i < len(kinds):
                row |= {"q": kinds[i].q, "until": kinds[i].until}
            rows.append(row)
    return rows
