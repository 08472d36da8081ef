"""What is looked for in every call, and in the start and the inner update: else each of these is wrong in silence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.oracles import unrolled_gradient
from ufom_runtime import (
    ES,
    EXACT,
    HELD,
    RECOMPUTED,
    REPTILE,
    BilevelProblem,
    Estimator,
    FlatModule,
    Forward,
    adapt,
    hypergradient,
)
from ufom_theory import Sweep, UfomError

F64 = torch.float64
UNROLLED = Estimator(1.0, Sweep.unrolled())
DRAWS = "torch's generator moved while a hypergradient was computed"


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


TASKS = tuple(normal(1, 6, k, seed=i) for i, k in enumerate((4, 1, 4, 1)))


def learning(net, **changes):
    """A net that learns tasks (x, y, query x, query y); θ begins with its φ_0."""
    p = len(net.vector())
    parts = {"start": lambda theta, t: theta[:p], "step_sizes": [0.3] * 3}
    return BilevelProblem(
        lambda theta, phi, t: F.mse_loss(net(phi, t[0]), t[1]), lambda theta, phi, t: F.mse_loss(net(phi, t[2]), t[3]),
        **{**parts, **changes}, sample_tasks=lambda n, g: tuple(t.expand(n, *t.shape[1:]) for t in TASKS),
    )  # fmt: skip


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8, dtype=F64), nn.Linear(8, 1, dtype=F64)

    def forward(self, x):
        return self.head(F.dropout(torch.tanh(self.body(x)), 0.3, self.training))


@pytest.mark.parametrize(
    "method",
    [EXACT, RECOMPUTED, UNROLLED, Forward(), REPTILE, adapt],
    ids=["exact", "recomputed", "unrolled", "forward", "reptile", "adapt"],
)
def test_a_loss_that_begins_to_draw_is_refused(method):
    def run():
        if method is adapt:
            return adapt(problem, net.vector(), TASKS)
        return method.direction(problem, net.vector(), TASKS)

    module = Dropping().eval()
    net = FlatModule(module)
    problem = learning(net)
    run()  # a function still
    module.train()
    with pytest.raises(UfomError, match=DRAWS):
        run()


class Late:
    """An update that draws in its second step alone."""

    def init(self, theta, phi, task):
        return ()

    def update(self, theta, phi, state, grad, task, j):
        return phi - 0.1 * grad * (1 + (torch.rand(()) if j == 2 else 0.0)), ()


def test_an_update_that_draws_in_a_later_step_is_refused():
    net = FlatModule(nn.Linear(4, 1, dtype=F64))
    with pytest.raises(UfomError, match=DRAWS):
        hypergradient(learning(net, update=Late(), step_sizes=None, steps=3), net.vector(), TASKS, EXACT)


def test_data_that_change_in_the_last_step_are_refused_at_first_use():
    net, count = FlatModule(nn.Linear(4, 1, dtype=F64)), iter(range(1000))
    problem = learning(net, inner_batch=lambda t, j: (t[0] + (next(count) if j == 3 else 0), t[1]))
    with pytest.raises(UfomError, match="a loss must be a function"):
        hypergradient(problem, net.vector(), TASKS, EXACT)


def test_the_default_generator_may_be_what_a_method_draws_from():
    net = FlatModule(nn.Linear(4, 1, dtype=F64))
    torch.manual_seed(0)
    found = hypergradient(learning(net), net.vector(), TASKS, ES(0.1), generator=torch.default_generator)
    assert found.isfinite().all()


class Wide(nn.Module):
    def __init__(self, inputs, outputs, saves):
        super().__init__()
        self.body, self.head = nn.Linear(inputs, 8, dtype=F64), nn.Linear(8, outputs, dtype=F64)
        self.saves = saves

    def forward(self, x):
        part = torch.nn.Sequential(self.body, nn.Tanh())
        return self.head(part(x) if self.saves is None else checkpoint(part, x, use_reentrant=self.saves))


class Learnt:
    """A learnt update; θ holds φ_0 and, behind it, the update's own parameters."""

    def __init__(self, net):
        self.net = net

    def init(self, theta, phi, task):
        return ()

    def update(self, theta, phi, state, grad, task, j):
        return phi - 0.1 * self.net(theta[len(phi) :], torch.stack([grad, phi], 1))[:, 0], ()


@pytest.mark.parametrize("saves", [None, False, True], ids=["plain", "not reentrant", "reentrant"])
@pytest.mark.parametrize("where", ["start", "the inner update"])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_activation_checkpointing_in_the_start_or_the_update_is_refused(where, saves):
    net = FlatModule(nn.Linear(4, 1, dtype=F64))
    torch.manual_seed(0)
    made = FlatModule(Wide(4, len(net.vector()), saves) if where == "start" else Wide(2, 1, saves))
    if where == "start":
        theta = made.vector() + 0.3
        problem = learning(net, start=lambda theta, t: made(theta, t[0].mean(0)))
    else:
        theta = torch.cat([net.vector(), made.vector() + 0.3])
        problem = learning(net, update=Learnt(made), step_sizes=None, steps=3)
    for estimator in (EXACT, UNROLLED, HELD):
        if saves is not None:
            with pytest.raises(UfomError, match=f"{where} checkpoints activations|switch activation checkpointing off"):
                hypergradient(problem, theta, TASKS, estimator)
        elif estimator is not HELD and where == "start":
            expected = unrolled_gradient(problem, theta, TASKS)[0]
            torch.testing.assert_close(hypergradient(problem, theta, TASKS, estimator), expected)


def test_a_module_that_begins_to_change_a_buffer_is_refused():
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 1, dtype=F64))
    net = FlatModule(layer.eval())
    problem = learning(net)
    hypergradient(problem, net.vector(), TASKS, RECOMPUTED)
    layer.train()
    with pytest.raises(UfomError, match=r"changed its buffer '_[uv]' when it was called.*\.eval\(\)"):
        hypergradient(problem, net.vector(), TASKS, RECOMPUTED)
