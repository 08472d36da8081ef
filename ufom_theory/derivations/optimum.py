"""The optimal q: log-time (19) → stationarity (21) → condition (20), existence and uniqueness → root, limits, speed-up.

The proofs return expressions whose sign sympy reads off their positive symbols: `GAP` is 1 − ρ > 0, `q = 1/(1 + y)` is
any point of (0, 1).
"""

from __future__ import annotations

from functools import cache

import sympy as sp

from ufom_theory.derivations import complexity
from ufom_theory.derivations.registry import claim, holds, step, vanishes, worst
from ufom_theory.derivations.symbols import C_DET, C_RND, D2, EPSILON, KAPPA, RHO, V2, K, M, Q, R

GAP = sp.Symbol("gap", positive=True)  # 1 − ρ, where D2 < V2
EXCESS = sp.Symbol("x", nonnegative=True)  # ρ − 1 where D2 ≥ V2, m − 1 where m ≥ 1
INSIDE = sp.Symbol("y", positive=True)  # q = 1/(1 + y) runs through (0, 1)


def log_time() -> sp.Expr:
    """Logarithm of the time to precision, (19) with a general exponent m."""
    return M * sp.log((1 / Q - 1) * D2 + V2) + sp.log(C_DET + C_RND * Q)


@cache
def quadratic() -> sp.Poly:
    """Left side of (21): where (19) is stationary, scaled to the paper's leading term."""
    numerator = sp.Poly(sp.numer(sp.together(sp.diff(log_time(), Q))), Q)
    return sp.Poly((numerator.as_expr() * C_RND * (V2 - D2) / numerator.LC()).simplify(), Q)


def printed_quadratic() -> sp.Poly:
    """(21) as the paper prints it, in ε."""
    linear, constant = (2 * EPSILON + 1) / (2 * EPSILON - 1), 2 / (2 * EPSILON - 1)
    return sp.Poly(C_RND * (V2 - D2) * Q**2 + linear * D2 * C_RND * Q + constant * D2 * C_DET, Q)


@cache
def condition() -> sp.Expr:
    """Condition (20) as an expression that is positive where q* < 1.

    It is the quadratic at q = 1. For m ≥ 1, or D2 < V2, it is necessary and sufficient: `one_minimum` and
    `falls_above`. For m < 1 and D2 ≥ V2 it is sufficient but not necessary: `enough_below_one`.
    """
    return sp.expand(quadratic().eval(1))


@cache
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


@cache
def slope_denominator_inside() -> sp.Expr:
    """`slope_denominator` at q = 1/(1 + y): a quotient of sums of positive terms."""
    return sp.factor(slope_denominator().subs(Q, 1 / (1 + INSIDE)))


@cache
def enough_below_one() -> tuple[sp.Expr, sp.Expr]:
    """D2 ≥ V2 and m < 1: leading coefficient −(ρ − 1) and value −mκρ at 0: a concave quadratic that starts below 0.

    If (20) holds it ends above 0, so it has one root in (0, 1), the minimum: (20) is sufficient. If (20) fails it can
    still have two roots in (0, 1), and the first can be the global minimum (`condition_below_one`).
    """
    a, _, c = (x.subs(RHO, 1 + EXCESS) for x in _coefficients())
    return sp.expand(a), c


@cache
def _coefficients() -> tuple[sp.Expr, sp.Expr, sp.Expr]:
    a, b, c = scaled_quadratic().all_coeffs()
    return sp.factor(a), sp.factor(b), sp.factor(c)


@cache
def slopes() -> tuple[sp.Expr, sp.Expr]:
    """∂q/∂ρ and ∂q/∂κ by differentiating the quadratic implicitly; at the root ∂f/∂q = 2(1 − ρ)q + (1 − m)ρ = S."""
    f = scaled_quadratic().as_expr()
    return -sp.diff(f, RHO) / discriminant_root(), -sp.diff(f, KAPPA) / discriminant_root()


@cache
def speedup() -> sp.Expr:
    """Time at q = 1 over time at q, in ρ, κ and m."""
    time = sp.exp(log_time()).subs({D2: RHO * V2, C_DET: KAPPA * C_RND})
    return sp.simplify(time.subs(Q, 1) / time)


def small_bias() -> sp.Expr:
    """lim q*/√ρ as ρ → 0: √(mκ), so that q* → 0 with the bias."""
    return sp.limit(root() / sp.sqrt(RHO), RHO, 0)


@cache
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


@cache
def long_loop_costs() -> sp.Expr:
    """lim κ as r → ∞ for Algorithm 4: 0, its exact gradient being quadratic in r."""
    return sp.limit(complexity.c_det().subs(K, 0) / complexity.c_rnd().subs(K, 0), R, sp.oo)


ROOT_S = sp.sqrt(((M - 1) * RHO) ** 2 + 4 * M * KAPPA * RHO * (1 - RHO))


@claim(
    "21",
    "(21)",
    says="%s = 0",
    printed=C_RND * (V2 - D2) * Q**2
    + (2 * EPSILON + 1) / (2 * EPSILON - 1) * D2 * C_RND * Q
    + 2 / (2 * EPSILON - 1) * D2 * C_DET,
    form=C_RND * (V2 - D2) * Q**2 + (1 - M) * C_RND * D2 * Q - M * D2 * C_DET,
)
def stationary(form: sp.Expr) -> str:
    """(19) is stationary in q exactly at the roots of (21): printed with m = 2/(1 − 2ε), derived for every m."""
    in_epsilon = form.has(EPSILON) or not form.has(M)
    left = quadratic().as_expr()
    return vanishes((left.subs(M, 2 / (1 - 2 * EPSILON)) if in_epsilon else left) - form)


@step("one-minimum", (-M * KAPPA * RHO, -M * KAPPA * RHO / GAP), r"f(0) = %s < 0,\quad q_1 q_2 = %s < 0")
def one_minimum(at_zero: sp.Expr, roots: sp.Expr) -> str:
    """D² < V², 1 − ρ = gap > 0: the quadratic f opens upwards, is < 0 at 0, and the product of its roots is < 0. The
    log-time has the sign of f as its slope on (0, 1), so it falls, then rises: the one positive root is the minimum,
    inside where f(1) > 0."""
    a, _, c = _coefficients()
    signs = holds(slope_denominator_inside().is_positive, at_zero.is_negative, roots.is_negative)
    return worst(vanishes(c - at_zero, c / sp.expand(a.subs(RHO, 1 - GAP)) - roots), signs)


RISE = sp.Symbol("n", nonnegative=True)  # m − 1


@step("falling-above", -(EXCESS * Q**2 + RISE * (1 + EXCESS) * Q + (1 + RISE) * KAPPA * (1 + EXCESS)), "f(q) = %s < 0")
def falls_above(form: sp.Expr) -> str:
    """D² ≥ V² and m ≥ 1, with x = ρ − 1 and n = m − 1: f is negative, so the time falls up to q = 1. (20) fails there
    too."""
    left = scaled_quadratic().as_expr().subs(M, 1 + RISE).subs(RHO, 1 + EXCESS)
    return worst(vanishes(left - form), holds(sp.expand(form).is_negative))


@claim(
    "20",
    "(20)",
    printed=sp.Lt(D2, C_RND * V2 / (2 / (1 - 2 * EPSILON) * (C_DET + C_RND))),
    form=sp.Lt(D2, C_RND * V2 / (M * (C_DET + C_RND))),
)
def condition_20(form: sp.Expr) -> str:
    """q* < 1 exactly when (20) holds, for m ≥ 1 (all that the paper uses) or D² < V²: it is f(1) > 0, by the two steps
    before."""
    if not isinstance(form, sp.StrictLessThan | sp.StrictGreaterThan):
        return "refuted"
    gap, value = form.gts - form.lts, condition()
    if form.has(EPSILON) or not form.has(M):
        value = value.subs(M, 2 / (1 - 2 * EPSILON))
    value, gap = (x.subs(EPSILON, sp.S.Half - 1 / (2 * INSIDE + 2)) for x in (value, gap))  # ε < 1/2
    ratio = (value / gap).subs({D2: 1, V2: 7})  # free of both, and > 0
    value -= gap * ratio
    positive = worst(vanishes(value), (holds(x.is_positive) for x in [sp.factor(sp.simplify(ratio))]))
    return worst(positive, one_minimum(-M * KAPPA * RHO, -M * KAPPA * RHO / GAP))


@claim(
    "stable-root",
    "ours",
    says=r"q^* = %s \;(m \ge 1),\quad %s \;(m < 1)",
    form=(((M - 1) * RHO + ROOT_S) / (2 * (1 - RHO)), 2 * M * KAPPA * RHO / ((1 - M) * RHO + ROOT_S)),
)
def stable_root(form: sp.Expr, small: sp.Expr) -> str:
    """Both solve (21) and are the positive root for D² < V²; neither subtracts nearly equal numbers for its m."""
    left = scaled_quadratic().as_expr()
    point = {RHO: sp.Rational(1, 7), KAPPA: sp.Rational(1, 5), M: sp.Rational(3, 2)}
    positive = holds(*(x.subs(point).evalf(40).is_positive for x in (form, small)))
    return worst(positive, (vanishes(left.subs(Q, x)) for x in (form, small)))


@claim(
    "inverse",
    "ours",
    says=r"\rho = %s,\quad \frac{d\rho}{dq} \propto %s",
    form=(Q**2 / (Q**2 + (M - 1) * Q + M * KAPPA), (M - 1) * Q + 2 * M * KAPPA),
)
def inverse_of_root(form: sp.Expr, slope: sp.Expr) -> str:
    """The ρ at which a given q is optimal, and its slope times (the denominator)²/q: > 0 for m ≥ 1, and for m < 1
    wherever ρ < 1. So the floor q_min binds exactly below ρ(q_min)."""
    _, denominator = sp.fraction(form)
    rate = sp.simplify(sp.diff(form, Q) * denominator**2 / Q)
    return vanishes(scaled_quadratic().as_expr().subs(RHO, form), rate - slope)


ROOT_SYMBOL = sp.Symbol("S", positive=True)


@claim(
    "slopes",
    "ours",
    says=r"\frac{\partial q^*}{\partial \rho} = %s,\quad \frac{\partial q^*}{\partial \kappa} = %s",
    form=((Q**2 + (M - 1) * Q + M * KAPPA) / ROOT_SYMBOL, M * RHO / ROOT_SYMBOL),
)
def slopes_of_root(by_rho: sp.Expr, by_kappa: sp.Expr) -> str:
    """How q* moves, by differentiating (21) implicitly; S is the root of its discriminant. The second also by the
    closed form."""
    forms = [x.subs(ROOT_SYMBOL, discriminant_root()) for x in (by_rho, by_kappa)]
    found = [left - right for left, right in zip(slopes(), forms, strict=True)]
    return vanishes(*found, sp.diff(root(), KAPPA) - forms[1].subs(Q, root()))


POINT = {M: sp.S.Half, RHO: sp.Integer(3), KAPPA: sp.Rational(37, 3750)}


@claim(
    "below-one",
    "ours",
    says=r"q = %s,\quad f(1) = %s < 0,\quad (\text{time}(q)/\text{time}(1))^2 = %s < 1",
    form=(sp.Rational(1, 100), -sp.Rational(1287, 2500), sp.Rational(149, 2) * 4 * sp.Rational(149, 7574) ** 2),
)
def condition_below_one(inside: sp.Expr, at_one: sp.Expr, ratio: sp.Expr) -> str:
    """For m < 1 and D² ≥ V² (20) is sufficient, f being concave and < 0 at 0, but not necessary: at m = 1/2, ρ = 3, κ =
    37/3750 it fails, and the minimum is inside."""
    leading, at_zero = enough_below_one()
    quadratic_here = scaled_quadratic().as_expr().subs(POINT)
    squared = speedup().subs(POINT).subs(Q, inside) ** -2
    facts = holds(leading.is_nonpositive, at_zero.is_negative, at_one < 0, inside > 0, inside < 1, ratio < 1)
    return worst(facts, vanishes(quadratic_here.subs(Q, inside), quadratic_here.subs(Q, 1) - at_one, squared - ratio))


@claim(
    "speed-up",
    "ours",
    says=r"\frac{\text{time}(1)}{\text{time}(q^*)} \to %s \;(m = 2,\; \rho < 1/2),\quad %s \;(m = 1)",
    form=(1 / (4 * RHO * (1 - RHO)), 1 / RHO),
)
def long_loops(two: sp.Expr, one: sp.Expr) -> str:
    """The speed-up over q = 1 as r → ∞ for Algorithm 4, whose κ → 0."""
    limits = [long_loop(sp.Integer(m))[1] for m in (2, 1)]
    return vanishes(limits[0] - two, limits[1] - one, long_loop_costs())
