"""The q that minimises A(q)^m·C(q), a power of the second moment times the cost: the stable root of (21).

Everything is a function of ρ = D²/V², κ = C_det/C_rnd and m; numpy broadcasting throughout. Derived in
`derivations/optimum.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def discriminant_root(rho: Array, gap: Array, kappa: Array, m: Array) -> Array:
    """S = √(((m − 1)ρ)² + 4mκρ(1 − ρ)), the root of (21)'s discriminant; 0 where it is negative."""
    linear, across = np.abs((m - 1) * rho), 2 * np.sqrt(m * kappa * np.abs(gap)) * np.sqrt(rho)  # κρ could underflow
    below = np.sqrt(np.maximum((linear - across) * (linear + across), 0.0))
    root: Array = np.where(gap >= 0, np.hypot(linear, across), below)
    return root


def _log_time(q: Array, rho: Array, kappa: Array, m: Array) -> Array:
    return m * np.log1p((1 / q - 1) * rho) + np.log(kappa + q)


def minimiser(rho: Any, gap: Any, kappa: Any, m: Any) -> Array:
    """argmin over q ∈ (0, 1] of (1 + (1/q − 1)ρ)^m·(κ + q); 0 where ρ = 0 < C_rnd (the infimum is q → 0).

    Args:
        rho: D²/V² ≥ 0 (inf where V² = 0).
        gap: 1 − ρ, computed as (V² − D²)/V² where digits matter.
        kappa: C_det/C_rnd > 0 (inf where C_rnd = 0: the correction is free, and q = 1).
        m: exponent > 0.
    """
    rho, gap, kappa, m = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (rho, gap, kappa, m)))
    with np.errstate(all="ignore"):
        root_s = discriminant_root(rho, gap, kappa, m)
        linear = (m - 1) * rho
        q = np.where(m >= 1, (linear + root_s) / (2 * gap), 2 * m * kappa * (rho / (root_s - linear)))
        q = np.where((rho < 1) & np.isfinite(kappa), np.minimum(q, 1.0), 1.0)
        concave = (m < 1) & (rho >= 1) & np.isfinite(rho) & np.isfinite(kappa)
        if concave.any():
            # below m = 1 the time can have its minimum inside (0, 1) though D² ≥ V² and (20) fails
            inner = 2 * m * kappa * (rho / (root_s - linear))
            real = (linear**2 + 4 * m * kappa * rho * gap >= 0) & (inner < 1)
            sooner = _log_time(inner, rho, kappa, m) < np.log1p(kappa)
            q = np.where(concave & real & sooner, inner, q)
    return np.where((rho == 0) & np.isfinite(kappa), 0.0, q)
