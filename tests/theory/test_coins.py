"""Stratified coins, partial debiasing and the batch: enumerated, and against numerical minima."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest

from tests.theory.test_one_step import progress_of
from ufom_theory import CostModel, UfomError
from ufom_theory.coins import (
    best_batch,
    partial_error,
    partial_share,
    stratified_q,
    stratified_scale,
    stratified_second_moment,
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


@pytest.mark.parametrize("m", [0.5, 1.0, 2.0])
def test_stratified_q_against_a_grid(m):
    rng = np.random.default_rng(9)
    for _ in range(25):
        exact, proxy = rng.normal(size=(3, 3)) + 1, rng.normal(size=(3, 3)) * 10 ** rng.uniform(-2, 0.3)
        progress = progress_of(exact, exact + proxy, np.eye(3))
        batch, cost = int(rng.integers(1, 9)), CostModel.of(10 ** rng.uniform(-1, 1), 10 ** rng.uniform(-1, 2))

        def time(q, progress=progress, batch=batch, cost=cost):
            weights = ("1/q", "B/k") if q * batch >= 1 else ("1/q",)
            moment = min(stratified_second_moment(progress, q, batch, weight) for weight in weights)
            return moment**m * (cost.c_det + cost.c_rnd * q)

        q = stratified_q(progress, cost, batch, m)
        assert time(q) <= min(time(x) for x in np.geomspace(1e-3, 1, 150)) * (1 + 1e-10)
        if q * batch < 1 - 1e-9:
            assert time(q) <= min(time(q * (1 - 1e-4)), time(q * (1 + 1e-4)))


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
    for _ in range(DRAWS // 20):
        exact, proxy = rng.normal(size=(2, 3, 2))
        progress, q, batch = progress_of(exact, proxy, np.eye(2)), rng.uniform(0.05, 1), int(rng.integers(1, 6))
        share = partial_share(progress, q, batch)
        # a parabola's vertex from three of its points
        y = [partial_error(progress, x, q, batch) for x in (-1.0, 0.0, 1.0)]
        assert share == pytest.approx((y[0] - y[2]) / (2 * (y[0] - 2 * y[1] + y[2])), rel=1e-10, abs=1e-12)


def test_best_batch_against_every_batch():
    rng = np.random.default_rng(11)
    for _ in range(DRAWS // 20):
        p = Progress(1.0, 10 ** rng.uniform(-2, 1), 10 ** rng.uniform(-3, 1), 0.0, 1.0, 1.0)
        cost = CostModel.of(10 ** rng.uniform(-1, 1), 10 ** rng.uniform(-1, 2))
        budget = float(cost.c_det) * rng.uniform(1.1, 40)
        batch, q = best_batch(p, cost, budget)
        assert batch * (cost.c_det + cost.c_rnd * q) <= budget * (1 + 1e-12)
        every = [
            (p.variance + (1 / x - 1) * p.d2) / b
            for b in range(1, 60)
            if (x := min(1.0, (budget / b - cost.c_det) / cost.c_rnd)) > 0
        ]
        assert (p.variance + (1 / q - 1) * p.d2) / batch <= min(every) * (1 + 1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: stratified_second_moment(p, 0.1, 5, "B/k"), "qB ≥ 1"),
        (lambda p: stratified_second_moment(p, 1.1, 5), "probability"),
        (lambda p: stratified_second_moment(p, 0.5, 5, "k"), "is unknown"),
        (lambda p: stratified_q(p, COST, 5, 0.0), "> 0"),
        (lambda p: stratified_scale(replace(p, proxy_variance=0.0)), "Var_F"),
        (lambda p: partial_share(replace(p, d2=0.0), 0.5), "proxy is exact"),
        (lambda p: best_batch(p, COST, 2.0), "leaves nothing"),
        (lambda p: stratified_q(replace(p, d2=np.ones(2)), COST, 5), "one θ at a time"),
    ],
)
def test_bad_input_is_named(tasks, call, message):
    with pytest.raises(UfomError, match=message):
        call(tasks[2])
