"""What cannot be is refused by name: shapes that do not broadcast, arrays for single values, impossible moments."""

import numpy as np
import pytest

from ufom_theory import (
    AssumptionConstants,
    CostModel,
    Moments,
    Sweep,
    Truncated,
    TwoTaskProblem,
    UfomError,
    bias_bound,
    bootstrap_interval,
    counted_candidates,
    diverging_problem,
    exponent,
    optimal_q,
    rate_bound,
    rate_constant,
    squared_gradient_norms,
    time_bound,
)

COST, FOM, TWO = CostModel(r=3), Truncated(0), Moments([0.1, 0.2], 1.0, mean_gradient_sq=0.5)
ONE = {FOM: Moments(0.1, 1.0)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Moments([1, 2], [1, 2, 3]), r"d2 \(2,\), v2 \(3,\) do not broadcast"),
        (lambda: Moments([1, 2], 3, mean_gradient_sq=[1, 1, 1]), "mean_gradient_sq"),
        (lambda: Moments([1, 2], 3, cov=np.zeros((3, 2, 2))), r"covariance \(3,\) do not broadcast"),
        (lambda: CostModel(r=[1, 2], c1=[1, 2, 3]), r"r \(2,\), c1 \(3,\) do not broadcast"),
        (lambda: CostModel(r=[1, 2], c2_sem=[1, 2, 3]), "c2_sem"),
        (lambda: optimal_q(TWO, CostModel(r=[1, 2, 3]), m=2), r"moments \(2,\), cost \(3,\) do not broadcast"),
        (lambda: optimal_q(TWO, COST, m=[1, 2, 3]), r"m \(3,\) do not broadcast"),
        (lambda: COST.time([0.1, 0.2, 0.3], TWO, m=2), r"q \(3,\), moments \(2,\) do not broadcast"),
        (lambda: optimal_q(TWO, COST, batch=np.array([1, 2]), m=2), "must be one number"),
        (lambda: bootstrap_interval([1, 2], [1, 2], CostModel(r=[5, 6]), m=2), "one cost model at a time"),
        (lambda: counted_candidates(ONE, np.array([5, 6]), 1, 1, 3), "must be one number"),
        (lambda: counted_candidates(ONE, 5, [1, 2], 1, 3), "must be one number"),
        (lambda: counted_candidates({FOM: Moments(0.1, 1, np.zeros((2, 2, 2)))}, 5, 1, 1, 3), "are arrays"),
        (lambda: diverging_problem([1, 2], 10, 0.1), "must be one number"),
        (lambda: diverging_problem(1, 10, [0.1, 0.2]), "must be one number"),
        (lambda: TwoTaskProblem(0.1, [1, 2], (1, 2), (0, 1), 1), "must be one number"),
        (lambda: time_bound(TWO, COST, 0.5, 1, 1, 1), "must be one number"),
        (lambda: time_bound(Moments(0.1, [1, 2]), COST, 0.5, 1, 1, 1), "must be one number"),
        (lambda: time_bound(Moments(0.1, 1), COST, 0.5, 1, 1, [1, 2]), "must be one number"),
        (lambda: rate_constant([1, 2], 1, 1, 0.1), "must be one number"),
        (lambda: rate_constant(1, 1, 1, [0.1]), "must be one number"),
        (lambda: rate_bound(1, [1, 2], 1, [1]), "must be one number"),
        (lambda: exponent([0.1, 0.2]), "must be one number"),
        (lambda: Truncated([1, 2]), "must be one number"),
        (lambda: AssumptionConstants([1, 2], 1, 1, 1, 1), "must be one number"),
    ],
)
def test_shapes_are_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exponent("a"), "not a number"),
        (lambda: CostModel(r=[[1], [1, 2]]), "array of integers"),
        (lambda: CostModel(r=5, proxy=2), r"write Truncated\(K\)"),
        (lambda: CostModel(r=5, sweep="stored"), r"write Sweep.stored\(\)"),
        (lambda: Sweep.parse(3), "is unknown"),
        (lambda: bias_bound(AssumptionConstants(1, 1, 1, 1, 1), [0.1], 2), r"write Truncated\(K\)"),
        (lambda: optimal_q(0.1, COST, m=2), "write Moments"),
        (lambda: optimal_q(TWO, 10, m=2), "write CostModel"),
        (lambda: counted_candidates({0: Moments(0.1, 1)}, 5, 1, 1, 3), r"write Truncated\(K\)"),
        (lambda: counted_candidates({FOM: 0.1}, 5, 1, 1, 3), "write Moments"),
        (lambda: counted_candidates([FOM], 5, 1, 1, 3), "of type Mapping"),
        (lambda: squared_gradient_norms(diverging_problem(1, 10, 0.1), 2.0, [0.1]), "probability"),
        (
            lambda: squared_gradient_norms(diverging_problem(1, 10, 0.1), [0.1] * 3, [], [1.0, 2.0]),
            "q .3,., start .2,.",
        ),
        (lambda: next(squared_gradient_norms(diverging_problem(1, 10, 0.1), 0.5, [-0.1])), "γ_k = -0.1 must be"),
        (lambda: next(squared_gradient_norms(diverging_problem(1, 10, 0.1), 0.5, ["a"])), "γ_k = 'a' is not"),
        (lambda: squared_gradient_norms(TwoTaskProblem(0.1, 9, (1, 2), (0, 50), 1), 0.5, [0.1]), "make A larger"),
    ],
)
def test_types_are_named_at_once(call, message):
    with pytest.raises(UfomError, match=message):
        call()


@pytest.mark.parametrize("r", [3_000_000_001, 2**63, 10**30])
def test_loops_too_long_to_count_are_refused(r):
    for given in (r, [r], np.array([1, r])):
        with pytest.raises(UfomError, match=r"at most 3e\+09"):
            CostModel(r=given)


def test_the_longest_loop_is_counted_exactly():
    r = 3_000_000_000
    assert CostModel(r=r).extra_steps == CostModel(r=np.array([r])).extra_steps[0] == r * (r - 1) // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cov": [[1e-6, 1e-7], [0, 1e-6]]}, "not symmetric"),
        ({"cov": [[1e-6, 1], [1, 1e-6]]}, "correlation beyond ±1"),
        ({"cov": [[0, 1e-9], [1e-9, 1e-6]]}, "correlation beyond ±1"),
        ({"mean_gradient_sq": 0.5, "cov": [[1e-6, 0, 0.1], [0, 1e-6, 0], [0.1, 0, 1e-6]]}, "correlation beyond ±1"),
        ({"mean_gradient_sq": -0.1}, "negative, but it is given without an error"),
        ({"cov": [[1e-6]]}, r"must be \(k, k\)"),
        ({"cov": np.zeros((8, 8))}, r"must be \(k, k\)"),
        ({"cross": 0.5}, "give both, or neither"),
        ({"cross": 0.5, "proxy_sq": 0.5}, "contradicts V² − 2·cross"),
        ({"cross": 0.91, "proxy_sq": 0.94, "mean_proxy_sq": 1.0}, "never above the mean of the squares"),
        ({"cross": 0.91, "proxy_sq": 0.94, "cov": np.diag([1e-6, 1e-6])}, "cov contradicts"),
        ({"cross": -0.9, "proxy_sq": 0.0}, "contradicts"),
        ({"mean_gradient_sq": 1.0}, "never above the mean of the squares"),
        ({"mean_gradient_sq": [0.5, 1.0]}, "never above the mean of the squares"),
    ],
)
def test_impossible_moments_are_refused(options, message):
    with pytest.raises(UfomError, match=message):
        Moments(0.02, 0.9, **options)


def test_possible_moments_are_not_refused():
    Moments(0.02, 0.9, cov=[[1e-6, 1e-6], [1e-6, 1e-6]])  # fully correlated
    Moments(0.02, 0.9, mean_gradient_sq=0.9)  # one task
    Moments(0.02, 0.9, cov=np.diag([0, 0.01]), mean_gradient_sq=1.0)  # measured: noise may carry it above
    Moments(0.02, 0.9, np.diag([0, 0, 1.0]), mean_gradient_sq=-0.1)  # an unbiased estimate
    Moments(0.02, 0.9, cross=0.91, proxy_sq=0.94, mean_cross=-1.0)
    samples = np.random.default_rng(0).exponential(size=(3, 2))  # of two tasks: a covariance of rank one
    cov = np.cov(samples)
    moments = Moments(0.02, 0.9, cov, mean_gradient_sq=0.4)
    assert optimal_q(moments, COST, batch=8, m=2).interval[0] >= 0
