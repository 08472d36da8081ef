"""Scaled proxies, the pooled cosine and their errors, against minimisation and repeated sampling."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from ufom_theory import Moments, UfomError
from ufom_theory.quantities import ENTRIES
from ufom_theory.tails import Tail


def vectors(seed, n):
    """Correlated G and F of n tasks, with means that differ from 0."""
    rng = np.random.default_rng(seed)
    exact = rng.normal((1.0, 0.5, 0.0), size=(n, 3))
    return exact, 2 * exact + rng.normal((0.0, 0.3, 0.3), size=(n, 3))


def all_of(exact, proxy):
    """Moments of a finite set of tasks."""
    g, f = exact.mean(0), proxy.mean(0)
    squares = ((proxy - exact) ** 2, exact**2, exact * proxy, proxy**2)
    d2, v2, cross, proxy_sq = (x.sum(1).mean() for x in squares)
    return Moments(
        d2, v2, mean_gradient_sq=g @ g, cross=cross, proxy_sq=proxy_sq, mean_cross=g @ f, mean_proxy_sq=f @ f
    )


def sampled(exact, proxy):
    """The same from a sample, with the covariance of the means over tasks; what belongs to the means is left out."""
    squares = ((proxy - exact) ** 2, exact**2, 0 * exact, exact * proxy, proxy**2)
    samples = np.stack([x.sum(1) for x in squares])
    values = dict(zip(ENTRIES, samples.mean(1), strict=False))
    return Moments(**values, cov=np.cov(samples) / len(exact), n=len(exact))


def test_the_scaled_proxy_is_the_best_one():
    exact, proxy = vectors(0, 50)
    c, sem, scaled = all_of(exact, proxy).scaled()
    best = minimize_scalar(lambda x: ((exact - x * proxy) ** 2).sum(1).mean())
    assert c == pytest.approx(best.x, rel=1e-6)
    assert sem == 0
    again = all_of(exact, c * proxy)
    for name in ENTRIES:
        assert getattr(scaled, name) == pytest.approx(getattr(again, name), rel=1e-12)
    cosine, _ = all_of(exact, proxy).pooled_cosine()
    assert scaled.rho == pytest.approx(1 - cosine**2, rel=1e-12)
    assert scaled.rho < min(1, all_of(exact, proxy).rho)


def test_a_good_proxy_keeps_its_digits():
    exact, _ = vectors(0, 50)
    proxy = exact + 1e-7 * vectors(1, 50)[0]
    residual = exact - (c := (exact * proxy).sum() / (proxy**2).sum()) * proxy
    found = all_of(exact, proxy).scaled()
    assert found.c == pytest.approx(c, rel=1e-14)
    assert found.moments.d2 == pytest.approx((residual**2).sum(1).mean(), rel=1e-6)


def test_a_proxy_of_zeros_is_scaled_by_zero():
    found = Moments(1.0, 1.0, cross=0.0, proxy_sq=0.0).scaled()
    assert (found.c, found.moments.d2) == (0.0, 1.0)
    assert np.isnan(Moments(1.0, 1.0, cross=0.0, proxy_sq=0.0).pooled_cosine()).all()


def test_errors_are_those_of_repeated_sampling():
    found = [sampled(*vectors(seed, 200)) for seed in range(400)]
    scaled, cosines = [m.scaled() for m in found], [m.pooled_cosine() for m in found]
    assert np.mean([s.c_sem for s in scaled]) == pytest.approx(np.std([s.c for s in scaled]), rel=0.12)
    assert np.mean([c[1] for c in cosines]) == pytest.approx(np.std([c[0] for c in cosines]), rel=0.12)
    for name in ("d2", "cross"):
        sems, values = zip(*((s.moments.sem(name), getattr(s.moments, name)) for s in scaled), strict=True)
        assert np.mean(sems) == pytest.approx(np.std(values), rel=0.12)


def test_arrays_are_scaled_one_by_one():
    pairs = [all_of(*vectors(seed, 20)) for seed in range(3)]
    values = {name: [getattr(m, name) for m in pairs] for name in ENTRIES}
    c, _, scaled = Moments(**values).scaled()
    assert c == pytest.approx([m.scaled().c for m in pairs], rel=1e-14)
    assert scaled.d2 == pytest.approx([m.scaled().moments.d2 for m in pairs], rel=1e-14)


def test_scaling_needs_what_joins_the_two():
    for call in (Moments(0.1, 1.0).scaled, Moments(0.1, 1.0).pooled_cosine):
        with pytest.raises(UfomError, match="needs E⟨G, F⟩ and E‖F‖²"):
            call()


def test_moments_of_tasks():
    rng = np.random.default_rng(0)
    d2, v2 = rng.exponential(size=(2, 9))
    moments = Moments.of_tasks(d2, v2)
    assert (moments.d2, moments.v2, moments.n) == (d2.mean(), v2.mean(), 9)
    np.testing.assert_allclose(moments.covariance("d2", "v2"), np.cov(d2, v2) / 9)
    pairs = {"n ≥ 2": ([1.0], [1.0]), "pair the same": ([1, 2], [1, 2, 3]), "squared": ([1, -1], [1, 1])}
    for message, bad in pairs.items():
        with pytest.raises(UfomError, match=message):
            Moments.of_tasks(*bad)
    with pytest.raises(UfomError, match="two rows"):
        Moments(0.1, 1.0, samples=3.0)


def test_a_tail_is_that_of_a_log_normal_sample():
    sigma, n = 0.7, 100_000
    x = np.exp(sigma * np.random.default_rng(0).normal(size=(2, n)))
    tail = Tail.of(x)
    assert tail.relative_error == pytest.approx(np.sqrt(np.expm1(sigma**2) / n), rel=0.03)
    assert tail.widening == pytest.approx(1, abs=0.03)
    assert tail.warning == ""


def test_a_tail_that_decides_is_named():
    x = np.array([[1.0, 1, 1, 1, 1, 1, 2, 900], [1, 1, 1, 1, 1, 1, 1, 1]])
    assert "the largest of 8 holds 99% of one" in Tail.of(x).warning
    assert "smaller inner step, clip" in Tail.of(x).warning
    assert Tail.of(np.array([[0.0] * 8, [1.0] * 8])).warning == ""
    assert Tail.of(np.array([[0.0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])).warning
