"""Equations (1)–(13), Algorithms 1–4 and Proposition 1, each with the function that decides it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import sympy as sp

from ufom_theory.claims.registry import Status, claim, holds, measures, vanishes
from ufom_theory.derivations import chain_rule, complexity, divergence, second_moment
from ufom_theory.derivations.symbols import ALPHA, K, Q, R
from ufom_theory.two_tasks import diverging_problem, squared_gradient_norms

ALPHAS = [sp.Rational(1, n) for n in (2, 3, 5)]
N = sp.Symbol("n", integer=True, positive=True)
CENTRE = divergence.CENTRE_B / divergence.CURVATURE


@cache
def _unrolled(r: int) -> tuple[chain_rule.Problem, sp.Matrix]:
    problem = chain_rule.polynomial_problem()
    return problem, chain_rule.unrolled_gradient(problem, ALPHAS[:r])


@claim("1", "(1)", "proved", other=sp.Integer(10), printed=r"\min_\theta E L^{out}(\theta, U(\theta,T), T)",
       derived=divergence.inner_descent,
       test="test_divergence.py::test_long_inner_loops_end_at_the_minimum")  # fmt: skip
def exact_bilevel_problem(steps: sp.Expr = N) -> Status:
    """On a quadratic inner loss (α·a = 1/3) inner GD ends at the minimum: as r → ∞ problem (4) tends to (1)."""
    distance = divergence.inner_descent().subs({ALPHA: 1 / (3 * divergence.CURVATURE), R: steps})
    return holds(sp.limit(distance, N, sp.oo) == 0)


@claim("2-3", "(2)–(3)", "proved", other=lambda a, r: (1 - a) ** (r + 1),
       printed=r"\phi_0 = V(\theta),\; \phi_j = \phi_{j-1} - \alpha_j \partial_\phi L^{in}(\theta, \phi_{j-1})",
       derived=lambda: sp.Eq(sp.Symbol("phi_r") - CENTRE, divergence.inner_descent()),
       test="test_proofs.py::test_stationary_point_of_the_first_order_method")  # fmt: skip
def inner_gradient_descent(factor: Callable[[Any, Any], Any] = lambda a, r: (1 - a) ** r) -> Status:
    """r inner steps on a quadratic shrink the distance to its minimum by (1 − αa)^r."""
    theta, phi = sp.symbols("theta phi", real=True)
    a = sp.Rational(1, 4)
    problem = chain_rule.Problem(sp.Matrix([theta]), sp.Matrix([phi]), phi**2 / 2, phi, sp.Matrix([theta]))
    return holds(*(chain_rule.states(problem, [a] * r)[-1][0] == factor(a, r) * theta for r in range(1, 5)))


@claim("4", "(4)", "proved", other=0, printed=r"\min_\theta E L^{out}(\theta, U^{(r)}(\theta,T), T)",
       derived=r"\nabla_\theta L^{out}(\theta, \phi_r(\theta)) = b_1 + (\partial_\theta V)^\top b_2",
       test="test_proofs.py::test_backward_loop_of_four_steps_at_a_point")  # fmt: skip
def approximate_problem(kept: int | None = None) -> Status:
    """The gradient of one task's term of (4), differentiated as a whole, is what the backward loop returns (r = 3)."""
    problem, unrolled = _unrolled(3)
    return vanishes(unrolled - chain_rule.backward_loop(problem, ALPHAS, kept))


@claim("5", "(5)", "proved", other=sp.Integer(2), printed=r"\sum \gamma_k = \infty,\; \gamma_k \to 0",
       derived=r"k^{-1/2}\text{ satisfies (5), but } \sum \gamma_k^2 = \infty",
       test="test_proofs.py::test_root_steps_and_their_squares_add_up_to_infinity")  # fmt: skip
def outer_steps(exponent: sp.Expr = sp.S.Half) -> Status:
    """γ_k = k^(−1/2) satisfies (5), but not Σγ² < ∞: the two parts of Theorem 1 speak of different sequences."""
    k = sp.Symbol("k", integer=True, positive=True)
    total, squares = sp.Sum(k**-exponent, (k, 1, sp.oo)), sp.Sum(k ** (-2 * exponent), (k, 1, sp.oo))
    return holds(sp.limit(k**-exponent, k, sp.oo) == 0, not total.is_convergent(), not squares.is_convergent())


@claim("6", "(6)", "proved", other=2, printed=r"\nabla_\theta L^{out} = \partial_\theta L^{out} + \sum_j D_j"
       r" + (\partial_\theta V)^\top \nabla_{\phi_0} L^{out}", derived=r"\text{the same}",
       test="test_proofs.py::test_backward_loop_is_the_unrolled_gradient")  # fmt: skip
def total_derivative(terms: int = 3) -> Status:
    """The total derivative has all r terms D_j: against the unrolled problem at r = 3, and by induction."""
    problem, unrolled = _unrolled(3)
    before, after = chain_rule.invariant()
    return vanishes(unrolled - chain_rule.backward_loop(problem, ALPHAS, terms), before - after)


@claim("7", "(7)", "proved", other=1, printed=r"D_j = -\alpha_j (\partial^2_{\theta\phi} L^{in}(\phi_{j-1}))^\top"
       r" \nabla_{\phi_j} L^{out}", derived=r"\text{the same}",
       test="test_proofs.py::test_every_backward_step_keeps_the_invariant")  # fmt: skip
def mixed_term(sign: int = -1) -> Status:
    """D_j has the factor −α_j: with a start free of θ, the gradient at r = 1 is ∂L_out/∂θ + D_1."""
    problem = chain_rule.polynomial_problem()._replace(start=sp.Matrix([1, 2, 3]))
    at = dict(zip(problem.phi, (1, 2, 3), strict=True))
    last = dict(zip(problem.phi, chain_rule.states(problem, ALPHAS[:1])[-1], strict=True))
    outer = sp.Matrix([problem.outer])
    mixed = sp.Matrix([problem.inner]).jacobian(problem.phi).T.jacobian(problem.theta).subs(at)
    term = sign * ALPHAS[0] * mixed.T * outer.jacobian(problem.phi).T.subs(last)
    expected = outer.jacobian(problem.theta).T.subs(last) + term
    return vanishes(chain_rule.unrolled_gradient(problem, ALPHAS[:1]) - expected)


@claim("8-9", "(8)–(9)", "proved", other=lambda h, alpha: sp.eye(3) + alpha * h,
       printed=r"\nabla_{\phi_{j-1}} L^{out} = (I - \alpha_j \partial^2_\phi L^{in})^\top \nabla_{\phi_j} L^{out}",
       derived=r"\text{the same}", test="test_proofs.py::test_every_backward_step_keeps_the_invariant")  # fmt: skip
def adjoint(step: Callable[[sp.Matrix, sp.Expr], sp.Matrix] = lambda h, alpha: sp.eye(3) - alpha * h) -> Status:
    """The adjoint of one inner step is I − α·∂²L_in/∂φ²: its Jacobian, differentiated directly."""
    problem = chain_rule.polynomial_problem()
    slope = sp.Matrix([problem.inner]).jacobian(problem.phi).T
    jacobian = (problem.phi - ALPHAS[0] * slope).jacobian(problem.phi)
    return vanishes(jacobian - step(sp.hessian(problem.inner, list(problem.phi)), ALPHAS[0]))


@claim("hvp", "§2.2", "proved", other=2, printed=r"H(\theta, \phi) = \partial_\phi L^{in}(\theta, \phi)^\top b_2",
       derived=r"\nabla H = ((\partial^2_{\theta\phi} L^{in})^\top b_2, (\partial^2_\phi L^{in})^\top b_2)",
       test="test_proofs.py::test_hessian_vector_products_are_directional_derivatives")  # fmt: skip
def hessian_vector_products(power: int = 1) -> Status:
    """Differentiating (∂L_in/∂φ)ᵀb2 in θ and φ gives both Hessian-vector products, without a Hessian."""
    problem = chain_rule.polynomial_problem()
    b2 = sp.Matrix(sp.symbols("b2_:3"))
    slope = sp.Matrix([problem.inner]).jacobian(problem.phi).T
    functional = sp.Matrix([slope.dot(b2) ** power])
    by_theta, by_phi = (functional.jacobian(x).T for x in (problem.theta, problem.phi))
    hessian = sp.hessian(problem.inner, list(problem.phi))
    return vanishes(by_theta - slope.jacobian(problem.theta).T * b2, by_phi - hessian * b2)


@claim("10-11", "(10)–(11)", "proved", other=1, printed=r"G_{FO} = \partial_\theta L^{out} + (\partial_\theta V)^\top"
       r" \partial_\phi L^{out}", derived=r"\text{the backward loop that keeps no step}",
       test="test_proofs.py::test_first_order_gradient_of_a_start_free_problem_vanishes")  # fmt: skip
def first_order_gradient(kept: int = 0) -> Status:
    """G_FO is the backward loop without a step: all second derivatives of L_in in (6)–(9) set to zero."""
    problem = chain_rule.polynomial_problem()
    last = dict(zip(problem.phi, chain_rule.states(problem, ALPHAS[:2])[-1], strict=True))
    outer = sp.Matrix([problem.outer])
    b1, b2 = (outer.jacobian(x).T.subs(last, simultaneous=True) for x in (problem.theta, problem.phi))
    stated = b1 + problem.start.jacobian(problem.theta).T * b2
    return vanishes(stated - chain_rule.backward_loop(problem, ALPHAS[:2], kept))


@claim("12-13", "(12)–(13)", "proved", other=lambda coin, e, p: p + coin * (e - p),
       printed=r"G_{UFO} = G_{FO} + \tfrac{\xi}{q}(\nabla_\theta L^{out} - G_{FO})", derived=second_moment.mean,
       test="test_proofs.py::test_second_moment")  # fmt: skip
def unbiased(estimate: Callable[..., sp.Expr] = second_moment.estimate) -> Status:
    """UFOM is unbiased: E_ξ of (12)–(13) is the exact gradient."""
    e, p = second_moment.EXACT, second_moment.PROXY
    return vanishes(second_moment.over_coin(lambda coin: estimate(coin, e, p)) - e)


@claim("algorithm-1", "Algorithm 1", "measured", other=(0.05, 0.04), printed=r"\theta_k = \theta_{k-1} - \gamma_k G",
       derived=r"\text{a linear recursion of }(E x, E x^2)",
       test="test_divergence.py::test_moment_recursion_against_simulation")  # fmt: skip
def outer_sgd(used: tuple[float, float] = (0.05, 0.03)) -> Status:
    """Outer SGD's E‖∇M(θ_k)‖² by the moment recursion is the mean over all 4³ (task, coin) sequences of three steps."""
    problem, q, steps = diverging_problem(0.06, 10, 0.1), 0.3, (0.05, 0.03, 0.02)
    total = 0.0
    for draws in itertools.product((0, 1), (0, 1), repeat=3):
        theta, weight = 5.0, 1.0
        for n, gamma in enumerate(steps):
            task, coin = draws[2 * n], draws[2 * n + 1]
            proxy, exact = (g[task] for g in problem.gradients(theta))
            theta, weight = theta - gamma * (proxy + coin / q * (exact - proxy)), weight * (q if coin else 1 - q) / 2
        total += weight * (problem.curvature * (theta - problem.theta_star)) ** 2
    *_, recursion = squared_gradient_norms(problem, q, (*used, steps[2]), start=5.0)
    return measures(recursion, total, 1e-9)


@claim("algorithm-2", "Algorithm 2", "proved", other=2, printed=r"b_1 + (\partial_\theta V)^\top b_2",
       derived=r"b_1 + J_j^\top b_2 \text{ is the same for every } j",
       test="test_proofs.py::test_backward_loop_is_the_unrolled_gradient")  # fmt: skip
def exact_inner_loop(terms: int | None = None) -> Status:
    """Algorithm 2 returns the gradient: r = 1, 2, 3 with s = 2 and p = 3, and each backward step keeps an invariant."""
    before, after = chain_rule.invariant()
    gaps = [before - after]
    for r in (1, 2, 3):
        problem, unrolled = _unrolled(r)
        gaps.append(unrolled - chain_rule.backward_loop(problem, ALPHAS[:r], None if terms is None else min(terms, r)))
    return vanishes(*gaps)


@claim("algorithm-3", "Algorithm 3", "measured", other=1.01, printed=r"G_{FO}", derived=divergence.theta_fo,
       test="test_divergence.py::test_gradient_at_theta_fo_of_the_whole_function")  # fmt: skip
def first_order_inner_loop(factor: float = 1.0) -> Status:
    """Algorithm 3 run on Theorem 2's problem vanishes in the mean at θ_FO, all three pieces of f followed."""
    problem = diverging_problem(0.06, 10, 0.1)
    first, _ = problem.gradients(factor * problem.theta_fo)
    return measures(1.0 + float(first.mean()), 1.0, 1e-12)


@claim("algorithm-4", "Algorithm 4", "proved", other=lambda j: j, printed=r"b_{FO} + \tfrac1q (b_{Exact} - b_{FO})",
       derived=second_moment.mean, test="test_proofs.py::test_algorithm_4_at_a_point")  # fmt: skip
def debiased_inner_loop(rerun: Callable[[int], int] = lambda j: j - 1) -> Status:
    """Algorithm 4, run with either coin, j − 1 inner steps from φ_0 before the backward step j, has the unrolled
    problem's gradient for its mean (r = 2, s = 2, p = 3)."""
    problem, unrolled = _unrolled(2)
    tails, heads = (chain_rule.algorithm_4(problem, ALPHAS[:2], coin, rerun) for coin in (0, 1))
    return vanishes((1 - Q) * tails + Q * heads - unrolled)


@claim("proposition-1", "Proposition 1", "proved", other=(R + 1 + Q * R * (R + 1) / 2, Q * R),
       printed=r"r + 1 + q\,r(r-1)/2,\; q\,r", derived=lambda: sp.factor(complexity.expected_gradients().subs(K, 0)),
       test="test_derivations.py::test_proposition_1")  # fmt: skip
def counts(form: tuple[sp.Expr, sp.Expr] = complexity.proposition_1()) -> Status:
    """Algorithm 4 takes r + 1 + q·r(r − 1)/2 gradients and q·r Hessian-vector products in expectation."""
    derived = complexity.expected_gradients(), complexity.expected_hessian_vector_products()
    return vanishes(*(d.subs(K, 0) - f for d, f in zip(derived, form, strict=True)))
