"""Theorem 2: a two-task problem on which FOM's stationary point has the squared gradient norm 2D."""

from __future__ import annotations

from functools import cache

import sympy as sp

from ufom_theory.derivations.registry import bounds, claim, holds, step, vanishes, worst
from ufom_theory.derivations.symbols import ALPHA, R

X, CENTRE_B = sp.symbols("x b", real=True)
CURVATURE, REACH = sp.symbols("a A", positive=True)
A1, A2, P1, P2, B2, BIAS = sp.symbols("a1 a2 p1 p2 b2 D", positive=True)
THETA = sp.Symbol("theta", real=True)


def pieces(z: sp.Expr) -> tuple[sp.Expr, sp.Expr, sp.Expr]:
    """f as a function of the distance z = |x − b/a|: quadratic to A, its curvature fades to A + 1, linear beyond."""
    a, reach = CURVATURE, REACH
    inner = a * z**2 / 2
    fading = -a * (z - reach) ** 3 / 6 + a * (z - reach) ** 2 / 2 + a * reach * z - a * reach**2 / 2
    beyond = (a / 2 + a * reach) * z - a / 6 - a * reach**2 / 2 - a * reach / 2
    return inner, fading, beyond


Z, PAST = sp.symbols("z t", positive=True)


@claim(
    "counterexample",
    "ours",
    says=r"f = %s \;(z \le A),\quad %s \;(z \le A + 1),\quad %s,\quad f' \le %s",
    form=(*pieces(Z), CURVATURE / 2 + CURVATURE * REACH),
)
def counterexample(inner: sp.Expr, fading: sp.Expr, beyond: sp.Expr, slope: sp.Expr) -> str:
    """Theorem 2's loss, z = |x − b/a|, satisfies Assumption 1: f, f', f'' join at A and A + 1, f'' is a, then a(1 − t)
    with t = z − A, then 0. So it is convex and C², L2 = L3 = a, and L1 is the slope beyond A + 1."""
    meets = ((inner, fading, REACH), (fading, beyond, REACH + 1))
    joints = [sp.diff(u - v, Z, order).subs(Z, at) for u, v, at in meets for order in range(3)]
    curvatures = (
        sp.diff(inner, Z, 2) - CURVATURE,
        sp.diff(fading, Z, 2).subs(Z, REACH + PAST) - CURVATURE * (1 - PAST),
        sp.diff(beyond, Z) - slope,
    )
    return vanishes(*joints, *curvatures, inner.subs(Z, 0), sp.diff(inner, Z).subs(Z, 0))


CENTRE = CENTRE_B / CURVATURE


@claim("2-3", "(2)–(3)", says=r"\phi_r - \frac{b}{a} = %s", form=(1 - ALPHA * CURVATURE) ** R * (THETA - CENTRE))
def inner_descent(form: sp.Expr) -> str:
    """r inner steps on a quadratic with curvature a and minimum b/a, from V(θ) = θ: by induction over r."""
    base = form.subs(R, 0) - (THETA - CENTRE)
    stepped = form - ALPHA * CURVATURE * form  # (3): the slope is a·(φ − b/a)
    return vanishes(base, sp.powsimp(sp.expand(stepped - form.subs(R, R + 1))))


@claim("1", "(1)", says=r"\lim_{r \to \infty} \phi_r = %s", form=CENTRE)
def exact_bilevel_problem(form: sp.Expr) -> str:
    """On a quadratic with 0 < αa < 1 inner GD ends at the minimum: as r → ∞ problem (4) tends to (1)."""
    left = 1 / (1 + Z)  # 1 − αa
    return vanishes(sp.limit(left**R * (THETA - CENTRE), R, sp.oo) + CENTRE - form)


@cache
def fields() -> tuple[sp.Expr, sp.Expr]:
    """E G_FO and ∇M near the stationary points: means over the tasks of p_i(a_iθ − b_i) and p_i²(a_iθ − b_i), b1 = 0.

    p_i = (1 − αa_i)^r. The outer slope at φ_r is a·(φ_r − b/a) = p(aθ − b), and the exact gradient has ∂φ_r/∂θ = p as
    one more factor.
    """
    first, second = A1 * THETA, A2 * THETA - B2
    return (P1 * first + P2 * second) / 2, (P1**2 * first + P2**2 * second) / 2


WEIGHTS = A1 * P1 + A2 * P2
POINT, GRADIENT = P2 * B2 / WEIGHTS, A1 * B2 * P1 * P2 * (P1 - P2) / (2 * WEIGHTS)


@step("fom-point", POINT, r"\theta_{FO} = %s")
def theta_fo(form: sp.Expr) -> str:
    """FOM's stationary point, E G_FO = 0. It is the only one: for α·a < 1 both φ_r(θ) and f' do not decrease, so
    neither does E G_FO."""
    return worst(vanishes(fields()[0].subs(THETA, form)), holds(sp.diff(fields()[0], THETA).is_positive))


@step("fom-gradient", GRADIENT, r"\nabla M(\theta_{FO}) = %s")
def gradient(form: sp.Expr) -> str:
    """The gradient there, not 0 unless p_1 = p_2."""
    return vanishes(fields()[1].subs(THETA, POINT) - form)


SHORTER = sp.Symbol("x", positive=True)  # |p1 − p2|


@claim(
    "theorem-2",
    "Theorem 2",
    says=r"\|\nabla M(\theta_{FO})\|^2 = %s > D,\quad b_2 = %s,\quad A = %s",
    form=(2 * BIAS, 2 * sp.sqrt(2 * BIAS) * WEIGHTS / (A1 * P1 * P2 * SHORTER), B2 / A2 + 1),
)
def divergence_of_fom(squared: sp.Expr, offset: sp.Expr, reach: sp.Expr) -> str:
    """On a convex C² two-task problem FOM's only stationary point has ‖∇M‖² = 2D > D, for any D, r, and α with αa < 1,
    a1 ≠ a2; x = |p1 − p2|. A leaves room for 1 beyond the largest distance from θ_FO to a minimum, as 0 < θ_FO < b2/a2;
    inner GD only comes nearer (0 < p < 1), so all this lies on the quadratic pieces."""
    there = (GRADIENT**2).subs((P1 - P2) ** 2, SHORTER**2).subs(B2, offset)
    farthest = [sp.limit(d, p, 0) for d, p in ((POINT, P1), (B2 / A2 - POINT, P2))]
    room = bounds(reach - 1, farthest[0]) if farthest[0] == farthest[1] else "refuted"
    return worst(vanishes(there - squared), holds((squared - BIAS).is_positive, offset.is_positive), room)
