"""Theorem 2's problem: its parameters, its moments, and where outer SGD ends on it."""

import collections
import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from tests.grids import slow_unless
from ufom_theory import (
    CostModel,
    Moments,
    Sweep,
    TwoTaskProblem,
    UfomError,
    diverging_problem,
    optimal_q,
    squared_gradient_norms,
)

STEPS = 200_000
TOY_D_TO_F = TwoTaskProblem(0.01, 10, (0.5, 1.5), (0.0, 10.0), 400.0)


def last(values):
    return collections.deque(values, maxlen=1)[0]


def harmonic(curvature: float, count: int):
    """γ_k = 1/(L(k + 20)), L the mean curvature of the followed field at its own stationary point."""
    return (1 / (curvature * (k + 20)) for k in range(1, count + 1))


def test_the_papers_toy_of_figure_1_a_to_c():
    p = diverging_problem(D=0.06, r=10, alpha=0.1)
    assert p.parameters == {"alpha": 0.1, "r": 10, "a": (0.5, 1.5), "b": p.b, "A": p.A}
    assert p.b[1] == pytest.approx(17.395269970483508, rel=1e-14)
    assert pytest.approx(12.596846646989006, rel=1e-14) == p.A
    assert p.theta_fo == pytest.approx(5.758867, abs=5e-7)
    assert p.gradient**2 == pytest.approx(2 * 0.06, rel=1e-13)


@pytest.mark.parametrize(("r", "alpha", "D"), list(itertools.product((1, 7, 20), (0.01, 0.3, 0.6), (1e-3, 5.0))))
def test_gradient_at_theta_fo_of_the_whole_function(r, alpha, D):
    """`gradients` follows all three pieces of f, so this tests that θ_FO lies where the formula needs it."""
    p = diverging_problem(D, r, alpha)
    first_order, exact = p.gradients(p.theta_fo)
    assert first_order.mean() == pytest.approx(0, abs=1e-9 * np.abs(first_order).max())
    assert exact.mean() ** 2 == pytest.approx(2 * D, rel=1e-9)
    assert p.gradients(p.theta_star)[1].mean() == pytest.approx(0, abs=1e-9 * np.abs(exact).max())


def test_any_step_size_is_served_by_small_curvatures():
    p = diverging_problem(1.0, 5, 100.0, a=(0.002, 0.006))
    assert p.gradients(p.theta_fo)[1].mean() ** 2 == pytest.approx(2, rel=1e-12)


def test_moments_of_the_toy_of_figure_1_d_to_f():
    d2, v2 = TOY_D_TO_F.moments(np.linspace(-50, 50, 20_001))
    assert (d2.argmax(), v2.argmax()) == (0, 0)  # both at θ = −50
    assert d2.max() == pytest.approx(53.21197334, rel=1e-9)
    assert v2.max() == pytest.approx(2229.315673, rel=1e-9)
    assert optimal_q(Moments(d2.max(), v2.max()), CostModel(r=10), m=2).q == pytest.approx(0.111879, abs=5e-7)


def test_suprema_over_the_real_line():
    d2, v2 = TOY_D_TO_F.moments(np.append(np.linspace(-3000, 3000, 60_001), 10 / 1.5 - 400))
    peak = minimize_scalar(lambda x: -TOY_D_TO_F.moments(x)[0], bounds=(-400, -390), options={"xatol": 1e-9})
    assert max(d2.max(), -peak.fun) == pytest.approx(2659.539581, rel=1e-9)
    assert v2.max() == pytest.approx(200500.3125, rel=1e-12)
    assert optimal_q(Moments(-peak.fun, v2.max()), CostModel(r=10), m=2).q == pytest.approx(0.080358, abs=5e-7)


def test_exponent_and_cost_of_the_released_toy_script():
    """m = 1/2 and a stored sweep's C_rnd = r, on the moments over [−50, 50]."""
    d2, v2 = TOY_D_TO_F.moments(-50.0)
    released = optimal_q(Moments(float(d2), float(v2)), CostModel(r=10, sweep=Sweep.stored()), m=0.5)
    assert released.q == pytest.approx(0.110, abs=5e-4)


@pytest.mark.parametrize(
    ("r", "alpha", "D"),
    slow_unless(
        lambda case: case[1:] == (0.1, 0.06),
        [(1, 0.05, 0.06), (1, 0.3, 10.0), (3, 0.1, 10.0), (10, 0.1, 0.06), (10, 0.2, 1.0)],
    ),
)
def test_fom_ends_at_2d_and_ufom_does_not(r, alpha, D):
    p = diverging_problem(D, r, alpha)
    assert last(squared_gradient_norms(p, 0.0, harmonic(p.curvature_fo, STEPS))) / D == pytest.approx(2, rel=0.03)
    assert last(squared_gradient_norms(p, 0.1, harmonic(p.curvature, STEPS))) / D < 1 / 20


@pytest.mark.parametrize(("r", "alpha", "D"), [(10, 0.1, 0.06), (3, 0.3, 1.0)])
@pytest.mark.parametrize("q", [0.0, 0.1])
def test_moment_recursion_against_simulation(r, alpha, D, q):
    p, chains, count = diverging_problem(D, r, alpha), 2000, 3000
    rng = np.random.default_rng(0)
    curvature = p.curvature if q else p.curvature_fo
    theta, a, b = np.full(chains, 6.0), np.asarray(p.a), np.asarray(p.b)
    for gamma in harmonic(curvature, count):
        task, coin = rng.integers(0, 2, chains), rng.random(chains) < q
        contraction = p.contractions[task]
        scale = contraction * (1 + (coin / q if q else 0.0) * (contraction - 1))
        theta = theta - gamma * scale * (a[task] * theta - b[task])
    squares = (p.curvature * (theta - p.theta_star)) ** 2
    expected = last(squared_gradient_norms(p, q, harmonic(curvature, count), start=6.0))
    assert abs(squares.mean() - expected) <= 4 * squares.std() / math.sqrt(chains)


def test_local_law_of_the_last_iterate():
    """Iterations to a precision grow as A(q)^(1/s), and the fastest q is the one predicted from the moments at θ*.

    γ_k = c·k^(−s) with c = 2/M'', so that 2·c·M'' > 1 as the law needs at s = 1. The moments vary only by k^(−s).
    """
    problem, count = TOY_D_TO_F, 20_000
    s, q = np.array([0.5, 0.6, 0.75, 0.9, 1.0]), np.geomspace(0.02, 1, 41)
    records = np.unique(np.geomspace(50, count, 100).astype(int))
    steps = (2 / problem.curvature * float(k) ** -s[:, None] for k in range(1, count + 1))
    norms = squared_gradient_norms(problem, q, steps, start=problem.theta_star)
    kept = np.array([value for k, value in enumerate(norms, 1) if k in records])
    moments, cost = Moments(*(float(x) for x in problem.moments(problem.theta_star))), CostModel(r=10)
    for i, exponent in enumerate(s):
        level = np.log(kept[-1, i, 0] * 1.02)  # what the smallest q reaches only at the end
        iterations = [np.interp(-level, -np.log(kept[:, i, n]), np.log(records)) for n in range(len(q))]
        m = np.polyfit(np.log((1 / q - 1) * moments.d2 + moments.v2), iterations, 1)[0]
        assert m == pytest.approx(1 / exponent, rel=0.02)
        log_time = iterations + np.log(cost.c_det + q * cost.c_rnd)
        near = slice(log_time.argmin() - 2, log_time.argmin() + 3)
        bend, slope, _ = np.polyfit(np.log(q[near]), log_time[near], 2)
        assert np.exp(-slope / (2 * bend)) == pytest.approx(optimal_q(moments, cost, 1 / exponent).q, rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diverging_problem(0.0, 10, 0.1), "> 0"),
        (lambda: diverging_problem(1.0, 0, 0.1), "at least 1"),
        (lambda: diverging_problem(1.0, 10, 0.1, (1.0, 1.0)), "two curvatures"),
        (lambda: diverging_problem(1.0, 10, 2.0, (0.25, 0.5)), "one inner step lands"),
        (lambda: diverging_problem(1.0, 10, 1.0, (0.5, 1.5)), "merely scaled"),
        (lambda: diverging_problem(1.0, 9, 1.0, (0.5, 1.5)), "jumps over"),
        (lambda: diverging_problem(1.0, 10**6, 0.1), "b_2 overflows"),
        (lambda: TwoTaskProblem(0.1, 10, (0.5,), (0.0, 1.0), 1.0), "two tasks"),  # type: ignore[arg-type]
        (lambda: TwoTaskProblem(0.1, 10, (0.5, 1.5), (0.0, 50.0), 1.0).theta_fo, "make A larger"),
        (lambda: next(squared_gradient_norms(TOY_D_TO_F, 1.5, [0.1])), "probability"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()


def test_moments_over_the_inner_step_size():
    """Against the closed form while the quadratic pieces hold: means of ((p² − p)·a·u)² and (p²·a·u)², u = θ − b/a."""
    grid, known = np.linspace(-50, 50, 1001), []
    for alpha in (0.001, 0.01, 0.05):
        toy = TwoTaskProblem(alpha, 10, (0.5, 1.5), (0.0, 10.0), 400.0)
        d2 = v2 = 0.0
        for a, b in zip(toy.a, toy.b, strict=True):
            p, u = (1 - alpha * a) ** 10, grid - b / a
            d2, v2 = d2 + ((p * p - p) * a * u) ** 2 / 2, v2 + (p * p * a * u) ** 2 / 2
        np.testing.assert_allclose(toy.moments(grid), (d2, v2), rtol=1e-11)
        known.append((d2.max(), v2.max()))
    assert known[0][0] < known[1][0] < known[2][0]
    assert known[0][1] > known[1][1] > known[2][1]


def test_long_inner_loops_end_at_the_minimum():
    """The slope at φ_r, over all three pieces of f, falls to nothing: problem (4) tends to (1)."""
    slopes = [
        np.abs(TwoTaskProblem(0.3, r, (0.5, 1.5), (0.0, 10.0), 12.0).gradients(25.0)[0]) for r in (1, 10, 100, 300)
    ]
    assert (np.diff(slopes, axis=0) < 0).all()
    assert slopes[-1].max() < 1e-15


def test_suprema_and_m_2_ask_for_a_larger_q_than_local_moments_and_m_1():
    ratios = []
    for alpha in (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05):
        toy = TwoTaskProblem(alpha, 10, (0.5, 1.5), (0.0, 10.0), 400.0)
        d2, v2 = toy.moments(np.append(np.linspace(-50, 50, 1001), toy.theta_star))
        paper = optimal_q(Moments(d2.max(), v2.max()), CostModel(r=10), 2.0).q
        ratios.append(paper / optimal_q(Moments(d2[-1], v2[-1]), CostModel(r=10), 1.0).q)
    assert ratios == pytest.approx([1.85, 1.87, 1.93, 2.05, 2.37, 2.87, 1.33], abs=0.005)
