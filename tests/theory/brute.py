"""Minima found without any closed form: what the closed forms are held to."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def stationary(log_time: Callable[..., NDArray], draws: int, low: float = -60.0) -> Array:
    """argmin over q ∈ (0, 1] of functions that fall and then rise, vectorised: bisection of log q on the slope's sign.

    The slope is a complex step's, d/dq f(q) = Im f(q + ih)/h, exact to the last digits.
    """
    below, above = np.full(draws, low), np.zeros(draws)
    for _ in range(90):
        middle = (below + above) / 2
        q = np.exp(middle)
        falling = log_time(q + 1e-100j * q).imag < 0
        below, above = np.where(falling, middle, below), np.where(falling, above, middle)
    return np.where(log_time(1 + 1e-100j * np.ones_like(q)).imag <= 0, 1.0, np.exp((below + above) / 2))


def shrinking_grid(log_time: Callable[[Array], Array], levels: int, draws: int, low: float = -14.0) -> Array:
    """min of `log_time` over 1 ≥ q_1 ≥ … ≥ q_n > 0, for each draw; q has shape (points, draws, n).

    A grid in the log of q_1 and of the ratios q_i/q_{i−1}, again and again on a smaller box round the best point.
    """
    centre, half = np.full((1, draws, levels), low / 2), -low / 2
    unit = np.stack(np.meshgrid(*[np.linspace(-1, 1, 7)] * levels, indexing="ij"), -1).reshape(-1, 1, levels)
    best = np.full(draws, np.inf)
    for _ in range(44):
        points = np.minimum(centre + half * unit, 0.0)
        values = log_time(np.exp(np.cumsum(points, axis=-1)))
        chosen = values.argmin(0)
        found = values[chosen, np.arange(draws)]
        better = found < best
        centre = np.where(better[:, None], points[chosen, np.arange(draws)], centre[0])[None]
        best = np.minimum(best, found)
        half *= 0.7
    return best
