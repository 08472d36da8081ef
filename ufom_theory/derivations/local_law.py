"""The local law: outer SGD near a minimiser with Hessian H ≻ 0, and gradient noise of covariance Σ there.

θ_k − θ* = (I − γH)(θ_{k−1} − θ*) − γ·noise, so that P = E(θ − θ*)(θ − θ*)ᵀ goes to (I − γH)P(I − γH) + γ²Σ. In the
eigenbasis of H the entry of P at (i, l) moves on its own: that is the law in any dimension. Σ = (1/q − 1)·E dddᵀ + Cov
G_exact, at θ*.
"""

from __future__ import annotations

from functools import cache

import sympy as sp

from ufom_theory.derivations.convergence import exponent_of
from ufom_theory.derivations.registry import claim, step, vanishes, worst
from ufom_theory.derivations.symbols import A_Q, DELTA, GAMMA

H, H2, NOISE, ENTRY, SCALE, COUNT = sp.symbols(r"h_i h_l \Sigma_{il} P_{il} c k", positive=True)
WEIGHT, DECAY = sp.Symbol("a", real=True), sp.Symbol("s", positive=True)
ONE = sp.Symbol(r"\Sigma_{ii}", positive=True)


def moved(entry: sp.Expr, gamma: sp.Expr) -> sp.Expr:
    """The entry of P after one step."""
    return (1 - gamma * H) * (1 - gamma * H2) * entry + gamma**2 * NOISE


@step("lyapunov", GAMMA * NOISE / (H + H2), r"P_{il} \simeq %s")
def lyapunov(form: sp.Expr) -> str:
    """To first order in γ the stationary P solves HP + PH = γΣ: what one step changes is of third order."""
    change = sp.expand(moved(form, GAMMA) - form)
    return vanishes(*(sp.limit(change / GAMMA**n, GAMMA, 0) for n in (1, 2)))


@claim("local-weighted", "ours", says=r"\mathrm{tr}(H^a P) = \sum_i %s", form=GAMMA * H ** (WEIGHT - 1) * ONE / 2)
def weighted(form: sp.Expr) -> str:
    """For M − M_* = ½tr(HP) the plain moments decide, Σ unweighted; for E‖∇M‖² = tr(H²P) those weighted by H; for E‖θ −
    θ*‖² = tr P those weighted by H⁻¹. In any dimension: the trace adds over the eigenvectors i."""
    diagonal = (GAMMA * NOISE / (H + H2)).subs({H2: H, NOISE: ONE})
    return vanishes(sp.expand_power_base(sp.powsimp(H**WEIGHT * diagonal - form)))


HARMONIC = SCALE * NOISE / (H + H2 - 1 / SCALE)


@claim("local-harmonic", "ours", says=r"k\,P_{il} \to %s \quad (\gamma_k = c/k)", form=HARMONIC)
def falling(form: sp.Expr) -> str:
    """With γ_k = c/k the equation is HP + PH − P/c = cΣ for P = lim k·P_k, and needs c·λ_min > 1/2: with P_k = form/k
    one step leaves an error of order k⁻³ where P moves by k⁻²."""
    after = moved(form / (COUNT - 1), SCALE / COUNT) - form / COUNT
    return vanishes(sp.limit(sp.together(after * COUNT**2 / form), COUNT, sp.oo))


CURVE = sp.Symbol("h", positive=True)


@cache
def local_ratio(s: sp.Rational, c: sp.Expr) -> sp.Expr:
    """lim e_k/γ_k in one dimension for γ_k = c·k^(−s): e_k = (1 − hγ_k)²·e_{k−1} + γ_k²·A.

    z_k = e_k/γ_k obeys z_k = [1 − w_k·γ_k]·z_{k−1} + γ_k·A with w_k = (1 − (γ_{k−1}/γ_k)(1 − hγ_k)²)/γ_k. As Σγ = ∞ it
    tends to A/lim w.
    """
    rate = c * COUNT ** (-s)
    weight = (1 - (COUNT / (COUNT - 1)) ** s * (1 - CURVE * rate) ** 2) / rate
    return A_Q / sp.limit(sp.expand(weight), COUNT, sp.oo)


@claim(
    "local-law",
    "ours",
    says=r"\frac{e_k}{\gamma_k} \to %s \;(s < 1),\quad %s \;(s = 1),\quad m = %s",
    form=(A_Q / (2 * CURVE), A_Q / (2 * CURVE - 1 / SCALE), 1 / DECAY),
)
def local_law(slow: sp.Expr, harmonic: sp.Expr, exponent: sp.Expr) -> str:
    """The last iterate near a minimiser in one dimension, γ_k = c·k^(−s) (s = 1/2, 3/4; s = 1 for 2hc > 1): e_k ∝
    A·k^(−s), so the exponent is 1/s, with D² and V² taken at θ*. Theorem 1's is 1/min(s, 1 − s): at s = 3/4 they are
    4/3 and 4."""
    cases = ((sp.S.Half, slow), (sp.Rational(3, 4), slow), (sp.S.One, harmonic))
    iterations = (slow * SCALE / DELTA) ** (1 / DECAY)  # A·c·k^(−s)/(2h) = δ
    solved = exponent_of(iterations)
    return worst((vanishes(local_ratio(s, SCALE) - form) for s, form in cases), vanishes(solved - exponent))
