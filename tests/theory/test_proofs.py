"""Each derivation's proof obligations: identities to zero, signs as sympy reads them, limits against numbers."""

import heapq
import itertools

import mpmath
import numpy as np
import pytest
import sympy as sp
import torch

from ufom_runtime.problems.few_shot import sample_episodes
from ufom_theory import Sweep
from ufom_theory.derivations import bias_bound, chain_rule, complexity, convergence, divergence, optimum, second_moment
from ufom_theory.derivations import smoothness as smooth
from ufom_theory.derivations.symbols import (
    A_Q,
    D2,
    EPSILON,
    GAP,
    KAPPA,
    L1,
    L2,
    L_M,
    M1,
    RHO,
    TAU,
    V2,
    M,
    Q,
    step_sizes,
)

ALPHAS = [sp.Rational(1, n) for n in (2, 3, 5, 7)]


@pytest.mark.parametrize("r", [1, 2, 3])
def test_backward_loop_is_the_unrolled_gradient(r):
    problem = chain_rule.polynomial_problem()
    unrolled = chain_rule.unrolled_gradient(problem, ALPHAS[:r])
    assert unrolled == chain_rule.backward_loop(problem, ALPHAS[:r])
    assert unrolled != chain_rule.backward_loop(problem, ALPHAS[:r], kept=r - 1)


def test_backward_loop_of_four_steps_at_a_point():
    problem = chain_rule.polynomial_problem()
    at = dict(zip(problem.theta, (sp.Rational(2, 3), sp.Rational(-5, 4)), strict=True))
    unrolled = chain_rule.unrolled_gradient(problem, ALPHAS).subs(at)
    assert unrolled == chain_rule.backward_loop(problem, ALPHAS, at=at)


def test_every_backward_step_keeps_the_invariant():
    before, after = chain_rule.invariant()
    assert before == after
    assert chain_rule.mixed_derivative_shape(chain_rule.polynomial_problem()) == (3, 2)


def test_first_order_gradient_of_a_start_free_problem_vanishes():
    problem = chain_rule.polynomial_problem()
    hyper = problem._replace(outer=problem.phi[0] ** 2, start=sp.Matrix([1, 2, 3]))
    assert chain_rule.backward_loop(hyper, ALPHAS[:2], kept=0) == sp.zeros(2, 1)
    assert chain_rule.backward_loop(hyper, ALPHAS[:2]) != sp.zeros(2, 1)


def test_second_moment():
    e, p = second_moment.EXACT, second_moment.PROXY
    assert second_moment.mean() == e
    assert sp.expand(second_moment.second_moment() - (e**2 + (1 / Q - 1) * (e - p) ** 2)) == 0
    assert sp.expand(second_moment.lemma_1() - ((1 / Q - 1) * D2 + V2)) == 0
    left, right = second_moment.covariance()
    assert sp.expand(left - right) == 0


def test_lemma_1_is_strict_when_the_suprema_lie_apart():
    supremum, bound = second_moment.suprema_apart()
    assert all(supremum.subs(Q, q) < bound.subs(Q, q) for q in (sp.Rational(1, 10), sp.Rational(9, 10)))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_by_enumeration(size):
    brute, formula = second_moment.enumerated_batch(size)
    assert sp.expand(brute - formula) == 0


def test_batch_formula():
    b, mean2 = second_moment.BATCH, second_moment.MEAN2
    stated = mean2 + (V2 + (1 / Q - 1) * D2 - mean2) / b
    assert sp.expand(second_moment.batch_second_moment() - stated) == 0


@pytest.mark.parametrize(("r", "proxy", "own"), [(1, 0, 1), (2, 1, 1), (4, 0, 1), (5, 3, 1), (2, 0, 0), (4, 1, 0)])
def test_the_bounds_are_attained(r, proxy, own):
    bias, gradient = bias_bound.sharp_values(r, proxy, own)
    assert sp.expand(bias - bias_bound.tight(r, proxy, own)) == 0
    assert sp.expand(gradient - bias_bound.gradient(r, own)) == 0
    assert sp.expand(bias_bound.bias(r, proxy, own) - bias_bound.tight(r, proxy, own)) == 0
    slope, curvature = bias_bound.sharp_constants()
    assert (slope, curvature) == (sp.Rational(7, 10) * L2, L2)


def test_losses_free_of_theta():
    product = sp.prod(1 + alpha * L2 for alpha in step_sizes(3))
    assert sp.expand(bias_bound.tight(3, own=0) - M1 * L1 * (product - 1)) == 0
    assert sp.expand(bias_bound.gradient(3, own=0) - M1 * L1 * product) == 0


def test_overwritten_proxy_is_361_times_too_large_at_q_0_05():
    e, p = second_moment.EXACT, second_moment.PROXY
    measured = (second_moment.estimate(sp.S.One) - e) ** 2
    factor = sp.simplify(measured / (e - p) ** 2)
    assert sp.simplify(factor - (1 / Q - 1) ** 2) == 0
    assert (factor.subs(Q, sp.Rational(1, 20)), factor.subs(Q, 1)) == (361, 0)


@pytest.mark.parametrize(("r", "own"), list(itertools.product((1, 2, 3, 4), (0, 1))))
def test_smoothness_closed_form(r, own):
    assert sp.cancel(sp.together(smooth.recursion(r, own) - smooth.closed_form(r, own))) == 0


@pytest.mark.parametrize("step", [smooth.adjoint_step, smooth.state_step, convergence.polyak_lojasiewicz_step])
def test_induction_steps(step):
    left, right = step()
    assert sp.simplify(left - right) == 0


def test_descent_sums_to_the_bound_for_any_steps():
    s1, s2 = convergence.STEPS, convergence.SQUARES
    assert sp.expand(convergence.any_steps() - (GAP + L_M * A_Q * s2 / 2) / s1) == 0
    stated = (GAP + L_M * A_Q * (1 + sp.log(TAU)) / 2) / (2 * (sp.sqrt(TAU + 1) - 1))
    assert sp.simplify(convergence.root_steps() - stated) == 0


def test_constant_of_18_bounds_what_it_should():
    """A·H(ε)·τ^(−1/2+ε) against the bound it comes from, on a grid of τ, ε, A ≥ V2."""
    names = (TAU, EPSILON, A_Q, V2, L_M, GAP)
    finer = sp.lambdify(names, convergence.root_steps(), "numpy")
    coarser = sp.lambdify(names, A_Q * convergence.constant_18() * TAU ** (EPSILON - sp.Rational(1, 2)), "numpy")
    tau = np.unique(np.geomspace(1, 1e12, 200).round())
    for eps, a in itertools.product((0.01, 0.1, 0.3, 0.49), (1.0, 1.5, 40.0)):
        assert np.all(finer(tau, eps, a, 1.0, 2.0, 3.0) <= coarser(tau, eps, a, 1.0, 2.0, 3.0) * (1 + 1e-12))


def test_parts_of_the_constant_of_18():
    assert sp.simplify(convergence.logarithm_peak() - sp.exp(EPSILON - 1) / EPSILON) == 0
    assert sp.diff(convergence.logarithm_turns(), sp.Symbol("u", real=True)) == -EPSILON
    share, slope = convergence.root_share()
    assert share == sp.sqrt(2) - 1
    assert slope.subs(sp.Symbol("x", positive=True), 1) > 0


def test_exponents_by_outer_schedule():
    assert sp.simplify(convergence.exponent_of(convergence.iterations()) - 2 / (1 - 2 * EPSILON)) == 0
    assert convergence.exponent_of(convergence.tuned_constant()) == 1
    assert convergence.exponent_of(convergence.local_iterations()) == 1 / sp.Symbol("s", positive=True)


def test_local_law():
    c, h = sp.symbols("c h", positive=True)
    for s in (sp.Rational(1, 2), sp.Rational(3, 4)):
        assert convergence.local_ratio(s, c) == A_Q / (2 * h)
    assert sp.simplify(convergence.local_ratio(sp.S.One, c) - A_Q / (2 * h - 1 / c)) == 0


def test_existence_and_uniqueness_of_the_root():
    assert optimum.slope_denominator_inside().is_positive
    assert all(x.is_negative for x in optimum.one_root_below())
    assert optimum.falling_above().is_positive
    leading, at_zero = optimum.enough_below_one()
    assert leading.is_nonpositive
    assert at_zero.is_negative


def test_condition_20_is_not_necessary_below_one():
    at_one, inside, log_time = (float(x) for x in optimum.counterexample_below_one())
    assert at_one < 0 < inside < 1
    assert log_time < 0


def test_limits():
    assert optimum.small_bias() == sp.sqrt(KAPPA * M)
    assert optimum.long_loop_costs() == 0
    assert sp.simplify(optimum.long_loop(sp.Integer(2))[1] - 1 / (4 * RHO * (1 - RHO))) == 0
    assert optimum.long_loop(sp.Integer(1)) == (0, 1 / RHO)
    assert sp.expand(optimum.inverse_slope() - ((M - 1) * Q + 2 * M * KAPPA)) == 0


def test_textbook_root_loses_its_digits_where_the_computed_one_does_not():
    """m < 1 and D² near V²: the textbook root of (21) subtracts nearly equal numbers, then divides by 1 − ρ."""
    from ufom_theory.optimum import minimiser

    gap, kappa, m = 2.0**-36, 1e-3, 0.5  # 1 − ρ = 1.5e-11, exactly
    rho = 1 - gap
    with mpmath.workdps(50):
        b, ac = mpmath.mpf(m - 1) * rho, mpmath.mpf(gap) * m * mpmath.mpf(kappa) * rho
        exact = (b + mpmath.sqrt(b * b + 4 * ac)) / (2 * mpmath.mpf(gap))
    textbook = ((m - 1) * rho + np.sqrt(((m - 1) * rho) ** 2 + 4 * gap * m * kappa * rho)) / (2 * gap)
    assert abs(textbook / exact - 1) > 1e-5
    assert abs(float(minimiser(rho, gap, kappa, m)) / exact - 1) < 1e-15


def shortest_schedule(r: int, slots: int) -> int:
    """Dijkstra over (position, kept states, states still to visit): no rule about where checkpoints go."""
    queue, done = [(0, 0, (), r)], set()
    while queue:
        cost, *node = heapq.heappop(queue)
        position, kept, left = node
        if left == 0:
            return cost
        if tuple(node) in done:
            continue
        done.add(tuple(node))
        moves = [(cost, back, kept, left) for back in (0, *kept) if back < left]
        moves += [(cost, position, tuple(x for x in kept if x != gone), left) for gone in kept]
        if position < left - 1:
            moves.append((cost + 1, position + 1, kept, left))
        if len(kept) < slots and position not in (0, *kept):
            moves.append((cost, position, tuple(sorted((*kept, position))), left))
        if position == left - 1:
            moves.append((cost, 0, kept, left - 1))
        for move in moves:
            heapq.heappush(queue, move)
    raise AssertionError("no schedule")


@pytest.mark.parametrize(("r", "slots"), [(1, 1), (4, 0), (5, 1), (7, 1), (7, 2), (8, 2), (7, 3)])
def test_binomial_count_against_exhaustive_search(r, slots):
    assert Sweep.checkpointed(slots).extra_steps(r) == shortest_schedule(r, slots)


def test_binomial_count_against_both_dynamic_programs():
    for slots, r in itertools.product(range(7), range(1, 61)):
        two_passes = Sweep.checkpointed(slots).extra_steps(r)
        assert two_passes == complexity.fewest_steps(r, slots)
        assert two_passes - (r - 1) == complexity.fewest_steps_one_pass(r, slots)
        assert Sweep.checkpointed(slots, one_pass=True).extra_steps(r) == two_passes - (r - 1)


def test_pieces_of_the_binomial_count_join():
    rise, expected = complexity.binomial_rise()
    assert sp.simplify(rise - expected) == 0


def test_counterexample_is_smooth_and_convex():
    assert divergence.joints() == [0] * 6
    a, t = divergence.CURVATURE, sp.Symbol("t", positive=True)
    assert divergence.curvatures()[0::2] == (a, 0)
    assert sp.expand(divergence.curvatures()[1] - a * (1 - t)) == 0
    assert sp.expand(divergence.slope_bound() - (a / 2 + a * divergence.REACH)) == 0


def test_stationary_point_of_the_first_order_method():
    a1, a2, p1, p2, b2 = divergence.A1, divergence.A2, divergence.P1, divergence.P2, divergence.B2
    assert sp.simplify(divergence.theta_fo() - p2 * b2 / (a1 * p1 + a2 * p2)) == 0
    stated = a1 * b2 * p1 * p2 * (p1 - p2) / (2 * (a1 * p1 + a2 * p2))
    assert sp.simplify(divergence.gradient() - stated) == 0
    at_offset = divergence.gradient().subs(b2, divergence.offset()) ** 2
    assert sp.simplify(at_offset - 2 * divergence.BIAS) == 0
    assert all(x.is_positive for x in divergence.room())


@pytest.mark.parametrize("coin", [0, 1])
def test_algorithm_4_at_a_point(coin):
    """Three steps, θ given: either coin against the unrolled gradient and the loop that keeps every state."""
    problem = chain_rule.polynomial_problem()
    at = dict(zip(problem.theta, (sp.Rational(2, 3), sp.Rational(-5, 4)), strict=True))
    first_order = chain_rule.backward_loop(problem, ALPHAS[:3], kept=0).subs(at)
    exact = chain_rule.unrolled_gradient(problem, ALPHAS[:3]).subs(at)
    returned = chain_rule.algorithm_4(problem, ALPHAS[:3], coin).subs(at)
    assert (returned - first_order - coin / Q * (exact - first_order)).applyfunc(sp.expand) == sp.zeros(2, 1)
    assert exact != first_order


def test_hessian_vector_products_are_directional_derivatives():
    """Reverse over reverse, as Algorithm 2 takes them, against the gradient's derivative along b2."""
    problem, t = chain_rule.polynomial_problem(), sp.Symbol("t")
    b2 = sp.Matrix([3, -2, 5])
    ahead = dict(zip(problem.phi, problem.phi + t * b2, strict=True))
    inner = sp.Matrix([problem.inner])
    functional = inner.jacobian(problem.phi) * b2
    for x in (problem.theta, problem.phi):
        along = inner.jacobian(x).T.subs(ahead, simultaneous=True).diff(t).subs(t, 0)
        assert sp.simplify(functional.jacobian(x).T - along) == sp.zeros(len(x), 1)


def test_root_steps_and_their_squares_add_up_to_infinity():
    gamma = np.arange(1, 10**6 + 1) ** -0.5
    for size in 10 ** np.arange(1, 7):
        assert gamma[:size].sum() >= 2 * (np.sqrt(size + 1) - 1)
        assert (gamma[:size] ** 2).sum() == pytest.approx(np.log(size) + np.euler_gamma, abs=1 / size)


def test_smoothed_and_debiased_means():
    """Adaptive UFOM's averages in floats: right for constants, right in the mean for noise, 0/0 before any update."""
    rng, beta, chains = np.random.default_rng(0), 0.9, 200_000
    constant, noisy = 0.0, np.zeros(chains)
    for updates in range(1, 6):
        constant, noisy = beta * constant + (1 - beta) * 0.7, beta * noisy + (1 - beta) * rng.exponential(0.7, chains)
        debiased = noisy / (1 - beta**updates)
        assert constant / (1 - beta**updates) == pytest.approx(0.7, rel=1e-14)
        assert abs(debiased.mean() - 0.7) <= 4 * debiased.std() / np.sqrt(chains)
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.float64(0) / (1 - np.float64(beta) ** 0))


@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (20, 5)])
def test_few_shot_tasks_have_as_many_training_images_as_counted(ways, shots):
    drawings = torch.zeros(30, 20, 1, 2, 2)  # classes × drawings of one class
    train, labels, test, _ = sample_episodes(drawings, 3, ways, shots, torch.Generator().manual_seed(0))
    assert train.shape[1] == labels.shape[1] == ways * shots
    assert test.shape[1] == ways
