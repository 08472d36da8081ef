"""Proposition 1 by symbolic summation, for a proxy that keeps K backward steps; checkpoints by dynamic programming."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import comb

import sympy as sp

from ufom_theory.cost import Sweep
from ufom_theory.derivations.registry import claim, holds, instances, vanishes, worst
from ufom_theory.derivations.symbols import C1, C2, J, K, Q, R


def forward_gradients() -> sp.Expr:
    """Gradients that every call pays: r inner ones on the way to φ_r, and the outer loss's."""
    return R + 1


def repeated_gradients() -> sp.Expr:
    """Algorithm 4's nested loop: the backward step j, down from r − K, runs j − 1 inner steps from φ_0 again."""
    return sp.summation(J - 1, (J, 1, R - K))


@cache
def expected_gradients() -> sp.Expr:
    """E[gradient calls] of Algorithm 4; the backward loop is entered with probability q."""
    return forward_gradients() + Q * repeated_gradients()


@cache
def expected_hessian_vector_products() -> sp.Expr:
    """E[Hessian-vector products]: K in every proxy, the other r − K with probability q."""
    return sp.summation(1, (J, R - K + 1, R)) + Q * sp.summation(1, (J, 1, R - K))


def cost() -> sp.Poly:
    """Expected cost of one call, C_det + C_rnd·q, as a polynomial in q."""
    return sp.Poly(C1 * expected_gradients() + C2 * expected_hessian_vector_products(), Q)


@cache
def c_det() -> sp.Expr:
    """C_det(K): the part of the cost that is paid whatever the coin."""
    return sp.factor(cost().coeff_monomial(1))


@cache
def c_rnd() -> sp.Expr:
    """C_rnd(K): the part that is paid with probability q."""
    return sp.factor(cost().coeff_monomial(Q))


COUNTS = (R + 1 + Q * R * (R - 1) / 2, Q * R)


@claim(
    "proposition-1",
    "Proposition 1, §4.4",
    says=r"%s \text{ gradients},\; %s \text{ HVPs},\; C_{det} = %s,\; C_{rnd} = %s",
    printed=(*COUNTS, C1 * (R + 1), (C1 * (R - 1) / 2 + C2) * R),
)
def counts(gradients: sp.Expr, products: sp.Expr, fixed: sp.Expr, random: sp.Expr) -> str:
    """Algorithm 4's expected calls, summed over its nested loops for every r, and the costs of §4.4, their coefficients
    in q."""
    derived = expected_gradients(), expected_hessian_vector_products(), c_det(), c_rnd()
    return vanishes(*(d.subs(K, 0) - f for d, f in zip(derived, (gradients, products, fixed, random), strict=True)))


@claim(
    "truncated-cost",
    "ours",
    says=r"C_{det} = %s,\quad C_{rnd} = %s",
    form=(C1 * (R + 1) + C2 * K, (C1 * (R - K - 1) / 2 + C2) * (R - K)),
)
def truncated_costs(fixed: sp.Expr, random: sp.Expr) -> str:
    """A proxy that keeps the last K backward steps pays K products always; the exact sweep goes on from where it
    stopped."""
    return vanishes(c_det() - fixed, c_rnd() - random)


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


SLOTS, PASSES = sp.symbols("c n", integer=True, positive=True)
BREAKPOINT = sp.binomial(SLOTS + PASSES, SLOTS)
BINOMIAL = PASSES * R - sp.binomial(SLOTS + PASSES, PASSES - 1)


@claim("binomial", "ours", "checked on 280 instances", r"t(r, c) = %s", form=BINOMIAL)
def binomial_count(form: sp.Expr) -> str:
    """Griewank's count, n the least integer with C(c + n, c) ≥ r, is the least number of repeated inner steps with c −
    1 states held besides φ_0: dynamic programming, r ≤ 40, 0 to 6 slots. Its linear pieces join (proved: n more steps
    for every state between two breakpoints)."""
    rise = (form - form.subs(PASSES, PASSES - 1).subs(R, R)).subs(R, BREAKPOINT.subs(PASSES, PASSES - 1))

    stated = sp.lambdify((R, SLOTS, PASSES), form, [{"binomial": lambda n, k: comb(n, k) if n >= k >= 0 else 0}])

    def decided() -> Iterator[str]:
        for r in range(1, 41):
            for slots in range(7):
                n = next(n for n in range(41) if comb(slots + 1 + n, n) >= r)
                least = fewest_steps(r, slots)
                yield holds(stated(r, slots + 1, n) == least, Sweep.checkpointed(slots).extra_steps(r) == least)
        yield vanishes(sp.combsimp(sp.gammasimp(rise.rewrite(sp.gamma))))

    return instances(worst(decided()), "checked on 280 instances")


@claim("one-pass", "ours", "checked on 280 instances", r"t(r, c) - t_{\text{one pass}}(r, c) = %s", form=R - 1)
def one_pass(saved: sp.Expr) -> str:
    """A coin drawn before the forward pass saves r − 1 repeated steps and leaves the estimator unchanged: both dynamic
    programs, r ≤ 40, 0 to 6 slots."""

    def decided() -> Iterator[str]:
        for r in range(1, 41):
            yield from (holds(fewest_steps(r, s) - fewest_steps_one_pass(r, s) == saved.subs(R, r)) for s in range(7))

    return instances(worst(decided()), "checked on 280 instances")
