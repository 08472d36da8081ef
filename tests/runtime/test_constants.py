"""Estimated constants against dense Jacobians and Hessians, and observed ≤ estimate ≤ bound."""

import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from tests.runtime.conftest import F64, coupled
from ufom_runtime.measure.constants import compare_bounds, estimate_constants
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory.two_tasks import diverging_problem


def test_quadratics_have_known_constants():
    problem = quadratic(dim=4)
    found = estimate_constants(problem, problem.initial, problem.sample(3, torch.Generator().manual_seed(0)))
    assert pytest.approx(1, rel=1e-12) == found.M1
    assert pytest.approx(2.0, rel=1e-3) == found.L2  # the largest eigenvalue of H
    assert found.M2 < 1e-9
    assert found.L3 < 1e-9
    assert not found.theta_in_losses


def test_against_dense_derivatives_at_every_state():
    problem, dense = coupled(), {"M1": 0.0, "L1": 0.0, "L2": 0.0}
    thetas = torch.stack([problem.initial, 0.3 - problem.initial])
    tasks = problem.sample(3, torch.Generator().manual_seed(0))
    for theta in thetas:
        for task in tasks:
            start = jacobian(lambda t, x=task: problem.start(t, x), theta)
            dense["M1"] = max(dense["M1"], float(torch.linalg.matrix_norm(start, 2)))
            phi, points = problem.start(theta, task), []
            for alpha in problem.alphas:
                points.append((problem.inner_loss, phi))
                phi = phi - alpha * jacobian(lambda p, t=theta, x=task: problem.inner_loss(t, p, x), phi)
            for loss, state in [*points, (problem.outer_loss, phi)]:
                slopes = jacobian(lambda t, p, f=loss, x=task: f(t, p, x), (theta, state))
                dense["L1"] = max(dense["L1"], *(float(g.norm()) for g in slopes))
                blocks = hessian(lambda t, p, f=loss, x=task: f(t, p, x), (theta, state))
                norms = [float(torch.linalg.matrix_norm(b, 2)) for row in blocks for b in row]
                dense["L2"] = max(dense["L2"], *norms)
    found = estimate_constants(problem, thetas, tasks)
    assert pytest.approx(dense["M1"], rel=1e-3) == found.M1
    assert pytest.approx(dense["L1"], rel=1e-9) == found.L1
    assert pytest.approx(dense["L2"], rel=1e-3) == found.L2
    assert found.theta_in_losses
    assert found.M2 > 0.01
    assert found.L3 > 0.01


@pytest.mark.parametrize("alpha", [1e-3, pytest.param(0.03, marks=pytest.mark.slow), 0.3])
def test_observed_is_below_the_estimate_and_that_below_the_bound_on_the_toy(alpha):
    problem = synthetic(alpha=alpha, A=3.0)
    thetas = torch.linspace(-12, 18, 7, dtype=F64)[:, None]
    for row in compare_bounds(problem, thetas, problem.tasks, problem.constants):
        assert row["observed"] <= row["bound"]
        assert row["estimate"] <= row["bound"] * (1 + 1e-9)
        if row["quantity"] != "L_M":  # between two θ the gradient's slope may be steeper than at either
            assert row["observed"] <= row["estimate"] * (1 + 1e-3)


def test_observed_is_below_the_estimate_where_nothing_is_known():
    problem = coupled()
    rows = compare_bounds(problem, problem.initial, problem.sample(4, torch.Generator().manual_seed(0)))
    assert [row["bound"] for row in rows] == [None] * 3
    assert rows[2]["observed"] is None
    for row in rows[:2]:
        assert row["observed"] <= row["estimate"] * (1 + 1e-3)


def test_theorem_2s_problem_runs():
    found = diverging_problem(D=0.06, r=10, alpha=0.1)
    problem = synthetic(**found.parameters)
    assert problem.constants == found.constants
    from ufom_runtime import EXACT, FOM, hypergradient

    theta = torch.tensor([found.theta_fo], dtype=F64)
    assert abs(hypergradient(problem, theta, problem.tasks, FOM).item()) < 1e-12
    assert hypergradient(problem, theta, problem.tasks, EXACT).item() ** 2 == pytest.approx(2 * 0.06, rel=1e-9)
