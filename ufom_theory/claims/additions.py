"""What is proved here and not in the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy as sp

from ufom_theory.claims.registry import Status, claim, holds, vanishes
from ufom_theory.cost import Sweep
from ufom_theory.derivations import bias_bound, complexity, convergence, divergence, optimum, second_moment, smoothness
from ufom_theory.derivations.symbols import A_Q, D2, KAPPA, M1, RHO, V2, M, Q


@claim("tight-bias", "ours", "proved", other=bias_bound.printed, derived=lambda: bias_bound.tight_constant(),
       test="test_proofs.py::test_the_bounds_are_attained")  # fmt: skip
def tight_bias(form: Callable[..., sp.Expr] = bias_bound.tight) -> Status:
    """D = (1 + M1)·L1·(P − 1) bounds the bias by telescoping, and a problem attains it: no smaller bound holds."""
    left, right = bias_bound.telescoping_step()
    ranges = [bias_bound.bias(r) - form(r) for r in (1, 2, 3, 4)]
    return vanishes(left - right, *ranges, *(bias_bound.sharp_values(r)[0] - form(r) for r in (1, 2, 3)))


@claim("tight-gradient", "ours", "proved", other=lambda r: bias_bound.gradient(r) * M1,
       derived=lambda: sp.factor(bias_bound.gradient(2)),
       test="test_proofs.py::test_the_bounds_are_attained")  # fmt: skip
def tight_gradient(form: Callable[[int], sp.Expr] = bias_bound.gradient) -> Status:
    """V = (1 + M1)·L1·P bounds the exact gradient, and the same problem attains it."""
    return vanishes(*(bias_bound.sharp_values(r)[1] - form(r) for r in (1, 2, 3)))


@claim("theta-free", "ours", "proved", other=1, derived=lambda: sp.factor(bias_bound.tight(2, own=0)),
       test="test_proofs.py::test_losses_free_of_theta")  # fmt: skip
def theta_free(own: int = 0) -> Status:
    """Where no loss contains θ, 1 + M1 becomes M1 in the bounds of bias and gradient, attained too (r = 1, 2, 3)."""
    gaps = []
    for r in (1, 2, 3):
        bias, gradient = bias_bound.sharp_values(r, own=0)
        gaps += [bias - bias_bound.tight(r, own=own), gradient - bias_bound.gradient(r, own=own)]
        gaps += [bias_bound.bias(r, own=0) - bias_bound.tight(r, own=own)]
    return vanishes(*gaps)


@claim("truncated-bias", "ours", "proved", other=0, derived=lambda: bias_bound.tight_constant(),
       test="test_derivations.py::test_bias_telescopes")  # fmt: skip
def truncated_bias(kept: int = 2) -> Status:
    """A proxy that keeps the last K steps has D_K = (1 + M1)·L1·(P − ∏_{j>r−K}(1 + α_j·L2)), attained too (r = 4)."""
    return vanishes(bias_bound.tight(4, kept) - bias_bound.bias(4, 2), bias_bound.sharp_values(4, 2)[0]
                    - bias_bound.tight(4, kept))  # fmt: skip


@claim("smoothness", "ours", "proved", other=lambda r: smoothness.closed_form(r, 0),
       derived=lambda: smoothness.closed_form(1), test="test_proofs.py::test_smoothness_closed_form")  # fmt: skip
def smoothness_constant(form: Callable[[int], sp.Expr] = smoothness.closed_form) -> Status:
    """L_M = M2·L1·P + (1 + M1)²·P·[L2·P + L1·L3·Σ_j α_j·P_{j−1}/(1 + α_j·L2)], by induction."""
    steps = [left - right for left, right in (smoothness.adjoint_step(), smoothness.state_step())]
    return vanishes(*steps, *(sp.cancel(sp.together(smoothness.recursion(r) - form(r))) for r in (1, 2, 3)))


@claim("covariance", "ours", "proved", other=1 / Q, derived=lambda: second_moment.covariance()[1],
       test="test_proofs.py::test_second_moment")  # fmt: skip
def covariance(factor: sp.Expr = 1 / Q - 1) -> Status:
    """Cov_ξ(G) = (1/q − 1)·d·dᵀ with d = G_exact − G_proxy: the correction adds noise along d alone."""
    left, right = second_moment.covariance()
    return vanishes(left - right / (1 / Q - 1) * factor)


@claim("batch", "ours", "proved", other=2, derived=second_moment.batch_second_moment,
       test="test_proofs.py::test_batches_by_enumeration")  # fmt: skip
def batch(size: int = 3) -> Status:
    """A batch of B independent (task, coin) pairs has E‖G‖² = ‖∇M‖² + [A − ‖∇M‖²]/B: all 4³ outcomes at B = 3."""
    b, mean2 = second_moment.BATCH, second_moment.MEAN2
    stated = mean2 + (V2 + (1 / Q - 1) * D2 - mean2) / b
    exact = second_moment.enumerated_batch(3)[0] - second_moment.enumerated_batch(size)[0]
    return vanishes(second_moment.batch_second_moment() - stated, exact, *map(_gap, (1, size)))


def _gap(size: int) -> sp.Expr:
    brute, formula = second_moment.enumerated_batch(size)
    return brute - formula


@claim("exponents", "ours", "proved", other=(2, 1), derived=convergence.tuned_constant,
       test="test_proofs.py::test_exponents_by_outer_schedule")  # fmt: skip
def exponents(form: tuple[int, int] = (1, 1)) -> Status:
    """m = 1 for a constant step tuned to the horizon, and for γ_k ~ 1/k under the Polyak–Łojasiewicz inequality."""
    left, right = convergence.polyak_lojasiewicz_step()
    harmonic = convergence.exponent_of(A_Q)  # e_τ ≤ L_M·A/(2μ²(τ + 1)): iterations ∝ A
    return vanishes(convergence.exponent_of(convergence.tuned_constant()) - form[0], harmonic - form[1],
                    sp.simplify(left - right))  # fmt: skip


@claim("local-law", "ours", "proved", other=lambda h, c, s: A_Q / (2 * h), derived=convergence.local_iterations,
       test="test_divergence.py::test_local_law_of_the_last_iterate")  # fmt: skip
def local_law(
    form: Callable[[Any, Any, Any], Any] = lambda h, c, s: A_Q / (2 * h - (1 / c if s == 1 else 0)),
) -> Status:
    """Near a minimiser e_k ~ γ_k·A/(2h) for γ_k = c·k^(−s), s < 1, and γ_k·A/(2h − 1/c) at s = 1: so m = 1/s."""
    h, c, s = (sp.Symbol(name, positive=True) for name in "hcs")
    cases = (sp.S.Half, sp.Rational(3, 4), sp.S.One)
    law = [convergence.local_ratio(case, c) - form(h, c, case) for case in cases]
    return vanishes(convergence.exponent_of(convergence.local_iterations()) - 1 / s, *law)


@claim("stable-root", "ours", "proved", other=optimum.root() * 2, derived=optimum.root,
       test="test_optimum.py::test_root_keeps_its_digits")  # fmt: skip
def stable_root(form: sp.Expr = optimum.root()) -> Status:
    """q* = ((m − 1)ρ + S)/(2(1 − ρ)), S = √(((m − 1)ρ)² + 4mκρ(1 − ρ)), solves (21), as does the form for m < 1."""
    quadratic = optimum.scaled_quadratic().as_expr()
    return vanishes(quadratic.subs(Q, form), quadratic.subs(Q, optimum.root_small_exponent()))


@claim("inverse", "ours", "proved", other=Q**2 / (Q**2 + (M - 1) * Q + KAPPA), derived=optimum.inverse,
       test="test_derivations.py::test_inverse_and_speedup")  # fmt: skip
def inverse(form: sp.Expr = Q**2 / (Q**2 + (M - 1) * Q + M * KAPPA)) -> Status:
    """q is optimal at ρ = q²/(q² + (m − 1)q + mκ), rising in q: the floor q_min binds exactly below ρ(q_min)."""
    rising = optimum.inverse_slope() - ((M - 1) * Q + 2 * M * KAPPA)
    return vanishes(optimum.scaled_quadratic().as_expr().subs(RHO, form), rising)


@claim("slopes", "ours", "proved", other=KAPPA, derived=lambda: optimum.slopes()[0],
       test="test_derivations.py::test_slopes_are_those_of_the_root")  # fmt: skip
def slopes(term: sp.Expr = M * KAPPA) -> Status:
    """∂q*/∂ρ = (q² + (m − 1)q + mκ)/S and ∂q*/∂κ = mρ/S."""
    by_rho, by_kappa = optimum.slopes()
    s = optimum.discriminant_root()
    return vanishes(by_rho - (Q**2 + (M - 1) * Q + term) / s, by_kappa - M * RHO / s,
                    sp.diff(optimum.root(), KAPPA) - by_kappa)  # fmt: skip


@claim("below-one", "ours", "proved", other={"m": 2}, derived=lambda: optimum.counterexample_below_one()[0],
       test="test_optimum.py::test_below_m_1_the_minimum_can_be_inside_though_condition_20_fails")  # fmt: skip
def condition_below_one(point: dict[str, Any] | None = None) -> Status:
    """For m < 1 and D² ≥ V², (20) is sufficient but not necessary; see m = 1/2, ρ = 3, κ = 1/500."""
    if point:  # for m ≥ 1 no such point exists
        return holds(not optimum.falling_above().is_positive)
    at_one, inside, log_time = optimum.counterexample_below_one()
    leading, at_zero = optimum.enough_below_one()
    sufficient = leading.is_nonpositive and at_zero.is_negative
    return holds(sufficient, at_one < 0, inside > 0, inside < 1, log_time < 0)


@claim("speed-up", "ours", "proved", other=1 / (2 * RHO * (1 - RHO)),
       derived=lambda: optimum.long_loop(sp.Integer(2))[1],
       test="test_optimum.py::test_speedup_for_long_loops_tends_to_its_limit")  # fmt: skip
def long_loops(form: sp.Expr = 1 / (4 * RHO * (1 - RHO))) -> Status:
    """As r → ∞ the speed-up over q = 1 tends to 1/(4ρ(1 − ρ)) at m = 2 (ρ < 1/2), and to 1/ρ at m = 1."""
    two, one = optimum.long_loop(sp.Integer(2))[1], optimum.long_loop(sp.Integer(1))[1]
    return vanishes(two - form, one - 1 / RHO, optimum.long_loop_costs())


@claim("binomial", "ours", "proved", other=1, derived=complexity.binomial_schedule,
       test="test_proofs.py::test_binomial_count_against_exhaustive_search")  # fmt: skip
def binomial_count(off: int = 0) -> Status:
    """t(r, c) = n·r − C(c + n, n − 1) is the least number of repeated steps: dynamic programming, r ≤ 40, 6 slots."""
    rise, expected = complexity.binomial_rise()
    joins = vanishes(rise - expected) == "proved"
    pairs = ((r, slots) for r in range(1, 41) for slots in range(7))
    return holds(
        joins, *(Sweep.checkpointed(s).extra_steps(r) + off == complexity.fewest_steps(r, s) for r, s in pairs)
    )


@claim("one-pass", "ours", "proved", other=lambda r: r, derived=r"t(r, c) - (r - 1)",
       test="test_proofs.py::test_binomial_count_against_both_dynamic_programs")  # fmt: skip
def one_pass(saved: Callable[[int], int] = lambda r: r - 1) -> Status:
    """A coin drawn before the forward pass saves r − 1 repeated steps, the estimator unchanged (r ≤ 40, 6 slots)."""
    pairs = [(r, slots) for r in range(1, 41) for slots in range(7)]
    both = [(complexity.fewest_steps(r, s), complexity.fewest_steps_one_pass(r, s) + saved(r)) for r, s in pairs]
    return holds(*(two == one for two, one in both))


@claim("counterexample", "ours", "proved", other=sp.S.Half,
       derived=lambda: divergence.convex_piece(divergence.X),
       test="test_proofs.py::test_counterexample_is_smooth_and_convex")  # fmt: skip
def counterexample(share: sp.Expr = sp.S.One) -> Status:
    """Theorem 2's loss is C² with 0 ≤ f'' ≤ a: f, f', f'' join at A and A + 1, and L1 = a/2 + aA, L2 = L3 = a."""
    a, reach = divergence.CURVATURE, divergence.REACH
    t = sp.Symbol("t", positive=True)
    inner, fading, beyond = divergence.curvatures()
    return vanishes(*divergence.joints(), inner - share * a, fading - a * (1 - t), beyond,
                    divergence.slope_bound() - (a / 2 + a * reach))  # fmt: skip
