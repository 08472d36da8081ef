"""The optimal q: log-time (19) → stationarity (21) → condition (20) → the root as computed, and its derivatives."""

import sympy as sp

from ufom_theory.derivations.symbols import C_DET, C_RND, D2, EPSILON, KAPPA, RHO, V2, M, Q


def log_time() -> sp.Expr:
    """Logarithm of the time to precision, (19) with a general exponent m."""
    return M * sp.log((1 / Q - 1) * D2 + V2) + sp.log(C_DET + C_RND * Q)


def quadratic() -> sp.Poly:
    """Left side of (21): where (19) is stationary, scaled to the paper's leading term."""
    numerator = sp.Poly(sp.numer(sp.together(sp.diff(log_time(), Q))), Q)
    return sp.Poly((numerator.as_expr() * C_RND * (V2 - D2) / numerator.LC()).simplify(), Q)


def printed_quadratic() -> sp.Poly:
    """(21) as the paper prints it, in ε."""
    linear, constant = (2 * EPSILON + 1) / (2 * EPSILON - 1), 2 / (2 * EPSILON - 1)
    return sp.Poly(C_RND * (V2 - D2) * Q**2 + linear * D2 * C_RND * Q + constant * D2 * C_DET, Q)


def condition() -> sp.Expr:
    """Condition (20) as an expression that is positive where q* < 1.

    The derivative of (19) has the sign of the quadratic, which is −m·D2·C_det < 0 at q → 0: for m ≥ 1, or D2 ≤ V2,
    it changes sign inside (0, 1) exactly when it is positive at q = 1.
    """
    return sp.expand(quadratic().eval(1))


def scaled_quadratic() -> sp.Poly:
    """The quadratic over C_rnd·V2, in ρ = D2/V2 and κ = C_det/C_rnd."""
    scaled = quadratic().as_expr().subs({D2: RHO * V2, C_DET: KAPPA * C_RND}) / (C_RND * V2)
    return sp.Poly(sp.expand(scaled), Q)


def discriminant_root() -> sp.Expr:
    """S, the square root of the discriminant of `scaled_quadratic`."""
    return sp.sqrt(((M - 1) * RHO) ** 2 + 4 * M * KAPPA * RHO * (1 - RHO))


def root() -> sp.Expr:
    """The positive root for ρ < 1, as it is computed for m ≥ 1: no cancellation between (m − 1)ρ and S."""
    return ((M - 1) * RHO + discriminant_root()) / (2 * (1 - RHO))


def root_small_exponent() -> sp.Expr:
    """The same root, as it is computed for m < 1, where (m − 1)ρ and S have opposite signs."""
    return 2 * M * KAPPA * RHO / ((1 - M) * RHO + discriminant_root())


def slopes() -> tuple[sp.Expr, sp.Expr]:
    """∂q/∂ρ and ∂q/∂κ by differentiating the quadratic implicitly; at the root ∂f/∂q = 2(1 − ρ)q + (1 − m)ρ = S."""
    f = scaled_quadratic().as_expr()
    return -sp.diff(f, RHO) / discriminant_root(), -sp.diff(f, KAPPA) / discriminant_root()


def inverse() -> sp.Expr:
    """The ρ at which a given q is optimal."""
    (rho,) = sp.solve(scaled_quadratic().as_expr(), RHO)
    return sp.factor(rho)


def speedup() -> sp.Expr:
    """Time at q = 1 over time at q, in ρ, κ and m."""
    time = sp.exp(log_time()).subs({D2: RHO * V2, C_DET: KAPPA * C_RND})
    return sp.simplify(time.subs(Q, 1) / time)
