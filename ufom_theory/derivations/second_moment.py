"""UFOM's mean, second moment and covariance (12)–(13) by enumerating the coin; Lemma 1 first as an equality."""

from collections.abc import Callable

import sympy as sp

from ufom_theory.derivations.symbols import D2, V2, Q

EXACT, PROXY = sp.symbols("G_exact G_proxy", real=True)  # one coordinate of each gradient
BATCH = sp.Symbol("B", integer=True, positive=True)
MEAN2 = sp.Symbol("mean2", nonnegative=True)  # ‖∇M‖²


def over_coin(function: Callable[[sp.Expr], sp.Expr]) -> sp.Expr:
    """E_ξ of a function of the coin, ξ ~ Bernoulli(q)."""
    return (1 - Q) * function(sp.S.Zero) + Q * function(sp.S.One)


def estimate(coin: sp.Expr, exact: sp.Expr = EXACT, proxy: sp.Expr = PROXY) -> sp.Expr:
    """(12)–(13): G_proxy + (ξ/q)·(G_exact − G_proxy)."""
    return proxy + coin / Q * (exact - proxy)


def mean() -> sp.Expr:
    """E_ξ G, which is G_exact: UFOM is unbiased."""
    return sp.expand(over_coin(estimate))


def second_moment() -> sp.Expr:
    """E_ξ G² of a coordinate, = G_exact² + (1/q − 1)·(G_exact − G_proxy)²; summed over coordinates, E_ξ‖G‖²."""
    return sp.expand(over_coin(lambda coin: estimate(coin) ** 2))


def covariance() -> tuple[sp.Expr, sp.Expr]:
    """Cov_ξ of two coordinates, enumerated, and as (1/q − 1)·d_i·d_l with d = G_exact − G_proxy."""
    e1, e2, p1, p2 = sp.symbols("e1 e2 p1 p2", real=True)
    product = over_coin(lambda coin: estimate(coin, e1, p1) * estimate(coin, e2, p2))
    means = over_coin(lambda coin: estimate(coin, e1, p1)) * over_coin(lambda coin: estimate(coin, e2, p2))
    return sp.expand(product - means), sp.expand((1 / Q - 1) * (e1 - p1) * (e2 - p2))


def lemma_1() -> sp.Expr:
    """(1/q − 1)·D2 + V2: the second moment at each θ, once E_T of its two terms is bounded by two suprema."""
    squares = {EXACT**2: V2, (EXACT - PROXY) ** 2: D2}
    return (EXACT**2 + (1 / Q - 1) * (EXACT - PROXY) ** 2).subs(squares)


def suprema_apart() -> tuple[sp.Expr, sp.Expr]:
    """Where Lemma 1 is strict: sup of the sum, and sum of the suprema, on two θ with (D2, V2) = (1, 2) and (2, 1)."""
    at = [(1 / Q - 1) * d2 + v2 for d2, v2 in ((1, 2), (2, 1))]
    return sp.Max(*at), (1 / Q - 1) * 2 + 2


def batch_second_moment() -> sp.Expr:
    """E‖mean of B independent (task, coin) pairs‖²: B squares and B(B − 1) products of independent terms, over B²."""
    single = (1 / Q - 1) * D2 + V2
    return (BATCH * single + BATCH * (BATCH - 1) * MEAN2) / BATCH**2


def enumerated_batch(size: int) -> tuple[sp.Expr, sp.Expr]:
    """The same from scratch for two equally likely tasks: all 4^B outcomes, and `batch_second_moment` on them."""
    exact, proxy = sp.symbols("e1:3", real=True), sp.symbols("p1:3", real=True)
    outcomes = [(estimate(sp.Integer(x), e, p), (Q if x else 1 - Q) / 2)
                for e, p in zip(exact, proxy, strict=True) for x in (0, 1)]  # fmt: skip
    totals = [(sp.S.Zero, sp.S.One)]
    for _ in range(size):
        totals = [(total + value, weight * w) for total, weight in totals for value, w in outcomes]
    squares = {
        D2: sum((e - p) ** 2 for e, p in zip(exact, proxy, strict=True)) / 2,
        V2: sum(e**2 for e in exact) / 2,
        MEAN2: (sum(exact) / 2) ** 2,
        BATCH: size,
    }
    brute = sum(weight * (total / size) ** 2 for total, weight in totals)
    return sp.expand(brute), sp.expand(batch_second_moment().subs(squares))
