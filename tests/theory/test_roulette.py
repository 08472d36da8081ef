"""The roulette over the backward loop: enumerated, against a numerical minimum, and its costs against a search."""

import functools
import os

import numpy as np
import pytest

from tests.theory.brute import shrinking_grid
from ufom_theory import CostModel, Moments, Sweep, Truncated, UfomError, optimal_q
from ufom_theory.roulette import level_costs, optimal_survival, partial_steps, roulette_moments

DRAWS = int(os.environ.get("UFOM_DRAWS", "2000"))


def estimates(levels, q):
    """(probability, estimate) of every way the roulette can end; levels are G_{K_0} … G_{K_n}, shape (n + 1, s)."""
    total, reached = levels[0], np.append(q, 0.0)
    outcomes = [(1 - q[0], total)]
    for i in range(len(q)):
        total = total + (levels[i + 1] - levels[i]) / q[i]
        outcomes.append((reached[i] - reached[i + 1], total))
    return outcomes


@pytest.mark.parametrize("n", [1, 2, 4])
def test_first_two_moments_by_enumeration(n):
    rng = np.random.default_rng(n)
    tasks, q = rng.normal(size=(3, n + 1, 5)), np.sort(rng.uniform(0.05, 1, n))[::-1]
    exact = tasks[:, -1]
    for levels in tasks:
        mean = sum(p * value for p, value in estimates(levels, q))
        np.testing.assert_allclose(mean, levels[-1], rtol=1e-12, atol=1e-12)
    second = np.mean([sum(p * value @ value for p, value in estimates(levels, q)) for levels in tasks])
    d2 = [np.mean(np.sum((exact - tasks[:, i]) ** 2, 1)) for i in range(n)]
    v2 = np.mean(np.sum(exact**2, 1))
    assert roulette_moments(q, d2, v2, np.ones(n + 1))[0] == pytest.approx(second, rel=1e-12)


def test_the_cost_is_that_of_the_runs():
    costs, q = level_costs([0, 3, 8], 1.0, 2.0, Sweep.recomputed()), np.array([0.6, 0.2])
    runs = [9.0, 9 + 2 * 3 + sum(range(5, 8)), 9 + 2 * 8 + sum(range(8))]
    probabilities = [1 - q[0], q[0] - q[1], q[1]]
    assert roulette_moments(q, [1.0, 0.5], 2.0, costs)[1] == pytest.approx(np.dot(runs, probabilities), rel=1e-14)


@pytest.mark.parametrize("m", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_against_the_numerical_minimum(n, m):
    rng = np.random.default_rng(10 * n + int(m))
    draws = max(1, DRAWS // 9)
    d2 = 10 ** rng.uniform(-2.5, 0.5, (draws, n))  # unsorted: some a_i < 0, some a_0 < 0
    v2, c = 10 ** rng.uniform(-0.7, 0.7, draws), 10 ** rng.uniform(-1, 1.5, (draws, n + 1))
    a = np.concatenate([v2[:, None] - d2[:, :1], d2 - np.concatenate([d2[:, 1:], np.zeros((draws, 1))], 1)], 1)

    def log_time(q):
        return m * np.log(a[:, 0] + (a[:, 1:] / q).sum(-1)) + np.log(c[:, 0] + (c[:, 1:] * q).sum(-1))

    found = shrinking_grid(log_time, n, draws)
    ours = np.log([optimal_survival(*row, m).time for row in zip(d2, v2, c, strict=True)])
    assert np.all(ours <= found + 1e-10)
    one_valley = (a[:, 0] >= 0) | (m >= 1)  # elsewhere the search may end in the wrong one of two
    np.testing.assert_allclose(ours[one_valley], found[one_valley], rtol=0, atol=1e-10)
    for row in zip(d2, v2, c, strict=True):
        survival = optimal_survival(*row, m)
        second_moment, cost = roulette_moments(survival.q, *row)
        assert (survival.second_moment, survival.cost) == pytest.approx((second_moment, cost), rel=1e-12)
        assert survival.time == pytest.approx(second_moment**m * cost, rel=1e-12)


def test_one_level_is_ufom():
    rng = np.random.default_rng(3)
    for _ in range(200):
        rho, m, r = 10 ** rng.uniform(-4, 0.5), rng.choice([0.5, 1.0, 2.0]), int(rng.integers(1, 200))
        cost = CostModel(r=r)
        q = optimal_survival([rho], 1.0, level_costs([0, r]), m).q[0]
        assert q == pytest.approx(optimal_q(Moments(rho, 1.0), cost, m=m).q, rel=1e-10)


def test_capping_without_solving_again_is_slower():
    """D²_0 ≈ V²: the first level is always taken, and the second belongs with the new a_0 and c_0."""
    d2, costs = [0.99, 0.05], [1.0, 1.0, 50.0]
    best = optimal_survival(d2, 1.0, costs)
    assert best.q[0] == 1.0
    a, c = np.array([0.01, 0.94, 0.05]), np.array(costs)
    cut = np.minimum(1.0, np.sqrt(c[0] / a[0]) * np.sqrt(a[1:] / c[1:]))
    moment, cost = roulette_moments(cut, d2, 1.0, costs)
    assert moment * cost > 1.2 * best.time


def test_edges():
    assert optimal_survival([0.0], 1.0, [1.0, 1.0]).q[0] == 0.0  # an exact proxy
    exact_then_nothing = optimal_survival([0.1, 0.0], 1.0, [1.0, 1.0, 5.0])
    assert exact_then_nothing.q[1] == 0.0 < exact_then_nothing.q[0]
    assert np.all(optimal_survival([2.0, 1.5], 1.0, [1.0, 1.0, 5.0], 2.0).q == [1.0, 1.0])
    rising = optimal_survival([0.1, 0.3], 1.0, [10.0, 5.0, 5.0])  # the middle level is worse than the first
    assert rising.q[0] == rising.q[1] == pytest.approx(optimal_survival([0.1], 1.0, [10.0, 10.0]).q[0])


@pytest.mark.parametrize("unit", [1e-200, 1e-80, 1e80, 1e200])
def test_the_unit_of_the_moments_does_not_matter(unit):
    """Also where A^m is below or beyond floating point; the first level is at 1."""
    d2, costs = np.array([3.0, 0.05]), [5.0, 10.0, 40.0]
    here, there = optimal_survival(d2, 1.0, costs, 4.0), optimal_survival(d2 * unit, unit, costs, 4.0)
    assert here.q[1] < here.q[0] == 1.0
    np.testing.assert_allclose(there.q, here.q, rtol=1e-12)
    assert there.second_moment == pytest.approx(here.second_moment * unit, rel=1e-12)


def search(r, last, slots):
    """Fewest steps for the last states of r, over every place of the first state kept."""

    @functools.cache
    def fewest(r, last, slots):
        if last == 0:
            return 0
        if slots == 0:
            return sum(range(r - last, r))
        kept = (
            k + fewest(r - k, min(last, r - k), slots - 1) + fewest(k, max(last - (r - k), 0), slots)
            for k in range(1, r)
        )
        return min([sum(range(r - last, r)), *kept])

    return fewest(r, last, slots)


def test_partial_sweeps_against_a_search():
    for r in range(1, 14):
        for last in range(r + 1):
            for slots in range(4):
                assert partial_steps(Sweep.checkpointed(slots), r, last) == search(r, last, slots)


def test_partial_sweeps():
    four = Sweep.checkpointed(3)  # and φ_0: four states held
    assert partial_steps(four, 100, 10) == 105
    assert four.extra_steps(100) - four.extra_steps(90) == 50  # what a difference would say
    for sweep in (four, Sweep.recomputed(), Sweep.stored()):
        assert partial_steps(sweep, 30, 30) == sweep.extra_steps(30)
    assert partial_steps(Sweep.recomputed(), 100, 10) == sum(range(90, 100))


def test_a_longer_first_level_is_a_truncated_proxy():
    cost = CostModel(r=100, c2=3.0, proxy=Truncated(20))
    assert level_costs([20, 100], c2=3.0) == pytest.approx([cost.c_det, cost.c_rnd])
    assert level_costs([20, 100])[1] == 3240


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimal_survival([0.1], 1.0, [1.0]), "c_0 … c_n"),
        (lambda: optimal_survival([0.1, 0.0, 0.0], 1.0, [1.0, 1.0]), "without D²_n"),
        (lambda: optimal_survival([-0.1], 1.0, [1.0, 1.0]), "squared norm"),
        (lambda: optimal_survival([0.1], 1.0, [1.0, 0.0]), "> 0"),
        (lambda: optimal_survival([0.0], 0.0, [1.0, 1.0]), "gradient vanishes"),
        (lambda: optimal_survival([0.1], 1.0, [1.0, 1.0], 0), "> 0"),
        (lambda: roulette_moments([0.1, 0.2], [0.1, 0.1], 1.0, [1, 1, 1]), "q_1 ≥ … ≥ q_n"),
        (lambda: roulette_moments([1.2], [0.1], 1.0, [1, 1]), "q_1 ≥ … ≥ q_n"),
        (lambda: level_costs([5]), "two at least"),
        (lambda: level_costs([5, 5]), "must rise"),
        (lambda: partial_steps(Sweep.stored(), 5, 6), "more than the r = 5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()
