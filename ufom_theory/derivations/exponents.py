"""The exponent m, time ∝ A(q)^m·C(q), by the outer step sizes: Theorem 1's bound, a tuned constant step, steps 1/k.

The local law of the last iterate has its own (`local_law`).
"""

from __future__ import annotations

from functools import cache

import sympy as sp

from ufom_theory.derivations.convergence import NORM2, SQUARES, STEPS, U, X, any_steps, descent, exponent_of
from ufom_theory.derivations.registry import claim, holds, vanishes, worst
from ufom_theory.derivations.symbols import A_Q, DELTA, GAMMA, GAP, L_M, TAU

DECAY = sp.Symbol("s", positive=True)  # γ_k = k^(−s)


@claim(
    "exponent-theorem",
    "ours",
    says=r"m(s) = %s \quad (\gamma_k = k^{-s},\; 0 < s < 1)",
    form=1 / sp.Min(DECAY, 1 - DECAY),
)
def exponent_of_theorem_1(form: sp.Expr) -> str:
    """The exponent of A in the time to precision by Theorem 1's bound. Σγ ~ τ^(1−s)/(1−s). For s < 1/2 Σγ² ~
    τ^(1−2s)/(1−2s), the bound falls as Aτ^(−s); for s > 1/2 Σγ² converges, the bound falls as Aτ^(−(1−s)), where
    ½L_MAΣγ² dominates Δ."""
    low = 1 / (2 + X)  # s in (0, 1/2)
    high = 1 - low  # s in (1/2, 1)

    def order(power: sp.Expr) -> sp.Expr:
        total = sp.integrate(U**-power, (U, 1, TAU))
        return sp.simplify(sp.limit(sp.log(total) / sp.log(TAU), TAU, sp.oo))

    falls = []
    for s in (sp.Rational(1, 4), sp.Rational(3, 4)):
        falls.append(1 / form.subs(DECAY, s) - (order(s) - order(2 * s)))
    return vanishes(*falls, form.subs(DECAY, low) - 1 / low, form.subs(DECAY, high) - 1 / low)


@cache
def tuned_constant() -> sp.Expr:
    """Iterations with one γ tuned to the horizon τ: the bound of Theorem 1 minimised over γ is √(2·Δ·L_M·A/τ)."""
    bound = any_steps().subs({STEPS: GAMMA * TAU, SQUARES: GAMMA**2 * TAU})
    (best,) = sp.solve(sp.diff(bound, GAMMA), GAMMA)
    (count,) = sp.solve(sp.simplify(bound.subs(GAMMA, best)) ** 2 - DELTA**2, TAU)
    return count


@claim("tuned-constant", "ours", says=r"\tau = %s", form=2 * GAP * L_M * A_Q / DELTA**2)
def tuned(form: sp.Expr) -> str:
    """m = 1 for one constant γ tuned to the horizon, and to q: iterations until √(2ΔL_MA/τ) = δ are ∝ A. (With one γ
    for every q the exponent is another.)"""
    return worst(vanishes(tuned_constant() - form), holds(exponent_of(form) == 1))


STRONG, COUNT = sp.symbols("mu k", positive=True)


@claim(
    "polyak",
    "ours",
    says=r"k(k+1)\,e_k \le %s",
    form=(COUNT - 1) * COUNT * U + L_M * A_Q / (2 * STRONG**2) * COUNT / (COUNT + 1),
)
def polyak_lojasiewicz(form: sp.Expr) -> str:
    """m = 1 too under ‖∇M‖² ≥ 2μ(M − M_*) with γ_k = 1/(μ(k + 1)): one step from u = e_{k−1}, e = E M − M_*, times k(k
    + 1). The left sides telescope: e_τ ≤ L_MA/(2μ²(τ + 1))."""
    after = U + descent().subs({NORM2: 2 * STRONG * U, GAMMA: 1 / (STRONG * (COUNT + 1))})
    return vanishes(after * COUNT * (COUNT + 1) - form)
