"""Stratified coins: exactly k of B tasks are corrected, drawn without replacement. One coordinate of each gradient."""

from functools import cache

import sympy as sp

from ufom_theory.derivations.registry import claim, vanishes
from ufom_theory.derivations.symbols import D2, Q

BATCH = sp.Symbol("B", positive=True)
COUNT = sp.Symbol("k", positive=True)
PART = sp.Symbol("f", nonnegative=True)  # frac(qB): k = k_0 + Bernoulli(f)
WEIGHT = sp.Symbol("w", positive=True)
MEAN_G, MEAN_D = sp.symbols("g e", real=True)  # E G and E d
VAR = sp.Symbol("Var", nonnegative=True)  # Var G
CROSS = sp.Symbol("Cov", real=True)  # Cov(G, d)


def coin_moments() -> tuple[sp.Expr, sp.Expr]:
    """E[x_i] and E[x_i·x_j] for i ≠ j, x the indicators of k of B drawn without replacement."""
    return COUNT / BATCH, COUNT * (COUNT - 1) / (BATCH * (BATCH - 1))


def given_count() -> tuple[sp.Expr, sp.Expr]:
    """Mean and second moment of (1/B)·Σ[G_i + (w·x_i − 1)·d_i] over tasks and subsets, k and w given.

    The tasks are i.i.d. and independent of the subset: B terms of one task, B(B − 1) products of two.
    """
    one, two = coin_moments()
    shift = WEIGHT * one - 1  # E[w·x − 1]
    square = WEIGHT**2 * one - 2 * WEIGHT * one + 1  # E[(w·x − 1)²]
    product = WEIGHT**2 * two - 2 * WEIGHT * one + 1  # E[(w·x_i − 1)(w·x_j − 1)]
    mean = MEAN_G + shift * MEAN_D
    single = VAR + MEAN_G**2 + 2 * shift * (CROSS + MEAN_G * MEAN_D) + square * D2
    pair = MEAN_G**2 + 2 * shift * MEAN_G * MEAN_D + product * MEAN_D**2
    return mean, sp.expand((single + (BATCH - 1) * pair) / BATCH)


def _over_count(expression: sp.Expr, whole: sp.Expr) -> sp.Expr:
    """E over k = k_0 + Bernoulli(f)."""
    return (1 - PART) * expression.subs(COUNT, whole) + PART * expression.subs(COUNT, whole + 1)


@cache
def by_probability() -> tuple[sp.Expr, sp.Expr]:
    """Mean and what the coins add to the second moment, weight 1/q, with q = (k_0 + f)/B."""
    whole = Q * BATCH - PART
    mean, second = (_over_count(x.subs(WEIGHT, 1 / Q), whole) for x in given_count())
    return sp.cancel(mean), sp.cancel(second - MEAN_G**2 - VAR / BATCH)


def by_probability_form() -> sp.Expr:
    """(1/B)(1/q − 1)(D² − e²) + f(1 − f)·e²/(qB)²."""
    return (1 / Q - 1) * (D2 - MEAN_D**2) / BATCH + PART * (1 - PART) * MEAN_D**2 / (Q * BATCH) ** 2


@cache
def by_count() -> tuple[sp.Expr, sp.Expr]:
    """Mean and what the coins add, weight B/k, for a given k: its average over k follows, the mean being G for each."""
    mean, second = (x.subs(WEIGHT, BATCH / COUNT) for x in given_count())
    return sp.cancel(mean), sp.cancel(second - MEAN_G**2 - VAR / BATCH)


def by_count_form() -> sp.Expr:
    """(1/B)(B/k − 1)(D² − e²)."""
    return (BATCH / COUNT - 1) * (D2 - MEAN_D**2) / BATCH


def weights_apart() -> tuple[sp.Expr, sp.Expr]:
    """What weight B/k adds over weight 1/q, and f(1 − f)/(k_0(k_0+1)(qB)²)·[qB·(D² − e²) − k_0(k_0 + 1)·e²].

    So weight B/k has the smaller moment where k_0(k_0 + 1)·e² > qB·(D² − e²), not always.
    """
    whole = sp.Symbol("k_0", positive=True)
    size = whole + PART  # qB
    by_k = _over_count(by_count_form(), whole)
    excess = sp.cancel(by_k - by_probability_form().subs(Q, size / BATCH))
    bracket = size * (D2 - MEAN_D**2) - whole * (whole + 1) * MEAN_D**2
    return excess, PART * (1 - PART) / (whole * (whole + 1) * size**2) * bracket


def best_scale() -> sp.Expr:
    """The c that minimises D_c² − ‖E d_c‖² = Var(G − c·F): Cov(G, F)/Var F."""
    scale, covariance, variance = sp.symbols("c Cov_GF Var_F", real=True)
    (best,) = sp.solve(sp.diff(VAR - 2 * scale * covariance + scale**2 * variance, scale), scale)
    return best


@claim(
    "stratified",
    "ours",
    says=r"\mathbb{E}\|G\|^2 - \mathbb{E}_{coins = 1} = %s \;(1/q),\quad %s \;(B/k)",
    form=(
        (1 / Q - 1) * (D2 - MEAN_D**2) / BATCH + PART * (1 - PART) * MEAN_D**2 / (Q * BATCH) ** 2,
        (BATCH / COUNT - 1) * (D2 - MEAN_D**2) / BATCH,
    ),
)
def stratified_coins(by_q: sp.Expr, by_k: sp.Expr) -> str:
    """What k of B corrected tasks add, drawn without replacement, with the weight 1/q, k = ⌊qB⌋ + Bernoulli(f), or B/k:
    ‖E d‖² = e² is taken off D² wherever 1/q − 1 stands. Both are unbiased."""
    (mean_q, second_q), (mean_k, second_k) = by_probability(), by_count()
    return vanishes(mean_q - MEAN_G, mean_k - MEAN_G, second_q - by_q, second_k - by_k)
