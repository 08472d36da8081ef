"""Independent oracles for the derivations: the unrolled loop differentiated, exhaustive search, long floats,
simulation."""

import heapq
import itertools

import mpmath
import numpy as np
import pytest
import sympy as sp
import torch

from tests.grids import slow_unless
from ufom_runtime.problems.few_shot import sample_episodes
from ufom_theory import CostModel, Sweep, Truncated
from ufom_theory.derivations import bias_bound, chain_rule, complexity, convergence, optimum, second_moment
from ufom_theory.derivations.symbols import (
    A_Q,
    C1,
    C2,
    EPSILON,
    GAP,
    KAPPA,
    L_M,
    RHO,
    TAU,
    V2,
    K,
    M,
    Q,
    R,
    at_length,
)

ALPHAS = [sp.Rational(1, n) for n in (2, 3, 5, 7)]
AT = dict(zip(chain_rule.polynomial_problem().theta, (sp.Rational(2, 3), sp.Rational(-5, 4)), strict=True))


@pytest.mark.parametrize("r", slow_unless(lambda r: r < 3, (1, 2, 3)))
def test_backward_loop_is_the_unrolled_gradient(r):
    problem = chain_rule.polynomial_problem()
    unrolled = chain_rule.unrolled_gradient(problem, ALPHAS[:r])
    assert unrolled == chain_rule.backward_loop(problem, ALPHAS[:r])
    assert unrolled != chain_rule.backward_loop(problem, ALPHAS[:r], kept=r - 1)


@pytest.mark.slow  # the test above takes up to three steps, with symbols
def test_backward_loop_of_four_steps_at_a_point():
    problem = chain_rule.polynomial_problem()
    assert chain_rule.unrolled_gradient(problem, ALPHAS).subs(AT) == chain_rule.backward_loop(problem, ALPHAS, at=AT)


def test_first_order_gradient_of_a_start_free_problem_vanishes():
    problem = chain_rule.polynomial_problem()
    hyper = problem._replace(outer=problem.phi[0] ** 2, start=sp.Matrix([1, 2, 3]))
    assert chain_rule.backward_loop(hyper, ALPHAS[:2], kept=0) == sp.zeros(2, 1)
    assert chain_rule.backward_loop(hyper, ALPHAS[:2]) != sp.zeros(2, 1)


def test_algorithm_4_at_a_point():
    problem = chain_rule.polynomial_problem()
    first_order, exact = chain_rule.algorithm_4(problem, ALPHAS[:3], AT)
    assert first_order == chain_rule.backward_loop(problem, ALPHAS[:3], kept=0).subs(AT)
    assert exact == chain_rule.unrolled_gradient(problem, ALPHAS[:3]).subs(AT)


def test_batch_of_three_by_enumeration():
    brute, squares = second_moment.enumerated_batch(3)
    assert sp.expand(brute - second_moment.batch_second_moment().subs(squares)) == 0


def test_overwritten_proxy_is_361_times_too_large_at_q_0_05():
    e, p = second_moment.EXACT, second_moment.PROXY
    factor = sp.simplify((second_moment.estimate(sp.S.One) - e) ** 2 / (e - p) ** 2)
    assert (factor.subs(Q, sp.Rational(1, 20)), factor.subs(Q, 1)) == (361, 0)


@pytest.mark.parametrize(("r", "kept", "own"), [(1, 0, 1), (2, 1, 1), (5, 3, 1), (4, 1, 0)])
def test_longer_loops_attain_the_bounds(r, kept, own):
    bias, gradient = bias_bound.sharp_values(r, kept, own)
    assert sp.expand(bias_bound.bias(r, kept, own) - bias) == 0
    assert sp.expand(bias_bound.gradient(r, own) - gradient) == 0
    if own:
        truncated = (1 + bias_bound.M1) * bias_bound.L1 * (bias_bound.ALL - bias_bound.KEPT)
        assert sp.expand(at_length(truncated, r, K=kept) - bias) == 0


def test_constant_of_18_bounds_what_it_should():
    """A·H(ε)·τ^(−1/2+ε) against the bound it comes from, on a grid of τ, ε, A ≥ V2; within 20 % of it for small ε."""
    names = (TAU, EPSILON, A_Q, V2, L_M, GAP)
    finer = sp.lambdify(names, convergence.root_steps(), "numpy")
    coarser = sp.lambdify(names, A_Q * convergence.constant_18() * TAU ** (EPSILON - sp.Rational(1, 2)), "numpy")
    tau = np.unique(np.geomspace(1, 1e12, 200).round())
    for eps, a in itertools.product((0.01, 0.1, 0.3, 0.49), (1.0, 1.5, 40.0)):
        assert np.all(finer(tau, eps, a, 1.0, 2.0, 3.0) <= coarser(tau, eps, a, 1.0, 2.0, 3.0) * (1 + 1e-12))
    far = np.exp(1 / 0.05 - 1)
    assert finer(far, 0.05, 1.0, 1.0, 2.0, 0.0) >= 0.8 * coarser(far, 0.05, 1.0, 1.0, 2.0, 0.0)


def test_local_law_at_two_curvatures():
    """c = 5, H = diag(1, 0.2), Σ = diag(1, 2): k·E(M − M_*) → 6.389 by iterating the covariance, not the plain 3.75."""
    h, noise, c = np.array([1.0, 0.2]), np.array([1.0, 2.0]), 5.0

    def entry(curvature, variance, value=0.0):
        for k in range(10, 400_001):
            value = (1 - c / k * curvature) ** 2 * value + (c / k) ** 2 * variance
        return value

    entries = np.array(list(map(entry, h.tolist(), noise.tolist())))
    assert 400_000 * (h * entries).sum() / 2 == pytest.approx(6.389, abs=2e-3)
    law = c * noise / (2 * h - 1 / c)
    assert (h * law).sum() / 2 == pytest.approx(6.389, abs=1e-3)
    assert c * noise.sum() / 4 == 3.75


def test_both_roots_are_the_positive_one():
    point = {RHO: sp.Rational(1, 7), KAPPA: sp.Rational(1, 5), M: sp.Rational(3, 2)}
    assert optimum.root().subs(point).evalf() > 0
    assert abs((optimum.root() - optimum.root_small_exponent()).subs(point).evalf(40)) < 1e-35


def test_slopes_are_those_of_the_root():
    by_rho, by_kappa = optimum.slopes()
    for symbol, slope in ((RHO, by_rho), (KAPPA, by_kappa)):
        assert sp.simplify(sp.diff(optimum.root(), symbol) - slope.subs(Q, optimum.root())) == 0


def test_speedup_in_numbers():
    expected = (1 + (1 / Q - 1) * RHO) ** -M * (KAPPA + 1) / (KAPPA + Q)
    point = {RHO: 0.1, KAPPA: 0.3, M: 1.7, Q: 0.4}
    assert float((optimum.speedup() / expected).subs(point)) == pytest.approx(1, rel=1e-14)


def test_limits():
    assert optimum.small_bias() == sp.sqrt(KAPPA * M)
    assert optimum.long_loop(sp.Integer(1)) == (0, 1 / RHO)


def test_textbook_root_loses_its_digits_where_the_computed_one_does_not():
    """m < 1 and D² near V²: the textbook root of (21) subtracts nearly equal numbers, then divides by 1 − ρ."""
    from ufom_theory.power_law import minimiser

    gap, kappa, m = 2.0**-36, 1e-3, 0.5  # 1 − ρ = 1.5e-11, exactly
    rho = 1 - gap
    with mpmath.workdps(50):
        b, ac = mpmath.mpf(m - 1) * rho, mpmath.mpf(gap) * m * mpmath.mpf(kappa) * rho
        exact = (b + mpmath.sqrt(b * b + 4 * ac)) / (2 * mpmath.mpf(gap))
    textbook = ((m - 1) * rho + np.sqrt(((m - 1) * rho) ** 2 + 4 * gap * m * kappa * rho)) / (2 * gap)
    assert abs(textbook / exact - 1) > 1e-5
    assert abs(float(minimiser(rho, gap, kappa, m)) / exact - 1) < 1e-15


@pytest.mark.parametrize(("r", "proxy"), [(1, 0), (10, 0), (10, 10), (100, 20), (37, 5)])
def test_cost_model_is_the_derived_cost(r, proxy):
    cost = CostModel(r=r, c1=2.5, c2=7.25, proxy=Truncated(proxy))
    point = {R: r, K: proxy, C1: 2.5, C2: 7.25}
    assert cost.c_det == float(complexity.c_det().subs(point))
    assert cost.c_rnd == float(complexity.c_rnd().subs(point))


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


def test_sweeps_count_as_both_dynamic_programs():
    for slots, r in itertools.product(range(7), range(1, 61)):
        two_passes = Sweep.checkpointed(slots).extra_steps(r)
        assert two_passes == complexity.fewest_steps(r, slots)
        assert Sweep.checkpointed(slots).extra_steps(r, as_printed=False) == complexity.fewest_steps_one_pass(r, slots)


def test_smoothed_and_debiased_means():
    """Adaptive UFOM's averages in floats: right in the mean for noise."""
    rng, beta, chains = np.random.default_rng(0), 0.9, 200_000
    noisy = np.zeros(chains)
    for updates in range(1, 6):
        noisy = beta * noisy + (1 - beta) * rng.exponential(0.7, chains)
        debiased = noisy / (1 - beta**updates)
        assert abs(debiased.mean() - 0.7) <= 4 * debiased.std() / np.sqrt(chains)


@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (20, 5)])
def test_few_shot_tasks_have_as_many_training_images_as_counted(ways, shots):
    drawings = torch.zeros(30, 20, 1, 2, 2)  # classes × drawings of one class
    train, labels, test, _ = sample_episodes(drawings, 3, ways, shots, torch.Generator().manual_seed(0))
    assert train.shape[1] == labels.shape[1] == ways * shots
    assert test.shape[1] == ways
