"""D_bound (15) from Assumption 1: the recursion (8)–(9), the tight form, a problem attaining it, the printed form.

`own` is 1 where the losses contain θ, as Assumption 1 allows, and 0 where they do not (MAML, Theorem 2's problem).
"""

from functools import cache

import sympy as sp

from ufom_theory.derivations.chain_rule import Problem, backward_loop
from ufom_theory.derivations.divergence import convex_piece
from ufom_theory.derivations.symbols import ALPHA, L1, L2, M1, J, K, R, step_sizes


def adjoint_bounds(r: int) -> list[sp.Expr]:
    """n_0 … n_r with ‖∇_{φ_j} L_out‖ ≤ n_j.

    (9) multiplies by I − α_j·∂²L_in/∂φ², whose norm is at most 1 + α_j·L2; at j = r the norm is at most L1.
    """
    bounds = [L1]
    for alpha in reversed(step_sizes(r)):
        bounds.insert(0, (1 + alpha * L2) * bounds[0])
    return bounds


def bias(r: int, proxy: int = 0, own: int = 1) -> sp.Expr:
    """Bound of ‖G − G_K‖ term by term, before any closed form.

    The proxy leaves out D_j for j ≤ r − K and stops the adjoint at φ_{r−K}. Each D_j (7) has norm ≤ α_j·L2·n_j, and
    ∇_{φ_{j−1}} − ∇_{φ_j} = −α_j·(∂²L_in/∂φ²)ᵀ∇_{φ_j} has the same bound and is met by ‖∂V/∂θ‖ ≤ M1.
    """
    n, alphas = adjoint_bounds(r), step_sizes(r)
    mixed = sum((alphas[j - 1] * L2 * n[j] for j in range(1, r - proxy + 1)), sp.S.Zero)
    return own * mixed + M1 * mixed


def tight(r: int, proxy: int = 0, own: int = 1) -> sp.Expr:
    """D_tight = (1 + M1)·L1·(P − ∏_{j>r−K}(1 + α_j·L2)): the sum of `bias` telescopes."""
    factors = [1 + alpha * L2 for alpha in step_sizes(r)]
    return (own + M1) * L1 * (sp.prod(factors) - sp.prod(factors[r - proxy :]))


def telescoping_step() -> tuple[sp.Expr, sp.Expr]:
    """The induction over r, one more step α put in front: both sides of S_{r+1} = α·L2·P_r + S_r = (1 + α·L2)·P_r − 1.

    S_r = Σ_j α_j·L2·∏_{i>j}(1 + α_i·L2) is the sum in `bias`, and S_r = P_r − 1 is the hypothesis.
    """
    product = sp.Symbol("P_r", positive=True)
    return ALPHA * L2 * product + (product - 1), (1 + ALPHA * L2) * product - 1


def printed(r: int) -> sp.Expr:
    """(15) as the paper prints it: the product starts at j' = j, where the proof needs j + 1."""
    alphas = step_sizes(r)
    terms = (alphas[j] * sp.prod(1 + alpha * L2 for alpha in alphas[j:]) for j in range(r))
    return (1 + M1) * L1 * L2 * sum(terms, sp.S.Zero)


def tight_constant() -> sp.Expr:
    """D_K for one step size α and symbolic r, K, by summing n_j = L1·(1 + αL2)^{r−j}."""
    total = sp.summation(ALPHA * L2 * L1 * (1 + ALPHA * L2) ** (R - J), (J, 1, R - K))
    return sp.simplify((1 + M1) * total)


def printed_constant() -> sp.Expr:
    """(15) as printed for one step size α and symbolic r."""
    return sp.simplify((1 + M1) * L1 * L2 * sp.summation(ALPHA * (1 + ALPHA * L2) ** (R - J + 1), (J, 1, R)))


def gradient(r: int, own: int = 1) -> sp.Expr:
    """V_bound: ‖G‖ ≤ L1 + Σ_j α_j·L2·n_j + M1·n_0 = (1 + M1)·L1·P."""
    n, alphas = adjoint_bounds(r), step_sizes(r)
    return own * (L1 + sum((alphas[j - 1] * L2 * n[j] for j in range(1, r + 1)), sp.S.Zero)) + M1 * n[0]


def sharp_problem(own: int = 1) -> Problem:
    """One task that attains both tight bounds at θ = 0: L_in = −h(θ + φ), L_out = L1·(θ + φ), V = M1·θ.

    h is Theorem 2's convex piece with a = L2, b = 0 and A = 1/5. At θ = 0 every state is 0, where −h has the Hessian
    −L2, so each factor 1 + α_j·L2 is met and all terms have one sign. Assumption 1 holds where |h'| ≤ L2·7/10 ≤ L1.
    """
    theta, phi = sp.symbols("theta phi", real=True)
    piece = convex_piece(own * theta + phi, L2, 0, sp.Rational(1, 5))
    return Problem(sp.Matrix([theta]), sp.Matrix([phi]), -piece, L1 * (own * theta + phi), sp.Matrix([M1 * theta]))


@cache
def sharp_values(r: int, proxy: int = 0, own: int = 1) -> tuple[sp.Expr, sp.Expr]:
    """|G − G_K| and |G| of the sharp problem at θ = 0, by running the backward loop."""
    problem, alphas = sharp_problem(own), step_sizes(r)
    at = {problem.theta[0]: sp.S.Zero}
    exact = backward_loop(problem, alphas, at=at)[0]
    return sp.expand(exact - backward_loop(problem, alphas, kept=proxy, at=at)[0]), exact


def sharp_constants() -> tuple[sp.Expr, sp.Expr]:
    """The slope and curvature bounds of the sharp problem's inner loss: 7/10·L2 and L2."""
    x = sp.Symbol("x", positive=True)
    beyond = convex_piece(x, L2, 0, sp.Rational(1, 5)).args[-1][0]
    return sp.diff(beyond, x), L2
