"""L_M, the Lipschitz constant of ∇M: how far each term of (6)–(9) moves with θ, under Assumption 1.

Inner Hessian blocks are bounded by L_eff (`bias_bound`); L2 alone bounds how far L_out's gradient moves.
"""

from collections.abc import Iterator
from functools import cache

import sympy as sp

from ufom_theory.derivations.registry import bounds, claim, step, vanishes, worst
from ufom_theory.derivations.symbols import (
    ALPHA,
    INDEX,
    L1,
    L2,
    L3,
    L_EFF,
    M1,
    M2,
    OWN,
    STEP_SIZES,
    R,
    at_length,
    step_sizes,
)


def state_constants(r: int, theta_in_losses: int = 1) -> list[sp.Expr]:
    """u_0 … u_r, the Lipschitz constants of θ ↦ φ_j: u_0 = M1, and (3) gives u_j = (1 + α_j·L_eff)·u_{j−1} + α_j·L_eff.

    The last term is the loss's own θ; `theta_in_losses` is 0 where it contains none.
    """
    constants = [M1]
    for alpha in step_sizes(r):
        constants.append((1 + alpha * L_EFF) * constants[-1] + theta_in_losses * alpha * L_EFF)
    return constants


@cache
def recursion(r: int, theta_in_losses: int = 1) -> sp.Expr:
    """L_M term by term, before any closed form.

    With |b_j| ≤ n_j = L1·∏_{i>j}(1 + α_i·L_eff) for the adjoints b_j = ∇_{φ_j} L_out, a product moves by (bound of one)
    × (motion of the other), so the adjoints' constants l_j obey, downwards from l_r = L2·(1 + u_r) by (9), l_{j−1} = (1
    + α_j·L_eff)·l_j + α_j·L3·(1 + u_{j−1})·n_j. The D_j (7) move by α_j·L_eff·l_j + α_j·L3·(1 + u_{j−1})·n_j, ∂L_out/∂θ
    by L2·(1 + u_r), (∂V/∂θ)ᵀb_0 by M1·l_0 + M2·n_0. Each 1 is the loss's own θ.
    """
    alphas, u = step_sizes(r), state_constants(r, theta_in_losses)
    n, own = L1, theta_in_losses
    adjoint = L2 * (own + u[r])
    total = own * adjoint  # ∂L_out/∂θ moves as ∂L_out/∂φ does
    for j in range(r, 0, -1):
        curving = alphas[j - 1] * L3 * (own + u[j - 1]) * n
        total += own * (alphas[j - 1] * L_EFF * adjoint + curving)
        adjoint = (1 + alphas[j - 1] * L_EFF) * adjoint + curving
        n = (1 + alphas[j - 1] * L_EFF) * n
    return total + M1 * adjoint + M2 * n


BEFORE, WHOLE, LATER, U = sp.symbols(r"P_{j-1} P \Sigma u", positive=True)  # Σ over i > j
PRODUCTS = sp.IndexedBase("P")  # P_j

FACTOR = 1 + ALPHA * L_EFF


@step("growth", sp.Product(1 + STEP_SIZES[INDEX] * L_EFF, (INDEX, 1, R)), "P_r = %s")
def growth(form: sp.Expr) -> str:
    """P_j is what every step's norm multiplies up to: P_0 = 1, P_j = (1 + α_jL_eff)·P_{j−1} (r = 1, 2, 3)."""
    return worst(
        bounds(at_length(form, r), at_length(form, r - 1) * (1 + step_sizes(r)[-1] * L_EFF) if r else sp.S.One)
        for r in range(4)
    )


@step("state-step", FACTOR * (1 + U), r"1 + u_j = %s")
def state_step(form: sp.Expr) -> str:
    """θ ↦ φ_j is Lipschitz with u_0 = M1, u_j = (1 + α_jL_eff)·u_{j−1} + α_jL_eff by (3): so 1 + u_j = (1 + M1)·P_j."""
    return vanishes(1 + FACTOR * U + ALPHA * L_EFF - form)


@step(
    "adjoint-step",
    (1 + M1) * WHOLE / BEFORE * (L2 * WHOLE + L1 * L3 * (LATER + ALPHA * BEFORE / FACTOR)),
    r"l_{j-1} = %s",
)
def adjoint_step(form: sp.Expr) -> str:
    """θ ↦ ∇_{φ_j}L_out is Lipschitz with l_r = L2·(1 + u_r) and l_{j−1} = (1 + α_jL_eff)·l_j + α_jL3(1 + u_{j−1})n_j.
    If l_j = (1 + M1)(P/P_j)[L2P + L1L3·Σ_{i>j} α_iP_{i−1}/(1 + α_iL_eff)], then l_{j−1} is the same with one more term;
    at j = r the sum is empty."""
    here = (1 + M1) * WHOLE / (BEFORE * FACTOR) * (L2 * WHOLE + L1 * L3 * LATER)
    curving = ALPHA * L3 * (1 + M1) * BEFORE * L1 * WHOLE / (BEFORE * FACTOR)
    return vanishes(FACTOR * here + curving - form)


SPREAD = sp.Sum(STEP_SIZES[INDEX] * PRODUCTS[INDEX - 1] / (1 + STEP_SIZES[INDEX] * L_EFF), (INDEX, 1, R))


@claim(
    "smoothness",
    "ours",
    says="L_M = %s",
    form=M2 * L1 * PRODUCTS[R] + (OWN + M1) ** 2 * PRODUCTS[R] * (L2 * PRODUCTS[R] + L1 * L3 * SPREAD),
)
def smoothness(form: sp.Expr) -> str:
    """∇M is Lipschitz with L_M = (1 + M1)·l_0 + M2·n_0, since l_0 − l_r is the sum of the D_j's constants: the sum of
    all terms, in closed form (r = 1, 2, 3, and the two steps). o is 1, and 0 where no loss contains θ."""

    def decided() -> Iterator[str]:  # nothing where all is proved
        for r in (1, 2, 3):
            grown = {PRODUCTS[j]: sp.prod(1 + alpha * L_EFF for alpha in step_sizes(r)[:j]) for j in range(r + 1)}
            for own in (1, 0):
                gap = at_length(form.subs(OWN, own), r).subs(grown) - recursion(r, own)
                factors = {alpha: (sp.Symbol(f"f{alpha}") - 1) / L_EFF for alpha in step_sizes(r)}  # f = 1 + α·L_eff
                if sp.expand(gap.subs(factors)) != 0:
                    yield bounds(gap, sp.S.Zero)
                    return

    return worst(decided())
