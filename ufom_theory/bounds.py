"""Bounds from the constants of Assumption 1. Derived in `derivations/bias_bound.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufom_theory.complexity import Truncated
from ufom_theory.quantities import AssumptionConstants, UfomError, positive


def _factors(constants: AssumptionConstants, step_sizes: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    alphas = np.asarray(positive("step size α_j", step_sizes))
    if alphas.ndim != 1:
        raise UfomError(f"step sizes have shape {alphas.shape}, but α_1 … α_r are one vector of shape (r,)")
    return alphas, 1 + alphas * constants.L2


def bias_bound(constants: AssumptionConstants, step_sizes: ArrayLike, proxy: Truncated | None = None) -> float:
    """The tight D_bound: D = (1 + M1)·L1·(P − ∏_{j>r−K}(1 + α_j·L2)), P the product over all j; K = 0 is FOM.

    Args:
        constants: Assumption 1.
        step_sizes: α_1 … α_r, shape (r,).
        proxy: truncation length K; None is FOM.

    Returns:
        A bound of ‖G_proxy − G‖ (its square bounds D²).

    Raises:
        UfomError: a step size that is not > 0, or K > r.
    """
    alphas, factors = _factors(constants, step_sizes)
    kept = proxy.steps if proxy else 0
    if kept > len(factors):
        raise UfomError(f"proxy length K = {kept} is longer than the inner loop, r = {len(factors)}: keep K ≤ r")
    split = len(factors) - kept
    growth = float(np.expm1(np.log1p(alphas[:split] * constants.L2).sum()))  # ∏ − 1, without cancellation
    return (1 + constants.M1) * constants.L1 * growth * float(np.prod(factors[split:]))


def bias_bound_printed(constants: AssumptionConstants, step_sizes: ArrayLike) -> float:
    """D_bound as the paper prints it, (15): (1 + M1)·L1·L2·Σ_j α_j·∏_{j'≥j}(1 + α_{j'}·L2).

    Its product starts at j where the proof needs j + 1, so it is larger than `bias_bound` by a factor between
    1 + min(α)·L2 and 1 + max(α)·L2.
    """
    alphas, factors = _factors(constants, step_sizes)
    tails = np.cumprod(factors[::-1])[::-1]
    return (1 + constants.M1) * constants.L1 * constants.L2 * float(np.sum(alphas * tails))


def gradient_bound(constants: AssumptionConstants, step_sizes: ArrayLike) -> float:
    """V_bound = (1 + M1)·L1·P: a bound of ‖G‖ (its square bounds V²)."""
    _, factors = _factors(constants, step_sizes)
    return (1 + constants.M1) * constants.L1 * float(np.prod(factors))
