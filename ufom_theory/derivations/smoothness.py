"""L_M, the Lipschitz constant of ∇M: how far each term of (6)–(9) moves with θ, under Assumption 1."""

import sympy as sp

from ufom_theory.derivations.symbols import ALPHA, L1, L2, L3, M1, M2, step_sizes


def growth(r: int) -> list[sp.Expr]:
    """P_0 … P_r, P_j = ∏_{i≤j}(1 + α_i·L2)."""
    products = [sp.S.One]
    for alpha in step_sizes(r):
        products.append(products[-1] * (1 + alpha * L2))
    return products


def state_constants(r: int, theta_in_losses: int = 1) -> list[sp.Expr]:
    """u_0 … u_r, the Lipschitz constants of θ ↦ φ_j: u_0 = M1, and (3) gives u_j = (1 + α_j·L2)·u_{j−1} + α_j·L2.

    The last term is the loss's own θ; `theta_in_losses` is 0 where it contains none.
    """
    constants = [M1]
    for alpha in step_sizes(r):
        constants.append((1 + alpha * L2) * constants[-1] + theta_in_losses * alpha * L2)
    return constants


def recursion(r: int, theta_in_losses: int = 1) -> sp.Expr:
    """L_M term by term, before any closed form.

    With |b_j| ≤ n_j = L1·∏_{i>j}(1 + α_i·L2) for the adjoints b_j = ∇_{φ_j} L_out, a product moves by (bound of one)
    × (motion of the other), so the adjoints' constants l_j obey, downwards from l_r = L2·(1 + u_r) by (9),
    l_{j−1} = (1 + α_j·L2)·l_j + α_j·L3·(1 + u_{j−1})·n_j. The D_j (7) move by α_j·L2·l_j + α_j·L3·(1 + u_{j−1})·n_j,
    ∂L_out/∂θ by L2·(1 + u_r), (∂V/∂θ)ᵀb_0 by M1·l_0 + M2·n_0. Each 1 is the loss's own θ.
    """
    alphas, u = step_sizes(r), state_constants(r, theta_in_losses)
    n, own = L1, theta_in_losses
    adjoint = L2 * (own + u[r])
    total = own * adjoint  # ∂L_out/∂θ moves as ∂L_out/∂φ does
    for j in range(r, 0, -1):
        curving = alphas[j - 1] * L3 * (own + u[j - 1]) * n
        total += own * (alphas[j - 1] * L2 * adjoint + curving)
        adjoint = (1 + alphas[j - 1] * L2) * adjoint + curving
        n = (1 + alphas[j - 1] * L2) * n
    return total + M1 * adjoint + M2 * n


def closed_form(r: int, theta_in_losses: int = 1) -> sp.Expr:
    """L_M = M2·L1·P + (1 + M1)²·P·[L2·P + L1·L3·Σ_j α_j·P_{j−1}/(1 + α_j·L2)]; M1² without θ in the losses."""
    p, alphas = growth(r), step_sizes(r)
    spread = sum((alphas[j] * p[j] / (1 + alphas[j] * L2) for j in range(r)), sp.S.Zero)
    return M2 * L1 * p[r] + (theta_in_losses + M1) ** 2 * p[r] * (L2 * p[r] + L1 * L3 * spread)


def adjoint_step() -> tuple[sp.Expr, sp.Expr]:
    """The induction downwards from j to j − 1: l_{j−1} by `recursion`, and as the closed form says.

    Hypothesis: l_j = (1 + M1)·(P/P_j)·[L2·P + L1·L3·Σ_{i>j} α_i·P_{i−1}/(1 + α_i·L2)], with 1 + u_j = (1 + M1)·P_j,
    which `state_step` proves. Then L_M = (1 + M1)·l_0 + M2·n_0, since l_0 − l_r is the sum of the D_j's constants.
    """
    before, whole, later = sp.symbols("P_before P Sigma", positive=True)  # P_{j−1}, P_r and the sum over i > j
    factor = 1 + ALPHA * L2
    here = (1 + M1) * whole / (before * factor) * (L2 * whole + L1 * L3 * later)
    curving = ALPHA * L3 * (1 + M1) * before * L1 * whole / (before * factor)
    claimed = (1 + M1) * whole / before * (L2 * whole + L1 * L3 * (later + ALPHA * before / factor))
    return factor * here + curving, claimed


def state_step() -> tuple[sp.Expr, sp.Expr]:
    """The induction 1 + u_j = (1 + α_j·L2)·(1 + u_{j−1}), from which 1 + u_j = (1 + M1)·P_j."""
    before = sp.Symbol("u", positive=True)
    return 1 + (1 + ALPHA * L2) * before + ALPHA * L2, (1 + ALPHA * L2) * (1 + before)
