"""Where a result that is not finite comes from, in words."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ufom_runtime import (
    EXACT,
    FOM,
    BilevelProblem,
    Estimator,
    FlatModule,
    Forward,
    adapt,
    hypergradient,
    measure_moments,
)
from ufom_theory import Sweep, UfomError

UNROLLED = Estimator(1.0, Sweep.unrolled())

THETA = torch.tensor([0.3, -0.2, 0.5, 0.9], dtype=torch.float64)
TASKS = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)


def square(theta, phi, t):
    return (phi - t).square().sum()


def problem(inner=square, outer=square, start=lambda theta, t: theta, alphas=(0.1,) * 3):
    return BilevelProblem(inner, outer, start, list(alphas), lambda n, g: TASKS)


def holding_nan():
    tasks = TASKS.clone()
    tasks[1, 2] = float("nan")
    return tasks


CASES = {
    "root at 0": (
        problem(lambda theta, phi, t: square(theta, phi, t) + (phi - theta).square().sum().sqrt()), TASKS,
        "In task 0 .*∂L_in/∂φ is not finite at φ_0; inner_loss is .*√x",
    ),
    "norm at 0": (
        problem(lambda theta, phi, t: square(theta, phi, t) + (phi - theta).norm()), TASKS,
        "second derivative of inner_loss is not finite at φ_0.*‖x‖",
    ),
    "outer root at 0": (
        problem(outer=lambda theta, phi, t: (phi - phi.detach()).square().sum().sqrt()), TASKS,
        "gradient of outer_loss is not finite at φ_r; outer_loss is 0 there",
    ),
    "logarithm": (
        problem(lambda theta, phi, t: square(theta, phi, t) + phi.log().sum()), TASKS,
        "inner_loss is nan at φ_0.*logarithm",
    ),
    "data": (problem(), holding_nan(), "In task 1 .*inner_loss is nan at φ_0 .the task itself holds NaN"),
    "start": (problem(start=lambda theta, t: theta.log()), TASKS, "start returned a φ_0 that is not finite"),
    "growth": (
        problem(lambda theta, phi, t: 50 * square(theta, phi, t), alphas=[1e12] * 40), TASKS,
        "φ has grown from a norm of .*take smaller inner step_sizes",
    ),
    "adjoint": (
        problem(lambda theta, phi, t: -50 * (phi - phi.detach()).square().sum(), alphas=[1e12] * 40), TASKS,
        "adjoint ∂L_out/∂φ has grown from a norm of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_first_number_that_is_not_finite_is_named(case):
    made, tasks, message = CASES[case]
    for call in (
        lambda: hypergradient(made, THETA, tasks, EXACT),
        lambda: hypergradient(made, THETA, tasks, UNROLLED, chunk=1),
        lambda: measure_moments(made, THETA, tasks),
    ):
        with pytest.raises(UfomError, match=message) as caught:
            call()
        assert ("diverged" in str(caught.value)) == (case in ("growth", "adjoint"))


@pytest.mark.parametrize("empty", [0, 1])
@pytest.mark.parametrize("method", [FOM, EXACT, Forward()])
def test_a_loss_over_no_labels_is_refused(empty, method):
    net = FlatModule(nn.Linear(4, 3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.int64)
    none = labels.clone()
    none[2] = -100
    made = BilevelProblem(
        lambda theta, phi, t: F.cross_entropy(net(phi, t[0]), t[1]) + 1e-3 * phi.square().sum(),
        lambda theta, phi, t: F.cross_entropy(net(phi, t[0]), t[2]) + 1e-3 * phi.square().sum(),
        lambda theta, t: theta, [0.1] * 3, lambda n, g: None,
    )  # fmt: skip
    tasks = (x, none, labels) if empty == 0 else (x, labels, none)
    with pytest.raises(UfomError, match=r"In task 2 .*loss is nan at φ_.*are all labels ignored"):
        hypergradient(made, net.vector(), tasks, method)
    if empty == 0:
        with pytest.raises(UfomError, match=r"φ_r is not finite. In task 2 .*inner_loss is nan at φ_0"):
            adapt(made, net.vector(), tasks, chunk=1)


def test_a_start_that_is_no_finite_vector_is_named():
    with pytest.raises(UfomError, match=r"In task 0 .*start returned a φ_0 that is not finite"):
        adapt(problem(start=lambda theta, t: theta / 0), THETA, TASKS)
    with pytest.raises(UfomError, match=r"start returned a float: it must return φ_0 as a tensor, shape \(p,\)"):
        adapt(problem(start=lambda theta, t: 1.0), THETA, TASKS)
