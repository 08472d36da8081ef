"""Equations (14)–(24), Lemma 1 and Theorems 1–2, each with the function that decides it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import sympy as sp

from ufom_theory.claims.registry import Status, bounds, claim, holds, vanishes
from ufom_theory.derivations import bias_bound, complexity, convergence, divergence, optimum, second_moment
from ufom_theory.derivations.symbols import (
    A_Q,
    C1,
    C2,
    C_DET,
    C_RND,
    D2,
    EPSILON,
    GAP,
    L_M,
    TAU,
    V2,
    K,
    M,
    Q,
    R,
)

BETA = sp.Symbol("beta", positive=True)
M_PAPER = 2 / (1 - 2 * EPSILON)


@claim("14", "(14)", "proved", other=bias_bound.printed, derived=lambda: bias_bound.tight(2),
       printed=r"D^2 = \sup_\theta E\|G_{FO} - \nabla_\theta L^{out}\|^2",
       test="test_proofs.py::test_the_bounds_are_attained")  # fmt: skip
def bias(form: Callable[[int], sp.Expr] = bias_bound.tight) -> Status:
    """The supremum D² of the sharp example is the square of (1 + M1)·L1·(P − 1), attained at θ = 0 (r = 1, 2, 3)."""
    return vanishes(*(bias_bound.sharp_values(r)[0] - form(r) for r in (1, 2, 3)))


@claim("15", "(15)", "loose", other=lambda r: bias_bound.tight(r) / 2, derived=lambda: bias_bound.tight_constant(),
       printed=r"D_{bound} = (1 + M_1) L_1 L_2 \sum_{j=1}^r \alpha_j \prod_{j'=j}^r (1 + \alpha_{j'} L_2)",
       test="test_derivations.py::test_printed_bound_is_loose_by_one_factor")  # fmt: skip
def bias_bound_15(form: Callable[[int], sp.Expr] = bias_bound.printed) -> Status:
    """(15) bounds the bias, but is above the attained D = (1 + M1)·L1·(P − 1) for every r (r = 1…4) and α_j."""
    found = {bounds(form(r) - bias_bound.bias(r)) for r in range(1, 5)}
    left, right = bias_bound.telescoping_step()
    if vanishes(left - right) != "proved" or "refuted" in found:
        return "refuted"
    return "loose" if "loose" in found else "proved"


@claim("16", "(16)", "proved", other=bias_bound.tight, derived=lambda: bias_bound.gradient(2),
       printed=r"V^2 = \sup_\theta E\|\nabla_\theta L^{out}\|^2",
       test="test_proofs.py::test_the_bounds_are_attained")  # fmt: skip
def second_moment_16(form: Callable[[int], sp.Expr] = bias_bound.gradient) -> Status:
    """The supremum V² of the sharp example is the square of (1 + M1)·L1·P, attained at θ = 0 (r = 1, 2, 3)."""
    return vanishes(*(bias_bound.sharp_values(r)[1] - form(r) for r in (1, 2, 3)))


@claim("lemma-1", "Lemma 1", "proved", other=D2 / Q + V2, derived=second_moment.lemma_1,
       printed=r"\sup_\theta E\|G_{UFO}\|^2 \le (1/q - 1) D^2 + V^2",
       test="test_proofs.py::test_second_moment")  # fmt: skip
def lemma_1(form: sp.Expr = (1 / Q - 1) * D2 + V2) -> Status:
    """Lemma 1 is an equality point by point, E_ξ‖G‖² = ‖G_exact‖² + (1/q − 1)‖d‖²; ≤ comes from adding two suprema."""
    e, p = second_moment.EXACT, second_moment.PROXY
    pointwise = form.subs({V2: e**2, D2: (e - p) ** 2})
    supremum, bound = second_moment.suprema_apart()
    strict = all((supremum < bound).subs(Q, sp.Rational(n, 10)) for n in range(1, 10))
    return vanishes(second_moment.second_moment() - pointwise) if strict else "refuted"


@claim("17", "(17)", "proved", other=sp.S.Half, derived=convergence.any_steps,
       printed=r"\liminf_k E\|\partial_\theta M^{(r)}(\theta_k)\|^2 = 0",
       test="test_proofs.py::test_descent_sums_to_the_bound_for_any_steps")  # fmt: skip
def stationarity(limit: sp.Expr = sp.S.Zero) -> Status:
    """The bound [Δ + ½·L_M·A·Σγ²]/Σγ tends to 0 as Σγ → ∞ with Σγ² bounded, so the lower limit of E‖∇M‖² is 0."""
    return vanishes(sp.limit(convergence.any_steps(), convergence.STEPS, sp.oo) - limit)


@claim("theorem-1", "Theorem 1", "proved", other=(GAP + L_M * A_Q * convergence.SQUARES / 4) / convergence.STEPS,
       derived=convergence.any_steps, printed=r"\min_{u<k} E\|\nabla M(\theta_u)\|^2 \to 0",
       test="test_proofs.py::test_descent_sums_to_the_bound_for_any_steps")  # fmt: skip
def convergence_of_ufom(
    form: sp.Expr = (GAP + L_M * A_Q * convergence.SQUARES / 2) / convergence.STEPS,
) -> Status:
    """min E‖∇M‖² ≤ [Δ + ½·L_M·A·Σγ²]/Σγ for any outer step sizes: the descent lemma, summed."""
    return vanishes(convergence.any_steps() - form)


@claim("18", "(18)", "proved", other=convergence.constant_18() / 2,
       printed=r"((1/q-1)D^2 + V^2)\, O(k^{-0.5+\epsilon})", derived=convergence.constant_18,
       test="test_proofs.py::test_constant_of_18_bounds_what_it_should")  # fmt: skip
def rate(form: sp.Expr = convergence.constant_18()) -> Status:
    """For γ_k = k^(−1/2), min E‖∇M‖² ≤ A(q)·H(ε)·k^(−1/2+ε) with an explicit H(ε) that is free of q."""
    excess = A_Q * form * TAU ** (EPSILON - sp.S.Half) - convergence.root_steps()
    names = (GAP, L_M, A_Q, V2, EPSILON)
    for values in ((3, 0, 1, 1, sp.Rational(1, 4)), (0, 2, 5, 1, sp.Rational(2, 5)), (1, 1, 2, 2, sp.Rational(1, 9))):
        point = dict(zip(names, values, strict=True))
        if any(excess.subs(point).subs(TAU, 10**k).evalf(50) < -(sp.Float(10) ** -40) for k in range(0, 30, 3)):
            return "refuted"
    share, slope = convergence.root_share()
    lemmas = holds(
        vanishes(convergence.logarithm_peak() - sp.exp(EPSILON - 1) / EPSILON) == "proved",
        sp.diff(convergence.logarithm_turns(), sp.Symbol("u", real=True)) == -EPSILON,
        share == sp.sqrt(2) - 1,
        sp.simplify((slope + 1) ** 2 - 1).is_positive,
    )
    proved = lemmas == "proved" and sp.simplify(form - convergence.constant_18()) == 0 and Q not in form.free_symbols
    return "proved" if proved else "checked to 50 digits"


@claim("19", "(19)", "proved", other=2 / (1 + 2 * EPSILON), derived=lambda: convergence.time(M_PAPER),
       printed=r"((1/q-1)D^2 + V^2)^{2/(1-2\epsilon)} (C_{det} + C_{rnd} q)",
       test="test_proofs.py::test_exponents_by_outer_schedule")  # fmt: skip
def time_19(exponent: sp.Expr = M_PAPER) -> Status:
    """The time to a given precision is ∝ A(q)^m·(C_det + C_rnd·q) with m = 2/(1 − 2ε)."""
    return vanishes(convergence.exponent_of(convergence.iterations()) - exponent)


@claim("20", "(20)", "proved", other=C_RND * V2 - 2 * D2 * (C_DET + C_RND),
       derived=lambda: sp.Gt(optimum.condition(), 0), printed=r"D^2 < \frac{C_{rnd}}{m (C_{det} + C_{rnd})} V^2",
       test="test_proofs.py::test_existence_and_uniqueness_of_the_root")  # fmt: skip
def condition_20(form: sp.Expr = C_RND * V2 - M * D2 * (C_DET + C_RND)) -> Status:
    """q* < 1 exactly when (20) holds, for m ≥ 1 (all that the paper uses) or D2 < V2; it is the quadratic at q = 1."""
    signs = (
        optimum.slope_denominator_inside().is_positive,
        *(x.is_negative for x in optimum.one_root_below()),
        optimum.falling_above().is_positive,
    )
    return vanishes(optimum.condition() - form) if all(signs) else "refuted"


@claim("21", "(21)", "proved", other=optimum.printed_quadratic().as_expr().subs(EPSILON, EPSILON + 1),
       derived=lambda: optimum.quadratic().as_expr(),
       printed=r"C_{rnd}(V^2-D^2)q^2 + \tfrac{2\epsilon+1}{2\epsilon-1}D^2 C_{rnd} q"
       r" + \tfrac{2}{2\epsilon-1}D^2 C_{det} = 0",
       test="test_derivations.py::test_quadratic_is_21")  # fmt: skip
def quadratic_21(form: sp.Expr = optimum.printed_quadratic().as_expr()) -> Status:
    """(19) is stationary in q exactly at the roots of (21)."""
    return vanishes(optimum.quadratic().as_expr().subs(M, M_PAPER) - form)


def smoothed(updates: int, signal: Callable[[int], sp.Expr]) -> sp.Expr:
    """D²_sm after some updates (23)."""
    value = sp.S.Zero
    for n in range(updates):
        value = BETA * value + (1 - BETA) * signal(n)
    return sp.expand(value)


@claim("22", "(22)", "proved", other=lambda n: 1 - BETA ** (n + 1), derived=lambda: smoothed(2, lambda _: D2),
       printed=r"\bar D^2_k = D^2_{sm,k}/(1 - \beta^{k_{upd}})",
       test="test_proofs.py::test_smoothed_and_debiased_means")  # fmt: skip
def debiased_average(divisor: Callable[[int], sp.Expr] = lambda n: 1 - BETA**n) -> Status:
    """Divided by 1 − β^k_upd, the smoothed square of a constant signal is that constant, after 1…6 updates."""
    return vanishes(*(sp.cancel(smoothed(n, lambda _: D2) / divisor(n)) - D2 for n in range(1, 7)))


Update = Callable[[sp.Expr, sp.Expr, sp.Expr], sp.Expr]
FIRST, EXACT = sp.symbols("b_FO:2", real=True), sp.symbols("b_Exact:2", real=True)  # of two equally likely tasks


def _mean_estimate(update: Update) -> sp.Expr:
    """What three updates (23) or (24), debiased by (22), are in the mean over every sequence of two tasks."""
    total = sp.S.Zero
    for tasks in itertools.product((0, 1), repeat=3):
        value = sp.S.Zero
        for i in tasks:
            value = update(value, FIRST[i], EXACT[i])
        total += value / 8
    return sp.expand(total) / (1 - BETA**3)


@claim("23", "(23)", "proved", other=lambda before, first, exact: (1 - BETA) * before + BETA * (first - exact) ** 2,
       derived=lambda: smoothed(2, lambda n: sp.Symbol(f"d_{n}")),
       printed=r"D^2_{sm,k} = \beta D^2_{sm,k-1} + (1-\beta)\|b_{FO} - b_{Exact}\|^2",
       test="test_proofs.py::test_smoothed_and_debiased_means")  # fmt: skip
def smoothing_of_bias(
    update: Update = lambda before, first, exact: BETA * before + (1 - BETA) * (first - exact) ** 2,
) -> Status:
    """(23), debiased by (22), has the mean D²: over all sequences of three tasks, each one of two."""
    d2 = sum((first - exact) ** 2 for first, exact in zip(FIRST, EXACT, strict=True)) / 2
    return vanishes(sp.cancel(_mean_estimate(update) - d2))


@claim("24", "(24)", "proved", other=lambda before, first, exact: BETA * before + (1 - BETA) * first**2,
       derived=lambda: smoothed(2, lambda n: sp.Symbol(f"v_{n}")),
       printed=r"V^2_{sm,k} = \beta V^2_{sm,k-1} + (1-\beta)\|b_{Exact}\|^2",
       test="test_proofs.py::test_smoothed_and_debiased_means")  # fmt: skip
def smoothing_of_second_moment(
    update: Update = lambda before, first, exact: BETA * before + (1 - BETA) * exact**2,
) -> Status:
    """(24), debiased as (22) is, has the mean V²: over all sequences of three tasks, each one of two."""
    return vanishes(sp.cancel(_mean_estimate(update) - sum(exact**2 for exact in EXACT) / 2))


@claim("theorem-2", "Theorem 2", "proved", other=sp.sqrt(2), derived=divergence.gradient,
       printed=r"\liminf_k E\|\nabla M^{(r)}(\theta_k)\|^2 > D",
       test="test_divergence.py::test_fom_ends_at_2d_and_ufom_does_not")  # fmt: skip
def divergence_of_fom(factor: int = 2) -> Status:
    """On a convex C² two-task problem FOM's only stationary point has ‖∇M‖² = 2D > D, for any D, r and admissible α."""
    smooth = all(jump == 0 for jump in divergence.joints())
    inside = all(x.is_positive for x in divergence.room())
    gap = divergence.gradient().subs(divergence.B2, divergence.offset()) ** 2 - factor * divergence.BIAS
    return vanishes(sp.simplify(gap)) if smooth and inside else "refuted"


@claim("costs", "§4.4", "proved", other=(C1 * (R + 1), (C1 * (R + 1) / 2 + C2) * R),
       derived=lambda: sp.Eq(C_RND, (C1 * (R - 1) / 2 + C2) * R),
       printed=r"C_{det} = C_1(r+1),\; C_{rnd} = (C_1(r-1)/2 + C_2) r",
       test="test_derivations.py::test_cost_model_is_the_derived_cost")  # fmt: skip
def costs(form: tuple[Any, Any] = (C1 * (R + 1), (C1 * (R - 1) / 2 + C2) * R)) -> Status:
    """C_det and C_rnd of §4.4 are the coefficients of Proposition 1's counts."""
    return vanishes(complexity.c_det().subs(K, 0) - form[0], complexity.c_rnd().subs(K, 0) - form[1])
