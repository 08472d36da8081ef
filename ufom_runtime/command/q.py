"""`ufom q`: the best q from D² and V², or from the constants of Assumption 1."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ufom_runtime.command.options import ExponentOption, OuterOption
from ufom_runtime.command.plain import json_text
from ufom_theory import (
    AssumptionConstants,
    CostModel,
    Moments,
    Prediction,
    Sweep,
    Truncated,
    UfomError,
    bias_bound,
    bias_bound_printed,
    exponent,
    gradient_bound,
    optimal_q,
    smoothness_bound,
)
from ufom_theory.checks import finite

_LONGEST = 1_000_000  # inner steps of a bound from --constants


def q_command(
    d2: Annotated[float | None, typer.Option(help="Bias D² of the proxy (14).")] = None,
    v2: Annotated[float | None, typer.Option(help="Second moment V² of the exact gradient (16).")] = None,
    r: Annotated[int, typer.Option("-r", help="Inner steps.")] = 10,
    c1: Annotated[float, typer.Option(help="Cost of a gradient.")] = 1.0,
    c2: Annotated[float, typer.Option(help="Cost of a Hessian-vector product.")] = 1.0,
    sweep: Annotated[str, typer.Option(help="stored, recomputed, checkpointed:SLOTS or unrolled.")] = "recomputed",
    proxy: Annotated[int, typer.Option(help="Backward steps K that the proxy keeps; 0 is FOM.")] = 0,
    m: ExponentOption = None,
    outer: OuterOption = None,
    epsilon: Annotated[float | None, typer.Option(help="The paper's ε instead: m = 2/(1 − 2ε).")] = None,
    batch: Annotated[int, typer.Option(help="Tasks an outer step, each with its own coin.")] = 1,
    mean_gradient_sq: Annotated[float | None, typer.Option(help="‖∇M‖², needed for a batch.")] = None,
    constants: Annotated[str | None, typer.Option(help="M1,M2,L1,L2,L3 of Assumption 1, instead of D² and V².")] = None,
    alpha: Annotated[
        str | None, typer.Option(help="With --constants: the inner step size, or r of them as 0.1,0.05.")
    ] = None,
    theta_in_losses: Annotated[
        bool, typer.Option(help="With --constants: whether a loss contains θ (in MAML none).")
    ] = True,
    d2_sem: Annotated[float, typer.Option(help="Standard error of D², for the interval.")] = 0.0,
    v2_sem: Annotated[float, typer.Option(help="Standard error of V², for the interval.")] = 0.0,
    plot: Annotated[Path | None, typer.Option(help="Draw the time curve into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The q that reaches a given precision soonest, from two numbers.

    They are D² and V², or follow from the constants of Assumption 1.
    """
    if epsilon is not None:
        if m is not None or outer is not None:
            raise UfomError("--m, --outer and --epsilon each set the exponent: give one of them")
        m = exponent(epsilon)
    if mean_gradient_sq is not None and batch == 1:
        raise UfomError("--mean-gradient-sq is used for a batch alone: give --batch, or leave it out")
    bounds: dict[str, float] = {}
    if constants is not None and d2 is None and v2 is None:
        bounds = _bounds(constants, alpha, r, proxy, theta_in_losses)
        d2, v2 = bounds["D_tight"] ** 2, bounds["V_bound"] ** 2
    elif constants is not None or d2 is None or v2 is None:
        raise UfomError("give either --d2 and --v2, or --constants M1,M2,L1,L2,L3 with --alpha")
    elif alpha is not None or not theta_in_losses:
        raise UfomError("--alpha and --no-theta-in-losses go with --constants: leave them out")
    cost = CostModel(r=r, c1=c1, c2=c2, sweep=Sweep.parse(sweep), proxy=Truncated(proxy))
    for name, sem in (("--d2-sem", d2_sem), ("--v2-sem", v2_sem)):
        finite(name, sem, "≥ 0: it is a standard error", 0.0)
    cov = np.diag(np.square([d2_sem, v2_sem]))
    prediction = optimal_q(Moments(d2, v2, cov, mean_gradient_sq=mean_gradient_sq), cost, m, outer, batch)
    if plot is not None:
        from ufom_runtime.command.time_curve import save_time_curve

        save_time_curve(prediction, plot)
    report = {**as_dict(prediction), **bounds}
    if as_json:
        print(json_text(report))
    else:
        from ufom_runtime.command.printing import print_prediction

        print_prediction(report)


def as_dict(p: Prediction) -> dict[str, Any]:
    """A prediction of plain floats as a flat dictionary, the same in tables and in JSON."""
    return {
        "q": p.q,
        "interval": list(p.interval),
        "speedup_over_exact": p.speedup_over_exact,
        "cost_over_fom": p.cost_over_fom,
        "condition_20": bool(p.condition_margin > 0),
        "pays": p.pays,
        "why": p.why,
        "d2": p.moments.d2,
        "v2": p.moments.v2,
        "r": p.cost.r,
        "c_det": p.cost.c_det,
        "c_rnd": p.cost.c_rnd,
        "sweep": str(p.cost.sweep),
        "proxy": p.cost.proxy.steps,
        "m": p.m,
        "law": p.law,
        "dq_dd2": p.dq_dd2,
        "dq_dv2": p.dq_dv2,
    }


def _bounds(text: str, alpha: str | None, r: int, proxy: int, theta_in_losses: bool) -> dict[str, float]:
    try:
        values = [float(x) for x in text.split(",")]
    except ValueError as error:
        raise UfomError(f"--constants {text!r}: five numbers M1,M2,L1,L2,L3 with commas between") from error
    if len(values) != 5:
        raise UfomError(f"--constants {text!r} holds {len(values)} numbers: five are needed, M1,M2,L1,L2,L3")
    if alpha is None:
        raise UfomError("--constants needs the inner step size: give --alpha")
    if not 1 <= r <= _LONGEST:
        raise UfomError(
            f"r, the number of inner steps, = {r} must be at least 1 and, with --constants, at most {_LONGEST:,}: the "
            "bounds are products over all steps; give --d2 and --v2 for a longer loop"
        )
    assumed, steps = AssumptionConstants(*values), _step_sizes(alpha, r)
    return {
        "D_tight": bias_bound(assumed, steps, Truncated(proxy), theta_in_losses),
        "D_printed_15": bias_bound_printed(assumed, steps),
        "V_bound": gradient_bound(assumed, steps, theta_in_losses),
        "L_M": smoothness_bound(assumed, steps, theta_in_losses),
    }


def _step_sizes(text: str, r: int) -> np.ndarray:
    try:
        given = np.array([float(x) for x in text.split(",")])
    except ValueError as error:
        raise UfomError(f"--alpha {text!r}: give one number, or {r} with commas between") from error
    if len(given) not in (1, r):
        raise UfomError(
            f"--alpha {text!r} holds {len(given)} step sizes and r = {r}: give one, or {r}, or -r {len(given)}"
        )
    return given.repeat(r) if len(given) == 1 else given
