"""HELD against other libraries whose inner gradients are detached; with `pip install '.[peers]'`."""

import pytest
import torch
from torch.autograd import grad

from ufom_runtime import FOM, HELD, BilevelProblem, hypergradient
from ufom_runtime.inner import adam, adamw, momentum

R, RATE = 8, -2.0  # inner steps, ln of the learnt rate


def inner_loss(theta, phi, task):
    return (torch.tanh(task @ phi) - theta[:6]).square().mean() + 0.1 * (phi * theta[:6]).square().sum()


def outer_loss(theta, phi, task):
    return (task.T @ phi - 1).square().mean() + 0.1 * theta.square().sum()


def data():
    generator = torch.Generator().manual_seed(0)
    theta = torch.cat([0.5 + 0.3 * torch.randn(6, generator=generator), torch.tensor([RATE])])
    return theta, torch.randn(6, 6, generator=generator)


def rate(theta):
    return theta[6].exp()


def held(update):
    theta, task = data()
    problem = BilevelProblem(
        inner_loss, outer_loss, lambda theta, task: theta[:6], update=update, steps=R, tasks=task[None]
    )
    found = hypergradient(problem, theta, task[None], HELD)
    assert (found - hypergradient(problem, theta, task[None], FOM)).norm() > 1e-3  # so it is not FOM that agrees
    return found


class Vector(torch.nn.Module):
    def __init__(self, values):
        super().__init__()
        self.vector = torch.nn.Parameter(values.detach().clone())

    def forward(self):
        return self.vector


def by_higher(make):
    """A learnt rate, as an override; the callback detaches the gradients."""
    higher = pytest.importorskip("higher", reason="pip install '.[peers]'", exc_type=ImportError)
    theta, task = data()
    theta.requires_grad_()
    module = Vector(theta[:6])
    optimizer = make(module.parameters())
    options = {"copy_initial_weights": False, "override": {"lr": [rate(theta)]}}
    with higher.innerloop_ctx(module, optimizer, **options) as (inner, steps):
        for _ in range(R):
            steps.step(
                inner_loss(theta.detach(), inner(), task),
                grad_callback=lambda gradients: [g.detach() for g in gradients],
            )
        by_theta, by_start = grad(outer_loss(theta, inner(), task), (theta, module.vector))
    return by_theta + torch.cat([by_start, torch.zeros(1)])


@pytest.mark.filterwarnings("ignore")  # higher's own
@pytest.mark.parametrize(
    ("update", "make"),
    [
        (adam(rate, (0.8, 0.9)), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9))),
        (momentum(rate, 0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
    ],
)
def test_held_is_what_higher_gives_with_detached_gradients(update, make):
    torch.testing.assert_close(held(update), by_higher(make), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # TorchOpt's own
def test_held_is_what_torchopt_gives_with_detached_gradients():
    torchopt = pytest.importorskip("torchopt", reason="pip install '.[peers]'", exc_type=ImportError)
    theta, task = data()
    theta.requires_grad_()
    phi = (theta[:6],)
    optimizer = torchopt.adamw(lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)
    state = optimizer.init(phi)
    for _ in range(R):
        gradients = grad(inner_loss(theta, phi[0], task), phi, retain_graph=True)
        updates, state = optimizer.update(gradients, state, params=phi, inplace=False)
        phi = torchopt.apply_updates(phi, updates, inplace=False)
    (expected,) = grad(outer_loss(theta, phi[0], task), theta)
    torch.testing.assert_close(held(adamw(0.1, (0.8, 0.9), weight_decay=0.2)), expected, rtol=1e-5, atol=1e-6)
