"""What the study of the readings computes: times to a precision by the exact recursion, and by simulation at one α."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from studies import optimal_q as fast_enough
from studies.shared.pair import exact_norms, exact_run, simulate
from ufom_theory import CostModel, Moments, Prediction, Sweep, TwoTaskProblem, UfomError, optimal_q

Array = NDArray[np.float64]
DECAYING = {"k^-0.5": 0.5, "k^-0.75": 0.75, "k^-1": 1.0}  # the outer steps' names and their s
TUNED, SAME = "constant, tuned to q", "constant, one for all q"
R = 10
PAPERS_Q, PAPERS_ALPHA = 0.08, 0.01


@dataclass(frozen=True)
class Reading:
    """A reading of (19)–(21).

    Attributes:
        name: what it is called.
        where: D² and V² are suprema over "[−50, 50]" or "ℝ", or taken at "θ*".
        rule: the outer steps that it is made for.
        m: exponent of the time to precision.
        sweep: decides the cost of the correction.
    """

    name: str
    where: str
    rule: str
    m: float
    sweep: Sweep

    @property
    def cost(self) -> CostModel:
        """The cost of one call."""
        return CostModel(r=R, sweep=self.sweep)

    def moments(self, row: Any) -> Moments:
        """D² and V² where this reading takes them, from a row of the table."""
        return Moments(float(row[f"D² {self.where}"]), float(row[f"V² {self.where}"]))

    def predict(self, row: Any) -> Prediction:
        """q* and what follows from it."""
        return optimal_q(self.moments(row), self.cost, self.m)


RECOMPUTED = Sweep.recomputed()
READINGS = (
    Reading("printed", "[−50, 50]", "k^-0.5", 2, RECOMPUTED),
    Reading("printed, over ℝ", "ℝ", "k^-0.5", 2, RECOMPUTED),
    Reading("released", "[−50, 50]", "k^-1", 0.5, Sweep.stored()),
    *(Reading(f"local, {rule}", "θ*", rule, 1 / s, RECOMPUTED) for rule, s in DECAYING.items()),
    Reading(f"local, {TUNED}", "θ*", TUNED, 1, RECOMPUTED),
)


def run_cell(cell: Mapping[str, Any]) -> pd.DataFrame:
    """One α: exactly, with decaying or with constant steps, or by simulation of one rule."""
    pair, row = describe(cell["alpha"])
    delta = min(pair.gradient**2 / 2, cell["largest_delta"])
    if cell["part"] == "simulated":
        table = _simulated(pair, _grid(row, 5), delta, cell)
    elif cell["kind"] == "decaying":
        table = _decaying(pair, _grid(row, cell["points"]), delta)
    else:
        table = _constant(pair, _grid(row, cell["points"]), delta)
    return table.assign(**row, delta=delta)


@cache
def describe(alpha: float) -> tuple[TwoTaskProblem, dict[str, float]]:
    """The pair at one α, and its D² and V² at θ* and over [−50, 50] and ℝ, by name."""
    pair, found = fast_enough.predict(alpha, R)
    # off the quadratic pieces by more than r steps, D² = 0 and V² = ½Σ(a·(A + ½))², its supremum
    reach = pair.A + 1 + abs(pair.b[1]) + R * alpha * max(pair.a) * (pair.A + 1)
    d2, v2 = (float(x.max()) for x in pair.moments(np.linspace(-reach, reach, 200_001)))
    return pair, {
        "D² θ*": found["d2"],
        "V² θ*": found["v2"],
        "D² [−50, 50]": found["sup_d2"],
        "V² [−50, 50]": found["sup_v2"],
        "D² ℝ": d2,
        "V² ℝ": v2,
    }


def _grid(row: Mapping[str, float], points: int) -> Array:
    """0 (FOM), the predicted q*, and q from where A(q) = 2V² at θ* to 1: over the same range of A at every α."""
    rho = row["D² θ*"] / row["V² θ*"]
    predicted = [float(reading.predict(row).q) for reading in READINGS] if points > 5 else []
    return np.unique([0.0, *np.geomspace(rho / (1 + rho), 1, points), *predicted])


def step_size(rule: str, pair: TwoTaskProblem, delta: float) -> Callable[[int], float]:
    """γ_k of a decaying rule."""
    s = DECAYING[rule]
    v2 = float(pair.moments(pair.theta_star)[1])
    horizon = 5 * pair.curvature * v2 / (s * delta)
    return lambda k: 10 / (s * horizon) * (horizon / (k + 100)) ** s


def _decaying(pair: TwoTaskProblem, grid: Array, delta: float) -> pd.DataFrame:
    rules = [step_size(rule, pair, delta) for rule in DECAYING]
    steps = (np.array([[rule(k)] for rule in rules]) for k in count(1))
    return _passages(exact_norms(pair, grid[None], steps), list(DECAYING), pair, grid, delta)


def _constant(pair: TwoTaskProblem, grid: Array, delta: float) -> pd.DataFrame:
    """The noise floor is about γ·L·A(q)/2, L = M'': half of δ or less with the first γ; the others are to be tuned."""
    d2, v2 = (float(x) for x in pair.moments(pair.theta_star))
    moments = Moments(d2, v2)
    largest = (1 / grid[1] - 1) * moments.d2 + moments.v2
    same, most = delta / (pair.curvature * largest), 2.1 * delta / (pair.curvature * moments.v2)
    gammas = np.array([same, *np.geomspace(1.6 * same, most, 24)])[:, None]
    norms = exact_norms(pair, grid[None], (gammas for _ in count()))
    best = (np.stack([each[0], each[1:].min(axis=0)]) for each in norms)
    return _passages(best, [SAME, TUNED], pair, grid, delta)


def _passages(
    norms: Iterator[Array], rules: list[str], pair: TwoTaskProblem, grid: Array, delta: float
) -> pd.DataFrame:
    """First steps with E‖∇M‖² ≤ δ for each rule and q, until every q > 0 has one; and every so often E‖∇M‖²."""
    index = pd.MultiIndex.from_product([rules, grid], names=["rule", "q"])
    drawn = np.isin(grid, [0.0, 1.0, *(float(reading.predict(describe(pair.alpha)[1]).q) for reading in READINGS)])
    drawn &= pair.alpha == PAPERS_ALPHA
    steps, tables, recorded = np.full((len(rules), len(grid)), np.nan), [], 1.0
    limit = 500 * pair.curvature * float(pair.moments(pair.theta_star)[1]) / delta
    for k, now in enumerate(norms, 1):
        steps[np.isnan(steps) & (now <= delta)] = k
        if drawn.any() and k >= recorded:
            curve = pd.DataFrame({"part": "curve", "steps": float(k), "final": now.ravel()}, index)
            tables.append(curve[np.tile(drawn, len(rules))])
            recorded = 1.2 * k
        if k % 16 == 0 and not np.isnan(steps[:, grid > 0]).any():
            break
        if k > limit:
            raise UfomError(f"δ = {delta:g} is not reached at α = {pair.alpha:g} in {k} steps: take a smaller δ")
    tables.append(pd.DataFrame({"part": "exact", "steps": steps.ravel(), "final": now.ravel()}, index))
    return pd.concat(tables).reset_index()


def _simulated(pair: TwoTaskProblem, grid: Array, delta: float, cell: Mapping[str, Any]) -> pd.DataFrame:
    rule = step_size(cell["rule"], pair, delta)
    length, exact = exact_run(pair, grid, delta, rule)
    rng = np.random.default_rng([20260101, list(DECAYING).index(cell["rule"])])
    steps, final = simulate(pair, grid, delta, length, rng, (cell["seeds"], cell["chains"]), rule)
    index = pd.MultiIndex.from_product([grid, range(cell["seeds"])], names=["q", "seed"])
    table = pd.DataFrame({"steps": steps.ravel(), "final": final.ravel()}, index).reset_index()
    return table.assign(exact_final=np.repeat(exact, cell["seeds"]))
