"""The law of one step: expected progress to second order in γ, the best q at a fixed step, tuned steps, break-even."""

from functools import cache

import sympy as sp

from ufom_theory.derivations import optimum
from ufom_theory.derivations.registry import claim, holds, step, vanishes, worst
from ufom_theory.derivations.second_moment import estimate, over_coin
from ufom_theory.derivations.symbols import C_DET, C_RND, D2, GAMMA, KAPPA, V2, M, Q

G, D = sp.symbols("G d", real=True)  # one task's exact gradient and correction along one eigenvector of H
CURVATURE = sp.Symbol("h", real=True)  # its eigenvalue
MEAN = sp.Symbol("g", real=True)  # ∇M along it
START, SLOPE = sp.symbols("s D'", positive=True)  # the progress is γ·(s − D'/q)
NORM2 = sp.Symbol("g2", positive=True)  # ‖∇M‖²
ELL = sp.Symbol("ell", positive=True)
A = sp.Symbol("A", positive=True)
VAR, VAR_F, BIAS2 = sp.symbols("Var Var_F Ed2", positive=True)
CALLS = sp.Symbol("N", positive=True)


@cache
def decrease() -> tuple[sp.Expr, sp.Expr]:
    """E_ξ[M(θ) − M(θ − γĜ)] of one task for a quadratic M by the coin's outcomes, and γgG − γ²h/2·[G² + (1/q − 1)d²].

    Summed over eigenvectors and averaged over tasks: E[Gᵀ H G] = ℓ_g‖g‖² + ℓ·Var, E[dᵀ H d] = ℓ_d·D². A batch of B
    divides Var and D² by B.
    """
    step = over_coin(lambda coin: GAMMA * MEAN * estimate(coin, G, G - D)
                     - GAMMA**2 * CURVATURE / 2 * estimate(coin, G, G - D) ** 2)  # fmt: skip
    form = GAMMA * MEAN * G - GAMMA**2 * CURVATURE / 2 * (G**2 + (1 / Q - 1) * D**2)
    return sp.expand(step), sp.expand(form)


@cache
def stationary() -> sp.Poly:
    """Where progress per cost (s − D'/q)/(κ + q) is stationary: s·q² − 2D'·q − κD' = 0."""
    slope = sp.diff((START - SLOPE / Q) / (KAPPA + Q), Q)
    return sp.Poly(-sp.numer(sp.together(slope)), Q)


def fixed_step_root() -> sp.Expr:
    """Its positive root, [D' + √(D'² + κsD')]/s: before it the progress per cost rises, after it it falls."""
    return (SLOPE + sp.sqrt(SLOPE**2 + KAPPA * START * SLOPE)) / START


@cache
def below_one() -> sp.Expr:
    """The quadratic at q = 1, > 0 where the root is below 1: s > (2 + κ)·D'."""
    return sp.expand(stationary().eval(1))


def smallest_steps() -> sp.Expr:
    """lim q*/√γ as γ → 0, with s → ‖g‖² and D' = γ·x: √(κx/‖g‖²)."""
    x = sp.Symbol("x", positive=True)
    return sp.limit(fixed_step_root().subs({START: NORM2, SLOPE: GAMMA * x}) / sp.sqrt(GAMMA), GAMMA, 0)


def quadratic() -> sp.Expr:
    """Progress γ‖g‖² − γ²·ℓ·A/2 of a step with one curvature for all directions."""
    return GAMMA * NORM2 - GAMMA**2 * ELL * A / 2


@cache
def tuned() -> sp.Expr:
    """max over γ of γ‖g‖² − γ²·ℓ·A/2: ‖g‖⁴/(2ℓA), so that the time is ∝ A·C and m = 1."""
    progress = quadratic()
    (best,) = sp.solve(sp.diff(progress, GAMMA), GAMMA)
    return sp.simplify(progress.subs(GAMMA, best))


def normalised() -> sp.Expr:
    """Progress ‖g‖²/√A over γ of a step g/√A, of one scale for all coordinates: a model of Adam."""
    return NORM2 / sp.sqrt(A)


@cache
def normalised_exponent() -> sp.Expr:
    """Such steps have progress ∝ A^(−1/2), so m = 1/2."""
    return sp.simplify(-A * sp.diff(sp.log(normalised()), A))


@cache
def break_even() -> sp.Expr:
    """N at which FOM's mean squared error ‖E d‖² + Var_F/N is UFOM's at the same cost, (A − ‖g‖²)·C/(N·C_det)."""
    noise = VAR + (1 / Q - 1) * D2
    cost = C_DET + C_RND * Q
    (count,) = sp.solve(BIAS2 + VAR_F / CALLS - noise * cost / (CALLS * C_DET), CALLS)
    return count


@cache
def least_noise() -> sp.Expr:
    """The numerator of ∂(A − ‖g‖²)·C/∂q less (21) at m = 1 with Var for V²: 0.

    So at a fixed budget for a step, which B = budget/C(q) tasks use up, the best q does not depend on the budget.
    """
    noise = (VAR + (1 / Q - 1) * D2) * (C_DET + C_RND * Q)
    return sp.expand(sp.numer(sp.together(sp.diff(noise, Q))) - optimum.quadratic().as_expr().subs({M: 1, V2: VAR}))


def fom_is_fixed() -> tuple[sp.Expr, sp.Expr]:
    """At f = 0: ‖∇M‖² − ‖E d‖², with d = G − F, vanishes; ⟨g, f⟩ = ‖g‖² − ⟨g, E d⟩ ≥ ‖g‖(‖g‖ − ‖E d‖) elsewhere."""
    g, f = sp.symbols("g f", real=True)
    return sp.expand((g**2 - (g - f) ** 2).subs(f, 0)), sp.expand(g * f - (g**2 - g * (g - f)))


@step(
    "one-step",
    GAMMA * MEAN * G - GAMMA**2 * CURVATURE / 2 * (G**2 + (1 / Q - 1) * D**2),
    r"\mathbb{E}_\xi[M(\theta) - M(\theta - \gamma \hat G)] \simeq %s",
)
def expected_decrease(form: sp.Expr) -> str:
    """Along one eigenvector of ∇²M, to second order in γ, for one task: the mean over the coin."""
    return vanishes(decrease()[0] - form)


@claim(
    "fixed-step",
    "ours",
    says=r"q^* = %s,\quad f(1) = %s",
    form=((SLOPE + sp.sqrt(SLOPE**2 + KAPPA * START * SLOPE)) / START, START - (2 + KAPPA) * SLOPE),
)
def fixed_step(root: sp.Expr, at_one: sp.Expr) -> str:
    """The same γ for every q: progress per cost (s − D'/q)/(κ + q) is stationary there, and the root is below 1 where
    f(1) > 0."""
    return worst(holds(root.is_positive), vanishes(stationary().as_expr().subs(Q, root), below_one() - at_one))


@claim("tuned-step", "ours", says=r"\max_\gamma = %s,\quad m_{Adam} = %s", form=(NORM2**2 / (2 * ELL * A), sp.S.Half))
def tuned_step(progress: sp.Expr, exponent: sp.Expr) -> str:
    """γ tuned to q: progress ∝ ‖g‖⁴/A, so that m = 1. A model, not a theorem: steps g/√A of one scale, as Adam's at a
    fixed rate, have m = 1/2."""
    return vanishes(tuned() - progress, normalised_exponent() - exponent)


@claim(
    "break-even", "ours", says="N_b = %s", form=((VAR + (1 / Q - 1) * D2) * (C_DET + C_RND * Q) / C_DET - VAR_F) / BIAS2
)
def fom_breaks_even(form: sp.Expr) -> str:
    """FOM's task gradients after which UFOM's mean squared error is smaller at the same cost; the best q here is (21)
    with m = 1 and Var for V²."""
    return worst(vanishes(break_even() - form), vanishes(least_noise()))
