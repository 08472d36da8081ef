"""Modules in and out of flat vectors."""

import pytest
import torch
from torch import nn

from tests.oracles import unrolled_gradient
from ufom_runtime import EXACT, BilevelProblem, FlatModule, hypergradient
from ufom_theory import UfomError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 1))


def test_call_is_the_modules_own():
    module = net()
    flat = FlatModule(module)
    x = torch.randn(5, 3)
    torch.testing.assert_close(flat(flat.vector(), x), module(x))
    assert flat.vector().shape == (3 * 4 + 4 + 4 + 4 + 4 + 1,)


def test_load_and_write_grad_are_inverse_to_vector():
    module = net()
    flat = FlatModule(module)
    target = torch.randn(flat.vector().shape)
    flat.load(target)
    assert torch.equal(flat.vector(), target)
    flat.write_grad(target)
    assert torch.equal(torch.cat([p.grad.reshape(-1) for p in module.parameters()]), target)


def test_a_loop_of_ones_own_with_an_optimiser():
    module = net().double()
    flat = FlatModule(module)
    problem = BilevelProblem(
        inner_loss=lambda theta, phi, task: (flat(phi, task[0]) - task[1]).square().mean(),
        outer_loss=lambda theta, phi, task: (flat(phi, task[2]) - task[3]).square().mean(),
        start=lambda theta, task: theta,
        step_sizes=torch.full((3,), 0.05),
        sample_tasks=lambda n, g: tuple(torch.randn(n, 6, k, generator=g).double() for k in (3, 1, 3, 1)),
    )
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    theta = flat.vector()
    gradient = hypergradient(problem, theta, tasks, EXACT)
    torch.testing.assert_close(gradient, unrolled_gradient(problem, theta, tasks).mean(0), rtol=1e-10, atol=1e-12)
    flat.write_grad(gradient)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    torch.testing.assert_close(flat.vector(), theta - 0.1 * gradient)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (torch.sin, "takes an nn.Module"),
        (nn.ReLU(), "no parameters"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "replace_all_batch_norm_modules_"),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), "eval"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "one device and dtype"),
    ],
)
def test_modules_with_hidden_state_are_refused(module, message):
    with pytest.raises(UfomError, match=message):
        FlatModule(module)


def test_the_remedy_for_running_statistics_works():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    flat = FlatModule(torch.func.replace_all_batch_norm_modules_(module))
    x = torch.randn(5, 2)
    assert torch.equal(flat(flat.vector(), x), flat(flat.vector(), x))  # no statistics move between two calls


def test_vectors_of_another_length_are_refused():
    flat = FlatModule(nn.Linear(2, 2))
    with pytest.raises(UfomError, match="has 6 parameters"):
        flat(torch.zeros(7), torch.zeros(1, 2))
