"""Lemma 1: UFOM's mean, second moment and covariance (12)–(13), by enumerating the coin ξ ~ Bernoulli(q).

G is one coordinate of the exact gradient, F that of the proxy, d = G − F. All holds for any proxy F.
"""

from collections.abc import Callable
from functools import cache

import sympy as sp

from ufom_theory.derivations.registry import claim, holds, step, vanishes, worst
from ufom_theory.derivations.symbols import COIN, D2, V2, Q

EXACT, PROXY = sp.symbols("G F", real=True)  # one coordinate of the exact gradient and of the proxy
BATCH = sp.Symbol("B", integer=True, positive=True)
MEAN2 = sp.Symbol("mean2", nonnegative=True)  # ‖∇M‖²


def over_coin(function: Callable[[sp.Expr], sp.Expr]) -> sp.Expr:
    """E_ξ of a function of the coin, ξ ~ Bernoulli(q)."""
    return (1 - Q) * function(sp.S.Zero) + Q * function(sp.S.One)


def estimate(coin: sp.Expr, exact: sp.Expr = EXACT, proxy: sp.Expr = PROXY) -> sp.Expr:
    """(12)–(13): F + (ξ/q)·(G − F)."""
    return proxy + coin / Q * (exact - proxy)


def mean() -> sp.Expr:
    """E_ξ G, which is G: UFOM is unbiased."""
    return sp.expand(over_coin(estimate))


@cache
def second_moment() -> sp.Expr:
    """E_ξ G² of a coordinate, = G² + (1/q − 1)·(G − F)²; summed over coordinates, E_ξ‖G‖²."""
    return sp.expand(over_coin(lambda coin: estimate(coin) ** 2))


@claim("12-13", "(12)–(13)", says=r"G_{UFO} = %s", printed=estimate(COIN))
def unbiased(form: sp.Expr) -> str:
    """UFOM is unbiased: E_ξ of (12)–(13) is the exact gradient."""
    return vanishes(over_coin(lambda coin: form.subs(COIN, coin)) - EXACT)


@step("second-moment", EXACT**2 + (1 / Q - 1) * (EXACT - PROXY) ** 2, r"\mathbb{E}_\xi G_{UFO}^2 = %s")
def second_moment_at_a_point(form: sp.Expr) -> str:
    """The second moment of each coordinate, at each θ and task; summed over coordinates, E_ξ‖G_UFO‖²."""
    return vanishes(second_moment() - form)


E1, E2, P1, P2 = sp.symbols("G_i G_l F_i F_l", real=True)


@claim("covariance", "ours", says=r"\mathrm{Cov}_\xi(G_{UFO})_{il} = %s", form=(1 / Q - 1) * (E1 - P1) * (E2 - P2))
def covariance(form: sp.Expr) -> str:
    """Cov_ξ(G_UFO) = (1/q − 1)·d·dᵀ: the correction adds noise along d alone."""
    product = over_coin(lambda coin: estimate(coin, E1, P1) * estimate(coin, E2, P2))
    means = over_coin(lambda coin: estimate(coin, E1, P1)) * over_coin(lambda coin: estimate(coin, E2, P2))
    return vanishes(product - means - form)


def lemma_1() -> sp.Expr:
    """(1/q − 1)·D2 + V2: the second moment at each θ, once E_T of its two terms is bounded by two suprema."""
    return (EXACT**2 + (1 / Q - 1) * (EXACT - PROXY) ** 2).subs({EXACT**2: V2, (EXACT - PROXY) ** 2: D2})


@claim("lemma-1", "Lemma 1", says=r"\sup_\theta \mathbb{E}\|G_{UFO}\|^2 \le %s", printed=(1 / Q - 1) * D2 + V2)
def lemma_1_bound(form: sp.Expr) -> str:
    """Lemma 1 is an equality at each θ; ≤ comes from adding two suprema. It is attained where both are at one θ, and
    strict where they lie apart: with (D², V²) = (1, 2) and (2, 1) at two θ, for every q in (0, 1)."""
    pointwise = form.subs({V2: EXACT**2, D2: (EXACT - PROXY) ** 2})
    inside = 1 / (1 + sp.Symbol("y", positive=True))  # q in (0, 1)
    gaps = [form.subs({D2: 2, V2: 2}) - form.subs({D2: d2, V2: v2}) for d2, v2 in ((1, 2), (2, 1))]
    return worst(vanishes(second_moment() - pointwise), holds(*(sp.simplify(g.subs(Q, inside)) > 0 for g in gaps)))


@cache
def enumerated_batch(size: int) -> tuple[sp.Expr, dict[sp.Symbol, sp.Expr]]:
    """E‖mean of B pairs‖² for two equally likely tasks from all 4^B outcomes; what D2, V2, ‖∇M‖² and B are there."""
    exact, proxy = sp.symbols("e1:3", real=True), sp.symbols("p1:3", real=True)
    outcomes = [
        (estimate(sp.Integer(x), e, p), (Q if x else 1 - Q) / 2)
        for e, p in zip(exact, proxy, strict=True)
        for x in (0, 1)
    ]
    totals = [(sp.S.Zero, sp.S.One)]
    for _ in range(size):
        totals = [(total + value, weight * w) for total, weight in totals for value, w in outcomes]
    squares = {
        D2: sum((e - p) ** 2 for e, p in zip(exact, proxy, strict=True)) / 2,
        V2: sum(e**2 for e in exact) / 2,
        MEAN2: (sum(exact) / 2) ** 2,
        BATCH: sp.Integer(size),
    }
    return sum(weight * (total / size) ** 2 for total, weight in totals), squares


@cache
def batch_second_moment() -> sp.Expr:
    """E‖mean of B independent (task, coin) pairs‖²: B squares and B(B − 1) products of independent terms, over B²."""
    return (BATCH * ((1 / Q - 1) * D2 + V2) + BATCH * (BATCH - 1) * MEAN2) / BATCH**2


@claim("batch", "ours", says=r"\mathbb{E}\|G\|^2 = %s", form=MEAN2 + (V2 + (1 / Q - 1) * D2 - MEAN2) / BATCH)
def batch(form: sp.Expr) -> str:
    """A batch of B independent (task, coin) pairs, for every B; and by all 4^B outcomes of two tasks at B = 1 and 2."""
    found = vanishes(batch_second_moment() - form)
    for size in (1, 2) if found == "proved" else ():
        brute, squares = enumerated_batch(size)
        found = worst(found, vanishes(brute - form.subs(squares)))
    return found
