"""Theorem 2's two-task problem in numbers: its parameters for any D, its moments, and exact moments of outer SGD on it.

Derived in `derivations/divergence.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufom_theory.checks import Number, UfomError, broadcast, finite, instance, integer, plain, positive, scalar
from ufom_theory.quantities import AssumptionConstants

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TwoTaskProblem:
    """Two equally likely tasks in one dimension: L_in = L_out = f_{a_i,b_i,A}(φ) and V(θ) = θ, r steps of size α.

    f is quadratic within A of its minimum b/a, linear beyond A + 1, convex and C² (see `gradients`).

    Attributes:
        alpha: inner step size.
        r: inner steps.
        a: curvatures a_1, a_2 > 0.
        b: b_1, b_2; the minima are at b_i/a_i.
        A: half-width > 0 of the quadratic pieces.

    Raises:
        UfomError: a number that is not finite or not > 0, an array where one number is meant.
    """

    alpha: float
    r: int
    a: tuple[float, float]
    b: tuple[float, float]
    A: float

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "alpha", scalar("inner step size α", self.alpha, positive))
        set_(self, "r", scalar("r, the number of inner steps,", self.r, integer, 1))
        set_(self, "A", scalar("half-width A", self.A, positive))
        for name, check in (("a", positive), ("b", finite)):
            pair = np.asarray(check(name, getattr(self, name)))
            if pair.shape != (2,):
                raise UfomError(f"{name} has shape {pair.shape}, but there are two tasks: give two numbers")
            set_(self, name, (float(pair[0]), float(pair[1])))

    @property
    def parameters(self) -> dict[str, Any]:
        """The keyword arguments of the runtime's `synthetic`."""
        return {"alpha": self.alpha, "r": self.r, "a": self.a, "b": self.b, "A": self.A}

    @property
    def constants(self) -> AssumptionConstants:
        """Assumption 1: M1 = 1, M2 = 0, L1 = max(a)/2 + max(a)·A, L2 = L3 = max(a). No loss contains θ."""
        a = max(self.a)
        return AssumptionConstants(M1=1.0, M2=0.0, L1=a / 2 + a * self.A, L2=a, L3=a)

    @cached_property
    def contractions(self) -> Array:
        """p_i = (1 − α·a_i)^r: what inner GD leaves of the distance to a task's minimum, shape (2,)."""
        return np.asarray((1 - self.alpha * np.asarray(self.a)) ** self.r)

    def _stationary(self, power: int) -> float:
        weights = self.contractions**power
        theta = float(weights @ np.asarray(self.b) / (weights @ np.asarray(self.a)))
        if any(abs(theta - b / a) > self.A for a, b in zip(self.a, self.b, strict=True)):
            raise UfomError(f"A = {self.A:g} is too small: θ = {theta:g} lies off a quadratic piece; make A larger")
        return theta

    @cached_property
    def theta_fo(self) -> float:
        """FOM's stationary point Σp_i·b_i/Σp_i·a_i."""
        return self._stationary(1)

    @cached_property
    def theta_star(self) -> float:
        """The minimiser of M, Σp_i²·b_i/Σp_i²·a_i."""
        return self._stationary(2)

    @cached_property
    def curvature(self) -> float:
        """M'' near its minimiser, ½Σp_i²·a_i: the mean slope of the field that UFOM follows."""
        return float(self.contractions**2 @ np.asarray(self.a)) / 2

    @cached_property
    def curvature_fo(self) -> float:
        """½Σp_i·a_i: the mean slope of the field that FOM follows."""
        return float(self.contractions @ np.asarray(self.a)) / 2

    @property
    def gradient(self) -> float:
        """∇M(θ_FO), zero only if FOM is right; M is quadratic there."""
        return self.curvature * (self.theta_fo - self.theta_star)

    def gradients(self, theta: ArrayLike) -> tuple[Array, Array]:
        """G_FO and the exact gradient at θ (`theta`) for both tasks, on all of ℝ; shapes (2, *θ.shape).

        f' = a·sign·(z, or A + t − t²/2, or A + ½) and f'' = a·(1, or 1 − t, or 0), z = |φ − b/a|, t = z − A.
        """
        theta = np.asarray(finite("θ", theta))
        a, b = (np.reshape(x, (2,) + (1,) * theta.ndim) for x in (self.a, self.b))
        phi, sensitivity = theta - b / a, np.ones((2, *theta.shape))
        for step in range(self.r + 1):
            z = np.abs(phi)
            t = np.clip(z - self.A, 0, 1)
            slope = a * np.sign(phi) * (np.minimum(z, self.A) + t - t**2 / 2)
            if step < self.r:
                phi, sensitivity = phi - self.alpha * slope, sensitivity * (1 - self.alpha * a * (1 - t))
        return slope, slope * sensitivity

    def moments(self, theta: ArrayLike) -> tuple[Array, Array]:
        """D² and V² of FOM at θ (`theta`): means over the tasks, before any supremum; shape θ.shape."""
        proxy, exact = self.gradients(theta)
        return np.mean((proxy - exact) ** 2, axis=0), np.mean(exact**2, axis=0)


def _too_long_a_step(alpha: float, a: tuple[float, float], r: int) -> str:
    remedy = f"choose a with max(a) < 1/α = {1 / alpha:g}"
    if any(alpha * x == 1 for x in a):
        return f"α·a = 1: one inner step lands on the minimum, so both gradients vanish (p = 0); {remedy}"
    if alpha * sum(a) == 2 and r % 2 == 0:
        return f"α(a1 + a2) = 2 with r = {r} even: p1 = p2, so FOM is merely scaled and not misled; {remedy}"
    return f"α·max(a) = {alpha * max(a):g} must be below 1, or inner GD jumps over its minimum; {remedy}"


def diverging_problem(D: float, r: int, alpha: float, a: tuple[float, float] = (0.5, 1.5)) -> TwoTaskProblem:
    """The problem of Theorem 2 on which FOM converges to a point with ‖∇M‖² = 2D; every task loss convex and C².

    b_2 = 2√(2D)·(a1·p1 + a2·p2)/(a1·p1·p2·|p1 − p2|), b_1 = 0, A = b_2/a_2 + 1. Any α > 0 is served by small enough a.

    Args:
        D: half of FOM's final squared gradient norm, > 0.
        r: inner steps.
        alpha: inner step size, α·max(a) < 1.
        a: the two curvatures, different.

    Raises:
        UfomError: D ≤ 0, a1 = a2, α·max(a) ≥ 1 (the reason named), or a b_2 beyond floating point.
    """
    D = scalar("D", D, positive)
    frame = TwoTaskProblem(alpha, r, a, (0.0, 0.0), 1.0)
    if frame.alpha * max(frame.a) >= 1:
        raise UfomError(_too_long_a_step(frame.alpha, frame.a, r))
    if frame.a[0] == frame.a[1]:
        raise UfomError(f"a1 = a2 = {frame.a[0]:g}: the tasks then agree on how biased FOM is; choose two curvatures")
    (a1, a2), (p1, p2) = frame.a, frame.contractions.tolist()
    bottom = a1 * p1 * p2 * abs(p1 - p2)
    b2 = 2 * math.sqrt(2 * D) * (a1 * p1 + a2 * p2) / bottom if bottom > 0 else math.inf
    if not math.isfinite(b2 / a2) or b2 / a2 > 1e150:
        raise UfomError(f"r·α·a = {r * alpha * max(frame.a):g} leaves p = {p2:g}: b_2 overflows; take a smaller a or r")
    return TwoTaskProblem(frame.alpha, frame.r, frame.a, (0.0, b2), b2 / a2 + 1)


def second_moment(
    second: Any, gamma: Any, s1: Any, s2: Any, c2: Any, mean: Any = 0.0, c1: Any = 0.0, sc: Any = 0.0
) -> Any:
    """E x² after a step x − γ·(s·x + c) of linear SGD, with (s, c) drawn independently of x.

    E(x − γ(s·x + c))² = E x²·(1 − γ(2E s − γE s²)) − 2γ·E x·(E c − γE sc) + γ²·E c².

    Args:
        second: E x² before.
        gamma: γ.
        s1: E s.
        s2: E s².
        c2: E c².
        mean: E x before.
        c1: E c.
        sc: E s·c.
    """
    return second * (1 - gamma * (2 * s1 - gamma * s2)) - 2 * gamma * mean * (c1 - gamma * sc) + gamma * gamma * c2


def squared_gradient_norms(
    problem: TwoTaskProblem, q: Number, step_sizes: Iterable[Any], start: float = 0.0
) -> Iterator[Any]:
    """E‖∇M(θ_k)‖² for k = 1, 2, … of outer SGD, exactly, on the locally linear problem (both tasks quadratic).

    There G = s·x + c with x = θ − θ_* and (s, c) drawn by task and coin, so (E x, E x²) obeys a linear recursion and
    ‖∇M‖² = M''²·x². No sampling is involved.

    Args:
        problem: the two tasks.
        q: probability of the exact correction, 0 for FOM; an array runs many at once.
        step_sizes: γ_1, γ_2, …; each a number or an array that broadcasts with q.
        start: θ_0, a number or an array that broadcasts with q.

    Raises:
        UfomError: q outside [0, 1], a start that is not finite, or a stationary point off the quadratic pieces,
            before the first value is asked for; a step size that is not > 0 or does not broadcast, when it comes.
    """
    q, theta = finite("q", q, "in [0, 1]", 0.0), finite("θ_0", start)
    if np.any(np.asarray(q) > 1):
        raise UfomError(f"q = {np.max(q):g} must lie in [0, 1]: it is a probability")
    instance("problem", problem, TwoTaskProblem, "write diverging_problem(D, r, alpha)")
    shape = broadcast(q=np.shape(q), start=np.shape(theta))
    return _norms(problem, q, step_sizes, theta - problem.theta_star, shape)


def step_moments(problem: TwoTaskProblem, q: Any) -> tuple[Any, Any, Any, Any, Any]:
    """(E s, E c, E s², E s·c, E c²) of G = s·x + c, x = θ − θ_*, over tasks and coins, on the quadratic pieces.

    q is a float64 number or array in [0, 1], 0 for FOM.
    """
    s1 = c1 = s2 = sc = c2 = 0.0
    drawn = plain(np.where(np.asarray(q) > 0, q, 1.0))  # at q = 0 the correction has no weight, whatever its size
    for a, b, p in zip(problem.a, problem.b, problem.contractions.tolist(), strict=True):
        for chance, scale in ((1 - q, p), (q, p * (1 + (p - 1) / drawn))):
            s, c = scale * a, scale * (a * problem.theta_star - b)
            s1, c1, s2 = s1 + chance * s / 2, c1 + chance * c / 2, s2 + chance * s * s / 2
            sc, c2 = sc + chance * s * c / 2, c2 + chance * c * c / 2
    return s1, c1, s2, sc, c2


def _norms(
    problem: TwoTaskProblem, q: Any, step_sizes: Iterable[Any], mean: Any, shape: tuple[int, ...]
) -> Iterator[Any]:
    s1, c1, s2, sc, c2 = step_moments(problem, q)
    second: Any = mean * mean
    for gamma in step_sizes:
        if not (isinstance(gamma, float) and 0 < gamma < math.inf):  # the check itself takes longer than a step
            gamma = positive("outer step size γ_k", gamma)
            broadcast(q_and_start=shape, gamma=np.shape(gamma))
        second = second_moment(second, gamma, s1, s2, c2, mean, c1, sc)
        mean = mean - gamma * (s1 * mean + c1)
        yield problem.curvature**2 * second
