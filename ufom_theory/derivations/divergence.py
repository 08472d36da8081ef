"""Theorem 2: a two-task problem on which FOM's stationary point has the squared gradient norm 2D."""

import sympy as sp

from ufom_theory.derivations.symbols import ALPHA, R

X, CENTRE_B = sp.symbols("x b", real=True)
CURVATURE, REACH = sp.symbols("a A", positive=True)
A1, A2, P1, P2, B2, BIAS = sp.symbols("a1 a2 p1 p2 b2 D", positive=True)
THETA = sp.Symbol("theta", real=True)


def pieces(z: sp.Expr, a: sp.Expr = CURVATURE, reach: sp.Expr = REACH) -> tuple[sp.Expr, sp.Expr, sp.Expr]:
    """f as a function of the distance z = |x − b/a|: quadratic to A, its curvature fades to A + 1, linear beyond."""
    inner = a * z**2 / 2
    fading = -a * (z - reach) ** 3 / 6 + a * (z - reach) ** 2 / 2 + a * reach * z - a * reach**2 / 2
    beyond = (a / 2 + a * reach) * z - a / 6 - a * reach**2 / 2 - a * reach / 2
    return inner, fading, beyond


def convex_piece(x: sp.Expr, a: sp.Expr = CURVATURE, b: sp.Expr = CENTRE_B, reach: sp.Expr = REACH) -> sp.Expr:
    """f_{a,b,A}(x), the loss of Theorem 2's counterexample; without |·| near b/a, to be differentiated there."""
    z = sp.Abs(x - b / a)
    inner, fading, beyond = pieces(z, a, reach)
    return sp.Piecewise((inner.subs(z, x - b / a), z <= reach), (fading, z <= reach + 1), (beyond, True))


def joints() -> list[sp.Expr]:
    """Jumps of f, f', f'' at z = A and at z = A + 1: all zero, so f is C². (At z = 0 f is a polynomial in z².)"""
    z = sp.Symbol("z", positive=True)
    inner, fading, beyond = pieces(z)
    meets = ((inner, fading, REACH), (fading, beyond, REACH + 1))
    return [sp.simplify(sp.diff(u - v, z, order).subs(z, at)) for u, v, at in meets for order in range(3)]


def curvatures() -> tuple[sp.Expr, sp.Expr, sp.Expr]:
    """f'' on the three pieces, with t = z − A ∈ [0, 1] on the second: a, a(1 − t), 0. So f is convex, L2 = L3 = a."""
    z, t = sp.symbols("z t", positive=True)
    inner, fading, beyond = (sp.diff(piece, z, 2) for piece in pieces(z))
    return inner, sp.factor(fading.subs(z, REACH + t)), beyond


def slope_bound() -> sp.Expr:
    """L1 = a/2 + a·A, the slope beyond A + 1: f' grows up to there because f'' ≥ 0."""
    z = sp.Symbol("z", positive=True)
    return sp.diff(pieces(z)[2], z)


def inner_descent() -> sp.Expr:
    """φ_r − b/a on the quadratic piece, from the recurrence (3): (1 − αa)^r·(θ − b/a)."""
    y = sp.Function("y")
    n = sp.Symbol("n", integer=True, nonnegative=True)
    start = THETA - CENTRE_B / CURVATURE
    solved = sp.rsolve(y(n) - (1 - ALPHA * CURVATURE) * y(n - 1), y(n), {y(0): start})
    return solved.subs(n, R)


def fields() -> tuple[sp.Expr, sp.Expr]:
    """E G_FO and ∇M near the stationary points: means over the tasks of p_i(a_iθ − b_i) and p_i²(a_iθ − b_i), b1 = 0.

    The outer slope at φ_r is a·(φ_r − b/a) = p(aθ − b), and the exact gradient has ∂φ_r/∂θ = p as one more factor.
    """
    first, second = A1 * THETA, A2 * THETA - B2
    return (P1 * first + P2 * second) / 2, (P1**2 * first + P2**2 * second) / 2


def theta_fo() -> sp.Expr:
    """FOM's stationary point, p2·b2/(a1·p1 + a2·p2).

    It is the only one: for α·a < 1 both φ_r(θ) and f' do not decrease, so neither does E G_FO.
    """
    (solution,) = sp.solve(fields()[0], THETA)
    return sp.factor(solution)


def gradient() -> sp.Expr:
    """∇M(θ_FO) = a1·b2·p1·p2·(p1 − p2)/(2(a1·p1 + a2·p2))."""
    return sp.factor(fields()[1].subs(THETA, theta_fo()))


def offset() -> sp.Expr:
    """The b2 > 0 at which ‖∇M(θ_FO)‖² = 2D; ∇M is linear in b2, so b2 = √(2D)/|∇M(θ_FO)/b2|."""
    return sp.sqrt(2 * BIAS) / sp.Abs(sp.cancel(gradient() / B2))


def room() -> tuple[sp.Expr, sp.Expr]:
    """A less the distances of θ_FO to both minima, for A = b2/a2 + 1: at least 1, since 0 < θ_FO < b2/a2.

    Inner GD only comes nearer to its minimum (0 < p < 1), so all that `fields` uses lies on the quadratic piece.
    """
    reach = B2 / A2 + 1
    return sp.factor(reach - theta_fo() - 1), sp.factor(reach - (B2 / A2 - theta_fo()) - 1)
