"""Reptile against gradient descent written out, and its calls against those counted."""

import pytest
import torch

from tests.runtime.conftest import coupled
from ufom_runtime import FOM, REPTILE, count_calls, outer_sgd
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.training.seeds import generator
from ufom_theory import UfomError


def descend(problem, theta, task):
    phi = theta
    for alpha in problem.step_sizes:
        leaf = phi.detach().requires_grad_()
        phi = leaf - alpha * torch.autograd.grad(problem.inner_loss(theta, leaf, task), leaf)[0]
    return phi.detach()


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_moves_towards_the_mean_end_of_the_inner_loops(chunk):
    problem = digits_few_shot(filters=3, r=3, dtype=torch.float64)
    theta = problem.initial
    run = outer_sgd(problem, theta, REPTILE, lambda k: 0.5 / k, 2, batch=3, seed=1, chunk=chunk)
    for k in (1, 2):
        tasks = problem.sample(3, generator(1, k, "tasks"))
        ends = torch.stack([descend(problem, theta, tuple(t[i] for t in tasks)) for i in range(3)])
        theta = theta + 0.5 / k * (ends.mean(0) - theta)  # Nichol et al., ε = 0.5/k
    torch.testing.assert_close(run.theta, theta, rtol=1e-9, atol=1e-12)
    assert run.log.exact.tolist() == [0, 0]


def test_costs_what_it_declares():
    for r, n in ((1, 1), (4, 3)):
        problem = quadratic(dim=3, r=r)
        tasks = problem.sample(n, torch.Generator().manual_seed(0))
        with count_calls() as calls:
            REPTILE.direction(problem, problem.initial, tasks)
        declared = REPTILE.calls(r)
        assert calls.gradients == n * declared.gradients == n * r
        assert calls.hessian_vector_products == n * declared.hessian_vector_products == 0
    fom = outer_sgd(problem, problem.initial, FOM, [0.1], 1).log.gradients.item()
    assert outer_sgd(problem, problem.initial, REPTILE, [0.1], 1).log.gradients.item() == fom - 1


def test_is_no_gradient_of_m():
    problem = quadratic(dim=3, r=4)
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    direction = REPTILE.direction(problem, problem.initial, tasks).value
    other = quadratic(dim=3, r=4)
    object.__setattr__(other, "outer_loss", lambda theta, phi, task: 7 * phi.sum())
    assert torch.equal(direction, REPTILE.direction(other, problem.initial, tasks).value)


def test_a_start_that_is_not_theta_is_refused():
    problem = coupled()
    with pytest.raises(UfomError, match="must start at θ"):
        outer_sgd(problem, problem.initial, REPTILE, [0.1], 1)


def test_a_loop_that_diverges_is_named():
    problem = quadratic(dim=3, r=4)
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    with pytest.raises(UfomError, match="chunk"):
        REPTILE.direction(problem, problem.initial, tasks, chunk=0)
    object.__setattr__(problem, "inner_loss", lambda theta, phi, task: phi.pow(4).sum())
    with pytest.raises(UfomError, match="inner_loss is inf at φ_0"):
        REPTILE.direction(problem, problem.initial * 1e100, tasks)
