"""Proposition 1 by symbolic summation, for a proxy that keeps K backward steps; checkpoints by dynamic programming."""

from functools import cache

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


@cache
def fewest_steps(r: int, slots: int) -> int:
    """Fewest inner steps that visit φ_{r−1}, …, φ_0 from φ_0, holding `slots` more states: by dynamic programming.

    The first state kept is φ_k: k steps lead to it, the r − k states from it on are visited with one slot fewer, then
    the k before it with all slots again. Without a slot each state is reached from φ_0.
    """
    if r <= 1 or slots == 0:
        return int(repeated_gradients().subs({R: r, K: 0})) if r else 0
    return min(k + fewest_steps(r - k, slots - 1) + fewest_steps(k, slots) for k in range(1, r))


@cache
def fewest_steps_one_pass(r: int, slots: int) -> int:
    """The same when the coin is drawn before the forward pass, which lays the first checkpoints as it goes by.

    ξ depends on nothing computed, so the estimator is unchanged. The steps on the way to φ_{r−1} are then the forward
    pass's own: those to φ_k cost nothing, and without a slot φ_{r−1} is at hand when φ_r is.
    """
    if r <= 1:
        return 0
    if slots == 0:
        return fewest_steps(r, 0) - (r - 1)
    return min(fewest_steps_one_pass(r - k, slots - 1) + fewest_steps(k, slots) for k in range(1, r))


def binomial_schedule() -> sp.Expr:
    """Griewank's count t = n·r − C(c + n, n − 1) for c = slots + 1 at r = C(c + n, c), its breakpoints.

    It is piecewise linear in r: n more steps for every state between C(c + n − 1, c) and C(c + n, c).
    """
    n, c = sp.symbols("n c", integer=True, positive=True)
    return n * sp.binomial(c + n, c) - sp.binomial(c + n, n - 1)


def binomial_rise() -> tuple[sp.Expr, sp.Expr]:
    """Rise of t between two breakpoints, and n times the rise of r: equal, so the pieces of t join."""
    n, c = sp.symbols("n c", integer=True, positive=True)
    rise = binomial_schedule() - binomial_schedule().subs(n, n - 1)
    states = sp.binomial(c + n, c) - sp.binomial(c + n - 1, c)
    return sp.combsimp(sp.gammasimp(rise.rewrite(sp.gamma))), sp.combsimp(sp.gammasimp((n * states).rewrite(sp.gamma)))
