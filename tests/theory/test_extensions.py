"""The derivations of what goes beyond the paper, and the functions that are held to them."""

import numpy as np
import pytest
import sympy as sp

from ufom_theory import Moments, UfomError
from ufom_theory.coins import partial_share, stratified_second_moment
from ufom_theory.derivations import general_update, one_step, roulette, scaled_proxy, stratified
from ufom_theory.derivations.symbols import D2, KAPPA, V2, Q
from ufom_theory.laws import Progress
from ufom_theory.updates import update_bias_bound


def zero(*expressions):
    return all(sp.expand(x) == 0 or sp.cancel(x) == 0 or sp.simplify(x) == 0 for x in expressions)


def both(left, right):
    return zero(left - right)


def test_scaled_proxy():
    c, x, f2 = scaled_proxy.SCALE, scaled_proxy.CROSS, scaled_proxy.PROXY2
    assert both(scaled_proxy.mean(), scaled_proxy.G)
    assert both(scaled_proxy.second_moment(), V2 + (1 / Q - 1) * scaled_proxy.bias())
    assert both(scaled_proxy.bias(), V2 - 2 * c * x + c**2 * f2)
    assert both(scaled_proxy.best_scale(), x / f2)
    assert both(scaled_proxy.best_bias() / V2, 1 - x**2 / (V2 * f2))
    assert both(scaled_proxy.gain(), (f2 - x) ** 2 / f2)
    assert both(scaled_proxy.online_scale(), (V2 + f2 - D2) / (2 * f2))
    assert both(*scaled_proxy.weight_excess())
    assert both(*scaled_proxy.any_weight())


def test_scaled_moments_are_the_derived_ones():
    rng = np.random.default_rng(0)
    best, scale = (
        sp.lambdify((V2, scaled_proxy.CROSS, scaled_proxy.PROXY2), form)
        for form in (scaled_proxy.best_bias(), scaled_proxy.best_scale())
    )
    for _ in range(200):
        exact, proxy = rng.normal(size=(2, 4, 3))
        v2, f2 = np.mean(np.sum(exact**2, 1)), np.mean(np.sum(proxy**2, 1))
        cross, d2 = np.mean(np.sum(exact * proxy, 1)), np.mean(np.sum((exact - proxy) ** 2, 1))
        found = Moments(d2, v2, cross=cross, proxy_sq=f2).scaled()
        assert found.c == pytest.approx(scale(v2, cross, f2), rel=1e-12)
        assert found.moments.d2 == pytest.approx(best(v2, cross, f2), rel=1e-10)
        # enumeration of the coin, first two moments
        q, c = rng.uniform(0.05, 1), found.c
        ends = [(1 - q, c * proxy), (q, c * proxy + (exact - c * proxy) / q)]
        np.testing.assert_allclose(sum(p * x for p, x in ends), exact, rtol=0, atol=1e-12)
        second = np.mean(np.sum(sum(p * x**2 for p, x in ends), 1))
        assert second == pytest.approx(v2 + (1 / q - 1) * found.moments.d2, rel=1e-12)


def test_partial_share_is_the_derived_one():
    names = (scaled_proxy.BATCH, scaled_proxy.BIAS2, scaled_proxy.VAR_F, scaled_proxy.COV, D2, Q)
    form = sp.lambdify(names, scaled_proxy.partial_share())
    p = Progress(0.5, 1.0, 0.4, 0.45, 0.6, 0.9)
    covariance = (1.0 + 0.5 + 0.9 + 0.6 - 0.4) / 2 - 0.45
    assert partial_share(p, 0.3, 4) == pytest.approx(form(4, p.bias_sq, 0.9, covariance, 0.4, 0.3), rel=1e-13)


def test_roulette():
    for n in (1, 2, 3):
        assert both(roulette.mean(n), roulette.symbols(n)[0][-1])
        assert both(roulette.second_moment(n), roulette.second_moment_form(n))
    assert both(*roulette.coefficients())
    assert zero(*roulette.stationary())
    assert zero(roulette.quadratic().as_expr().subs(roulette.T, roulette.scale()))
    from ufom_theory.derivations import optimum

    assert both(roulette.one_level(), optimum.quadratic().as_expr())
    assert both(*roulette.pooled())


def test_stratified():
    for found, form in (
        (stratified.by_probability(), stratified.by_probability_form()),
        (stratified.by_count(), stratified.by_count_form()),
    ):
        assert both(found[0], stratified.MEAN_G)
        assert both(found[1], form)
    assert both(*stratified.weights_apart())
    form = sp.lambdify((stratified.BATCH, Q, stratified.PART, stratified.MEAN_D, D2), stratified.by_probability_form())
    p = Progress(0.5, 1.0, 0.4, 0.45, 0.6, 0.9)
    coins = stratified_second_moment(p, 0.35, 5) - 0.5 - 1.0 / 5
    assert coins == pytest.approx(form(5, 0.35, 0.75, np.sqrt(p.bias_sq), 0.4), rel=1e-12)


def test_one_step():
    assert both(*one_step.decrease())
    assert zero(one_step.stationary().as_expr().subs(Q, one_step.fixed_step_root()))
    assert both(one_step.below_one(), one_step.START - (2 + KAPPA) * one_step.SLOPE)
    assert both(one_step.tuned(), one_step.NORM2**2 / (2 * one_step.ELL * one_step.A))
    assert both(one_step.normalised_exponent(), sp.S.Half)
    assert zero(one_step.least_noise(), *one_step.fom_is_fixed())
    x = sp.Symbol("x", positive=True)
    assert both(one_step.smallest_steps(), sp.sqrt(KAPPA * x / one_step.NORM2))


def test_general_update():
    before, after = general_update.invariant()
    assert before == after
    assert both(*general_update.difference())
    assert general_update.gradient_descent() == (sp.Matrix([[1]]), sp.Matrix([[0]]))
    from_identity, from_held = general_update.momentum()
    a, b, h = general_update.ALPHA, general_update.BETA, general_update.HESSIAN
    assert from_identity == sp.Matrix([[-a * h, -a * b], [h, b - 1]])
    assert from_held == sp.Matrix([[-a * h, 0], [h, 0]])
    assert general_update.weight_decay()[0] == -a * sp.Symbol("phi", real=True)


def momentum(alpha, beta=0.9, curvature=1.0, r=10):
    step = np.array([[1 - alpha * curvature, -alpha * beta], [curvature, beta]])
    held = np.array([[1.0, -alpha * beta], [0.0, beta]])
    return np.stack([step] * r), np.zeros((r, 2, 1)), (np.stack([held] * r), np.zeros((r, 2, 1)))


@pytest.mark.parametrize(("alpha", "whole", "parameters"), [(0.1, 1.66, 1.59), (0.01, 5.5, 0.38), (0.001, 6.4, 0.041)])
def test_momentum_reference_numbers(alpha, whole, parameters):
    jacobians, mixed, _ = momentum(alpha)
    assert update_bias_bound(jacobians, mixed, 1.0, 1.0) == pytest.approx(whole, rel=0.02)
    assert update_bias_bound(jacobians, mixed, 1.0, 1.0, rows=1) == pytest.approx(parameters, rel=0.02)


def gradient(jacobians, mixed, slope, start):
    total = np.zeros(mixed.shape[-1])
    for step, by_theta in zip(jacobians[::-1], mixed[::-1], strict=True):
        total, slope = total + by_theta.T @ slope, step.T @ slope
    return total + start.T @ slope


@pytest.mark.parametrize("held", [False, True])
def test_the_bound_holds_and_is_attained(held):
    rng = np.random.default_rng(1)
    for _ in range(200):
        r, p, s = 4, 3, 2
        jacobians, mixed, start = rng.normal(size=(r, p, p)), rng.normal(size=(r, p, s)), rng.normal(size=(p, s))
        proxy = (rng.normal(size=(r, p, p)), rng.normal(size=(r, p, s)))
        used = proxy if held else (np.stack([np.eye(p)] * r), np.zeros((r, p, s)))
        slope = np.append(rng.normal(size=2), 0.0)  # the last entry is a state that the outer loss does not see
        apart = gradient(jacobians, mixed, slope, start) - gradient(*used, slope, start)
        limits = (np.linalg.norm(slope), np.linalg.norm(start, 2))
        bounds = [update_bias_bound(jacobians, mixed, *limits, held=proxy if held else None, rows=n) for n in (2, 3)]
        assert np.linalg.norm(apart) <= bounds[0] * (1 + 1e-12) <= bounds[1] * (1 + 1e-11)
    # in one dimension, all of one sign, every term is met
    step, by_theta = np.full((5, 1, 1), 1.3), np.full((5, 1, 1), 0.4)
    proxy = (np.full((5, 1, 1), 1.1), np.full((5, 1, 1), 0.1))
    used = proxy if held else (np.ones((5, 1, 1)), np.zeros((5, 1, 1)))
    apart = gradient(step, by_theta, np.array([2.0]), np.array([[0.7]])) - gradient(
        *used, np.array([2.0]), np.array([[0.7]])
    )
    assert update_bias_bound(step, by_theta, 2.0, 0.7, held=proxy if held else None) == pytest.approx(
        apart[0], rel=1e-12
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda j, b: update_bias_bound(j[0], b, 1, 1), r"\(r, p, p\)"),
        (lambda j, b: update_bias_bound(j, b[:3], 1, 1), "mixed has shape"),
        (lambda j, b: update_bias_bound(j, b, -1, 1), "≥ 0"),
        (lambda j, b: update_bias_bound(j, b, 1, 1, rows=3), "more than the p = 2"),
        (lambda j, b: update_bias_bound(j, b, 1, 1, held=(j[:2], b)), "held J̃ has shape"),
    ],
)
def test_bad_input_is_named(call, message):
    jacobians, mixed, _ = momentum(0.1)
    with pytest.raises(UfomError, match=message):
        call(jacobians, mixed)
