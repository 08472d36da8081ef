"""Implicit differentiation against the unrolled loop and dense linear algebra; its rate, and where it is refused."""

import math
import warnings

import numpy as np
import pytest
import torch

from tests.oracles import unrolled_gradient
from tests.runtime.conftest import coupled
from ufom_runtime import BilevelProblem, hypergradient, outer_sgd
from ufom_runtime.methods import Implicit, proximal
from ufom_runtime.methods.implicit import conjugate_gradient, neumann_series
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import UfomError

F64 = torch.float64
G = torch.Generator().manual_seed(0)
H = quadratic(dim=4).hessian  # eigenvalues 0.2, 0.8, 1.4, 2
B = torch.randn(4, 3, dtype=F64, generator=G)
FIRST = torch.randn(4, dtype=F64, generator=G)
THETA = torch.randn(3, dtype=F64, generator=G)
TASKS = torch.randn(3, 4, dtype=F64, generator=G)


def hyper(r, alpha=0.3, hessian=H):
    """An inner quadratic whose Hessian and start are free of θ, and an outer loss that is none."""
    return BilevelProblem(
        inner_loss=lambda theta, phi, task: phi @ hessian @ phi / 2 - phi @ (B @ theta + task),
        outer_loss=lambda theta, phi, task: torch.cos(phi - task).sum() + torch.sin(theta).sum() * phi.sum(),
        start=lambda theta, task: FIRST,
        step_sizes=[alpha] * r,
        tasks=TASKS,
    )


def quietly(problem, method, theta=THETA, tasks=TASKS):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return method.direction(problem, theta, tasks)


def test_approaches_the_exact_gradient_at_the_predicted_rate():
    """G_implicit − G = −Bᵀ H⁻¹ (I − αH)^r ∂L_out/∂φ: the slope of its logarithm is log(1 − α·0.2)."""
    lengths, errors = range(100, 201, 50), []
    for r in lengths:
        problem = hyper(r)
        implicit = quietly(problem, Implicit("cg", 4))
        exact = unrolled_gradient(problem, THETA, TASKS)
        errors.append(float((implicit.per_task - exact).norm()))
        assert implicit.columns["residual"] < 1e-10  # four dimensions, four iterations
    slope, _ = np.polyfit(list(lengths), np.log(errors), 1)
    predicted = math.log(max(abs(1 - 0.3 * x) for x in torch.linalg.eigvalsh(H).tolist()))
    print(f"slope of log error {slope:.6f}, predicted {predicted:.6f}")
    assert slope == pytest.approx(predicted, rel=1e-4)
    assert errors[0] > 100 * errors[-1] > 1e-6


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_agrees_with_dense_linear_algebra_and_reports_its_residual(solver, damping):
    problem, steps = hyper(12), 3
    method = Implicit(solver, steps, damping, 0.4 if solver == "neumann" else None)
    a = H + damping * torch.eye(4, dtype=F64)
    for task in TASKS:
        found = quietly(problem, method, tasks=task[None])
        phi = FIRST
        slopes = []
        for _ in range(12):
            slopes.append(H @ phi - B @ THETA - task)
            phi = phi - 0.3 * slopes[-1]
        b = -torch.sin(phi - task) + torch.sin(THETA).sum()
        if solver == "neumann":
            x = 0.4 * sum(torch.linalg.matrix_power(torch.eye(4, dtype=F64) - 0.4 * a, k) @ b for k in range(steps + 1))
        else:  # the best of the Krylov space in the norm of A
            krylov = torch.stack([torch.linalg.matrix_power(a, k) @ b for k in range(steps)], 1)
            x = krylov @ torch.linalg.solve(krylov.T @ a @ krylov, krylov.T @ b)
        expected = torch.cos(THETA) * phi.sum() + B.T @ x
        torch.testing.assert_close(found.value, expected, rtol=1e-9, atol=1e-10)
        assert found.columns["residual"] == pytest.approx(float((b - a @ x).norm() / b.norm()), rel=1e-8)
        last = H @ phi - B @ THETA - task
        assert found.columns["stationarity"] == pytest.approx(float(last.norm() / slopes[0].norm()), rel=1e-9)


def test_at_a_stationary_point_both_solvers_give_the_limit():
    exact = unrolled_gradient(hyper(400), THETA, TASKS)
    for method in (Implicit("cg", 8), Implicit("neumann", 400)):
        found = hypergradient(hyper(400), THETA, TASKS, method, per_task=True)
        assert (found - exact).norm() <= 1e-9 * exact.norm()


def test_solvers_stop_where_nothing_is_left():
    b = torch.stack([torch.zeros(4, dtype=F64), TASKS[0]])
    assert torch.equal(conjugate_gradient(lambda x: x @ H, b, 30)[0], b[0])
    for x in (conjugate_gradient(lambda x: x @ H, b, 30), neumann_series(lambda x: x @ H, b, 400, 0.5)):
        torch.testing.assert_close(x @ H, b, rtol=1e-10, atol=1e-12)


def test_plain_maml_is_refused_and_its_proximal_form_is_not():
    problem = quadratic(dim=4, r=200, alpha=0.3)
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    for solver in ("cg", "neumann"):
        with pytest.raises(UfomError, match=r"free of θ.*proximal\(problem, strength\)"):
            hypergradient(problem, problem.initial, tasks, Implicit(solver))
    found = hypergradient(proximal(problem, 0.7), problem.initial, tasks, Implicit(steps=4), per_task=True)
    regularised = H + 0.7 * torch.eye(4, dtype=F64)  # iMAML: (I + H/λ)⁻¹ ∂L_out/∂φ at φ* = (H + λI)⁻¹(Hc + λθ)
    for g, c in zip(found, tasks, strict=True):
        phi = torch.linalg.solve(regularised, H @ c + 0.7 * problem.initial)
        torch.testing.assert_close(g, 0.7 * torch.linalg.solve(regularised, H @ (phi - c)), rtol=1e-9, atol=1e-11)


def test_far_from_a_stationary_point_it_warns():
    with pytest.warns(UserWarning, match=r"not near a stationary point.*above 0\.1"):
        hypergradient(hyper(3), THETA, TASKS, Implicit(steps=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient(hyper(3), THETA, TASKS, Implicit(steps=4, warn_above=1.0))


def test_a_series_that_diverges_is_said_to():
    with pytest.warns(UserWarning, match="series diverges.*smaller step"):
        hypergradient(hyper(100), THETA, TASKS, Implicit("neumann", 20, step=2.0))


def test_negative_curvature_is_refused_and_damping_mends_it():
    bent = H - 0.5 * torch.eye(4, dtype=F64)
    with pytest.raises(UfomError, match=r"met the curvature -0\.\d+.*raise damping"):
        hypergradient(hyper(3, hessian=bent), THETA, TASKS, Implicit(warn_above=99.0))
    hypergradient(hyper(3, hessian=bent), THETA, TASKS, Implicit(warn_above=99.0, damping=0.4))


def test_runs_in_outer_sgd_and_logs_what_it_reports():
    problem = digits_hypercleaning(n_train=24, n_validation=20, hidden=5, r=20, dtype=F64)
    run = outer_sgd(problem, problem.initial, Implicit("neumann", 5, 0.1, warn_above=99.0), [1.0] * 3, 3)
    assert {"residual", "stationarity"} < set(run.log)
    assert (run.log.residual < 1).all()
    assert run.log.gradients.tolist() == [22, 44, 66]


def linear():
    return BilevelProblem(
        lambda t, p, x: p @ x, lambda t, p, x: (p**2).sum(), lambda t, x: t, [0.1], tasks=torch.ones(1, 2, dtype=F64)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Implicit("lu"), "use cg or neumann"),
        (lambda: Implicit(steps=0), "at least 1"),
        (lambda: Implicit(steps=1.5), "must be an integer"),
        (lambda: Implicit(damping=-1.0), "≥ 0"),
        (lambda: Implicit(step=0.1), "takes none"),
        (lambda: Implicit("neumann", step=0.0), "> 0"),
        (lambda: Implicit(warn_above=0.0), "> 0"),
        (lambda: proximal(coupled(), -1.0), "> 0"),
        (lambda: hypergradient(linear(), torch.ones(2, dtype=F64), linear().tasks, Implicit()), "linear in φ"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()
