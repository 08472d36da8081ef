"""A roulette over the backward loop: how far each task's sweep goes, decided by one uniform number.

Levels 0 ≤ K_0 < K_1 < … < K_n = r of backward steps are reached with probabilities 1 ≥ q_1 ≥ … ≥ q_n > 0: the increment
G_{K_i} − G_{K_{i−1}} is added with weight 1/q_i where u < q_i, u uniform. The estimate is unbiased, and one level is
UFOM. Derived in `derivations/roulette.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufom_theory.checks import UfomError, finite, instance, integer, positive, scalar
from ufom_theory.cost import Sweep, binomial_steps

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Survival:
    """The best probabilities to reach each level, and what they come to.

    Attributes:
        q: q_1 … q_n, shape (n,); 0.0 where a level adds nothing (its proxy is exact).
        second_moment: A = a_0 + Σ a_i/q_i.
        cost: C = c_0 + Σ c_i·q_i.
        time: A^m·C; 0 or ∞ where that is beyond floating point, which the other three do not mind.
    """

    q: Array
    second_moment: float
    cost: float
    time: float


def _levels(d2_by_level: ArrayLike, v2: float, costs: ArrayLike) -> tuple[Array, Array]:
    """a_0 … a_n with A = a_0 + Σ a_i/q_i, and c_0 … c_n."""
    rule = "a finite number ≥ 0: it is the mean of a squared norm"
    d2, v2 = np.atleast_1d(finite("d2_by_level", d2_by_level, rule, 0.0)), scalar("V² (v2)", v2, finite, rule, 0.0)
    c = np.atleast_1d(positive("costs", costs))
    if d2.shape == c.shape and d2[-1] == 0:  # D²_n, which is 0 by definition, may be given
        d2 = d2[:-1]
    if d2.ndim != 1 or not len(d2) or c.shape != (len(d2) + 1,):
        raise UfomError(
            f"d2_by_level {d2.shape} must hold D²_0 … D²_(n−1), without D²_n = 0, and costs {c.shape} c_0 … c_n"
        )
    return np.concatenate([[v2 - d2[0]], d2 - np.append(d2[1:], 0.0)]), c


def roulette_moments(q: ArrayLike, d2_by_level: ArrayLike, v2: float, costs: ArrayLike) -> tuple[float, float]:
    """(A, C): the second moment a_0 + Σ a_i/q_i and the expected cost c_0 + Σ c_i·q_i of one task.

    a_0 = V² − D²_0 and a_i = D²_{i−1} − D²_i, D²_i = E‖G − G_{K_i}‖², D²_n = 0.

    Args:
        q: q_1 … q_n, shape (n,).
        d2_by_level: D²_0 … D²_{n−1}.
        v2: V²; for a batch of B tasks with their own coins V² + (B − 1)·‖∇M‖².
        costs: c_0 … c_n, as `level_costs`.

    Raises:
        UfomError: shapes that do not belong together, q that rise or lie outside (0, 1], costs ≤ 0, D² or V² < 0.
    """
    a, c = _levels(d2_by_level, v2, costs)
    chosen = np.atleast_1d(positive("q", q))
    if chosen.shape != (len(a) - 1,) or (np.diff(chosen) > 0).any() or chosen[0] > 1:
        raise UfomError(f"q = {chosen} must be 1 ≥ q_1 ≥ … ≥ q_n > 0, one for each of the {len(a) - 1} levels")
    return float(a[0] + np.sum(a[1:] / chosen)), float(c[0] + np.sum(c[1:] * chosen))


def _pooled(a: Array, c: Array) -> list[tuple[float, float, int]]:
    """Pool adjacent violators: blocks (Σa, Σc, levels) whose ratios a/c do not rise."""
    blocks: list[tuple[float, float, int]] = []
    for block in zip(a.tolist(), c.tolist(), itertools.repeat(1), strict=False):
        while blocks and blocks[-1][0] * block[1] <= block[0] * blocks[-1][1]:
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
        blocks.append(block)
    return blocks


def optimal_survival(d2_by_level: ArrayLike, v2: float, costs: ArrayLike, m: float = 1.0) -> Survival:
    """The q_1 ≥ … ≥ q_n that minimise A^m·C.

    Over blocks of levels whose ratios a_i/c_i do not rise (pool adjacent violators), q_i = t·√(a_i/c_i) or 1. With the
    first k blocks at 1, their a and c added to a_0 and c_0, and S = Σ√(a_i·c_i) over the others, t is the positive root
    of a_0·t² − (m − 1)·S·t − m·c_0 = 0. Every k gives one candidate at most, and the best of them is taken: a level at
    1, a_0 ≤ 0 and m < 1 need no case of their own.

    >>> optimal_survival([0.1], 1.0, [11.0, 55.0]).q.round(4)  # one level is UFOM
    array([0.1491])

    Args:
        d2_by_level: D²_0 … D²_{n−1}, of G_{K_0} … G_{K_{n−1}}, and D²_n = 0 if you like; they need not fall.
        v2: V²; for a batch of B tasks with their own coins V² + (B − 1)·‖∇M‖².
        costs: c_0 … c_n, as `level_costs`.
        m: exponent of the time to precision.

    Raises:
        UfomError: as `roulette_moments`; D² = V² = 0; m ≤ 0.
    """
    m, (a, c) = scalar("m", m, positive), _levels(d2_by_level, v2, costs)
    if not a.any():
        raise UfomError("D² = V² = 0: the gradient vanishes, so every q is equally good; measure at another θ")
    blocks = _pooled(a[1:], c[1:])
    best, least = (np.ones(len(a) - 1), max(float(a.sum()), 0.0), float(c.sum())), np.inf
    for capped in range(len(blocks) + 1):
        ends = [sum(x[i] for x in blocks[:capped]) + first for i, first in ((0, a[0]), (1, c[0]))]
        free = [(max(x, 0.0), y, n) for x, y, n in blocks[capped:]]
        t = _scale(float(ends[0]), float(ends[1]), sum(np.sqrt(x) * np.sqrt(y) for x, y, _ in free), m)
        q = [(1.0, n) for *_, n in blocks[:capped]] + [(t * np.sqrt(x / y) if x else 0.0, n) for x, y, n in free]
        if any(not value <= 1 for value, _ in q):
            continue
        chosen = np.repeat([value for value, _ in q], [n for _, n in q])
        moment = ends[0] + sum(x / value for (x, *_), (value, _) in zip(free, q[capped:], strict=True) if x)
        cost = c[0] + float(np.sum(c[1:] * chosen))
        with np.errstate(divide="ignore", invalid="ignore"):
            log_time = m * np.log(moment) + np.log(cost)  # A^m itself may be beyond floating point
        if log_time < least:
            best, least = (chosen, float(moment), float(cost)), log_time
    with np.errstate(over="ignore"):
        return Survival(*best, float(np.float64(best[1]) ** m * best[2]))


def _scale(a0: float, c0: float, total: float, m: float) -> float:
    """t > 0 with a_0·t² − (m − 1)·S·t − m·c_0 = 0 where A^m·C is least; nan where there is none."""
    if total == 0:
        return 1.0
    linear, discriminant = (m - 1) * total, ((m - 1) * total) ** 2 + 4 * m * a0 * c0
    if discriminant < 0 or (a0 <= 0 and m >= 1):
        return np.nan
    root = np.sqrt(discriminant)
    return float((linear + root) / (2 * a0) if m >= 1 else 2 * m * c0 / (root - linear))


@cache
def _partial(r: int, last: int, slots: int) -> int:
    """Fewest inner steps that visit the last `last` of r states backwards from φ_0, `slots` more held."""
    if last <= 0:
        return 0
    if slots == 0:
        return sum(range(r - last, r))
    if last == r:
        return binomial_steps(r, slots)
    # the first state kept is φ_k; before φ_{r−last} it would only be farther from what is visited
    return min(k + binomial_steps(r - k, slots - 1) + _partial(k, last - (r - k), slots) for k in range(r - last, r))


def partial_steps(sweep: Sweep, r: int, last: int) -> int:
    """Inner steps repeated while the last `last` of r states are visited backwards; all r of them: `extra_steps`.

    A run that stops early places its checkpoints for its own way: a difference of `extra_steps` would be wrong.

    Raises:
        UfomError: last < 0 or last > r.
    """
    instance("sweep", sweep, Sweep, "write Sweep.stored()")
    r, last = scalar("r", r, integer, 1), scalar("last", last, integer, 0)
    if last > r:
        raise UfomError(f"last = {last} backward steps are more than the r = {r} there are")
    if sweep.keeps_steps or last == 0:
        return 0
    if sweep.kind == "recomputed":
        steps = r * (r - 1) // 2 - (r - last) * (r - last - 1) // 2
    else:
        steps = _partial(r, last, sweep.slots)
    return steps


def level_costs(levels: Sequence[int], c1: float = 1.0, c2: float = 1.0, sweep: Sweep | None = None) -> Array:
    """c_0 … c_n: what a run that stops at level i costs more than one that stops at level i − 1.

    c_0 = C1·(r + 1) + C2·K_0 is the proxy's cost. A run to level i takes K_i − K_0 more Hessian-vector products, and
    repeats the steps that visit these states by its sweep; u is known first, so it plans for its own end.

    Args:
        levels: K_0 < K_1 < … < K_n = r.
        c1: cost of a gradient.
        c2: cost of a Hessian-vector product.
        sweep: how the states are recovered; recomputed if not given.

    Raises:
        UfomError: levels that do not rise or fewer than two, costs ≤ 0.
    """
    k = np.atleast_1d(integer("levels", levels, 0))
    if k.ndim != 1 or len(k) < 2 or (np.diff(k) <= 0).any():
        raise UfomError(f"levels = {list(levels)} must rise from K_0 to K_n = r, two at least")
    c1, c2 = scalar("c1", c1, positive), scalar("c2", c2, positive)
    sweep, r, first = sweep if sweep is not None else Sweep.recomputed(), int(k[-1]), int(k[0])
    runs = [c2 * (x - first) + c1 * partial_steps(sweep, r - first, x - first) for x in k.tolist()]
    return np.array([c1 * (r + 1) + c2 * first, *np.diff(runs)])
