"""D_bound (15) and V (16) from Assumption 1: the least bounds, and a problem that attains them for all constants.

Every inner Hessian block has norm at most L_eff = min(L2, √(2·L1·L3)): L2 by Assumption 1, the root because the slope
is bounded too (Landau–Kolmogorov). The recursion (8)–(9) then bounds the adjoints, the sum of the D_j telescopes, and
an inner loss with curvature −L_eff at 0 meets every inequality at θ = 0. A bound that is attained is the supremum of
(14) or (16). `own` is 1 where the losses contain θ, as Assumption 1 allows, and 0 where they do not (MAML, Theorem 2's
problem).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import sympy as sp

from ufom_theory.derivations.chain_rule import Problem, backward_loop
from ufom_theory.derivations.registry import bounds, claim, holds, step, vanishes, worst
from ufom_theory.derivations.symbols import (
    ALPHA,
    INDEX,
    L1,
    L2,
    L3,
    L_EFF,
    M1,
    STEP_SIZES,
    K,
    R,
    at_length,
    step_sizes,
)

FROM = sp.Symbol("j'", integer=True)  # a product's own index
CURVATURE, TIME = sp.symbols("c t", positive=True)
FACTOR = 1 + STEP_SIZES[INDEX] * L_EFF
ALL, KEPT = sp.Product(FACTOR, (INDEX, 1, R)), sp.Product(FACTOR, (INDEX, R - K + 1, R))


@step("landau", CURVATURE**2 / L3, r"2 L_1 \ge h'(t) - h'(-t) \ge 2 c t - L_3 t^2,\quad \max_t (2 c t - L_3 t^2) = %s")
def landau(form: sp.Expr) -> str:
    """Along any direction let h'' be c at 0 with |h'''| ≤ L3 and |h'| ≤ L1. Then h'(t) ≥ h'(0) + ct − L3t²/2 and
    h'(−t) ≤ h'(0) − ct + L3t²/2: twice L1 is at least the largest value of the difference."""
    rise = 2 * CURVATURE * TIME - L3 * TIME**2
    (best,) = sp.solve(sp.diff(rise, TIME), TIME)
    return worst(vanishes(rise.subs(TIME, best) - form), holds(sp.diff(rise, TIME, 2).is_negative))


@step("effective-constant", sp.Min(L2, sp.sqrt(2 * L1 * L3)), r"L_{\mathrm{eff}} = %s")
def effective_constant(form: sp.Expr) -> str:
    """The norm of every inner Hessian block, the mixed one too (t ↦ vᵀ∂_φL_in(θ + tu, φ)), is at most L2 and at most
    the c at which the last step is an equality. The example below attains the smaller one."""
    (by_slope,) = sp.solve(CURVATURE**2 / L3 - 2 * L1, CURVATURE)
    return bounds(form, sp.Min(L2, by_slope))


def adjoint_bounds(r: int) -> list[sp.Expr]:
    """n_0 … n_r with ‖∇_{φ_j} L_out‖ ≤ n_j.

    (9) multiplies by I − α_j·∂²L_in/∂φ², whose norm is at most 1 + α_j·L_eff; at j = r the norm is at most L1.
    """
    found = [L1]
    for alpha in reversed(step_sizes(r)):
        found.insert(0, (1 + alpha * L_EFF) * found[0])
    return found


@claim(
    "erratum-1",
    "(15)",
    "loose",
    r"\|\nabla_{\phi_j} L^{out}\| \le L_1 %s",
    printed=sp.Product(1 + STEP_SIZES[FROM] * L2, (FROM, INDEX, R)),
    form=sp.Product(1 + STEP_SIZES[FROM] * L2, (FROM, INDEX + 1, R)),
)
def product_range(form: sp.Expr) -> str:
    """(15) bounds ‖∇_{φ_j} L_out‖/L1 in D_j by a product over j' ≥ j. True, but loose: by (9) it is j' > j (r = 1…4,
    L_eff = L2, and one more step multiplies by one more factor)."""

    def decided() -> Iterator[str]:
        for r in (1, 2, 3, 4):
            least = [(n / L1).subs(L_EFF, L2) for n in adjoint_bounds(r)]
            yield from (bounds(at_length(form.subs(INDEX, j), r), least[j]) for j in range(1, r + 1))

    return worst(decided())


@cache
def bias(r: int, proxy: int = 0, own: int = 1) -> sp.Expr:
    """Bound of ‖G − G_K‖ term by term, before any closed form.

    The proxy leaves out D_j for j ≤ r − K and stops the adjoint at φ_{r−K}. Each D_j (7) has norm ≤ α_j·L_eff·n_j, and
    ∇_{φ_{j−1}} − ∇_{φ_j} = −α_j·(∂²L_in/∂φ²)ᵀ∇_{φ_j} has the same bound and is met by ‖∂V/∂θ‖ ≤ M1.
    """
    n, alphas = adjoint_bounds(r), step_sizes(r)
    mixed = sum((alphas[j - 1] * L_EFF * n[j] for j in range(1, r - proxy + 1)), sp.S.Zero)
    return own * mixed + M1 * mixed


@cache
def gradient(r: int, own: int = 1) -> sp.Expr:
    """Bound of ‖G‖ term by term: L1 + Σ_j α_j·L_eff·n_j + M1·n_0."""
    n, alphas = adjoint_bounds(r), step_sizes(r)
    return own * (L1 + sum((alphas[j - 1] * L_EFF * n[j] for j in range(1, r + 1)), sp.S.Zero)) + M1 * n[0]


PRODUCT, TAIL = sp.symbols("P T", positive=True)  # of the steps there are, and of the kept ones


@step("telescoping", (1 + ALPHA * L_EFF) * PRODUCT - TAIL, r"S_{r+1} = \alpha L_{\mathrm{eff}} P_r + S_r = %s")
def telescoping(form: sp.Expr) -> str:
    """S_r = Σ_{j ≤ r−K} α_jL_eff·∏_{i>j}(1 + α_iL_eff) is P_r − T, T the product over the K kept steps. Base: r = K, S
    = 0 and P = T. Step: put one more step α in front; P_r gains its factor."""
    base = form.subs(ALPHA, 0).subs(PRODUCT, TAIL)  # no step in front: the K kept ones alone
    return vanishes(ALPHA * L_EFF * PRODUCT + (PRODUCT - TAIL) - form, base)


def sharp_problem(own: int = 1) -> Problem:
    """One task that attains both bounds at θ = 0: L_in = −h(θ + φ), L_out = ℓ(θ + φ), V = M1·θ, near 0.

    h'(z) = L_eff·z − sgn(z)·L3·z²/2 up to |z| = L_eff/L3 and constant beyond; ℓ' = L1 for arguments ≥ 0, and falls
    below (`slope_of_outer`). At θ = 0 every state is 0, where −h has the Hessian −L_eff: all terms have one sign.
    """
    theta, phi = sp.symbols("theta phi", real=True)
    inner = L_EFF * (own * theta + phi) ** 2 / 2  # the cubic term has no second derivative at 0
    return Problem(sp.Matrix([theta]), sp.Matrix([phi]), -inner, L1 * (own * theta + phi), sp.Matrix([M1 * theta]))


@step(
    "example",
    (L_EFF * TIME - L3 * TIME**2 / 2, L1 * (3 * (1 - TIME) ** 2 - 2 * (1 - TIME) ** 3)),
    r"h'(z) = %s \;(0 \le z \le L_{\mathrm{eff}}/L_3),\quad \ell'(-3L_1t/(2L_2)) = %s \;(0 \le t \le 1)",
)
def example(slope: sp.Expr, outer: sp.Expr) -> str:
    """An admissible problem for all constants: h' and its two derivatives stay within L1, L_eff ≤ L2 and L3 and meet
    L_eff at 0, L3, and (where L_eff² = 2L1L3) L1; ℓ' falls smoothly from L1 to 0 at a rate ≤ L2, so that M_* > −∞
    (Assumption 2)."""
    end, rate = L_EFF / L3, sp.diff(slope, TIME)
    smooth = vanishes(
        slope.subs(TIME, 0),
        rate.subs(TIME, 0) - L_EFF,
        rate.subs(TIME, end),
        sp.diff(rate, TIME) + L3,
        slope.subs(TIME, end).subs(L_EFF, sp.sqrt(2 * L1 * L3)) - L1,
    )
    fall = -sp.diff(outer, TIME) / (3 * L1 / (2 * L2))  # in the argument, over t
    turns = sp.solve(sp.diff(fall, TIME), TIME)
    outer_ends = vanishes(outer.subs(TIME, 0) - L1, outer.subs(TIME, 1), fall.subs(TIME, 0), fall.subs(TIME, 1))
    return worst(smooth, outer_ends, holds(len(turns) == 1), (vanishes(fall.subs(TIME, turn) - L2) for turn in turns))


@cache
def sharp_values(r: int, proxy: int = 0, own: int = 1) -> tuple[sp.Expr, sp.Expr]:
    """|G − G_K| and |G| of the sharp problem at θ = 0, by running the backward loop."""
    problem, alphas = sharp_problem(own), step_sizes(r)
    at = {problem.theta[0]: sp.S.Zero}
    exact = backward_loop(problem, alphas, at=at)[0]
    return sp.expand(exact - backward_loop(problem, alphas, kept=proxy, at=at)[0]), exact


def _least(form: sp.Expr, which: int, lengths: tuple[tuple[int, int], ...], own: int = 1) -> str:
    """Is it what the sharp problem attains, and what the bounds add up to, at these r and K?"""

    def decided() -> Iterator[str]:
        for r, kept in lengths:
            attained = sharp_values(r, kept, own)[which]
            yield bounds(at_length(form, r, K=kept), attained)
            yield vanishes((bias(r, kept, own), gradient(r, own))[which] - attained)

    return worst(decided())


SHORT, KEEPING = ((1, 0), (2, 0), (3, 0)), ((1, 0), (2, 1), (3, 1), (4, 2))
BIAS, GRADIENT = (1 + M1) * L1 * (ALL - 1), (1 + M1) * L1 * ALL


@claim(
    "15",
    "(14), (15)",
    "loose",
    r"\mathbb{D} \le %s",
    printed=(1 + M1)
    * L1
    * L2
    * sp.Sum(STEP_SIZES[INDEX] * sp.Product(1 + STEP_SIZES[FROM] * L2, (FROM, INDEX, R)), (INDEX, 1, R)),
    form=BIAS,
)
def bias_bound(form: sp.Expr) -> str:
    """(15) bounds 𝔻 of (14), but is never attained: larger by 1 + α_minL2 or more. The least bound, and the supremum
    for some problem whatever the constants, has the product from j + 1 and L_eff (base r = 1, 2, 3, `telescoping` the
    step)."""
    step_holds = telescoping((1 + ALPHA * L_EFF) * PRODUCT - TAIL)
    return worst(_least(form.subs(L2, L_EFF), 0, SHORT), step_holds)


@claim("16", "(16)", says=r"\mathbb{V} \le %s", form=GRADIENT)
def gradient_bound(form: sp.Expr) -> str:
    """𝕍 of (16) is at most this, and for some problem, whatever the constants, it is this."""
    return worst(_least(form, 1, SHORT), telescoping((1 + ALPHA * L_EFF) * PRODUCT - TAIL))


@claim(
    "theta-free", "ours", says=r"\mathbb{D} \le %s,\quad \mathbb{V} \le %s", form=(M1 * L1 * (ALL - 1), M1 * L1 * ALL)
)
def theta_free(bias_form: sp.Expr, gradient_form: sp.Expr) -> str:
    """Where no loss contains θ, 1 + M1 becomes M1 in both bounds, attained too."""
    return worst((_least(form, i, SHORT, own=0) for i, form in enumerate((bias_form, gradient_form))))


@claim("truncated-bias", "ours", says=r"\mathbb{D}_K \le %s", form=(1 + M1) * L1 * (ALL - KEPT))
def truncated_bias(form: sp.Expr) -> str:
    """A proxy that keeps the last K backward steps is off by at most this, attained too (r ≤ 4, and `telescoping`)."""
    return worst(_least(form, 0, KEEPING), telescoping((1 + ALPHA * L_EFF) * PRODUCT - TAIL))


@claim(
    "15-constant",
    "(15)",
    says=r"\frac{D_{bound}}{\mathbb{D}} = %s \;(\alpha_j = \alpha,\; L_{\mathrm{eff}} = L_2)",
    form=1 + ALPHA * L2,
)
def looseness(form: sp.Expr) -> str:
    """For one step size (15) is too large by one factor, for every r: every term of its sum is."""
    terms = [ALPHA * (1 + ALPHA * L2) ** (R - INDEX + 1 - first) for first in (0, 1)]  # j' from j, or from j + 1
    return vanishes(sp.simplify(terms[0] / terms[1]) - form)
