"""The derivations agree with what the paper prints (or show how it errs) and with the numbers computed at run time."""

import importlib
import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import sympy as sp

from ufom_theory import AssumptionConstants, CostModel, Truncated, bias_bound, bias_bound_printed, gradient_bound
from ufom_theory.derivations import __main__ as printed_derivations
from ufom_theory.derivations import bias_bound as bias_derivation
from ufom_theory.derivations import complexity, optimum
from ufom_theory.derivations.symbols import (
    ALPHA,
    C1,
    C2,
    C_DET,
    C_RND,
    D2,
    EPSILON,
    KAPPA,
    L1,
    L2,
    M1,
    RHO,
    V2,
    K,
    M,
    Q,
    R,
    step_sizes,
)


def is_zero(expression: sp.Expr) -> bool:
    return bool(sp.simplify(expression) == 0)


def test_quadratic_is_21():
    in_epsilon = optimum.quadratic().as_expr().subs(M, 2 / (1 - 2 * EPSILON))
    assert is_zero(in_epsilon - optimum.printed_quadratic().as_expr())


def test_a_wrong_quadratic_is_refused():
    wrong = optimum.printed_quadratic().as_expr().subs(EPSILON, EPSILON + 1)
    assert not is_zero(optimum.quadratic().as_expr().subs(M, 2 / (1 - 2 * EPSILON)) - wrong)


def test_condition_is_20():
    assert is_zero(optimum.condition() - (C_RND * V2 - M * D2 * (C_DET + C_RND)))


@pytest.mark.parametrize("root", [optimum.root(), optimum.root_small_exponent()])
def test_the_computed_roots_solve_the_quadratic(root):
    assert is_zero(optimum.scaled_quadratic().as_expr().subs(Q, root))


def test_both_roots_are_the_positive_one():
    point = {RHO: sp.Rational(1, 7), KAPPA: sp.Rational(1, 5), M: sp.Rational(3, 2)}
    assert optimum.root().subs(point).evalf() > 0
    assert abs((optimum.root() - optimum.root_small_exponent()).subs(point).evalf(40)) < 1e-35


def test_slopes_are_those_of_the_root():
    by_rho, by_kappa = optimum.slopes()
    for symbol, slope in ((RHO, by_rho), (KAPPA, by_kappa)):
        assert is_zero(sp.diff(optimum.root(), symbol) - slope.subs(Q, optimum.root()))


def test_slopes_as_computed_at_run_time():
    by_rho, by_kappa = optimum.slopes()
    s = optimum.discriminant_root()
    assert is_zero(by_rho - (Q**2 + (M - 1) * Q + M * KAPPA) / s)
    assert is_zero(by_kappa - M * RHO / s)


def test_inverse_and_speedup():
    assert is_zero(optimum.inverse() - Q**2 / (Q**2 + (M - 1) * Q + M * KAPPA))
    expected = (1 + (1 / Q - 1) * RHO) ** -M * (KAPPA + 1) / (KAPPA + Q)
    point = {RHO: 0.1, KAPPA: 0.3, M: 1.7, Q: 0.4}
    assert float((optimum.speedup() / expected).subs(point)) == pytest.approx(1, rel=1e-14)


def test_proposition_1():
    gradients, products = complexity.proposition_1()
    assert is_zero(complexity.expected_gradients().subs(K, 0) - gradients)
    assert is_zero(complexity.expected_hessian_vector_products().subs(K, 0) - products)


@pytest.mark.parametrize(("r", "proxy"), [(1, 0), (10, 0), (10, 10), (100, 20), (37, 5)])
def test_cost_model_is_the_derived_cost(r, proxy):
    cost = CostModel(r=r, c1=2.5, c2=7.25, proxy=Truncated(proxy))
    point = {R: r, K: proxy, C1: 2.5, C2: 7.25}
    assert cost.c_det == float(complexity.c_det().subs(point))
    assert cost.c_rnd == float(complexity.c_rnd().subs(point))


def test_cost_of_going_on_from_a_truncated_proxy():
    assert CostModel(r=100, proxy=Truncated(20)).c_rnd == 3240
    assert CostModel(r=100).c_rnd == 5050


@pytest.mark.parametrize(("r", "proxy"), [(r, k) for r in range(1, 6) for k in range(r + 1)])
def test_bias_telescopes(r, proxy):
    assert sp.expand(bias_derivation.bias(r, proxy) - bias_derivation.tight(r, proxy)) == 0


def test_telescoping_by_induction():
    left, right = bias_derivation.telescoping_step()
    assert sp.expand(left - right) == 0


@pytest.mark.parametrize("r", [1, 2, 5])
def test_gradient_bound_telescopes(r):
    product = sp.prod(1 + alpha * L2 for alpha in step_sizes(r))
    assert sp.expand(bias_derivation.gradient(r) - (1 + M1) * L1 * product) == 0


def test_printed_bound_is_loose_by_one_factor():
    ratio = bias_derivation.printed_constant() / bias_derivation.tight_constant().subs(K, 0)
    assert is_zero(sp.powsimp(ratio) - (1 + ALPHA * L2))
    difference = sp.expand(bias_derivation.printed(3) - bias_derivation.tight(3))
    assert all(c > 0 for c in sp.Poly(difference, *step_sizes(3), L1, L2, M1).coeffs())


def test_numeric_bounds_are_the_derived_ones():
    draw = random.Random(1)
    for r, k in itertools.product((1, 4, 7), (0, 1)):
        alphas = [draw.uniform(0.01, 0.5) for _ in range(r)]
        constants = AssumptionConstants(draw.random(), 0.0, 3 * draw.random(), 2 * draw.random(), 0.0)
        point = {M1: constants.M1, L1: constants.L1, L2: constants.L2, **dict(zip(step_sizes(r), alphas, strict=True))}
        tight, printed = bias_derivation.tight(r, k), bias_derivation.printed(r)
        assert bias_bound(constants, alphas, Truncated(k)) == pytest.approx(float(tight.subs(point)), rel=1e-12)
        assert bias_bound_printed(constants, alphas) == pytest.approx(float(printed.subs(point)), rel=1e-12)
        assert gradient_bound(constants, alphas) == pytest.approx(float(bias_derivation.gradient(r).subs(point)))


@pytest.mark.parametrize(
    ("constants", "alpha", "r", "tight", "printed", "gradient"),
    [
        ((1, 2, 0.7), 0.1, 10, 3.868605429, 4.139407809, 7.868605429),
        ((0.3, 5, 1.5), 0.5, 4, 54.462890625, 95.31005859, 60.962890625),
    ],
)
def test_bounds_at_the_reference_points(constants, alpha, r, tight, printed, gradient):
    m1, l1, l2 = constants
    assumed = AssumptionConstants(M1=m1, M2=0, L1=l1, L2=l2, L3=0)
    alphas = np.full(r, alpha)
    assert bias_bound(assumed, alphas) == pytest.approx(tight, rel=1e-9)
    assert bias_bound_printed(assumed, alphas) == pytest.approx(printed, rel=1e-9)
    assert gradient_bound(assumed, alphas) == pytest.approx(gradient, rel=1e-9)


@pytest.mark.parametrize("module", printed_derivations.MODULES)
def test_every_derivation_can_be_printed(module):
    shown = printed_derivations.text(module)
    for function in printed_derivations._functions(importlib.import_module(f"ufom_theory.derivations.{module}")):
        assert f"\n{function.__name__}(" in shown
    assert " =\n\n    " in shown


def test_derivations_are_printed_by_name():
    command = [sys.executable, "-m", "ufom_theory.derivations"]
    shown = subprocess.run([*command, "optimum"], capture_output=True, text=True, check=True, encoding="utf-8").stdout
    assert "quadratic() =\n" in shown
    assert "-C_det⋅D₂⋅m + q ⋅(-C_rnd⋅D₂ + C_rnd⋅V₂)" in shown
    wrong = subprocess.run([*command, "nothing"], capture_output=True, text=True, encoding="utf-8")
    assert (wrong.returncode, "there are bias_bound, chain_rule" in wrong.stderr) == (1, True)
