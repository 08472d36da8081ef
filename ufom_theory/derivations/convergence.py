"""Theorem 1: descent lemma → bound for any step sizes → k^(−1/2) → (18) with its constant → iterations → (19)."""

import sympy as sp

from ufom_theory.derivations.symbols import A_Q, C_DET, C_RND, DELTA, EPSILON, GAMMA, GAP, L_M, TAU, V2, M, Q

NORM2 = sp.Symbol("g2", nonnegative=True)  # E‖∇M(θ_{k−1})‖²
STEPS, SQUARES = sp.symbols("S1 S2", positive=True)  # Σγ_k and Σγ_k²
T = sp.Symbol("t", positive=True)


def descent() -> sp.Expr:
    """Bound of E M(θ_k) − E M(θ_{k−1}): −γ·E‖∇M‖² + ½·L_M·γ²·A.

    M(θ − γG) − M(θ) + γ⟨∇M, G⟩ = −γ∫₀¹⟨∇M(θ − tγG) − ∇M, G⟩dt ≤ ∫₀¹ L_M·tγ·γ‖G‖² dt; then E⟨∇M, G⟩ = ‖∇M‖², G
    being unbiased, and E‖G‖² ≤ A by Lemma 1.
    """
    remainder = sp.integrate(L_M * T * GAMMA**2 * A_Q, (T, 0, 1))
    return -GAMMA * NORM2 + remainder


def any_steps() -> sp.Expr:
    """[Δ + ½·L_M·A·Σγ²]/Σγ ≥ min_{u<τ} E‖∇M(θ_u)‖²: the descent summed over k, with E M(θ_τ) ≥ M_*.

    The sum is linear in γ and γ², so it is the descent with Σγ and Σγ² in their place, set to −Δ and solved.
    With Σγ = ∞ and Σγ² < ∞ the bound tends to 0, and so it does when the sum starts at any later iterate, whose
    expected gap is finite by the same descent: the lower limit is 0, part 1 of Theorem 1.
    """
    step = sp.Poly(descent(), GAMMA)
    summed = step.coeff_monomial(GAMMA) * STEPS + step.coeff_monomial(GAMMA**2) * SQUARES
    (bound,) = sp.solve(summed + GAP, NORM2)
    return sp.expand(bound)


def root_steps() -> sp.Expr:
    """For γ_k = k^(−1/2): [Δ + ½·L_M·A·(1 + ln τ)]/(2(√(τ+1) − 1)), both sums compared with integrals.

    k^(−1/2) ≥ ∫_k^{k+1} x^(−1/2) dx, and 1/k ≤ ∫_{k−1}^k dx/x for k ≥ 2.
    """
    x = sp.Symbol("x", positive=True)
    from_below = sp.integrate(1 / sp.sqrt(x), (x, 1, TAU + 1))
    from_above = 1 + sp.integrate(1 / x, (x, 1, TAU))
    return any_steps().subs({STEPS: from_below, SQUARES: from_above})


def logarithm_peak() -> sp.Expr:
    """max over τ > 0 of (1 + ln τ)·τ^(−ε) = e^(ε−1)/ε, ε > 0: where its derivative in u = ln τ vanishes."""
    u, eps = sp.Symbol("u", real=True), sp.Symbol("epsilon", positive=True)
    function = (1 + u) * sp.exp(-eps * u)
    (peak,) = sp.solve(sp.diff(function, u), u)
    return sp.simplify(function.subs(u, peak)).subs(eps, EPSILON)


def logarithm_turns() -> sp.Expr:
    """The derivative of (1 + u)e^(−εu) over e^(−εu): falling in u, so its one zero is the maximum."""
    u = sp.Symbol("u", real=True)
    return sp.expand(sp.simplify(sp.diff((1 + u) * sp.exp(-EPSILON * u), u) * sp.exp(EPSILON * u)))


def root_share() -> tuple[sp.Expr, sp.Expr]:
    """√(τ+1) − 1 ≥ (√2 − 1)·√τ for τ ≥ 1: the ratio at τ = 1, and its derivative (times a positive factor), > 0."""
    x = sp.Symbol("x", positive=True)
    ratio = (sp.sqrt(x + 1) - 1) / sp.sqrt(x)
    slope = sp.simplify(sp.diff(ratio, x) * 2 * x ** sp.Rational(3, 2) * sp.sqrt(x + 1))
    return ratio.subs(x, 1), slope


def constant_18() -> sp.Expr:
    """H(ε) = [Δ/V2 + (L_M/2)·e^(ε−1)/ε]/(2(√2 − 1)), with min E‖∇M‖² ≤ A·H(ε)·τ^(−1/2+ε).

    Δ ≤ A·Δ/V2 since A ≥ V2 > 0, 1 + ln τ ≤ τ^ε·`logarithm_peak`, and the denominator is at least
    2(√2 − 1)·√τ by `root_share`. It is free of q, and grows as 1/ε.
    """
    return (GAP / V2 + L_M / 2 * logarithm_peak()) / (2 * root_share()[0])


def iterations() -> sp.Expr:
    """τ at which A·H·τ^(−1/2+ε) = δ: (H·A/δ)^(1/(1/2 − ε)).

    The paper prints the exponent −1/(0.5 + ε) of the inverse, from which its own (19) does not follow.
    """
    constant = sp.Symbol("H", positive=True)
    log_tau, log_ratio = sp.symbols("log_tau log_ratio", real=True)  # log_ratio = ln(A·H/δ)
    (solution,) = sp.solve(log_ratio + (EPSILON - sp.Rational(1, 2)) * log_tau, log_tau)
    return (A_Q * constant / DELTA) ** sp.simplify(solution / log_ratio)


def exponent_of(count: sp.Expr) -> sp.Expr:
    """m with count ∝ A^m: the logarithmic derivative of a number of iterations in A."""
    return sp.simplify(A_Q * sp.diff(sp.log(count), A_Q))


def time(exponent: sp.Expr = M) -> sp.Expr:
    """(19): A^m·(C_det + C_rnd·q), iterations times the cost of one."""
    return A_Q**exponent * (C_DET + C_RND * Q)


def tuned_constant() -> sp.Expr:
    """Iterations with one γ tuned to the horizon τ: `any_steps` minimised over γ is √(2·Δ·L_M·A/τ), so m = 1."""
    bound = any_steps().subs({STEPS: GAMMA * TAU, SQUARES: GAMMA**2 * TAU})
    (best,) = sp.solve(sp.diff(bound, GAMMA), GAMMA)
    (count,) = sp.solve(sp.simplify(bound.subs(GAMMA, best)) ** 2 - DELTA**2, TAU)
    return count


def polyak_lojasiewicz_step() -> tuple[sp.Expr, sp.Expr]:
    """One step under ‖∇M‖² ≥ 2μ(M − M_*) with γ_k = 1/(μ(k + 1)): k(k+1)·e_k ≤ (k−1)k·e_{k−1} + L_M·A/(2μ²)·k/(k+1).

    e_k = E M(θ_k) − M_*. The left sides telescope: e_τ ≤ L_M·A/(2μ²(τ + 1)), hence iterations ∝ A and m = 1.
    Returns the step as the descent gives it, times k(k + 1), and as written here.
    """
    k, before, mu = sp.symbols("k e mu", positive=True)
    step = before + descent().subs({NORM2: 2 * mu * before, GAMMA: 1 / (mu * (k + 1))})
    return sp.expand(step * k * (k + 1)), sp.expand((k - 1) * k * before + L_M * A_Q / (2 * mu**2) * k / (k + 1))


def local_ratio(s: sp.Rational, c: sp.Expr) -> sp.Expr:
    """lim e_k/γ_k near a minimiser with curvature h, for γ_k = c·k^(−s): e_k = (1 − hγ_k)²·e_{k−1} + γ_k²·A.

    z_k = e_k/γ_k obeys z_k = [1 − w_k·γ_k]·z_{k−1} + γ_k·A with w_k = (1 − (γ_{k−1}/γ_k)(1 − hγ_k)²)/γ_k. As Σγ = ∞ it
    tends to A/lim w: A/(2h) for s < 1, A/(2h − 1/c) at s = 1 (for 2hc > 1). So e_k ∝ A·k^(−s) and m = 1/s, with D2 and
    V2 taken at the minimiser.
    """
    h, k = sp.symbols("h k", positive=True)
    rate = c * k ** (-s)
    weight = (1 - (k / (k - 1)) ** s * (1 - h * rate) ** 2) / rate
    return A_Q / sp.limit(sp.expand(weight), k, sp.oo)


def local_iterations() -> sp.Expr:
    """Iterations until A·c·k^(−s)/(2h) = δ, the local law: ∝ A^(1/s)."""
    s, c, h = sp.symbols("s c h", positive=True)
    return (A_Q * c / (2 * h * DELTA)) ** (1 / s)
