"""Theorem 1: the descent lemma, summed, for any outer step sizes → (17) and (18) with its constant → iterations → (19).

g_k is E‖∇M(θ_{k−1})‖², Δ = M(θ_0) − M_*, L_M the Lipschitz constant of ∇M, A(q) = (1/q − 1)·D² + V² by Lemma 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import sympy as sp

from ufom_theory.derivations.registry import bounds, claim, holds, random_point, step, vanishes, worst
from ufom_theory.derivations.symbols import (
    A_Q,
    C_DET,
    C_RND,
    D2,
    DELTA,
    EPSILON,
    GAMMA,
    GAP,
    INDEX,
    L_M,
    TAU,
    V2,
    M,
    Q,
)

NORM2 = sp.Symbol("g", nonnegative=True)
STEPS, SQUARES = sp.symbols("S_1 S_2", positive=True)  # Σγ_k and Σγ_k²
T, X, U = sp.Symbol("t", positive=True), sp.Symbol("x", positive=True), sp.Symbol("u", nonnegative=True)
GAMMAS, SECOND, NORMS = sp.IndexedBase("gamma"), sp.IndexedBase("A"), sp.IndexedBase("g")
VARIANCE = sp.Symbol("W", nonnegative=True)  # E‖G‖² − ‖∇M‖²


def descent(second: sp.Expr = A_Q) -> sp.Expr:
    """Bound of E M(θ_k) − E M(θ_{k−1}), by integrating along the step."""
    return -GAMMA * NORM2 + sp.integrate(L_M * T * GAMMA**2 * second, (T, 0, 1))


@step(
    "descent", -GAMMA * NORM2 + L_M * GAMMA**2 * A_Q / 2, r"\mathbb{E} M(\theta_k) - \mathbb{E} M(\theta_{k-1}) \le %s"
)
def descent_lemma(form: sp.Expr) -> str:
    """M(θ − γG) − M(θ) + γ⟨∇M, G⟩ = −γ∫₀¹⟨∇M(θ − tγG) − ∇M, G⟩dt ≤ ∫₀¹ L_M·tγ·γ‖G‖²dt. Given the past, G is unbiased:
    E⟨∇M, G⟩ = ‖∇M‖², and E‖G‖² ≤ A by Lemma 1."""
    return vanishes(descent() - form)


def _total(term: sp.Expr) -> sp.Sum:
    return sp.Sum(term, (INDEX, 1, TAU))


def _summed(form: sp.Expr, second: sp.Expr) -> str:
    """Is it [Δ + ½·L_M·Σγ_k²·A_k]/Σγ_k, at τ = 1, 2, 3 from the descent at each step? min ≤ the weighted mean."""

    def decided() -> Iterator[str]:
        for steps in (1, 2, 3):
            written = {GAMMAS[k]: sp.Symbol(f"gamma_{k}", positive=True) for k in range(6)}
            written |= {SECOND[k]: sp.Symbol(f"A_{k}", positive=True) for k in range(6)}
            falls = [descent(second).subs({GAMMA: GAMMAS[k], SECOND[INDEX]: SECOND[k]}) for k in range(1, steps + 1)]
            (least,) = sp.solve(sum(falls) + GAP, NORM2)  # one value for all: the largest minimum there can be
            yield bounds(form.subs(TAU, steps).doit().subs(written), sp.together(least.subs(written)))

    return worst(decided())


@claim(
    "theorem-1",
    "Theorem 1",
    says=r"\min_{u < \tau} \mathbb{E}\|\nabla M(\theta_u)\|^2 \le %s",
    form=(GAP + L_M * A_Q * _total(GAMMAS[INDEX] ** 2) / 2) / _total(GAMMAS[INDEX]),
)
def any_outer_steps(form: sp.Expr) -> str:
    """The descent, summed over τ steps of any size: Σγ_kg_k ≤ Δ + ½L_MAΣγ_k², and the least g_k is at most the weighted
    mean (τ = 1, 2, 3; one more step adds its own descent to both sides)."""
    return _summed(form, A_Q)


@claim(
    "adaptive-q",
    "Theorem 1",
    says=r"\min_{u < \tau} \mathbb{E}\|\nabla M(\theta_u)\|^2 \le %s",
    form=(GAP + L_M * _total(GAMMAS[INDEX] ** 2 * SECOND[INDEX]) / 2) / _total(GAMMAS[INDEX]),
)
def predictable_q(form: sp.Expr) -> str:
    """The same with A_k = E A(q_k) for adaptive q_k ∈ [q_min, 1] that are functions of what is known before step k, not
    of its tasks or coins: given the past the coin has the probability q_k, so that Lemma 1 holds step by step."""
    return _summed(form, SECOND[INDEX])


def any_steps() -> sp.Expr:
    """[Δ + ½·L_M·A·S_2]/S_1, S_1 = Σγ, S_2 = Σγ²: the descent summed over k, with E M(θ_τ) ≥ M_*."""
    return (GAP + L_M * A_Q * SQUARES / 2) / STEPS


@step(
    "variance-form",
    -GAMMA * (1 - L_M * GAMMA / 2) * NORM2 + L_M * GAMMA**2 * VARIANCE / 2,
    r"\mathbb{E} M(\theta_k) - \mathbb{E} M(\theta_{k-1}) \le %s",
)
def variance_form(form: sp.Expr) -> str:
    """One step with W = E‖G‖² − ‖∇M‖² in the place of A: at the price of the factor 1 − L_Mγ/2 where γ ≤ 1/L_M. On one
    task, with exact gradients, W = 0: no noise at all."""
    return vanishes(descent(VARIANCE + NORM2) - form)


@step("steps-vanish", GAMMA, r"\lim \frac{\sum \gamma_k^2}{\sum \gamma_k} = \lim_k %s")
def stolz(form: sp.Expr) -> str:
    """Theorem 1, part 1, needs (5) alone: as Σγ = ∞, the quotient of the sums has the limit of the quotient of their
    increments (Stolz–Cesàro), and γ_k → 0."""
    return vanishes(GAMMA**2 / GAMMA - form)


@claim("17", "(17)", says=r"\liminf_k \mathbb{E}\|\nabla M(\theta_k)\|^2 = %s", printed=sp.S.Zero)
def stationarity(limit: sp.Expr) -> str:
    """Under (5) alone: with S_2 = x·S_1, x → 0 and S_1 → ∞ the bound of Theorem 1 tends to 0. So it does from any later
    iterate on, whose gap is finite by the same descent: the lower limit is 0."""
    bound = any_steps().subs(SQUARES, X * STEPS)
    return vanishes(sp.limit(sp.limit(bound, STEPS, sp.oo), X, 0) - limit)


ROOT_V, ROOT_A, SIZE = sp.symbols("V a z", positive=True)  # 𝕍, √A, ‖G‖


@step(
    "moves",
    L_M * GAMMA * (2 * ROOT_V * ROOT_A + L_M * GAMMA * ROOT_A**2),
    r"|\mathbb{E}\|\nabla M(\theta_k)\|^2 - \mathbb{E}\|\nabla M(\theta_{k-1})\|^2| \le %s",
)
def norm_moves(form: sp.Expr) -> str:
    """|‖x‖² − ‖y‖²| ≤ ‖x − y‖(2‖y‖ + ‖x − y‖) with ‖x − y‖ ≤ L_Mγ‖G‖ and ‖∇M‖ ≤ 𝕍; then E‖G‖ ≤ a and E‖G‖² ≤ a², a =
    √A."""
    moved = L_M * GAMMA * SIZE
    expected = sp.expand(moved * (2 * ROOT_V + moved))
    return vanishes(expected.coeff(SIZE, 1) * ROOT_A + expected.coeff(SIZE, 2) * ROOT_A**2 - form)


RATE = sp.Symbol("C", positive=True)  # |g_k − g_{k−1}| ≤ C·γ_k


@claim(
    "17-limit",
    "(17)",
    says=r"\lim_k \mathbb{E}\|\nabla M(\theta_k)\|^2 = 0: \; \sum_{crossing} \gamma_k g_k \ge %s",
    form=DELTA**2 / RATE,
)
def limit_of_all(form: sp.Expr) -> str:
    """Where Σγ² < ∞, Σγ_kg_k ≤ Δ + ½L_MAΣγ² is finite, and g moves by at most Cγ_k a step (`moves`). A passage of g
    from δ to 2δ takes Σγ ≥ δ/C, all of it at g ≥ δ, and so this much of a finite sum: there are finitely many, and the
    lower limit 0 is the limit."""
    taken = (2 * DELTA - DELTA) / RATE
    return vanishes(DELTA * taken - form)


@claim(
    "5",
    "(5)",
    says=r"\sum_{k \le \tau} \gamma_k \ge %s,\quad \sum_{k \le \tau} \gamma_k^2 \ge %s \quad (\gamma_k = k^{-1/2})",
    form=(2 * sp.sqrt(TAU + 1) - 2, sp.log(TAU + 1)),
)
def outer_steps(total: sp.Expr, squares: sp.Expr) -> str:
    """γ_k = k^(−1/2) satisfies (5), but Σγ² = ∞: the two parts of Theorem 1 speak of different sequences. Both sums are
    at least the integrals over [1, τ + 1], which are unbounded."""
    integrals = [sp.integrate(X**-power, (X, 1, TAU + 1)) for power in (sp.S.Half, sp.S.One)]
    found = [vanishes(form - integral) for form, integral in zip((total, squares), integrals, strict=True)]
    return worst(*found, holds(*(sp.limit(x, TAU, sp.oo) == sp.oo for x in integrals)))


@step(
    "root-steps",
    (GAP + L_M * A_Q * (1 + sp.log(TAU)) / 2) / (2 * (sp.sqrt(TAU + 1) - 1)),
    r"\min_{u < \tau} \mathbb{E}\|\nabla M(\theta_u)\|^2 \le %s \quad (\gamma_k = k^{-1/2})",
)
def root_steps_bound(form: sp.Expr) -> str:
    """Theorem 1 with Σγ ≥ ∫_1^{τ+1} x^(−1/2)dx and Σγ² ≤ 1 + ∫_1^τ dx/x."""
    return vanishes(root_steps() - form)


@cache
def root_steps() -> sp.Expr:
    """The bound of Theorem 1 for γ_k = k^(−1/2), both sums compared with integrals."""
    from_below = sp.integrate(1 / sp.sqrt(X), (X, 1, TAU + 1))
    from_above = 1 + sp.integrate(1 / X, (X, 1, TAU))
    return any_steps().subs({STEPS: from_below, SQUARES: from_above})


POWER = sp.Symbol("p", positive=True)


def peak(power: sp.Expr) -> sp.Expr:
    """max over τ ≥ 1 of (1 + ln τ)·τ^(−p) for 0 < p ≤ 1."""
    return sp.exp(power - 1) / power


@step("logarithm", peak(POWER), r"\max_{\tau \ge 1} (1 + \ln \tau)\,\tau^{-p} = %s")
def logarithm_peak(form: sp.Expr) -> str:
    """In u = ln τ the derivative of (1 + u)e^(−pu) has the sign of 1 − p − pu, which falls: its zero, at u ≥ 0 for p ≤
    1, is the maximum."""
    u = sp.Symbol("u", real=True)
    function = (1 + u) * sp.exp(-POWER * u)
    slope = sp.expand(sp.simplify(sp.diff(function, u) * sp.exp(POWER * u)))
    (turn,) = sp.solve(slope, u)
    return worst(vanishes(function.subs(u, turn) - form, turn - (1 / POWER - 1)), holds(sp.diff(slope, u).is_negative))


@step("root-share", 1 + sp.sqrt(2 / X), r"\frac{\sqrt x}{\sqrt{x+1} - 1} \le %s")
def root_share(form: sp.Expr) -> str:
    """For x ≥ 1 the quotient is (√(x+1) + 1)/√x, equal at x = 1; √(x+1) grows less than √x does. For large x it tends
    to 1."""
    gap = sp.sqrt(X) * form - (sp.sqrt(X + 1) + 1)
    slope = sp.simplify(1 / (2 * sp.sqrt(X)) - 1 / (2 * sp.sqrt(X + 1)))
    rational = vanishes((sp.sqrt(X + 1) + 1) * (sp.sqrt(X + 1) - 1) - X)
    grows = holds(sp.simplify((X + 1) - X) > 0)  # so 1/√x > 1/√(x+1)
    return worst(vanishes(gap.subs(X, 1), sp.diff(gap, X) - slope), rational, grows)


@cache
def constant_18() -> sp.Expr:
    """H(ε), with min E‖∇M‖² ≤ A·H(ε)·τ^(−1/2+ε): `root-share` splits each term of `root-steps` in two."""
    noise = peak(EPSILON) + sp.sqrt(2) * peak(EPSILON + sp.S.Half)
    return (GAP / V2 * (1 + sp.sqrt(2)) + L_M / 2 * noise) / 2


@claim(
    "18",
    "(18)",
    says=r"\min_{u < \tau} \mathbb{E}\|\nabla M(\theta_u)\|^2 \le A(q)\,\tau^{-1/2+\epsilon}\, %s",
    form=(
        GAP / V2 * (1 + sp.sqrt(2))
        + L_M / 2 * (sp.exp(EPSILON - 1) / EPSILON + sp.sqrt(2) * sp.exp(EPSILON - sp.S.Half) / (EPSILON + sp.S.Half))
    )
    / 2,
)
def rate(form: sp.Expr) -> str:
    """For γ_k = k^(−1/2), 0 < ε < 1/2, the constant H(ε) that (18) hides. It is free of q, as A ≥ V² > 0, and grows as
    1/ε. The steps before prove it; each term, divided by √τ/(√(τ+1) − 1) ≤ 1 + √(2/τ), has its own maximum over τ ≥
    1."""
    terms = {GAP: V2 * X, L_M: 2 * U}  # Δ/V² and L_M/2 on their own
    split = sp.expand(form.subs(terms))
    first, noise = split.coeff(X, 1), split.coeff(U, 1)
    exact = vanishes(split - first * X - noise * U, first - (1 + sp.sqrt(2)) / 2)
    return worst(exact, vanishes(noise - (peak(EPSILON) + sp.sqrt(2) * peak(EPSILON + sp.S.Half)) / 2))


RATIO = sp.Symbol("H", positive=True)


@cache
def iterations() -> sp.Expr:
    """τ at which A·H·τ^(−1/2+ε) = δ."""
    log_tau, log_ratio = sp.symbols("log_tau log_ratio", real=True)  # log_ratio = ln(A·H/δ)
    (solution,) = sp.solve(log_ratio + (EPSILON - sp.S.Half) * log_tau, log_tau)
    return (A_Q * RATIO / DELTA) ** sp.simplify(solution / log_ratio)


@claim(
    "erratum-2",
    "before (19)",
    "refuted",
    r"\tau = %s",
    printed=(DELTA / (RATIO * A_Q)) ** (-1 / (sp.S.Half + EPSILON)),
    form=(DELTA / (RATIO * A_Q)) ** (-1 / (sp.S.Half - EPSILON)),
)
def iterations_exponent(form: sp.Expr) -> str:
    """The paper says that (18) reaches δ after (δ/(HA))^(−1/(0.5 + ε)) iterations; it is not so: the exponent is
    −1/(0.5 − ε), from which its own (19) follows. Counterexample: ε = 1/4, HA/δ = 2: 16 iterations, not 2^(4/3)."""
    left = sp.log(form / iterations())
    point = random_point(left.free_symbols, 1)
    return vanishes(sp.expand_log(left, force=True)) if left.subs(point).is_real else "refuted"


@cache
def exponent_of(count: sp.Expr) -> sp.Expr:
    """m with count ∝ A^m: the logarithmic derivative of a number of iterations in A."""
    return sp.simplify(A_Q * sp.diff(sp.log(count), A_Q))


def second_moment(q: sp.Expr = Q) -> sp.Expr:
    """A(q) written out."""
    return (1 / q - 1) * D2 + V2


@claim(
    "19",
    "(19)",
    says=r"\text{time} \propto %s",
    printed=((1 / Q - 1) * D2 + V2) ** (2 / (1 - 2 * EPSILON)) * (C_DET + C_RND * Q),
)
def time_19(form: sp.Expr) -> str:
    """The time to a given precision, iterations times the cost of one, is proportional to this: the quotient is free of
    q, D², V² and the costs."""
    inside = {Q: 1 / (1 + X), EPSILON: sp.S.Half - 1 / M}  # q in (0, 1), ε < 1/2
    time = iterations().subs(A_Q, second_moment()) * (C_DET + C_RND * Q)
    ratio = sp.expand_power_base((form / time).subs(inside), force=True)
    moving = ratio.free_symbols & {X, D2, V2, C_DET, C_RND}
    return worst(holds(ratio.is_positive), (vanishes(sp.diff(ratio, x)) for x in sorted(moving, key=str)))


def time(exponent: sp.Expr = M) -> sp.Expr:
    """(19) with a general exponent: A^m·(C_det + C_rnd·q), iterations times the cost of one."""
    return A_Q**exponent * (C_DET + C_RND * Q)
