"""What Adam's model needs by coordinate: against exact means, and unbiased from few tasks."""

import numpy as np
import pytest
import torch

from ufom_runtime import EXACT, FOM, hypergradient
from ufom_runtime.measure.chances import DRAWS, interval
from ufom_runtime.measure.coordinates import _progress, measure_coordinates
from ufom_runtime.measure.path import Measuring
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import Truncated
from ufom_theory.laws import parse_outer

BATCH = 4


def drawn():
    """A quadratic and six of its tasks."""
    problem = quadratic(dim=4, r=5, noise=0.5)
    return problem, problem.sample(6, torch.Generator().manual_seed(0))


def test_the_moments_of_each_coordinate():
    problem, tasks = drawn()
    theta = problem.initial
    found = measure_coordinates(problem, theta, tasks, [Truncated()], 50)[Truncated()]
    exact, first = (hypergradient(problem, theta, tasks, e, per_task=True).numpy() for e in (EXACT, FOM))
    n = len(tasks)
    assert found.d2.shape == (51, 4)
    np.testing.assert_allclose(found.d2[0], ((exact - first) ** 2).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance[0], exact.var(0, ddof=1), rtol=1e-12)
    pairs = exact.sum(0) * first.sum(0) - (exact * first).sum(0)  # over i ≠ j
    np.testing.assert_allclose(found.cross[0], pairs / n / (n - 1), rtol=1e-12)


def test_squares_from_few_tasks_are_unbiased_and_their_spread_is_drawn():
    rng, n = np.random.default_rng(0), 12
    g, f, sigma = np.array([0.3, 0.0, -1.0]), np.array([0.2, 0.1, -1.2]), np.array([1.0, 0.5, 0.2])
    found, spreads = [], []
    for _ in range(300):
        noise = rng.standard_normal((n, 3)) * sigma
        shares = np.vstack([np.full((1, n), 1 / n), rng.multinomial(n, np.full(n, 1 / n), 60) / n])
        p = _progress(shares, g + noise, f + 0.8 * noise, False)
        found.append([p.gradient_sq[0], p.cross[0], p.proxy_mean_sq[0], p.variance[0], p.proxy_variance[0]])
        spreads.append(p.gradient_sq[1:].std(0))
    means, errors = np.mean(found, 0), np.std(found, 0) / np.sqrt(300)
    expected = np.array([g * g, g * f, f * f, sigma**2, (0.8 * sigma) ** 2])
    assert (abs(means - expected) < 4 * errors).all()
    wide = np.mean(spreads, 0)[[0, 2]] / np.std(found, 0)[0, [0, 2]]
    assert ((wide > 0.85) & (wide < 1.4)).all()  # a small square is drawn too wide


def test_steps_over_exact_are_sums_over_coordinates():
    problem, tasks = drawn()
    measuring = Measuring(problem, tasks, parse_outer("adam:1e-3"), BATCH)
    path = measuring.path(problem.initial[None], (0,), 1, [Truncated()], lambda path: [Truncated()])
    exact, first = (hypergradient(problem, problem.initial, tasks, e, per_task=True).numpy() for e in (EXACT, FOM))
    n = len(tasks)

    def product(x, y):
        return (x.sum(0) * y.sum(0) - (x * y).sum(0)) / n / (n - 1)

    def second(x, extra=0.0):
        return np.sqrt(product(x, x) + (x.var(0, ddof=1) + extra) / BATCH)

    d2 = ((exact - first) ** 2).mean(0)
    whole = (product(exact, exact) / second(exact)).sum()
    assert path.fom()[0, 0] == pytest.approx(whole / (product(exact, first) / second(first)).sum(), rel=1e-12)
    for q in (0.1, 0.5):
        ratios = path.ufom(path.progress[Truncated()], q, "task")
        ours = (product(exact, exact) / second(exact, (1 / q - 1) * d2)).sum()
        assert ratios[0, 0] == pytest.approx(whole / ours, rel=1e-12)
        low, high = interval(ratios[0])
        assert ratios.shape == (1, DRAWS + 1)
        assert low < ratios[0, 0] < high
