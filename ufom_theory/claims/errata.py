"""Where the paper, or the code released with it, errs: each printed form is refuted, and its correction passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import sympy as sp

from ufom_theory.claims.experiments import toy_q
from ufom_theory.claims.registry import Status, awaits, claim, holds, measures, vanishes
from ufom_theory.claims.theory import BETA, M_PAPER, smoothed
from ufom_theory.cost import CostModel, Sweep, Truncated
from ufom_theory.derivations import bias_bound, chain_rule, convergence, divergence, optimum, second_moment
from ufom_theory.derivations.symbols import A_Q, C_DET, C_RND, D2, DELTA, EPSILON, L2, V2, M, Q, step_sizes
from ufom_theory.planner import plan
from ufom_theory.quantities import Moments

WAYS, SHOTS = sp.symbols("m_ways K_shots", integer=True, positive=True)


@claim("erratum-1", "(15)", "refuted", other=lambda j, r: range(j + 1, r + 1),
       printed=r"\prod_{j'=j}^r", derived=r"\prod_{j'=j+1}^r",
       test="test_derivations.py::test_printed_bound_is_loose_by_one_factor")  # fmt: skip
def product_range(factors: Callable[[int, int], range] = lambda j, r: range(j, r + 1)) -> Status:
    """The recursion (8)–(9) bounds D_j with the product over j' ≥ j, as (15) has it (it is j' > j)."""
    gaps = []
    for r in (1, 2, 3, 4):
        alphas, bounds = step_sizes(r), bias_bound.adjoint_bounds(r)
        for j in range(1, r + 1):
            product = sp.prod(1 + alphas[i - 1] * L2 for i in factors(j, r))
            gaps.append(bounds[j] - bounds[r] * product)
    return vanishes(*gaps)


@claim("erratum-2", "before (19)", "refuted", other=-1 / (sp.S.Half - EPSILON),
       printed=r"(\cdot)^{-1/(0.5+\epsilon)}", derived=convergence.iterations,
       test="test_proofs.py::test_exponents_by_outer_schedule")  # fmt: skip
def iterations_exponent(exponent: sp.Expr = -1 / (sp.S.Half + EPSILON)) -> Status:
    """The number of iterations is (δ/(H·A)) to the power −1/(0.5 + ε), from which (19) follows."""
    return vanishes(convergence.exponent_of((DELTA / A_Q) ** exponent) - M_PAPER)


@claim("erratum-3", "after (7)", "refuted", other=(3, 2), printed=r"\in R^{s \times p}", derived=r"\in R^{p \times s}",
       test="test_proofs.py::test_every_backward_step_keeps_the_invariant")  # fmt: skip
def mixed_derivative_shape(shape: tuple[int, int] = (2, 3)) -> Status:
    """The mixed derivative, whose transpose maps b2 ∈ ℝᵖ to ℝˢ in (7), is s×p (here s = 2, p = 3)."""
    return holds(chain_rule.mixed_derivative_shape(chain_rule.polynomial_problem()) == shape)


@claim("erratum-4", "after Theorem 2", "refuted", other=sp.sqrt, printed=r"\|\nabla M\| \ge D",
       derived=r"\|\nabla M\| \ge \sqrt{D}",
       test="test_divergence.py::test_fom_ends_at_2d_and_ufom_does_not")  # fmt: skip
def norm_lower_than(floor: Callable[[Any], Any] = lambda bias: bias) -> Status:
    """FOM cannot find a gradient norm lower than D: compared with ‖∇M(θ_FO)‖ = √(2D) for D from 1/100 to 100."""
    norm = sp.sqrt(sp.simplify(divergence.gradient().subs(divergence.B2, divergence.offset()) ** 2))
    values = [sp.Rational(1, 100), sp.S.One, sp.Integer(100)]
    return holds(*(norm.subs(divergence.BIAS, d) > floor(d) for d in values))


@claim("erratum-5", "(16)", "refuted", other=lambda mean_square, mean: mean_square,
       printed=r"\text{“variance”}", derived=second_moment.second_moment,
       test="test_proofs.py::test_second_moment")  # fmt: skip
def called_a_variance(of: Callable[[Any, Any], Any] = lambda mean_square, mean: mean_square - mean**2) -> Status:
    """V² in Lemma 1 is a variance: E‖G‖² − ‖E G‖² put for it. (It is a second moment.)"""
    e, p = second_moment.EXACT, second_moment.PROXY
    lemma = of(e**2, e) + (1 / Q - 1) * (e - p) ** 2
    return vanishes(second_moment.second_moment() - lemma)


@claim("erratum-6", "(20)–(21)", "refuted", other=V2 / 10, printed=r"q^* \in (0, 1)", derived=r"q^* \to 0",
       test="test_optimum.py::test_edges")  # fmt: skip
def root_without_bias(d2: sp.Expr = sp.S.Zero) -> Status:
    """Where (20) holds, (21) has a root in (0, 1): also for D² = 0 < V² (C_det = 1, C_rnd = 9, V² = 1, m = 2)."""
    point = {C_DET: 1, C_RND: 9, V2: 1, M: 2}
    quadratic = optimum.quadratic().as_expr().subs(D2, d2).subs(point)
    return holds(any(0 < root < 1 for root in sp.solve(quadratic, sp.Symbol("q", positive=True))))


@claim("erratum-6b", "(22)", "refuted", other=1, printed=r"D^2_{sm,0}/(1 - \beta^0)", derived=r"0/0",
       test="test_proofs.py::test_smoothed_and_debiased_means")  # fmt: skip
def before_the_first_update(updates: int = 0) -> Status:
    """(22) has a value before the first update, where (21) already asks for one: (23) run k_upd = 0 times. (It is 0/0;
    after one update it is D².)"""
    return holds(sp.cancel(smoothed(updates, lambda _: D2) / (1 - BETA**updates)).is_positive)


@claim("erratum-7", "§4.4", "refuted", other=sp.oo, printed=r"q \to 0 \text{ is FOM}",
       derived=lambda: second_moment.second_moment(),
       test="test_proofs.py::test_second_moment")  # fmt: skip
def small_q_is_fom(limit: sp.Expr = second_moment.PROXY**2) -> Status:
    """As q → 0 UFOM becomes FOM also in the second moment. (It grows as D²/q: the limit is in probability only.)"""
    values = {second_moment.EXACT: 2, second_moment.PROXY: 1}
    return holds(sp.limit(second_moment.second_moment().subs(values), Q, 0, "+") == limit.subs(values))


@claim("erratum-8", "(18)", "refuted", other=sp.Rational(1, 4), printed=r"O(k^{-0.5+\epsilon}),\; \epsilon = 0",
       derived=convergence.constant_18, test="test_proofs.py::test_parts_of_the_constant_of_18")  # fmt: skip
def no_epsilon(epsilon: sp.Expr = sp.S.Zero) -> Status:
    """The constant of (18) is finite as ε → 0, which §5 sets. (It grows as 1/ε, so m = 2 is formal.)"""
    return holds(sp.limit(convergence.constant_18(), EPSILON, epsilon, "+").is_finite)


@claim("erratum-9", "§5.2", "refuted", other=1, printed=r"G_{FO}", derived=r"G_{FO} \equiv 0,\; D^2 = V^2",
       test="test_proofs.py::test_first_order_gradient_of_a_start_free_problem_vanishes")  # fmt: skip
def hypercleaning_proxy(kept: int = 0) -> Status:
    """FOM is a proxy for data hypercleaning, where neither V nor L_out contains θ. (G_FO = 0; K = 1 is a proxy.)"""
    problem = chain_rule.polynomial_problem()
    problem = problem._replace(outer=problem.phi[0] ** 2, start=sp.Matrix([1, 2, 3]))
    alphas = [sp.Rational(1, 2), sp.Rational(1, 3)]
    return holds(chain_rule.backward_loop(problem, alphas, kept) != sp.zeros(2, 1))


@claim("erratum-9b", "§5.2", "refuted", other=sp.Rational(1, 10), printed=r"q^* < 1",
       derived=optimum.condition, test="test_optimum.py::test_edges")  # fmt: skip
def hypercleaning_condition(scale: sp.Expr = sp.S.One) -> Status:
    """With G_FO = 0, so D² = V², (20) holds at m = 2 (C_det = 101, C_rnd = 5050). (Only once D² is divided by 10.)"""
    point = {C_DET: 101, C_RND: 5050, D2: scale * V2, M: 2}
    return holds(optimum.condition().subs(point).is_positive)


awaits("erratum-9c", "§5.2", "The inner loss as printed, a sum over the images, diverges at α = 1; the mean is stable.")


@claim("erratum-10", "§5", "refuted", other=0.001, printed=r"\text{same memory}",
       derived=r"t(r, c) = n r - \tbinom{c+n}{n-1}",
       test="test_planner.py::test_one_stored_state_already_changes_the_answer")  # fmt: skip
def constant_memory(rho: float = 0.1) -> Status:
    """Within constant memory UFOM beats the exact gradient at ρ = 0.1, r = 100. (Not with one state kept: it loses.)"""
    rows = plan({Truncated(0): Moments(rho, 1.0)}, r=100, c1=1.0, c2=1.0, memory_slots=2, outer="paper")
    times = {str(row.sweep): row for row in rows}
    return holds(times["recomputed"].time < times["checkpointed:1"].time_exact)


@claim("erratum-11", "§5.3", "refuted", other=WAYS * SHOTS, printed=r"t = m", derived=r"t = mK,\; t' = m",
       test="test_proofs.py::test_few_shot_tasks_have_as_many_training_images_as_counted")  # fmt: skip
def training_size(size: sp.Expr = WAYS) -> Status:
    """A K-shot m-way task has t = m training images in §5.3. (It is mK; a slip of notation, decided by counting the
    images of the paper's tasks: m = 5 and 20, K = 1 and 5.)"""
    sizes = []
    for ways, shots in itertools.product((5, 20), (1, 5)):
        images = {(way, shot) for way in range(ways) for shot in range(shots)}
        sizes.append(size.subs({WAYS: ways, SHOTS: shots}) == len(images))
    return holds(*sizes)


@claim("erratum-12", "released code", "refuted", other=(0.5, "stored"), printed=r"q^* = 0.110",
       derived=lambda: sp.Float(toy_q(50.0), 4),
       test="test_divergence.py::test_exponent_and_cost_of_the_released_toy_script")  # fmt: skip
def released_toy(form: tuple[float, str] = (2.0, "recomputed")) -> Status:
    """The released toy's q* = 0.110 at α = 0.01 comes from (21) with Proposition 1. (It is m = 1/2 and C_rnd = r.)"""
    return measures(toy_q(50.0, CostModel(r=10, sweep=Sweep.parse(form[1])), form[0]), 0.110, 5e-3)


@claim("erratum-12b", "released code", "refuted", other=second_moment.estimate(sp.S.Zero),
       printed=r"\|b_{FO} - b_{Exact}\|^2", derived=r"(1/q - 1)^2 \|b_{FO} - b_{Exact}\|^2",
       test="test_proofs.py::test_overwritten_proxy_is_361_times_too_large_at_q_0_05")  # fmt: skip
def overwritten_proxy(smoothed: sp.Expr = second_moment.estimate(sp.S.One)) -> Status:
    """The released code smooths (23): it measures D² once UFOM's estimate has overwritten b_FO. (361× at q = 0.05.)"""
    e, p = second_moment.EXACT, second_moment.PROXY
    return vanishes((smoothed - e) ** 2 - (e - p) ** 2)


awaits("erratum-12c", "released code", "It counts N + 1 first-order calls where its loop makes N.")
awaits("erratum-12d", "released code", "Its exact gradients are clipped to ±0.1, so they are no longer unbiased.")
awaits("erratum-12e", "released code", "The .npz files that its figures need are not shipped.")
