"""Bounds from the constants of Assumption 1. Derived in `derivations/bias_bound.py`, `smoothness.py`, `convergence.py`.

Where no loss contains θ (MAML, Theorem 2's problem) pass `theta_in_losses=False`: 1 + M1 then becomes M1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufom_theory.checks import UfomError, finite, instance, positive, scalar
from ufom_theory.cost import CostModel, Truncated
from ufom_theory.quantities import AssumptionConstants, Moments


def _factors(
    constants: AssumptionConstants, step_sizes: ArrayLike, effective: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """α_j and 1 + α_j·L, L = L_eff or L2."""
    instance("constants", constants, AssumptionConstants, "write AssumptionConstants(M1, M2, L1, L2, L3)")
    curvature = effective_curvature(constants) if effective else constants.L2
    alphas = np.asarray(positive("step size α_j", step_sizes))
    if alphas.ndim != 1:
        raise UfomError(f"step sizes have shape {alphas.shape}, but α_1 … α_r are one vector of shape (r,)")
    with np.errstate(over="ignore"):
        return alphas, 1 + alphas * curvature


def _reach(constants: AssumptionConstants, theta_in_losses: bool) -> float:
    instance("constants", constants, AssumptionConstants, "write AssumptionConstants(M1, M2, L1, L2, L3)")
    instance("theta_in_losses", theta_in_losses, bool, "write True or False")
    return constants.M1 + (1 if theta_in_losses else 0)


_GROWTH = "(1 + α·L2)^r is too large for a bound to mean anything"
_UNITS = "its arguments are too large, or ε, δ or the steps too small, for a bound to mean anything"


def _representable(name: str, value: float, why: str = _GROWTH) -> float:
    if not math.isfinite(value):
        raise UfomError(f"{name} exceeds floating point: {why}")
    return float(value)


def effective_curvature(constants: AssumptionConstants) -> float:
    """L_eff = min(L2, √(2·L1·L3)): a bound of every inner Hessian block. A bounded slope bounds the curvature, too."""
    return min(constants.L2, math.sqrt(2) * math.sqrt(constants.L1) * math.sqrt(constants.L3))


def bias_bound(
    constants: AssumptionConstants,
    step_sizes: ArrayLike,
    proxy: Truncated | None = None,
    theta_in_losses: bool = True,
) -> float:
    """The least D_bound: D = (1 + M1)·L1·(P − ∏_{j>r−K}(1 + α_j·L_eff)), P the product over all j; K = 0 is FOM.

    L_eff = min(L2, √(2·L1·L3)), see `effective_curvature`.

    Args:
        constants: Assumption 1.
        step_sizes: α_1 … α_r, shape (r,).
        proxy: truncation length K; None is FOM.
        theta_in_losses: False where no loss contains θ.

    Returns:
        A bound of ‖G_proxy − G‖ (its square bounds D²), attained for all constants by
        `derivations.bias_bound.sharp_problem`.

    Raises:
        UfomError: a step size that is not > 0, K > r, or a bound beyond floating point.
    """
    alphas, factors = _factors(constants, step_sizes)
    proxy = proxy if proxy is not None else Truncated(0)
    instance("proxy", proxy, Truncated, "write Truncated(K), K = 0 for FOM")
    proxy.refuse_beyond(len(factors))
    split = len(factors) - proxy.steps
    with np.errstate(over="ignore", invalid="ignore"):
        growth = np.expm1(
            np.log1p(alphas[:split] * effective_curvature(constants)).sum()
        )  # ∏ − 1, without cancellation
        value = _reach(constants, theta_in_losses) * constants.L1 * growth * np.prod(factors[split:])
    return _representable("D_bound", value)


def bias_bound_printed(constants: AssumptionConstants, step_sizes: ArrayLike) -> float:
    """D_bound as the paper prints it, (15): (1 + M1)·L1·L2·Σ_j α_j·∏_{j'≥j}(1 + α_{j'}·L2).

    Its product starts at j where the proof needs j + 1, and it leaves out that L1 and L3 bound the curvature, too. It
    is larger than `bias_bound` by a factor 1 + min(α)·L2 or more.

    Args:
        constants: Assumption 1.
        step_sizes: α_1 … α_r, shape (r,).

    Raises:
        UfomError: a step size that is not > 0, or a bound beyond floating point.
    """
    alphas, factors = _factors(constants, step_sizes, effective=False)
    with np.errstate(over="ignore", invalid="ignore"):
        tails = np.cumprod(factors[::-1])[::-1]
        value = (1 + constants.M1) * constants.L1 * constants.L2 * np.sum(alphas * tails)
    return _representable("D_bound (15)", value)


def gradient_bound(constants: AssumptionConstants, step_sizes: ArrayLike, theta_in_losses: bool = True) -> float:
    """V_bound = (1 + M1)·L1·P: a bound of ‖G‖ (its square bounds V²), P the product of all 1 + α_j·L_eff.

    Args:
        constants: Assumption 1.
        step_sizes: α_1 … α_r, shape (r,).
        theta_in_losses: False where no loss contains θ.

    Raises:
        UfomError: a step size that is not > 0, or a bound beyond floating point.
    """
    _, factors = _factors(constants, step_sizes)
    with np.errstate(over="ignore", invalid="ignore"):
        value = _reach(constants, theta_in_losses) * constants.L1 * np.prod(factors)
    return _representable("V_bound", float(value))


def smoothness_bound(constants: AssumptionConstants, step_sizes: ArrayLike, theta_in_losses: bool = True) -> float:
    """L_M = M2·L1·P + (1 + M1)²·P·[L2·P + L1·L3·Σ_j α_j·P_{j−1}/(1 + α_j·L_eff)]: a Lipschitz constant of ∇M.

    P_j = ∏_{i≤j}(1 + α_i·L_eff), P = P_r; the bare L2 is L_out's. Added here: see `derivations/smoothness.py`.

    Args:
        constants: Assumption 1.
        step_sizes: α_1 … α_r, shape (r,).
        theta_in_losses: False where no loss contains θ.

    Raises:
        UfomError: a step size that is not > 0, or a bound beyond floating point.
    """
    alphas, factors = _factors(constants, step_sizes)
    c, reach = constants, _reach(constants, theta_in_losses)
    with np.errstate(over="ignore", invalid="ignore"):
        products = np.cumprod(factors)
        spread = np.sum(alphas * (products / factors) / factors)
        bracket = c.L2 * products[-1] + c.L1 * c.L3 * spread
        value = products[-1] * (c.M2 * c.L1 + reach * reach * bracket)
    return _representable("L_M", float(value))


def rate_bound(gap: float, smoothness: float, second_moment: float, outer_steps: ArrayLike) -> float:
    """[Δ + ½·L_M·A·Σγ²]/Σγ, a bound of min_{u<τ} E‖∇M(θ_u)‖² for any outer step sizes (Theorem 1).

    Args:
        gap: Δ = M(θ_0) − M_*, ≥ 0.
        smoothness: L_M ≥ 0.
        second_moment: A(q) = (1/q − 1)·D² + V² ≥ 0.
        outer_steps: γ_1 … γ_τ, shape (τ,).

    Raises:
        UfomError: a value out of range, an array where one number is meant, or a bound beyond floating point.
    """
    gamma = np.atleast_1d(positive("outer step size γ_k", outer_steps))
    gap, smoothness = scalar("Δ", gap, finite, "≥ 0", 0.0), scalar("L_M", smoothness, finite, "≥ 0", 0.0)
    second_moment = scalar("A", second_moment, finite, "≥ 0", 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.float64(gap) / gamma.sum() + np.float64(smoothness) * second_moment / 2 * (
            np.sum(gamma**2) / gamma.sum()
        )
    return _representable("the rate bound", value, _UNITS)


def rate_constant(gap: float, smoothness: float, v2: float, epsilon: float) -> float:
    """H(ε), the constant that (18) hides: min E‖∇M‖² ≤ A(q)·H(ε)·τ^(−1/2+ε) for γ_k = k^(−1/2).

    H = ½[(1 + √2)·Δ/V² + (L_M/2)·(e^(ε−1)/ε + √2·e^(ε−1/2)/(ε + 1/2))]. It does not depend on q, and grows as 1/ε:
    at ε = 0 it gives no constant.

    Args:
        gap: Δ = M(θ_0) − M_*, ≥ 0.
        smoothness: L_M, ≥ 0.
        v2: V², > 0.
        epsilon: ε in (0, 0.5).

    Raises:
        UfomError: ε outside (0, 0.5), V² ≤ 0, a negative Δ or L_M, an array, or a constant beyond floating point.
    """
    epsilon = scalar("ε", epsilon)
    if not 0 < epsilon < 0.5:
        raise UfomError(f"ε = {epsilon:g} must lie in (0, 0.5): the constant of (18) grows as 1/ε")
    gap, smoothness = scalar("Δ", gap, finite, "≥ 0", 0.0), scalar("L_M", smoothness, finite, "≥ 0", 0.0)
    v2 = scalar("V²", v2, positive)
    with np.errstate(over="ignore"):
        noise = sum(weight * math.exp(p - 1) / p for weight, p in ((1, epsilon), (math.sqrt(2), epsilon + 0.5)))
        value = ((1 + math.sqrt(2)) * np.float64(gap) / v2 + np.float64(smoothness) / 2 * noise) / 2
    return _representable("H(ε)", value, _UNITS)


def time_bound(
    moments: Moments, cost: CostModel, q: float, gap: float, smoothness: float, delta: float, epsilon: float = 0.1
) -> float:
    """Expected time within which γ_k = k^(−1/2) reaches min E‖∇M‖² ≤ δ: (H(ε)·A(q)/δ)^m iterations, m = 2/(1 − 2ε).

    Its dependence on q is (19)'s; unlike (19) it has the constant, in the unit of `cost`.

    Args:
        moments: D² and V², scalars, V² > 0.
        cost: cost of one call.
        q: probability of the exact correction, in (0, 1].
        gap: Δ = M(θ_0) − M_*.
        smoothness: L_M.
        delta: δ > 0.
        epsilon: in (0, 0.5).

    Returns:
        A time in the unit of `cost`; an upper bound, and usually a generous one.

    Raises:
        UfomError: a value out of range, an array where one number is meant, or a bound beyond floating point.
    """
    instance("moments", moments, Moments, "write Moments(d2, v2)")
    instance("cost", cost, CostModel, "write CostModel(r=10)")
    constant = rate_constant(gap, smoothness, moments.v2, epsilon)  # type: ignore[arg-type]
    m, delta = 2 / (1 - 2 * epsilon), scalar("δ", delta, positive)
    time = scalar("the time of one iteration", cost.time(q, moments, m))
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.float64(time) * np.float64(constant / delta) ** m
    return _representable("the time bound", float(value), _UNITS)
