"""D², V² against closed forms and the unrolled oracle; their covariance, the supremum, the interval's coverage."""

import numpy as np
import pytest
import torch

from tests.oracles import unrolled_gradient
from tests.runtime.conftest import F64, coupled
from ufom_runtime import BilevelProblem, compare_bounds, measure_cost, measure_moments, moments_by_proxy
from ufom_runtime.measure.moments import Estimate
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory import CostModel, Truncated, UfomError, bootstrap_interval, optimal_q


def rng(seed):
    return torch.Generator().manual_seed(seed)


def test_toy_over_the_papers_range():
    problem = synthetic(alpha=0.01)
    thetas = torch.linspace(-50, 50, 1001, dtype=F64)
    measured = measure_moments(problem, thetas[:, None])
    assert measured.d2 == pytest.approx(53.21197334, rel=1e-9)
    assert measured.v2 == pytest.approx(2229.315673, rel=1e-9)
    assert (measured.d2_sem, measured.v2_sem) == (0.0, 0.0)
    d2, v2 = problem.pair.moments(thetas.numpy())
    assert (measured.d2, measured.v2) == pytest.approx((d2.max(), v2.max()), rel=1e-12)
    mean_gradient = problem.pair.gradients(thetas.numpy())[1].mean(0)
    assert measured.mean_gradient_sq == pytest.approx(mean_gradient[v2.argmax()] ** 2, rel=1e-12)
    assert optimal_q(measured, CostModel(r=10), m=2).q == pytest.approx(0.111879, abs=5e-7)


@pytest.mark.parametrize("A", [2.0, 400.0])
def test_toys_closed_form_against_the_unrolled_loop(A):
    problem = synthetic(alpha=0.3, r=7, A=A)
    for theta in (-9.0, 1.3, 6.0, 8.7, 30.0):
        exact = unrolled_gradient(problem, torch.tensor([theta], dtype=F64), problem.tasks)
        first_order = unrolled_gradient(problem, torch.tensor([theta], dtype=F64), problem.tasks, 0)
        known = problem.pair.gradients(theta)
        np.testing.assert_allclose(known, torch.cat([first_order, exact], 1).T, rtol=1e-12)


def test_toys_stationary_points():
    problem = synthetic(r=10, alpha=0.1, b=(0.0, 17.395269970483508), A=12.596846646989006)
    pair, both = problem.pair, torch.tensor([problem.pair.theta_fo, problem.pair.theta_star], dtype=F64)
    assert pair.theta_fo == pytest.approx(5.758867, abs=1e-6)
    at_fom, at_star = (unrolled_gradient(problem, theta[None], problem.tasks).mean() for theta in both)
    assert at_fom**2 == pytest.approx(2 * 0.06, rel=1e-9)
    assert abs(at_star) < 1e-12


@pytest.mark.parametrize("k", [0, 2])
def test_per_task_values_against_the_oracle(k):
    problem = coupled()
    tasks = problem.sample(9, rng(0))
    exact = unrolled_gradient(problem, problem.initial, tasks)
    d = unrolled_gradient(problem, problem.initial, tasks, k) - exact
    values = np.stack([d.square().sum(1), exact.square().sum(1)])
    m = measure_moments(problem, problem.initial, tasks, Truncated(k))
    assert (m.d2, m.v2) == pytest.approx(tuple(values.mean(1)), rel=1e-10)
    np.testing.assert_allclose(m.covariance("d2", "v2"), np.cov(values) / 9, rtol=1e-9)
    proxy, pairs = d + exact, [(i, j) for i in range(9) for j in range(9) if i != j]

    def over_pairs(x, y):
        return pytest.approx(np.mean([float(x[i] @ y[j]) for i, j in pairs]), rel=1e-9)

    assert m.bias_sq == over_pairs(d, d)
    assert m.mean_gradient_sq == over_pairs(exact, exact)
    assert (m.mean_cross, m.mean_proxy_sq) == (over_pairs(exact, proxy), over_pairs(proxy, proxy))
    crosses = torch.stack([(exact * proxy).sum(1), proxy.square().sum(1)])
    assert (m.cross, m.proxy_sq) == pytest.approx(tuple(crosses.mean(1).tolist()), rel=1e-10)
    np.testing.assert_allclose(m.covariance("cross", "proxy_sq"), np.cov(crosses) / 9, rtol=1e-9)
    np.testing.assert_allclose(m.samples, values, rtol=1e-9)
    mean_proxy = (d + exact).mean(0)
    assert m.cosine == pytest.approx(float(torch.cosine_similarity(mean_proxy, exact.mean(0), dim=0)), rel=1e-9)


def test_known_moments_of_quadratics_by_simulation():
    problem = quadratic(dim=4)
    known = problem.moments(problem.initial, n=40_000)
    m = measure_moments(problem, problem.initial, problem.sample(40_000, rng(0)))
    assert abs(m.d2 - known.d2) < 4 * known.d2_sem
    assert abs(m.v2 - known.v2) < 4 * known.v2_sem
    np.testing.assert_allclose(m.covariance("d2", "v2"), known.covariance("d2", "v2"), rtol=0.1)
    assert abs(m.mean_gradient_sq - known.mean_gradient_sq) < 4 * m.sem("mean_gradient_sq")


def test_errors_of_products_of_means_are_those_of_repeated_sampling():
    rows = []
    for seed in range(300):
        x, noise = torch.randn(2, 40, 2, dtype=F64, generator=rng(seed))
        x = x + 1
        y = x + noise
        found = [Estimate.product_of_means(*pair, exact_sums=False) for pair in ((x, x), (x, y), (y, y))]
        rows.append([[e.value for e in found], np.cov([e.influence for e in found]) / 40])
    values, covs = (np.array(x) for x in zip(*rows, strict=True))
    assert abs(values.mean(0) - [2, 2, 2]).max() < 4 * values.std(0).max() / 300**0.5
    np.testing.assert_allclose(covs.mean(0), np.cov(values.T), rtol=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_squares_are_taken_in_float64(dtype):
    """Their squares underflow in the dtype of the gradients."""
    small = 1e-30 if dtype == torch.float32 else 1e-4
    theta, tasks = torch.ones(3, dtype=dtype), torch.rand(7, 3, generator=rng(0)).to(dtype)
    problem = BilevelProblem(
        lambda t, p, x: (p * x).sum(), lambda t, p, x: small * (p * x).sum(), lambda t, x: t, [0.1, 0.1],
        lambda n, g: tasks[:n],
    )  # fmt: skip
    gradients = unrolled_gradient(problem, theta, tasks).double()
    m = measure_moments(problem, theta, tasks, chunk=7)
    assert m.v2 == pytest.approx(float(gradients.square().sum(1).mean()), rel=1e-9)
    assert m.v2 > 0
    assert m.d2 == 0


def test_two_suprema_at_different_thetas_have_nothing_in_common():
    problem = synthetic(alpha=0.3, r=7, A=2.0)
    thetas = torch.linspace(-20, 30, 11, dtype=F64)[:, None]
    m = measure_moments(problem, thetas)
    assert m.per_theta["d2"].argmax() != m.per_theta["v2"].argmax()
    assert m.cross is None
    i = int(m.per_theta["d2"].argmax())
    at = {name: m.per_theta[name][i] for name in ("v2", "cross", "proxy_sq", "mean_cross", "mean_proxy_sq")}
    assert m.d2 == pytest.approx(at["v2"] - 2 * at["cross"] + at["proxy_sq"], rel=1e-9)
    one = measure_moments(problem, thetas[i])
    assert {name: getattr(one, name) for name in at} == pytest.approx(at, rel=1e-12)


def test_interval_covers_the_true_q():
    problem, cost, truth = quadratic(dim=4, alpha=0.02), CostModel(r=10), None
    truth = optimal_q(problem.moments(problem.initial), cost, m=2).q
    assert truth < 1
    covered = 0
    for seed in range(100):
        m = measure_moments(problem, problem.initial, problem.sample(100, rng(seed)), chunk=100)
        low, high = optimal_q(m, cost, m=2).interval
        covered += low <= truth <= high
    assert 0.90 <= covered / 100 <= 0.98, f"coverage {covered}/100"


def test_bootstrap_from_the_samples_agrees_with_the_interval():
    problem, cost = quadratic(dim=4, alpha=0.02), CostModel(r=10)
    m = measure_moments(problem, problem.initial, problem.sample(400, rng(0)))
    assert bootstrap_interval(*m.samples, cost, m=2) == pytest.approx(optimal_q(m, cost, m=2).interval, rel=0.03)


def test_errors_of_the_mean_gradient_are_calibrated():
    problem = quadratic(dim=4)
    values, sems = [], []
    for seed in range(100):
        m = measure_moments(problem, problem.initial, problem.sample(50, rng(seed)), chunk=50)
        values.append(m.mean_gradient_sq)
        sems.append(m.sem("mean_gradient_sq"))
    truth = problem.moments(problem.initial).mean_gradient_sq
    assert abs(np.mean(values) - truth) < 4 * np.std(values) / 100**0.5
    assert np.mean(sems) == pytest.approx(np.std(values), rel=0.2)


def test_supremum_without_the_optimism_of_picking_the_largest():
    """At ±u, by symmetry, D² is the same: the largest of 16 noisy means is too large, the split value is not."""
    problem = quadratic(dim=2, noise=1.0)
    signs = torch.tensor([1.0, -1.0], dtype=F64)
    thetas = problem.initial * signs.repeat(8)[:, None]
    truth = problem.moments(problem.initial).d2
    split, naive = [], []
    for seed in range(50):
        m = measure_moments(problem, thetas, problem.sample(20, rng(seed)), chunk=320)
        split.append(m.d2)
        naive.append(m.per_theta["d2"].max())
    sem = np.std(split) / 50**0.5
    assert abs(np.mean(split) - truth) < 3 * sem
    assert np.mean(naive) > truth + 3 * sem
    assert m.n == 10
    assert len(m.per_theta["d2"]) == 16


def test_supremum_finds_the_largest_theta():
    problem = quadratic(dim=3)
    thetas = torch.stack([problem.initial * x for x in (0.1, 3.0, 1.0)])
    m = measure_moments(problem, thetas, problem.sample(400, rng(0)))
    known = problem.moments(thetas[1], n=200)
    assert abs(m.d2 - known.d2) < 4 * known.d2_sem
    assert int(m.per_theta["v2"].argmax()) == 1


def test_all_proxies_of_one_sweep():
    problem = coupled()
    tasks = problem.sample(5, rng(0))
    found = moments_by_proxy(problem, problem.initial, tasks, [Truncated(k) for k in (3, 0, 5)])
    for proxy, m in found.items():
        alone = measure_moments(problem, problem.initial, tasks, proxy)
        assert (m.d2, m.v2, m.bias_sq) == pytest.approx((alone.d2, alone.v2, alone.bias_sq), rel=1e-12, abs=1e-25)
    assert found[Truncated(5)].d2 == 0


def test_hypercleanings_first_order_gradient_vanishes():
    problem = digits_hypercleaning(n_train=40, n_validation=30, hidden=6, r=12, dtype=F64)
    found = moments_by_proxy(problem, problem.initial, None, [Truncated(k) for k in (0, 4, 8)])
    m = found[Truncated(0)]
    assert m.vanishes
    assert m.d2 == pytest.approx(m.v2, rel=1e-12)
    assert np.isnan(m.cosine)
    for exponent in (1.0, 2.0):
        assert optimal_q(m, CostModel(r=12), exponent).q == 1.0
    assert not found[Truncated(4)].vanishes
    with torch.no_grad():
        assert measure_moments(problem, problem.initial).vanishes
        assert not measure_moments(synthetic(), torch.ones(1, dtype=F64)).vanishes
    assert found[Truncated(8)].d2 < found[Truncated(4)].d2 < m.d2


def test_a_first_order_gradient_that_is_zero_at_one_theta_only_does_not_vanish():
    problem = BilevelProblem(
        lambda t, p, x: (p**2).sum() / 2 + (torch.sin(t) * p).sum(),
        lambda t, p, x: ((p - x) ** 2).sum() / 2 + (t**2).sum() / 2,
        lambda t, x: torch.zeros_like(x), [0.1] * 4, lambda n, g: torch.randn(n, 3, generator=g, dtype=F64) + 1,
    )  # fmt: skip
    theta, tasks = torch.zeros(3, dtype=F64), problem.sample(8, rng(0))
    m = measure_moments(problem, theta, tasks)
    assert m.d2 == pytest.approx(m.v2)
    assert not m.vanishes
    thetas = torch.stack([theta, theta + 1])  # at θ = 0 alone no third derivative would be seen
    bound, estimate, observed = (
        compare_bounds(problem, thetas, tasks)[0][k] for k in ("bound", "estimate", "observed")
    )
    assert bound is None
    assert 0 < observed <= estimate


def test_progress_ends_at_one():
    problem, seen = quadratic(), []
    measure_moments(problem, problem.initial, problem.sample(10, rng(0)), chunk=3, progress=seen.append)
    assert seen == sorted(seen)
    assert (len(seen), seen[-1]) == (4, 1.0)


def test_cost_is_seconds_of_a_task():
    problem = quadratic(dim=50, r=7)
    cost = measure_cost(problem, problem.initial, problem.sample(1, rng(0)), seconds=0.1)
    assert cost.r == 7
    assert 0 < cost.c1 < cost.c2 < 1
    assert cost.c1_sem == 0  # the clock of the tests is steady
    batch = measure_cost(problem, problem.initial, problem.sample(100, rng(0)), seconds=0.1)
    assert batch.c1 < cost.c1 / 3  # a hundred small tasks at once cost far less than one at a time


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: measure_moments(p, p.initial), "no finite set of tasks"),
        (lambda p: measure_moments(p, p.initial, p.sample(1, rng(0))), "at least 2"),
        (lambda p: measure_moments(p, torch.stack([p.initial] * 2), p.sample(3, rng(0))), "at least 4"),
        (
            lambda p: measure_moments(p, p.initial[None, None], p.sample(3, rng(0))),
            r"give one vector, \(s,\), or several, \(k, s\)",
        ),
        (lambda p: measure_moments(p, p.initial[None][:0], p.sample(3, rng(0))), "give"),
        (lambda p: measure_moments(p, p.initial, p.sample(3, rng(0)), Truncated(11)), "keep K ≤ r"),
        (lambda p: measure_moments(p, p.initial * float("inf"), p.sample(3, rng(0))), "NaN or ±inf"),
        (lambda p: measure_cost(p, p.initial, p.sample(1, rng(0)), repeats=1), "at least 5"),
        (lambda p: measure_cost(p, p.initial[None], p.sample(1, rng(0))), "give"),
        (lambda p: measure_cost(p, p.initial, p.sample(1, rng(0)) * float("nan")), "not finite"),
        (lambda p: moments_by_proxy(p, p.initial, p.sample(3, rng(0)), []), "at least one"),
        (lambda p: quadratic(dim=2.5), "must be an integer"),
        (lambda p: quadratic(noise=float("nan")), "> 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call(quadratic())


def test_a_diverging_inner_loop_is_named():
    problem = BilevelProblem(
        lambda t, p, x: (p**4).sum(), lambda t, p, x: p.sum(), lambda t, x: t, torch.full((30,), 9.0),
        lambda n, g: torch.ones(n, 1),
    )  # fmt: skip
    with pytest.raises(UfomError, match="inner loop diverged"):
        measure_moments(problem, torch.ones(2), torch.ones(3, 1))
