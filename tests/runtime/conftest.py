"""Problems of every kind, small and in float64, with a θ and four tasks."""

from __future__ import annotations

import os

import pytest
import torch

from ufom_runtime import BilevelProblem
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.few_shot import digits_few_shot, omniglot_few_shot
from ufom_runtime.problems.hypercleaning import digits_hypercleaning, mnist_hypercleaning
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.problems.synthetic import synthetic

F64 = torch.float64
needs_data = pytest.mark.skipif(
    "UFOM_DATA" not in os.environ, reason="UFOM_DATA is not set: MNIST and Omniglot are not tested"
)


def coupled(r: int = 5, dim: int = 3) -> BilevelProblem:
    """θ in the start, in the inner and in the outer loss; sines, so that no derivative vanishes; unequal step sizes."""

    def inner(theta, phi, task):
        return torch.sin(theta + phi * task).sum() + 0.1 * (theta * phi).sum() ** 2

    def outer(theta, phi, task):
        return torch.cos(theta * task - phi).sum() + 0.3 * (phi[0] * theta[0])

    return BilevelProblem(
        inner_loss=inner,
        outer_loss=outer,
        start=lambda theta, task: torch.sin(theta) + task,
        step_sizes=torch.linspace(0.1, 0.4, r, dtype=F64),
        sample_tasks=lambda n, g: torch.randn(n, dim, generator=g, dtype=F64),
        initial=torch.linspace(-1, 1, dim, dtype=F64),
    )


def _hypercleaning(factory):
    return factory(n_train=24, n_validation=20, hidden=5, r=6, alpha=0.5, dtype=F64)


MAKERS = {
    "coupled": coupled,
    "synthetic": lambda: synthetic(alpha=0.3, r=7, A=2.0),  # all three pieces are visited
    "quadratic": lambda: quadratic(dim=4, r=6),
    "digits-hypercleaning": lambda: _hypercleaning(digits_hypercleaning),
    "digits-few-shot": lambda: digits_few_shot(filters=3, r=3, dtype=F64),
    "mnist-hypercleaning": lambda: _hypercleaning(mnist_hypercleaning),
    "omniglot": lambda: omniglot_few_shot(ways=3, filters=3, r=3, dtype=F64),
}
REAL = ("mnist-hypercleaning", "omniglot")  # the embedded digits are their stand-ins in a quick run


def make_case(name):
    """(problem, θ, four tasks) or, where Ω is a single task, that task."""
    problem = MAKERS[name]()
    theta = problem.initial
    if name == "synthetic":
        return problem, torch.tensor([4.5], dtype=F64), Tasks.of(problem.tasks).take(torch.tensor([0, 1, 1, 0])).stack
    if name.endswith("hypercleaning"):
        return problem, torch.linspace(-1, 1, len(theta), dtype=F64), problem.tasks
    return problem, theta, problem.sample(4, torch.Generator().manual_seed(1))


@pytest.fixture(
    params=[pytest.param(name, marks=[needs_data, pytest.mark.slow] if name in REAL else ()) for name in MAKERS],
    scope="module",
)
def case(request):
    return make_case(request.param)
