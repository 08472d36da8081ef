"""How far a first-order proxy can be off, for any differentiable inner step: D_bound from the steps' Jacobians.

Derived in `derivations/general_update.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufom_theory.checks import UfomError, finite, integer, scalar

Array = NDArray[np.float64]


def _stack(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = np.asarray(finite(name, value))
    if array.shape != shape:
        raise UfomError(f"{name} has shape {array.shape}, but the steps' Jacobians must have {shape}")
    return array


def _tails(jacobians: Array, rows: int) -> list[Array]:
    """Rows of J_r…J_{j+1} for j = r, …, 0."""
    found = [np.eye(jacobians.shape[-1])[:rows]]
    for step in jacobians[::-1]:
        found.append(found[-1] @ step)
    return found


def update_bias_bound(
    jacobians: ArrayLike,
    mixed: ArrayLike,
    outer_slope: float,
    start_slope: float,
    held: tuple[ArrayLike, ArrayLike] | None = None,
    rows: int | None = None,
) -> float:
    """Bound of ‖G − F‖: L1·[Σ_j(‖B_j − B̃_j‖·‖P_j‖ + ‖B̃_j‖·‖P_j − P̃_j‖) + M1·‖P_0 − P̃_0‖], P_j = J_r…J_{j+1}.

    Args:
        jacobians: J_1 … J_r = ∂Φ_j/∂φ along the trajectory, shape (r, p, p); φ holds the optimiser's states too.
        mixed: B_1 … B_r = ∂Φ_j/∂θ, shape (r, p, s).
        outer_slope: L1, a bound of ‖∂L_out/∂φ‖.
        start_slope: M1, a bound of ‖dφ_0/dθ‖, states included.
        held: (J̃, B̃) of the proxy that holds ∂L_in/∂φ constant, shaped as J and B; None is the identity proxy, J̃ = I
            and B̃ = 0, the paper's FOM.
        rows: how many leading entries of φ are parameters, where the others are states that the outer loss does not
            see; all of them if not given.

    Raises:
        UfomError: shapes that do not belong together, values that are not finite, slopes < 0, rows outside 1 … p.
    """
    exact = np.asarray(finite("jacobians", jacobians))
    if exact.ndim != 3 or exact.shape[1] != exact.shape[2]:
        raise UfomError(f"jacobians have shape {exact.shape}, but J_1 … J_r must have (r, p, p)")
    r, p, _ = exact.shape
    s = np.shape(mixed)[-1] if np.ndim(mixed) else 0
    by_theta = _stack("mixed", mixed, (r, p, s))
    if held is None:
        proxy, proxy_mixed = np.broadcast_to(np.eye(p), exact.shape), np.zeros_like(by_theta)
    else:
        proxy, proxy_mixed = _stack("held J̃", held[0], exact.shape), _stack("held B̃", held[1], by_theta.shape)
    rule = ("a finite number ≥ 0", 0.0)
    outer, start = scalar("outer_slope", outer_slope, finite, *rule), scalar("start_slope", start_slope, finite, *rule)
    seen = p if rows is None else scalar("rows", rows, integer, 1)
    if seen > p:
        raise UfomError(f"rows = {seen} are more than the p = {p} entries of φ")

    def size(matrix: Array) -> float:
        return float(np.linalg.norm(matrix, 2))

    ours, theirs = _tails(exact, seen), _tails(proxy, seen)
    apart = [size(a - b) for a, b in zip(ours, theirs, strict=True)]
    total = start * apart[r]
    for j in range(1, r + 1):
        b, b_proxy = by_theta[j - 1], proxy_mixed[j - 1]
        total += size(b - b_proxy) * size(ours[r - j]) + size(b_proxy) * apart[r - j]
    return float(outer * total)
