"""The optimal q: log-time (19) → stationarity (21) → condition (20), existence and uniqueness → root, limits, speed-up.

The proofs return expressions whose sign sympy reads off their positive symbols: `GAP` is 1 − ρ > 0, `q = 1/(1 + y)` is
any point of (0, 1).
"""

import sympy as sp

from ufom_theory.derivations import complexity
from ufom_theory.derivations.symbols import C_DET, C_RND, D2, EPSILON, KAPPA, RHO, V2, K, M, Q, R

GAP = sp.Symbol("gap", positive=True)  # 1 − ρ, where D2 < V2
EXCESS = sp.Symbol("x", nonnegative=True)  # ρ − 1 where D2 ≥ V2, m − 1 where m ≥ 1
INSIDE = sp.Symbol("y", positive=True)  # q = 1/(1 + y) runs through (0, 1)


def log_time() -> sp.Expr:
    """Logarithm of the time to precision, (19) with a general exponent m."""
    return M * sp.log((1 / Q - 1) * D2 + V2) + sp.log(C_DET + C_RND * Q)


def quadratic() -> sp.Poly:
    """Left side of (21): where (19) is stationary, scaled to the paper's leading term."""
    numerator = sp.Poly(sp.numer(sp.together(sp.diff(log_time(), Q))), Q)
    return sp.Poly((numerator.as_expr() * C_RND * (V2 - D2) / numerator.LC()).simplify(), Q)


def printed_quadratic() -> sp.Poly:
    """(21) as the paper prints it, in ε."""
    linear, constant = (2 * EPSILON + 1) / (2 * EPSILON - 1), 2 / (2 * EPSILON - 1)
    return sp.Poly(C_RND * (V2 - D2) * Q**2 + linear * D2 * C_RND * Q + constant * D2 * C_DET, Q)


def condition() -> sp.Expr:
    """Condition (20) as an expression that is positive where q* < 1.

    It is the quadratic at q = 1. For m ≥ 1, or D2 < V2, it is necessary and sufficient: `one_root_below` and
    `falling_above`. For m < 1 and D2 ≥ V2 it is sufficient but not necessary: `enough_below_one`.
    """
    return sp.expand(quadratic().eval(1))


def scaled_quadratic() -> sp.Poly:
    """The quadratic over C_rnd·V2, in ρ = D2/V2 and κ = C_det/C_rnd."""
    scaled = quadratic().as_expr().subs({D2: RHO * V2, C_DET: KAPPA * C_RND}) / (C_RND * V2)
    return sp.Poly(sp.expand(scaled), Q)


def discriminant_root() -> sp.Expr:
    """S, the square root of the discriminant of `scaled_quadratic`."""
    return sp.sqrt(((M - 1) * RHO) ** 2 + 4 * M * KAPPA * RHO * (1 - RHO))


def root() -> sp.Expr:
    """The positive root for ρ < 1, as it is computed for m ≥ 1: no cancellation between (m − 1)ρ and S."""
    return ((M - 1) * RHO + discriminant_root()) / (2 * (1 - RHO))


def root_small_exponent() -> sp.Expr:
    """The same root, as it is computed for m < 1, where (m − 1)ρ and S have opposite signs."""
    return 2 * M * KAPPA * RHO / ((1 - M) * RHO + discriminant_root())


def slope_denominator() -> sp.Expr:
    """∂ log time/∂q = quadratic / this, and this is > 0 on (0, 1): the derivative of (19) has the quadratic's sign."""
    derivative = sp.diff(log_time().subs({D2: RHO * V2, C_DET: KAPPA * C_RND}), Q)
    return sp.factor(sp.simplify(scaled_quadratic().as_expr() / derivative))


def slope_denominator_inside() -> sp.Expr:
    """`slope_denominator` at q = 1/(1 + y): a quotient of sums of positive terms."""
    return sp.factor(slope_denominator().subs(Q, 1 / (1 + INSIDE)))


def one_root_below() -> tuple[sp.Expr, sp.Expr]:
    """D2 < V2: the quadratic at q → 0, and the product of its roots: both < 0, so exactly one root is positive.

    The quadratic opens upwards, so it is < 0 before that root and > 0 after: the time falls, then rises, and the root
    is the only minimum. It lies below 1 exactly when the quadratic is positive at 1, which is (20). Any m > 0.
    """
    a, _, c = _coefficients()
    return c, c / sp.expand(a.subs(RHO, 1 - GAP))


def falling_above() -> sp.Expr:
    """D2 ≥ V2 and m ≥ 1: minus the quadratic, a sum of terms ≥ 0 with mκρ > 0. The time falls up to q = 1: q* = 1.

    (20) fails there too: it needs mρ(1 + κ) < 1.
    """
    rise = sp.Symbol("m_minus_1", nonnegative=True)
    return sp.expand(-scaled_quadratic().as_expr().subs(M, 1 + rise).subs(RHO, 1 + EXCESS))


def enough_below_one() -> tuple[sp.Expr, sp.Expr]:
    """D2 ≥ V2 and m < 1: leading coefficient −(ρ − 1) and value −mκρ at 0: a concave quadratic that starts below 0.

    If (20) holds it ends above 0, so it has one root in (0, 1), the minimum: (20) is sufficient. If (20) fails it can
    still have two roots in (0, 1), and the first can be the global minimum (`counterexample_below_one`).
    """
    a, _, c = (x.subs(RHO, 1 + EXCESS) for x in _coefficients())
    return sp.expand(a), c


def counterexample_below_one() -> tuple[sp.Expr, sp.Expr, sp.Expr]:
    """m = 1/2, ρ = 3, κ = 1/500: the quadratic at 1 (< 0: (20) fails), a root in (0, 1), the log-time there.

    The log-time is counted from that at q = 1 and is < 0: the minimum is inside although (20) fails.
    """
    point = {M: sp.Rational(1, 2), RHO: sp.Integer(3), KAPPA: sp.Rational(1, 500)}
    at_one = scaled_quadratic().eval(1).subs(point)
    inside = root_small_exponent().subs(point)
    return at_one, inside, -sp.log(speedup().subs(point).subs(Q, inside))


def _coefficients() -> tuple[sp.Expr, sp.Expr, sp.Expr]:
    a, b, c = scaled_quadratic().all_coeffs()
    return sp.factor(a), sp.factor(b), sp.factor(c)


def slopes() -> tuple[sp.Expr, sp.Expr]:
    """∂q/∂ρ and ∂q/∂κ by differentiating the quadratic implicitly; at the root ∂f/∂q = 2(1 − ρ)q + (1 − m)ρ = S."""
    f = scaled_quadratic().as_expr()
    return -sp.diff(f, RHO) / discriminant_root(), -sp.diff(f, KAPPA) / discriminant_root()


def inverse() -> sp.Expr:
    """The ρ at which a given q is optimal."""
    (rho,) = sp.solve(scaled_quadratic().as_expr(), RHO)
    return sp.factor(rho)


def speedup() -> sp.Expr:
    """Time at q = 1 over time at q, in ρ, κ and m."""
    time = sp.exp(log_time()).subs({D2: RHO * V2, C_DET: KAPPA * C_RND})
    return sp.simplify(time.subs(Q, 1) / time)


def inverse_slope() -> sp.Expr:
    """dρ/dq of `inverse`, times (its denominator)²/q: (m − 1)q + 2mκ.

    For m ≥ 1 it is > 0. For m < 1 it is > 0 wherever ρ < 1, that is (1 − m)q < mκ. So q* rises with ρ on D2 < V2, and
    the floor q_min binds (q* < q_min) exactly when ρ < inverse(q_min).
    """
    _, denominator = sp.fraction(inverse())
    return sp.expand(sp.simplify(sp.diff(inverse(), Q) * denominator**2 / Q))


def small_bias() -> sp.Expr:
    """lim q*/√ρ as ρ → 0: √(mκ), so that q* → 0 with the bias."""
    return sp.limit(root() / sp.sqrt(RHO), RHO, 0)


def long_loop(m: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """lim of q* and of the speed-up over q = 1 as κ → 0, for the recomputed sweep that is r → ∞; m ≥ 1 a number.

    m = 2: q* → ρ/(1 − ρ), speed-up 1/(4ρ(1 − ρ)) for ρ < 1/2. m = 1: q* → 0, speed-up 1/ρ.
    """
    gap = sp.Symbol("gap", positive=True)
    limit = root().subs(M, m).subs(1 - RHO, gap)
    best = sp.simplify(limit.subs(KAPPA, 0))
    if best == 0:  # q* ~ √(κρ/(1 − ρ)): put it in before κ goes
        t = sp.Symbol("t", positive=True)
        ratio = speedup().subs(M, m).subs(Q, t * sp.sqrt(RHO / gap)).subs(KAPPA, t**2)
        return best, sp.simplify(sp.limit(sp.simplify(ratio), t, 0).subs(gap, 1 - RHO))
    best = best.subs(gap, 1 - RHO)
    return best, sp.factor(sp.simplify(speedup().subs({M: m, KAPPA: 0}).subs(Q, best)))


def long_loop_costs() -> sp.Expr:
    """lim κ as r → ∞ for Algorithm 4: 0, its exact gradient being quadratic in r."""
    return sp.limit(complexity.c_det().subs(K, 0) / complexity.c_rnd().subs(K, 0), R, sp.oo)
