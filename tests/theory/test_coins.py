"""Stratified coins, partial debiasing and the batch: enumerated, and against numerical minima."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest

from tests.grids import slow_unless
from tests.theory.test_one_step import progress_of
from ufom_theory import CostModel, UfomError
from ufom_theory.coins import (
    best_batch,
    best_scale,
    partial_error,
    partial_share,
    scaled_proxy,
    stratified_q,
    stratified_scale,
    stratified_second_moment,
    with_coins,
)
from ufom_theory.laws import Progress

DRAWS = int(os.environ.get("UFOM_DRAWS", "2000"))
COST = CostModel.of(c_det=2.0, c_rnd=9.0)


@pytest.fixture(scope="module")
def tasks():
    rng = np.random.default_rng(8)
    exact, proxy = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    return exact, proxy, progress_of(exact, proxy, np.eye(3))


def enumerated(exact, proxy, batch, q, weight):
    """Mean and second moment of the batch mean, over all tasks, numbers k and subsets of k."""
    k = int(np.floor(q * batch + 1e-12))
    share = q * batch - k
    mean, second = 0.0, 0.0
    for drawn in itertools.product(range(len(exact)), repeat=batch):
        for count, chance in ((k, 1 - share), (k + 1, share)):
            if chance < 1e-15:
                continue
            subsets = list(itertools.combinations(range(batch), count))
            for chosen in subsets:
                w = 1 / q if weight == "1/q" else batch / count
                value = sum(proxy[i] for i in drawn) + w * sum(exact[drawn[j]] - proxy[drawn[j]] for j in chosen)
                p = chance / len(subsets) / len(exact) ** batch
                mean, second = mean + p * value / batch, second + p * np.sum((value / batch) ** 2)
    return mean, second


@pytest.mark.parametrize(
    ("batch", "q", "weight"),
    [(5, 0.15, "1/q"), (4, 0.5, "1/q"), (4, 0.5, "B/k"), (5, 0.47, "1/q"), (5, 0.47, "B/k"), (3, 1.0, "B/k")],
)
def test_stratified_coins_by_enumeration(tasks, batch, q, weight):
    exact, proxy, progress = tasks
    mean, second = enumerated(exact, proxy, batch, q, weight)
    np.testing.assert_allclose(mean, exact.mean(0), atol=1e-12)
    assert stratified_second_moment(progress, q, batch, weight) == pytest.approx(second, rel=1e-12)


@pytest.mark.parametrize(("batch", "q"), [(5, 0.15), (4, 0.5), (5, 0.47)])
def test_all_coins_are_put_into_one_law(tasks, batch, q):
    exact, proxy, p = tasks
    second = enumerated(exact, proxy, batch, q, "B/k" if q * batch >= 1 else "1/q")[1]
    assert with_coins(p, q, batch, "stratified").second_moment(q, batch) == pytest.approx(second, rel=1e-12)
    coins = [(q, 1 / q), (1 - q, 0.0)]  # one for the batch
    draws = [list(drawn) for drawn in itertools.product(range(len(exact)), repeat=batch)]
    values = [(chance, proxy[i].mean(0) + w * (exact[i] - proxy[i]).mean(0)) for i in draws for chance, w in coins]
    second = sum(chance * np.sum(x * x) for chance, x in values) / len(draws)
    assert with_coins(p, q, batch, "batch").second_moment(q, batch) == pytest.approx(second, rel=1e-12)
    assert with_coins(p, q, batch, "task") is p


@pytest.mark.parametrize("c", [0.3, 1.0, 1.7])
def test_a_scaled_proxy_by_its_gradients(c):
    rng = np.random.default_rng(3)
    exact, proxy, hessian = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), np.diag([1.0, 3.0, 0.5])
    found, expected = scaled_proxy(progress_of(exact, proxy, hessian), c), progress_of(exact, c * proxy, hessian)
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12), name
    p = progress_of(exact, proxy, hessian)
    best = best_scale(p)
    assert best == pytest.approx(np.sum(exact * proxy) / np.sum(proxy * proxy), rel=1e-12)
    assert scaled_proxy(p, best).d2 < min(scaled_proxy(p, x).d2 for x in (best - 0.1, best + 0.1))
    assert best_scale(replace(p, d2=p.variance + p.gradient_sq, proxy_mean_sq=0.0, proxy_variance=0.0)) == 0.0


def test_which_weight_has_the_smaller_moment(tasks):
    compared = set()
    for progress in (
        tasks[2],
        replace(tasks[2], cross=(tasks[2].gradient_sq + tasks[2].proxy_mean_sq - 0.05 * tasks[2].d2) / 2),
    ):
        for batch in (2, 5):
            for q in np.linspace(1 / batch, 1, 23):
                moments = [stratified_second_moment(progress, q, batch, weight) for weight in ("B/k", "1/q")]
                k, spread = np.floor(q * batch), progress.d2 - progress.bias_sq
                if abs(moments[0] - moments[1]) > 1e-12:
                    smaller = k * (k + 1) * progress.bias_sq > q * batch * spread
                    assert (moments[0] < moments[1]) == smaller
                    compared.add(bool(smaller))
                assert min(moments) <= progress.second_moment(q, batch) * (1 + 1e-12)  # independent coins
    assert compared == {True, False}


@pytest.mark.parametrize("m", slow_unless(lambda m: m == 1.0, [0.5, 1.0, 2.0]))
def test_stratified_q_against_a_grid(m):
    rng, grid = np.random.default_rng(9), np.append(np.geomspace(1e-3, 1, 150), 1.0)
    for _ in range(DRAWS // 3):
        p, batch = drawn(rng), int(rng.integers(1, 9))
        cost = CostModel.of(10 ** rng.uniform(-1, 1), 10 ** rng.uniform(-1, 2))
        spread, size = p.d2 - p.bias_sq, grid * batch
        count = np.floor(size + 1e-12)
        share = size - count
        coins = (1 / grid - 1) * spread / batch + share * (1 - share) * p.bias_sq / size**2
        with np.errstate(divide="ignore"):
            other = ((1 - share) / count + share / (count + 1) - 1 / batch) * spread
        noise = np.where(count >= 1, np.minimum(coins, other), coins)
        times = (p.gradient_sq + p.variance / batch + noise) ** m * (cost.c_det + cost.c_rnd * grid)
        q = stratified_q(p, cost, batch, m)
        time = stratified_second_moment(p, q, batch) ** m * (cost.c_det + cost.c_rnd * q)
        assert time <= times.min() * (1 + 1e-10)


def drawn(rng):
    """Progress of two equally likely tasks with random gradients."""
    (g1, g2), (d1, d2) = rng.normal(size=(2, 3)) + 1, rng.normal(size=(2, 3)) * 10 ** rng.uniform(-2, 0.5)
    f1, f2 = g1 - d1, g2 - d2
    g, f = (g1 + g2) / 2, (f1 + f2) / 2
    variances = [np.sum((x - y) ** 2) / 4 for x, y in ((g1, g2), (f1, f2))]
    return Progress(g @ g, variances[0], (d1 @ d1 + d2 @ d2) / 2, g @ f, f @ f, variances[1])


def test_stratified_scale(tasks):
    exact, proxy, progress = tasks
    scale = stratified_scale(progress)

    def spread(c):
        d = exact - c * proxy
        return np.mean(np.sum((d - d.mean(0)) ** 2, 1))

    assert spread(scale) < min(spread(scale - 1e-3), spread(scale + 1e-3))


@pytest.mark.parametrize(("share", "q", "batch"), [(0.3, 0.4, 1), (1.0, 0.4, 2), (0.0, 0.4, 2), (0.7, 0.1, 2)])
def test_partial_debiasing_by_enumeration(tasks, share, q, batch):
    exact, proxy, progress = tasks
    outcomes = [
        (f + share * coin / q * (e - f), (q if coin else 1 - q) / 2)
        for e, f in zip(exact, proxy, strict=True) for coin in (0, 1)
    ]  # fmt: skip
    error = sum(
        np.prod([w for _, w in drawn]) * np.sum((sum(x for x, _ in drawn) / batch - exact.mean(0)) ** 2)
        for drawn in itertools.product(outcomes, repeat=batch)
    )
    assert partial_error(progress, share, q, batch) == pytest.approx(error, rel=1e-12)


def test_partial_share_is_the_minimum():
    rng = np.random.default_rng(10)
    each = [drawn(rng) for _ in range(DRAWS)]
    names = ("gradient_sq", "variance", "d2", "cross", "proxy_mean_sq", "proxy_variance")
    progress, q = Progress(*([getattr(p, name) for p in each] for name in names)), rng.uniform(0.05, 1, DRAWS)
    for batch in (1, 5):
        # a parabola's vertex from three of its points
        y = [partial_error(progress, x, q, batch) for x in (-1.0, 0.0, 1.0)]
        vertex = (y[0] - y[2]) / (2 * (y[0] - 2 * y[1] + y[2]))
        share = partial_share(progress, q, batch)
        least = [partial_error(progress, x, q, batch) for x in (share, vertex)]
        np.testing.assert_allclose(*least, rtol=1e-10)
        np.testing.assert_allclose(share, vertex, rtol=1e-6, atol=1e-9)


def test_best_batch_against_every_batch():
    rng, sizes = np.random.default_rng(11), np.arange(1, 60)[:, None]
    p = Progress(1.0, 10 ** rng.uniform(-2, 1, DRAWS), 10 ** rng.uniform(-3, 1, DRAWS), 0.0, 1.0, 1.0)
    cost = CostModel.of(10 ** rng.uniform(-1, 1, DRAWS), 10 ** rng.uniform(-1, 2, DRAWS))
    budget = cost.c_det * rng.uniform(1.1, 40, DRAWS)
    batch, q = best_batch(p, cost, budget)
    assert np.all(batch * (cost.c_det + cost.c_rnd * q) <= budget * (1 + 1e-12))
    spent = np.minimum(1.0, (budget / sizes - cost.c_det) / cost.c_rnd)
    every = np.where(spent > 0, (p.variance + (1 / np.where(spent > 0, spent, 1) - 1) * p.d2) / sizes, np.inf)
    assert np.all((p.variance + (1 / q - 1) * p.d2) / batch <= every.min(0) * (1 + 1e-10))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: stratified_second_moment(p, 0.1, 5, "B/k"), "qB ≥ 1"),
        (lambda p: stratified_second_moment(p, 1.1, 5), "probability"),
        (lambda p: stratified_second_moment(p, 0.5, 5, "k"), "is unknown"),
        (lambda p: stratified_q(p, COST, 5, 0.0), "> 0"),
        (lambda p: stratified_q(replace(p, gradient_sq=-9.0), COST, 5), "not above 0"),
        (lambda p: stratified_scale(replace(p, proxy_variance=0.0)), "Var_F"),
        (lambda p: partial_share(replace(p, d2=0.0), 0.5), "proxy is exact"),
        (lambda p: best_batch(p, COST, 2.0), "leaves nothing"),
        (lambda p: stratified_q(replace(p, d2=np.ones(2)), COST, 5), "one θ at a time"),
    ],
)
def test_bad_input_is_named(tasks, call, message):
    with pytest.raises(UfomError, match=message):
        call(tasks[2])
