"""A scaled proxy c·F: the same proof with D_c² for D², the best c and what it leaves; weights other than UFOM's."""

from functools import cache

import sympy as sp

from ufom_theory.derivations.registry import claim, vanishes, worst
from ufom_theory.derivations.second_moment import estimate, over_coin
from ufom_theory.derivations.symbols import D2, V2, Q

SCALE = sp.Symbol("c", real=True)
CROSS = sp.Symbol("X", real=True)  # E⟨G, F⟩
PROXY2 = sp.Symbol("F2", positive=True)  # E‖F‖²
G, F = sp.symbols("G F", real=True)  # one coordinate of the exact gradient and of the proxy


def _averaged(expression: sp.Expr) -> sp.Expr:
    """E over tasks of a quadratic form in G and F, by its coefficients."""
    form = sp.Poly(sp.expand(expression), G, F)
    means = {(2, 0): V2, (1, 1): CROSS, (0, 2): PROXY2}
    return sum((coefficient * means[powers] for powers, coefficient in form.terms()), sp.S.Zero)


@cache
def mean() -> sp.Expr:
    """E_ξ[c·F + (ξ/q)(G − c·F)] = G for every c that depends neither on this coin nor on G."""
    return sp.expand(over_coin(lambda coin: estimate(coin, G, SCALE * F)))


@cache
def second_moment() -> sp.Expr:
    """E‖c·F + (ξ/q)(G − c·F)‖² over coin and task."""
    return _averaged(over_coin(lambda coin: estimate(coin, G, SCALE * F) ** 2))


def bias() -> sp.Expr:
    """D_c² = E‖G − c·F‖² = V² − 2c·E⟨G, F⟩ + c²·E‖F‖²; at c = 1 it is D²."""
    return _averaged((G - SCALE * F) ** 2)


@cache
def best_scale() -> sp.Expr:
    """c* = E⟨G, F⟩/E‖F‖², free of q: the second moment's derivative in c is (1/q − 1) times that of D_c²."""
    (scale,) = sp.solve(sp.diff(second_moment(), SCALE), SCALE)
    return scale


@cache
def best_bias() -> sp.Expr:
    """D_c² at c*: V² − E⟨G, F⟩²/E‖F‖², at most V²."""
    return sp.expand(bias().subs(SCALE, best_scale()))


def gain() -> sp.Expr:
    """D² − D_{c*}² = (E‖F‖² − E⟨G, F⟩)²/E‖F‖² ≥ 0."""
    return sp.factor(bias().subs(SCALE, 1) - best_bias())


@cache
def online_scale() -> sp.Expr:
    """c* from averages over the same corrected steps: (V² + F² − D²)/(2F²)."""
    (cross,) = sp.solve(bias().subs(SCALE, 1) - D2, CROSS)
    return sp.cancel(best_scale().subs(CROSS, cross))


def weight_excess() -> tuple[sp.Expr, sp.Expr]:
    """E w² − 1/p and E[(w − 1/p)²; w ≠ 0] for E w = 1, p = P(w ≠ 0): equal, so Bernoulli's 1/p is the least E w².

    w takes two values other than 0 here; the identity is linear in the distribution, so two say it for any.
    """
    w1, w2, p1, p2 = sp.symbols("w1 w2 p1 p2", positive=True)
    p, mean_weight = p1 + p2, p1 * w1 + p2 * w2
    square = p1 * w1**2 + p2 * w2**2
    spread = p1 * (w1 - 1 / p) ** 2 + p2 * (w2 - 1 / p) ** 2
    return square - 1 / p, spread + 2 / p * (mean_weight - 1)  # the last term vanishes as E w = 1


def any_weight() -> tuple[sp.Expr, sp.Expr]:
    """E‖F + w·d‖² and ‖G‖² + (E w² − 1)‖d‖² for E w = 1, d = G − F: w enters by its second moment alone."""
    square = sp.Symbol("w2", positive=True)
    return sp.expand(F**2 + 2 * F * (G - F) + square * (G - F) ** 2), sp.expand(G**2 + (square - 1) * (G - F) ** 2)


SHARE = sp.Symbol("lambda", real=True)
BATCH = sp.Symbol("B", positive=True)
BIAS2, VAR, VAR_F, COV = sp.symbols("Ed2 Var Var_F Cov", real=True)  # ‖E d‖²; Var G, Var F and Cov(G, F) of one task


def partial_error() -> sp.Expr:
    """Mean squared error of the batch mean of F + λ(ξ/q)d: its bias is −(1 − λ)·E d.

    One task's variance is Var(F + λd) + λ²(1/q − 1)D², and D² = Var d + ‖E d‖².
    """
    spread = (1 - SHARE) ** 2 * VAR_F + SHARE**2 * VAR + 2 * SHARE * (1 - SHARE) * COV
    return (1 - SHARE) ** 2 * BIAS2 + (spread + SHARE**2 * (1 / Q - 1) * D2) / BATCH


@cache
def partial_share() -> sp.Expr:
    """λ* = (B‖E d‖² + Var_F − Cov)/((B − 1)‖E d‖² + D²/q), as Var + Var_F − 2Cov = D² − ‖E d‖²."""
    (share,) = sp.solve(sp.diff(partial_error(), SHARE), SHARE)
    (variance,) = sp.solve(VAR + VAR_F - 2 * COV - (D2 - BIAS2), VAR)
    return sp.cancel(share.subs(VAR, variance))


@claim(
    "scaled-proxy",
    "ours",
    says=r"\mathbb{E}\|G\|^2 = %s",
    form=V2 + (1 / Q - 1) * (V2 - 2 * SCALE * CROSS + SCALE**2 * PROXY2),
)
def scaled_second_moment(form: sp.Expr) -> str:
    """c·F + (ξ/q)(G − c·F) is unbiased for every c that depends neither on this coin nor on G, and has D_c² = E‖G −
    cF‖² in the place of D²; X = E⟨G, F⟩, F2 = E‖F‖²."""
    return worst(vanishes(second_moment() - form), vanishes(mean() - G))


@claim(
    "best-scale",
    "ours",
    says=r"c^* = %s = %s,\quad \mathbb{D}_{c^*}^2 = %s",
    form=(CROSS / PROXY2, (V2 + PROXY2 - D2) / (2 * PROXY2), V2 - CROSS**2 / PROXY2),
)
def best_scale_leaves(scale: sp.Expr, online: sp.Expr, left: sp.Expr) -> str:
    """The best c, free of q; the same from averages over the corrected steps; what it leaves, at most V² and at most
    D²."""
    return vanishes(best_scale() - scale, online_scale() - online, best_bias() - left)


CHANCE = sp.Symbol("p", positive=True)


@claim("bernoulli", "ours", says=r"\mathbb{E} w^2 \ge %s", form=1 / CHANCE)
def bernoulli_is_best(form: sp.Expr) -> str:
    """For any weight w with E w = 1, p = P(w ≠ 0), the second moment of F + w·d is ‖G‖² + (E w² − 1)‖d‖², and E w² is
    1/p more than the mean square of w − 1/p where w ≠ 0: no weight is better than the coin's."""
    left, right = weight_excess()
    p = sp.Symbol("p1", positive=True) + sp.Symbol("p2", positive=True)
    square, stated = any_weight()
    mean_is_one = vanishes(left + 1 / p - form.subs(CHANCE, p) - right - (square - stated) * 0)
    return worst(mean_is_one, vanishes((square - stated).subs(sp.Symbol("w2", positive=True), 1)))


@claim(
    "partial-debiasing",
    "ours",
    says=r"\lambda^* = %s",
    form=(BATCH * BIAS2 + VAR_F - COV) / ((BATCH - 1) * BIAS2 + D2 / Q),
)
def partial_debiasing(form: sp.Expr) -> str:
    """The share of the correction, F + λ(ξ/q)d, with the least mean squared error of a batch mean; Ed2 = ‖E d‖²."""
    return vanishes(partial_share() - form)
