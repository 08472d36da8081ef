"""The paper's synthetic pair under outer SGD: simulated, many chains at once, and by the exact recursion of moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufom_theory import UfomError
from ufom_theory.two_tasks import TwoTaskProblem, squared_gradient_norms, step_moments

Array = NDArray[np.float64]
Gradients = Callable[[Array, NDArray[np.int64]], tuple[Any, Array, Array]]
RANGE = (-50.0, 50.0)  # θ_0 is uniform on it


def outer_step_size(k: int) -> float:
    """γ_k, which is 1/k near the minimiser."""
    return 10 / (k + 100)


def linear(pair: TwoTaskProblem) -> Gradients:
    """The gradients on the quadratic pieces, where both are linear in θ − b/a: the quick form.

    Raises:
        UfomError: (when called) a chain left the quadratic pieces.
    """
    a, p = np.asarray(pair.a), pair.contractions
    first_order, correction, centres = a * p, a * p**2 - a * p, np.asarray(pair.b) / a
    u = None  # one array for all steps: a fresh one of this size would cost more than the sums

    def gradients(theta: Array, task: NDArray[np.int64]) -> tuple[Array, Array, Array]:
        nonlocal u
        u = np.subtract(theta, centres[task], out=u)
        if max(u.max(), -u.min()) > pair.A:
            raise UfomError(f"a chain left the quadratic pieces at α = {pair.alpha:g}: take larger q")
        return u, first_order[task], correction[task]

    return gradients


def pieces(pair: TwoTaskProblem) -> Gradients:
    """The gradients on the whole line."""

    def gradients(theta: Array, task: NDArray[np.int64]) -> tuple[float, Array, Array]:
        first_order, exact = (np.where(task, both[1], both[0]) for both in pair.gradients(theta))
        return 1.0, first_order, exact - first_order

    return gradients


def outer_sgd(
    gradients: Gradients,
    theta: Array,
    q: Array,
    rng: np.random.Generator,
    step_size: Callable[[int], float] = outer_step_size,
) -> Iterator[Array]:
    """θ_k for k = 1, 2, …, with common random numbers: one task and one coin a step for each chain, the same for all q.

    Args:
        gradients: `linear(pair)` or `pieces(pair)`: of θ and the tasks, (u, s, c) with G_FO = u·s and G = u·(s + c).
        theta: θ_0 of each chain, shape (...).
        q: probabilities of the exact correction, shape (n,), 0 for FOM.
        rng: of the tasks and coins.
        step_size: γ_k.

    Yields:
        θ_k, shape (n, ...); the same array each time, changed in place.
    """
    shape = theta.shape
    q = np.reshape(q, (-1,) + (1,) * len(shape))
    weight = np.divide(1.0, q, out=np.zeros_like(q), where=q > 0)
    theta = np.repeat(theta[None], len(q), axis=0)
    move, slope = np.empty_like(theta), np.empty_like(theta)
    for k in count(1):
        task, coin = rng.integers(0, 2, shape), rng.random(shape)
        u, first_order, correction = gradients(theta, task)
        np.multiply(coin < q, weight, out=slope)
        slope *= correction
        slope += first_order
        np.multiply(u, step_size(k), out=move)
        move *= slope
        theta -= move
        yield theta


def simulate(
    pair: TwoTaskProblem,
    grid: Array,
    delta: float,
    length: int,
    rng: np.random.Generator,
    shape: tuple[int, int],
    step_size: Callable[[int], float] = outer_step_size,
) -> tuple[Array, Array]:
    """When E‖∇M‖² passes δ (`delta`) at each q of the grid, shape (n,), over `length` outer steps from θ_0 in `RANGE`.

    Args:
        shape: independent repetitions, and chains of each, over which E‖∇M‖² is taken.

    Returns:
        The first step with E‖∇M‖² ≤ δ (nan where there is none) and E‖∇M‖² after the last, both of shape (n, seeds).
        E is the mean over a seed's chains. Such a mean is early to pass δ by about its fluctuation, alike for every q:
        times are to be compared, not taken by themselves.
    """
    seeds, chains = shape
    steps = np.full((len(grid), seeds), np.nan)
    run = outer_sgd(linear(pair), rng.uniform(*RANGE, shape), grid, rng, step_size)
    for k, theta in zip(range(1, length + 1), run, strict=False):
        u = theta - pair.theta_star
        gradient_sq = pair.curvature**2 * np.einsum("qsr,qsr->qs", u, u) / chains
        steps[np.isnan(steps) & (gradient_sq <= delta)] = k
    return steps, gradient_sq


def exact_norms(pair: TwoTaskProblem, q: Array, step_sizes: Iterable[float | Array]) -> Iterator[Array]:
    """E‖∇M(θ_k)‖² for k = 1, 2, … by the exact moment recursion, θ_0 uniform; of q's shape, broadcast with the γ_k.

    The recursion is quadratic in θ_0, so the mean over the two starts at ± the standard deviation is the mean over all.
    """
    spread = (RANGE[1] - RANGE[0]) / math.sqrt(12)
    starts = np.reshape([spread, -spread], (2,) + (1,) * q.ndim)
    found = squared_gradient_norms(pair, q, step_sizes, starts)  # type: ignore[arg-type]
    return (norms.mean(axis=0) for norms in found)


def exact_blocks(
    pair: TwoTaskProblem, q: Array, step_size: Callable[[Any], Any], size: int = 512
) -> Iterator[tuple[NDArray[np.int64], Array]]:
    """k and E‖∇M(θ_k)‖² of `exact_norms` in blocks of many steps at once, shapes (size,) and (size, n), from k = 1 on.

    With x = θ − θ_*, both E x and E x² follow x_k = f_k·x_{k−1} + g_k, so x_k = F_k·(x_0 + Σ_{i ≤ k} g_i/F_i) with
    F_k = f_1 ⋯ f_k.

    Args:
        pair: the two tasks.
        q: shape (n,), 0 for FOM.
        step_size: γ_k of an array of k.
        size: steps of a block; F_k must not underflow in it.
    """
    s1, c1, s2, sc, c2 = step_moments(pair, q)
    mean = np.full(q.shape, -pair.theta_star)
    second = mean**2 + (RANGE[1] - RANGE[0]) ** 2 / 12
    for first in count(1, size):
        k = np.arange(first, first + size, dtype=np.int64)
        gamma = step_size(k)[:, None]
        means = _affine(mean, 1 - gamma * s1, -gamma * c1)
        before = np.vstack([mean, means[:-1]])
        noise = gamma**2 * c2 - 2 * gamma * before * (c1 - gamma * sc)
        seconds = _affine(second, 1 - gamma * (2 * s1 - gamma * s2), noise)
        mean, second = means[-1], seconds[-1]
        yield k, pair.curvature**2 * seconds


def _affine(start: Array, factor: Array, term: Array) -> Array:
    """x_k = f_k·x_{k−1} + g_k for k = 1 … size, shape (size, n)."""
    product = np.cumprod(factor, axis=0)
    return np.asarray(product * (start + np.cumsum(term / product, axis=0)))


def exact_run(
    pair: TwoTaskProblem, grid: Array, delta: float, step_size: Callable[[int], float] = outer_step_size
) -> tuple[int, Array]:
    """How many steps to run, and E‖∇M‖² of each q after them, by the exact moment recursion.

    The run is a quarter longer than the slowest q > 0 needs to E‖∇M‖² ≤ δ.
    """
    length = 0
    for k, gradient_sq in enumerate(exact_norms(pair, grid, map(step_size, count(1))), 1):
        if not length and (gradient_sq[grid > 0] <= delta).all():
            length = math.ceil(1.25 * k)
        if k == length:
            break
    return length, gradient_sq
