"""The roulette over the backward loop: its mean and second moment by enumeration, and the best survival probabilities.

Level i is reached where u < q_i, 1 ≥ q_1 ≥ … ≥ q_n > 0, and adds (G_i − G_{i−1})/q_i; G_n is the exact gradient.
"""

from functools import cache

import sympy as sp

from ufom_theory.derivations.registry import claim, holds, step, vanishes, worst
from ufom_theory.derivations.symbols import C_DET, C_RND, D2, V2, M, Q

A0, C0 = sp.symbols("a0 c0", positive=True)
TOTAL = sp.Symbol("S", positive=True)  # Σ√(a_i·c_i) over the free levels
T = sp.Symbol("t", positive=True)


def symbols(n: int) -> tuple[tuple[sp.Symbol, ...], tuple[sp.Symbol, ...]]:
    """One coordinate of G_0 … G_n, and q_1 … q_n."""
    return sp.symbols(f"G0:{n + 1}", real=True), sp.symbols(f"q1:{n + 1}", positive=True)


def _over_uniform(n: int, power: int) -> sp.Expr:
    levels, q = symbols(n)
    ends = [levels[0]]
    for i in range(n):
        ends.append(ends[-1] + (levels[i + 1] - levels[i]) / q[i])
    reached = (sp.S.One, *q, sp.S.Zero)
    return sum((reached[i] - reached[i + 1]) * end**power for i, end in enumerate(ends))


@cache
def mean(n: int = 3) -> sp.Expr:
    """E_u of the estimate, which is G_n: unbiased."""
    return sp.expand(_over_uniform(n, 1))


@cache
def second_moment(n: int = 3) -> sp.Expr:
    """E_u of its square, by the n + 1 ways it can end."""
    return sp.expand(_over_uniform(n, 2))


def second_moment_form(n: int = 3) -> sp.Expr:
    """a_0 + Σ a_i/q_i, a_0 = V² − D²_0, a_i = D²_{i−1} − D²_i, D_i = G_n − G_i: the same, point by point."""
    levels, q = symbols(n)
    bias = [(levels[-1] - level) ** 2 for level in levels]
    return levels[-1] ** 2 - bias[0] + sum((bias[i] - bias[i + 1]) / q[i] for i in range(n))


def coefficients() -> tuple[sp.Expr, sp.Expr]:
    """The proof for every n: the coefficient of 1/q_i in E[square], and a_i = (v + δ)² − v².

    With δ_i = G_i − G_{i−1} the estimate is G_0 + Σ 1{u < q_i}·δ_i/q_i, and E[1{u < q_i}·1{u < q_j}] = q_j for i < j.
    So 1/q_i has the coefficient δ_i² + 2δ_i·Σ_{j>i} δ_j, where Σ_{j>i} δ_j = v = G_n − G_i.
    """
    delta, rest = sp.symbols("delta v", real=True)
    return delta**2 + 2 * delta * rest, sp.expand((rest + delta) ** 2 - rest**2)


@cache
def stationary(n: int = 2) -> list[sp.Expr]:
    """∂ log(A^m·C)/∂q_i at q_i = t·√(a_i/c_i), c_0 by `quadratic`: all 0. The roots of a_i and c_i are the symbols."""
    q = symbols(n)[1]
    a, c = (sp.symbols(f"{name}1:{n + 1}", positive=True) for name in ("root_a", "root_c"))
    moment = A0 + sum(x**2 / y for x, y in zip(a, q, strict=True))
    cost = C0 + sum(x**2 * y for x, y in zip(c, q, strict=True))
    (first,) = sp.solve(quadratic().as_expr(), C0)
    point = {x: T * y / z for x, y, z in zip(q, a, c, strict=True)}
    total = sum(x * y for x, y in zip(a, c, strict=True))
    slopes = (sp.diff(M * sp.log(moment) + sp.log(cost), x) for x in q)
    return [sp.simplify(slope.subs(point).subs(C0, first.subs(TOTAL, total))) for slope in slopes]


@cache
def quadratic() -> sp.Poly:
    """t²·A = m·C with A = a_0 + S/t and C = c_0 + S·t: a_0·t² − (m − 1)·S·t − m·c_0 = 0."""
    return sp.Poly(sp.expand(T**2 * (A0 + TOTAL / T) - M * (C0 + TOTAL * T)), T)


def scale() -> sp.Expr:
    """Its positive root, for a_0 > 0."""
    return ((M - 1) * TOTAL + sp.sqrt((M - 1) ** 2 * TOTAL**2 + 4 * M * A0 * C0)) / (2 * A0)


@cache
def one_level() -> sp.Expr:
    """One level is UFOM: with a_0 = V² − D², a_1 = D², c = (C_det, C_rnd), q = t·√(D²/C_rnd), D² times it is (21)."""
    point = {A0: V2 - D2, C0: C_DET, TOTAL: sp.sqrt(D2 * C_RND), T: Q * sp.sqrt(C_RND / D2)}
    return sp.expand(sp.simplify(quadratic().as_expr().subs(point) * D2))


def pooled() -> tuple[sp.Expr, sp.Expr]:
    """Two adjacent levels at q and (1 + x)·q, cost Σ a/q + λ·Σ c·q: its slope in x at 0, and a_1·c_2 − a_2·c_1.

    Where a_2/c_2 > a_1/c_1 the free optimum has q_2 > q_1, which is not allowed. The sum is convex in log q: the best
    allowed point has q_1 = q_2 = √((a_1 + a_2)/(λ(c_1 + c_2))): there the slope is ≤ 0 exactly when a_2·c_1 ≥ a_1·c_2.
    """
    a1, a2, c1, c2, multiplier, apart = sp.symbols("a1 a2 c1 c2 lambda x", positive=True)
    q = sp.sqrt((a1 + a2) / (multiplier * (c1 + c2)))
    total = a1 / q + a2 / (q * (1 + apart)) + multiplier * (c1 * q + c2 * q * (1 + apart))
    slope = sp.diff(total, apart).subs(apart, 0)
    return sp.factor(sp.simplify(slope * q * (c1 + c2))), a1 * c2 - a2 * c1


DELTA, REST = sp.symbols("delta v", real=True)


@step("roulette-level", (DELTA + REST) ** 2 - REST**2, r"a_i = %s")
def level_coefficient(form: sp.Expr) -> str:
    """The coefficient of 1/q_i in E‖G‖², for every number of levels: with δ = G_i − G_{i−1} and v = G_n − G_i it is δ²
    + 2δv = D²_{i−1} − D²_i, as the indicators of i < j have the mean product q_j. (And by all outcomes of three levels,
    unbiased.)"""
    by_outcomes = vanishes(mean() - symbols(3)[0][-1], second_moment() - second_moment_form())
    return worst(vanishes(coefficients()[0] - form), by_outcomes)


@claim(
    "roulette",
    "ours",
    says=r"q_i = t\sqrt{a_i/c_i},\quad 0 = %s,\quad t = %s",
    form=(
        A0 * T**2 - (M - 1) * TOTAL * T - M * C0,
        ((M - 1) * TOTAL + sp.sqrt((M - 1) ** 2 * TOTAL**2 + 4 * M * A0 * C0)) / (2 * A0),
    ),
)
def best_survival(equation: sp.Expr, root: sp.Expr) -> str:
    """The best survival probabilities of A = a_0 + Σa_i/q_i and C = c_0 + Σc_iq_i, S = Σ√(a_ic_i), where none is cut:
    there every derivative of A^m·C vanishes (two levels). One level is (21)."""
    one = vanishes(one_level() - sp.expand(Q**2 * C_RND * (V2 - D2) - (M - 1) * Q * C_RND * D2 - M * D2 * C_DET))
    positive = holds(root.subs(M, sp.S.Half).subs(C0, TOTAL**2 / A0).is_positive)
    return worst(
        positive, vanishes(quadratic().as_expr() - equation, equation.subs(T, root)), vanishes(*stationary()), one
    )
