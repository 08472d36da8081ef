"""FOM, UFOM and the exact gradient side by side: expected progress per cost under the user's outer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufom_theory.checks import Number, UfomError, plain, positive, scalar
from ufom_theory.cost import CostModel
from ufom_theory.laws import (
    Outer,
    Progress,
    fixed_step_decrease,
    fixed_step_fom,
    fixed_step_q,
    fom_second_moment,
    parse_outer,
    quotient,
)
from ufom_theory.power_law import minimiser


@dataclass(frozen=True, eq=False)
class Scores:
    """Expected progress per cost of one outer step, the three in one unit; that unit is of the law.

    Attributes:
        q: the best q of UFOM, at least `q_min`; nan where no q makes expected progress.
        ufom: at that q.
        exact: at q = 1.
        fom: the proxy alone. 0 under a law that speaks of a precision δ → 0, which FOM does not reach: its gradient
            vanishes where ‖∇M‖² = ‖E d‖².
        law: what this rests on, such as "'adam:0.001', a model".
    """

    q: Number
    ufom: Number
    exact: Number
    fom: Number
    law: str


def scores(
    progress: Progress, cost: CostModel, outer: str, batch: int = 1, step: int = 1, q_min: float = 0.05
) -> Scores:
    """Progress per cost of UFOM at its best q, of the exact gradient and of FOM.

    "sgd:γ" and "decay:s:γ₁" (at γ_k of outer step k = `step`): the law of one step, in M's unit; it needs curvatures.
    "tuned": ‖g‖⁴/A_B and FOM's max(⟨g, f⟩, 0)²/(‖f‖² + Var_F/B). "adam:γ": ‖g‖²/√A_B and ⟨g, f⟩/√(‖f‖² + Var_F/B), one
    scale for all coordinates. "paper" and "decay:s" (asymptotic): A_B^(−m).

    Args:
        progress: at one θ; numbers or arrays.
        cost: of one task.
        outer: how the outer steps are taken.
        batch: tasks a step, each with its own coin.
        step: k of "decay:s:γ₁".
        q_min: the least q considered, in (0, 1].

    Raises:
        UfomError: a text outside the grammar, q_min outside (0, 1], missing curvatures for a fixed step.
    """
    chosen, floor = parse_outer(outer), scalar("q_min", q_min, positive)
    if floor > 1:
        raise UfomError(f"q_min = {floor:g} must lie in (0, 1]: it is a probability")
    if takes_fixed_steps(chosen):
        q = np.asarray(fixed_step_q(progress, cost, chosen.rate_at(step), batch, floor))
    else:
        q = np.maximum(_power_q(progress, cost, chosen, batch), floor)
    ours, exact = (ufom_progress(progress, x, chosen, batch, step) for x in (np.where(np.isnan(q), 1.0, q), 1.0))
    law = f"'{chosen}', a {chosen.law}"
    return _scores(q, ours, exact, fom_progress(progress, chosen, batch, step), cost, law)


def takes_fixed_steps(outer: Outer) -> bool:
    """Whether the law of one step with a given γ is the one that holds; it needs curvatures."""
    return outer.rate is not None and outer.kind != "adam"


def ufom_progress(progress: Progress, q: Number, outer: Outer, batch: int = 1, step: int = 1) -> Any:
    """Expected progress of one outer step of UFOM(q), in a unit of the law, which `fom_progress` shares; see `scores`.

    Raises:
        UfomError: q outside (0, 1], batch < 1, missing curvatures for a fixed step.
    """
    if takes_fixed_steps(outer):
        return fixed_step_decrease(progress, q, outer.rate_at(step), batch)
    return _power(outer, progress, progress.second_moment(q, batch))


def fom_progress(progress: Progress, outer: Outer, batch: int = 1, step: int = 1) -> Any:
    """Expected progress of one outer step along the proxy alone, in the unit of `ufom_progress`."""
    if takes_fixed_steps(outer):
        return fixed_step_fom(progress, outer.rate_at(step), batch)
    return _power_fom(outer, progress, batch)


def coordinate_progress(progress: Progress, q: Number, batch: int = 1) -> NDArray[np.float64]:
    """Σ_i g_i²/√A_{B,i}, A_{B,i} = g_i² + (Var_i + (1/q − 1)·D_i²)/B: progress over γ of a step of Adam (a model).

    The curvature is left out. The last axis of the arrays in `progress` holds the coordinates.

    Raises:
        UfomError: q outside (0, 1], batch < 1.
    """
    moment = np.maximum(progress.second_moment(q, batch), 0.0)
    return np.asarray(quotient(progress.gradient_sq, np.sqrt(moment)).sum(-1))


def coordinate_fom(progress: Progress, batch: int = 1) -> NDArray[np.float64]:
    """Σ_i g_i·f_i/√(f_i² + Var_{F,i}/B): the same for the proxy alone; shapes as in `coordinate_progress`."""
    moment = np.maximum(fom_second_moment(progress, batch), 0.0)
    return np.asarray(quotient(progress.cross, np.sqrt(moment)).sum(-1))


def _scores(q: Any, ufom: Any, exact: Any, fom: Any, cost: CostModel, law: str) -> Scores:
    ours = np.asarray(ufom / (cost.c_det + cost.c_rnd * np.where(np.isnan(q), 1.0, q)))
    alone = np.asarray(exact / (cost.c_det + cost.c_rnd))
    q = np.where(ours < alone, 1.0, q)  # below m = 1 the best q may lie under q_min, and q = 1 be the next best
    return Scores(plain(q), plain(np.maximum(ours, alone)), plain(alone), plain(np.asarray(fom / cost.c_det)), law)


def _power_q(p: Progress, cost: CostModel, outer: Outer, batch: int) -> Any:
    """(21) with the moments of the batch, D² and Var + B·‖g‖²."""
    second = np.maximum(p.variance + batch * np.asarray(p.gradient_sq), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        kappa = np.asarray(cost.c_det) / np.asarray(cost.c_rnd)
        rho = np.where(second > 0, p.d2 / second, np.inf)
        gap = np.where(second > 0, (second - p.d2) / second, -np.inf)
    return minimiser(rho, gap, kappa, outer.exponent)


def _power(outer: Outer, p: Progress, second_moment: Any) -> Any:
    gradient_sq, second_moment = np.maximum(p.gradient_sq, 0.0), np.maximum(second_moment, 0.0)
    match outer.kind:
        case "tuned":
            return quotient(gradient_sq**2, second_moment)
        case "adam":
            return quotient(gradient_sq, np.sqrt(second_moment))
        case _:
            return quotient(1.0, second_moment**outer.exponent)


def _power_fom(outer: Outer, p: Progress, batch: int) -> Any:
    moment = fom_second_moment(p, batch)
    match outer.kind:
        case "tuned":
            return quotient(np.maximum(p.cross, 0.0) ** 2, moment)
        case "adam":
            return quotient(p.cross, np.sqrt(np.maximum(moment, 0.0)))
        case _:
            return np.zeros(np.shape(moment))
