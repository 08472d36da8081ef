"""The law of one step: enumerated on a quadratic, its closed forms against numerical maxima, reference numbers."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest

from tests.theory.brute import stationary
from ufom_theory import CostModel, Moments, UfomError, optimal_q
from ufom_theory.laws import (
    Progress,
    break_even,
    exponent_of,
    fixed_step_decrease,
    fixed_step_fom,
    fixed_step_q,
    noise_q,
    parse_outer,
    theorem_exponent,
)
from ufom_theory.scores import coordinate_fom, coordinate_progress, scores

DRAWS = int(os.environ.get("UFOM_DRAWS", "2000"))
COST = CostModel(r=10)


@pytest.fixture(scope="module")
def case():
    """Three equally likely tasks on a quadratic M: gradients, proxies, H and what `Progress` says of them."""
    rng = np.random.default_rng(4)
    exact, proxy, root = rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), rng.normal(size=(4, 4))
    hessian = root @ root.T / 4
    return exact, proxy, hessian, progress_of(exact, proxy, hessian)


def progress_of(exact, proxy, hessian):
    g, f, d = exact.mean(0), proxy.mean(0), exact - proxy

    def noise(x):
        return np.mean(np.sum((x - x.mean(0)) ** 2, 1)), np.mean(np.einsum("ij,jk,ik->i", x - x.mean(0), hessian, x))

    (var, curved), (var_f, curved_f) = noise(exact), noise(proxy)
    d2 = np.mean(np.sum(d**2, 1))
    return Progress(
        g @ g, var, d2, g @ f, f @ f, var_f, g @ hessian @ g / (g @ g), curved / var,
        np.einsum("ij,jk,ik->", d, hessian, d) / len(d) / d2, f @ hessian @ f / (f @ f), curved_f / var_f,
    )  # fmt: skip


def expected_decrease(exact, proxy, hessian, rate, batch, q):
    """E[M(θ) − M(θ⁺)] over all (task, coin) outcomes of a batch; q = None is FOM."""
    outcomes = [
        (f + coin / (q or 1) * (e - f), (q if coin else 1 - q) / 3 if q else (0.0 if coin else 1 / 3))
        for e, f in zip(exact, proxy, strict=True)
        for coin in (0, 1)
    ]
    g, total = exact.mean(0), 0.0
    for drawn in itertools.product(outcomes, repeat=batch):
        step = rate * sum(value for value, _ in drawn) / batch
        total += np.prod([weight for _, weight in drawn]) * (g @ step - step @ hessian @ step / 2)
    return total


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("q", [0.1, 0.6, 1.0])
def test_a_step_of_ufom_by_enumeration(case, batch, q):
    exact, proxy, hessian, progress = case
    brute = expected_decrease(exact, proxy, hessian, 0.07, batch, q)
    assert fixed_step_decrease(progress, q, 0.07, batch) == pytest.approx(brute, abs=1e-12)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_of_fom_by_enumeration(case, batch):
    exact, proxy, hessian, progress = case
    brute = expected_decrease(exact, proxy, hessian, 0.07, batch, None)
    assert fixed_step_fom(progress, 0.07, batch) == pytest.approx(brute, abs=1e-12)


def test_second_moment_and_bias(case):
    exact, proxy, _, progress = case
    assert progress.bias_sq == pytest.approx(np.sum((exact - proxy).mean(0) ** 2), rel=1e-12)
    moment = sum(
        (q if coin else 1 - q) / 3 * np.sum((f + coin / q * (e - f)) ** 2)
        for e, f in zip(exact, proxy, strict=True) for coin in (0, 1) for q in (0.3,)
    )  # fmt: skip
    assert progress.second_moment(0.3) == pytest.approx(moment, rel=1e-12)


def test_progress_of_moments(case):
    exact, proxy, _, progress = case
    g, f = exact.mean(0), proxy.mean(0)
    inner = np.mean(np.sum(exact * proxy, 1))
    v2, proxy_sq = np.mean(np.sum(exact**2, 1)), np.mean(np.sum(proxy**2, 1))
    moments = Moments(progress.d2, v2, None, 3, g @ g, inner, proxy_sq, g @ f, f @ f)
    found = Progress.of(moments, curvature_noise=2.0)
    for name in ("gradient_sq", "variance", "d2", "cross", "proxy_mean_sq", "proxy_variance"):
        assert getattr(found, name) == pytest.approx(getattr(progress, name), rel=1e-12)
    assert found.curvature_noise == 2.0
    with pytest.raises(UfomError, match="mean_cross, proxy_sq"):
        Progress.of(Moments(0.1, 1.0, mean_gradient_sq=0.2))


def drawn_progress(rng):
    x = 10 ** rng.uniform(-2, 1, (11, DRAWS))
    return Progress(*x[:3], x[3] * rng.choice([-1, 1], DRAWS), *x[4:])


def test_fixed_step_q_against_the_numerical_maximum():
    rng = np.random.default_rng(5)
    p, cost = drawn_progress(rng), CostModel(r=rng.integers(1, 300, DRAWS), c2=10 ** rng.uniform(-1, 1, DRAWS))
    rate, batch = 0.02, 4
    q = fixed_step_q(p, cost, rate, batch)
    at_one = fixed_step_decrease(p, 1.0, rate, batch)
    slope = rate**2 / 2 * p.curvature_correction * p.d2 / batch  # decrease(q) = at_one − slope·(1/q − 1)

    def per_cost(q):
        return (at_one - slope * (1 / q - 1)) / (cost.c_det + cost.c_rnd * q)

    some = at_one > 0
    assert some.any()
    assert not some.all()
    np.testing.assert_array_equal(np.isnan(q), ~some)
    found = stationary(
        lambda q: -per_cost(q), DRAWS
    )  # negative progress rises towards q → 0, so the slope's sign still tells
    np.testing.assert_allclose(q[some], found[some], rtol=1e-10)
    assert np.all(per_cost(q)[some] >= per_cost(found)[some] * (1 - 1e-10))
    floored = fixed_step_q(p, cost, rate, batch, q_min=0.1)
    np.testing.assert_array_equal(floored[some], np.maximum(q[some], 0.1))


def test_where_the_correction_costs_no_curvature_the_least_q_is_best(case):
    flat = replace(case[3], curvature_correction=-0.1)
    assert fixed_step_q(flat, COST, 0.05, q_min=0.05) == 0.05
    assert fixed_step_q(replace(case[3], d2=0.0), COST, 0.05) == 0.0


def test_too_large_a_step_has_no_q(case):
    assert np.isnan(fixed_step_q(case[3], COST, 50.0))
    assert np.isnan(fixed_step_q(replace(case[3], gradient_sq=-1e-3), COST, 0.05))


def test_small_steps_ask_for_the_square_root(case):
    p, cost, rate = case[3], COST, 1e-8
    expected = np.sqrt(cost.c_det / cost.c_rnd * rate * p.curvature_correction * p.d2 / (2 * 4 * p.gradient_sq))
    assert fixed_step_q(p, cost, rate, batch=4) == pytest.approx(expected, rel=1e-3)


def test_noise_q_and_break_even():
    p = Progress(0.5, 1.0, 0.1, 0.6, 0.8, 1.0)
    assert noise_q(p, COST) == pytest.approx(0.149, abs=5e-4)
    as_second_moment = optimal_q(Moments(0.1, 1.5), COST, m=1.0).q
    assert as_second_moment == pytest.approx(0.120, abs=5e-4)
    # at N_b task gradients of FOM both have the same mean squared error for the same cost
    n, q = break_even(p, COST), noise_q(p, COST)
    calls = n * COST.c_det / (COST.c_det + COST.c_rnd * q)
    fom = p.bias_sq + p.proxy_variance / n
    assert fom == pytest.approx((p.second_moment(q) - p.gradient_sq) / calls, rel=1e-12)
    assert break_even(replace(p, variance=0.01, d2=1e-4), COST) < 0  # UFOM is always ahead
    assert break_even(replace(p, cross=0.65), COST) == np.inf  # no bias
    assert break_even(replace(p, variance=0.0), COST, 1.0) == pytest.approx(-p.proxy_variance / p.bias_sq)


def test_noise_q_against_the_numerical_minimum():
    rng = np.random.default_rng(6)
    p, cost = drawn_progress(rng), CostModel(r=rng.integers(1, 300, DRAWS))
    found = stationary(lambda q: np.log(p.variance + (1 / q - 1) * p.d2) + np.log(cost.c_det + cost.c_rnd * q), DRAWS)
    np.testing.assert_allclose(noise_q(p, cost), found, rtol=1e-10)


def test_tuned_steps(case):
    """The best γ of a quadratic with one curvature ℓ leaves ⟨g, E G⟩²/(2ℓ·E‖G‖²)."""
    exact, proxy, _, _ = case
    p, rates = progress_of(exact, proxy, 2.0 * np.eye(4)), np.linspace(1e-4, 0.5, 200_001)
    p = replace(p, cross=0.3 * p.gradient_sq)
    found = scores(p, COST, "tuned", batch=2, q_min=0.01)
    fom = max(rates * p.cross - rates**2 * (p.proxy_mean_sq + p.proxy_variance / 2))
    assert found.fom * COST.c_det / 4 == pytest.approx(fom, rel=1e-8)
    for q, value in ((found.q, found.ufom), (1.0, found.exact)):
        best = max(rates * p.gradient_sq - rates**2 * p.second_moment(q, 2))
        assert value * (COST.c_det + COST.c_rnd * q) / 4 == pytest.approx(best, rel=1e-8)
    assert scores(replace(p, cross=-1.0), COST, "tuned").fom == 0.0


@pytest.mark.parametrize("outer", ["sgd:0.02", "decay:0.5:0.1", "tuned", "adam:1e-3", "paper", "decay:0.75"])
def test_no_q_scores_better(outer):
    rng = np.random.default_rng(12)
    p, cost = drawn_progress(rng), CostModel(r=rng.integers(1, 300, DRAWS))
    found = scores(p, cost, outer, batch=4, step=9)
    some = ~np.isnan(found.q)
    assert some.any()
    chosen = parse_outer(outer)
    for q in (*np.geomspace(0.05, 1, 40), 1.0):
        second = p.second_moment(q, 4)
        value = {
            "tuned": p.gradient_sq**2 / second,
            "adam": p.gradient_sq / second**0.5,
            "paper": second**-2.0,
            "decay": second ** -(4 / 3),
        }[chosen.kind] if chosen.rate is None or chosen.kind == "adam" else (
            fixed_step_decrease(p, q, chosen.rate_at(9), 4)
        )  # fmt: skip
        assert np.all((value / (cost.c_det + cost.c_rnd * q))[some] <= found.ufom[some] * (1 + 1e-10))
    np.testing.assert_allclose(found.exact[some], (value / (cost.c_det + cost.c_rnd))[some], rtol=1e-12)
    assert found.law.startswith(f"'{chosen}', a")


def test_scores_where_nothing_is_above_the_noise(case):
    found = scores(replace(case[3], gradient_sq=-0.01), COST, "tuned")
    assert (found.ufom, found.exact) == (0.0, 0.0)
    assert scores(replace(case[3], gradient_sq=-99.0), COST, "decay:0.75").ufom == 0.0
    assert np.isnan(scores(case[3], COST, "sgd:50").q)
    assert scores(case[3], COST, "sgd:50").exact < 0
    assert scores(case[3], COST, "paper").fom == 0.0
    with pytest.raises(UfomError, match="curvature_gradient"):
        scores(Progress(1, 1, 1, 0, 1, 1), COST, "sgd:0.1")
    with pytest.raises(UfomError, match="probability"):
        scores(case[3], COST, "tuned", q_min=2)


def test_21_against_the_numerical_minimum():
    rng = np.random.default_rng(13)
    v2, m = 10 ** rng.uniform(-2, 2, DRAWS), rng.choice([0.5, 1.0, 4 / 3, 2.0, 4.0], DRAWS)
    d2, cost = v2 * 10 ** rng.uniform(-8, -0.01, DRAWS), CostModel(r=rng.integers(1, 300, DRAWS))
    found = stationary(lambda q: m * np.log((1 / q - 1) * d2 + v2) + np.log(cost.c_det + cost.c_rnd * q), DRAWS)
    np.testing.assert_allclose(optimal_q(Moments(d2, v2), cost, m=m).q, found, rtol=1e-10)


def test_steps_normalised_by_coordinate():
    g, var, d2 = np.array([0.5, -0.2]), np.array([1.0, 0.3]), np.array([0.1, 0.2])
    f, var_f = np.array([0.4, 0.1]), np.array([0.2, 0.0])
    p = Progress(g * g, var, d2, g * f, f * f, var_f)
    by_hand = sum(x * x / np.sqrt(x * x + (v + d) / 4) for x, v, d in zip(g, var, d2, strict=True))
    assert coordinate_progress(p, 0.5, 4) == pytest.approx(by_hand, rel=1e-14)
    by_hand = sum(x * y / np.sqrt(y * y + v / 4) for x, y, v in zip(g, f, var_f, strict=True))
    assert coordinate_fom(p, 4) == pytest.approx(by_hand, rel=1e-14)
    zero = np.zeros(1)
    assert coordinate_fom(Progress(zero + 1, zero, zero, zero, zero, zero)) == 0.0
    # one scale for all coordinates: progress per cost is ∝ (A^(1/2)·C)^(−1), so the best q is (21)'s at m = 1/2
    one, q = (
        Progress(zero + 1e-8, zero + 1.5, zero + 0.1, zero, zero, zero),
        optimal_q(Moments(0.1, 1.5), COST, outer="adam:1e-3").q,
    )
    near = [coordinate_progress(one, x) / (COST.c_det + COST.c_rnd * x) for x in (q * 0.9, q, q * 1.1)]
    assert near[1] == max(near)


@pytest.mark.parametrize(
    ("text", "m", "law"),
    [("paper", 2, "theorem"), ("tuned", 1, "theorem"), ("decay:0.75", 4 / 3, "local law"), ("adam:0.1", 0.5, "model")],
)
def test_exponents_are_named(text, m, law):
    assert exponent_of(None, text) == (pytest.approx(m), f"'{text}', a {law}")


def test_the_theorems_exponent_is_another_one():
    assert theorem_exponent(0.75) == 4.0
    assert theorem_exponent(0.5) == parse_outer("decay:.5").exponent == 2.0
    with pytest.raises(UfomError, match="Theorem 1"):
        theorem_exponent(1.0)


def test_rates():
    assert parse_outer("decay:.5:2").rate_at(16) == 0.5
    assert parse_outer("sgd:0.1").rate_at(9) == 0.1
    with pytest.raises(UfomError, match="has no rate"):
        parse_outer("tuned").rate_at(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exponent_of(None, None), "exactly one of m and outer, neither"),
        (lambda: exponent_of(2.0, "paper"), "exactly one of m and outer, both"),
        (lambda: exponent_of(None, "sgd:0.1"), "no exponent m"),
        (lambda: exponent_of(-1.0, None), "> 0"),
        (lambda: Progress(1, 1, -1, 0, 1, 1), "D²"),
        (lambda: Progress(1, np.ones(2), np.ones(3), 0, 1, 1), "broadcast"),
        (lambda: fixed_step_q(Progress(1, 1, 1, 0, 1, 1), COST, 0.1), "curvature_gradient, curvature_noise"),
        (lambda: fixed_step_fom(Progress(1, 1, 1, 0, 1, 1), 0.1), "curvature_proxy"),
        (lambda: fixed_step_q(Progress(1, 1, 1, 0, 1, 1, 1, 1, 1), COST, 0.0), "rate"),
        (lambda: fixed_step_q(Progress(1, 1, 1, 0, 1, 1, 1, 1, 1), COST, 0.1, q_min=2), "probability"),
        (lambda: Progress(1, 1, 1, 0, 1, 1).second_moment(1.2), "probability"),
        (lambda: break_even(Progress(1, 1, 1, 0, 1, 1), COST, 0.0), "> 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()
