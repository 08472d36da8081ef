"""What several pages share: plain autograd, and the measured D²/V² and q*."""

import torch
from torch import Tensor
from torch.autograd import grad

from ufom_runtime import (
    EXACT,
    BilevelProblem,
    Estimator,
    hypergradient,
    measure_moments,
)
from ufom_runtime.inner import sgd
from ufom_runtime.problem import Task, Tasks
from ufom_theory import CostModel, Sweep, optimal_q


def plain_autograd(problem: BilevelProblem, theta: Tensor, task: Task) -> Tensor:
    """The hypergradient of one task, by one backward pass through the inner loop."""
    theta = theta.clone().requires_grad_()
    update = problem.update or sgd(lr=torch.tensor(problem.alphas))
    phi = problem.start(theta, task)
    phi = phi if phi.requires_grad else phi.clone().requires_grad_()
    state = update.init(theta, phi, task)
    for j in range(1, problem.r + 1):
        seen = problem.inner_batch(task, j) if problem.inner_batch else task
        (g,) = grad(problem.inner_loss(theta, phi, seen), phi, create_graph=True)
        phi, state = update.update(theta, phi, state, g, seen, j)
    return grad(problem.outer_loss(theta, phi, task), theta)[0]


def assert_plain(problem: BilevelProblem, theta: Tensor, tasks: Task) -> None:
    """The package's exact gradients of these tasks are those of plain autograd."""
    found, stack = (
        hypergradient(problem, theta, tasks, EXACT, per_task=True),
        Tasks.of(tasks),
    )
    for i, row in enumerate(found):
        expected = plain_autograd(problem, theta, stack.take(slice(i, i + 1)).one())
        assert (row - expected).norm() <= 1e-4 * expected.norm()
    print(f"{len(found)} exact hypergradients are those of plain autograd")


def print_q(
    problem: BilevelProblem, theta: Tensor, proxy: Estimator, tasks: Task | None = None
) -> None:
    """Print D²/V² of a proxy and q*, for a stored sweep and C2 = 2·C1."""
    moments = measure_moments(problem, theta, tasks, proxy=proxy)
    cost = CostModel(problem.r, c1=1.0, c2=2.0, sweep=Sweep.stored(), proxy=proxy.proxy)
    best = optimal_q(moments, cost, outer="tuned")
    print(f"D²/V² = {best.rho:.3g}, q* = {best.q:.3g}: {best.why}")
