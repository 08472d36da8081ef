"""Proposition 1 by symbolic summation: what Algorithm 4 costs, with a proxy that keeps the last K backward steps."""

import sympy as sp

from ufom_theory.derivations.symbols import C1, C2, J, K, Q, R


def forward_gradients() -> sp.Expr:
    """Gradients that every call pays: r inner ones on the way to φ_r, and the outer loss's."""
    return R + 1


def repeated_gradients() -> sp.Expr:
    """Algorithm 4's nested loop: the backward step j, down from r − K, runs j − 1 inner steps from φ_0 again."""
    return sp.summation(J - 1, (J, 1, R - K))


def expected_gradients() -> sp.Expr:
    """E[gradient calls] of Algorithm 4; the backward loop is entered with probability q."""
    return forward_gradients() + Q * repeated_gradients()


def expected_hessian_vector_products() -> sp.Expr:
    """E[Hessian-vector products]: K in every proxy, the other r − K with probability q."""
    return sp.summation(1, (J, R - K + 1, R)) + Q * sp.summation(1, (J, 1, R - K))


def cost() -> sp.Poly:
    """Expected cost of one call, C_det + C_rnd·q, as a polynomial in q."""
    return sp.Poly(C1 * expected_gradients() + C2 * expected_hessian_vector_products(), Q)


def c_det() -> sp.Expr:
    """C_det(K): the part of the cost that is paid whatever the coin."""
    return sp.factor(cost().coeff_monomial(1))


def c_rnd() -> sp.Expr:
    """C_rnd(K): the part that is paid with probability q."""
    return sp.factor(cost().coeff_monomial(Q))


def proposition_1() -> tuple[sp.Expr, sp.Expr]:
    """The paper's counts as printed: r + 1 + q·r(r − 1)/2 gradients, q·r Hessian-vector products (K = 0)."""
    return R + 1 + Q * R * (R - 1) / 2, Q * R
