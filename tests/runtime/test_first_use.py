"""What is checked at a problem's first use, against plain autograd through the unrolled loop."""

import gc
import random
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.oracles import unrolled_gradient
from ufom_runtime import (
    EXACT,
    FOM,
    RECOMPUTED,
    BilevelProblem,
    Estimator,
    FlatModule,
    Forward,
    audit_gradient,
    count_calls,
    hypergradient,
    measure_cost,
    measure_moments,
)
from ufom_theory import Sweep, UfomError

UNROLLED = Estimator(1.0, Sweep.unrolled())
SWEEPS = [EXACT, RECOMPUTED, UNROLLED, Forward()]
LOOP = "one after another, without vmap"


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learning(net, loss=F.mse_loss, r=3):
    """MAML of a net on tasks (x, y, query x, query y)."""
    return BilevelProblem(
        lambda theta, phi, t: loss(net(phi, t[0]), t[1]), lambda theta, phi, t: loss(net(phi, t[2]), t[3]),
        lambda theta, t: theta, [0.3] * r, lambda n, g: None,
    )  # fmt: skip


def regression(n=3):
    return tuple(normal(n, 6, k, seed=i) for i, k in enumerate((4, 1, 4, 1)))


def vectors(inner, outer=None, r=3):
    """A problem of vectors of length 4, whose tasks are such."""
    outer = outer or (lambda theta, phi, t: (phi - t).square().sum())
    return BilevelProblem(inner, outer, lambda theta, t: theta, [0.05] * r, lambda n, g: normal(n, 4))


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.table(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.cells, self.out = nn.LSTM(4, 3, 2, batch_first=True, dropout=dropout), nn.Linear(3, 1)

    def forward(self, x):
        return self.out(self.cells(x[:, None])[0][:, 0])


def padded_tasks():
    g = torch.Generator().manual_seed(3)
    x, xq = (torch.randint(0, 11, (3, 6, 5), generator=g) for _ in range(2))
    return x, normal(3, 6, 1), xq, normal(3, 6, 1, seed=2)


@pytest.mark.parametrize(
    ("make", "tasks"), [(Padded, padded_tasks), pytest.param(Recurrent, regression, marks=pytest.mark.slow)]
)
def test_where_vmap_is_wrong_or_fails_the_right_number_comes_from_a_loop(make, tasks):
    net, tasks = FlatModule(make()), tasks()
    problem = learning(net)
    expected = unrolled_gradient(problem, net.vector(), tasks)
    with pytest.warns(UserWarning, match=LOOP):
        found = hypergradient(problem, net.vector(), tasks, EXACT, per_task=True)
    torch.testing.assert_close(found, expected)
    for sweep in SWEEPS[1:]:  # said once
        torch.testing.assert_close(hypergradient(problem, net.vector(), tasks, sweep, per_task=True), expected)
    assert measure_moments(problem, net.vector(), tasks).v2 == pytest.approx(float(expected.square().sum(1).mean()))
    assert measure_cost(problem, net.vector(), tasks, seconds=0, repeats=5).c1 > 0


def test_padding_that_the_first_batch_lacks_is_right_in_later_ones():
    net = FlatModule(Padded())
    problem, tasks = learning(net), padded_tasks()
    first = tuple(t.clamp(min=1) if not t.is_floating_point() else t for t in tasks)
    with pytest.warns(UserWarning, match="padding index"):
        hypergradient(problem, net.vector(), first, EXACT)
    found = hypergradient(problem, net.vector(), tasks, EXACT, per_task=True)
    torch.testing.assert_close(found, unrolled_gradient(problem, net.vector(), tasks))


def test_the_audit_holds_the_right_gradient_for_right_where_vmap_is_wrong():
    net, tasks = FlatModule(Padded()), padded_tasks()
    problem = learning(net)

    def own(theta, given):
        return unrolled_gradient(problem, theta.detach(), given).mean(0)

    with pytest.warns(UserWarning, match=LOOP):
        assert audit_gradient(own, problem, net.vector(), tasks).verdict == "exact"


class Activation(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.out = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 1)
        self.reentrant = reentrant

    def forward(self, x):
        return self.out(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sweep", [FOM, EXACT, UNROLLED, Forward()])
def test_activation_checkpointing_of_a_module_is_refused(reentrant, sweep):
    net = FlatModule(Activation(reentrant))
    for n in (1, 3):
        with pytest.raises(UfomError, match="gradient_checkpointing_disable"):
            hypergradient(learning(net), net.vector(), regression(n), sweep)


def test_activation_checkpointing_is_refused_in_single_precision_too():
    net = FlatModule(Activation(False).float())
    tasks = tuple(t.float() for t in regression(1))
    with pytest.raises(UfomError, match="gradient_checkpointing_disable"):
        hypergradient(learning(net), net.vector(), tasks, EXACT)


def test_activation_checkpointing_with_explicit_parameters_is_right():
    def body(phi, x):
        return torch.tanh(x * phi).square().sum()

    def inner(theta, phi, t):
        return checkpoint(body, phi, t, use_reentrant=False) + (phi * theta).sum()

    problem, theta, tasks = vectors(inner), normal(4, seed=5), normal(1, 4)
    expected = unrolled_gradient(problem, theta, tasks)
    for sweep in SWEEPS:
        torch.testing.assert_close(hypergradient(problem, theta, tasks, sweep, per_task=True), expected)


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(F.dropout(torch.tanh(self.body(x)), 0.3, self.training))


class Spectral(nn.Sequential):
    def __init__(self):
        super().__init__(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Linear(8, 1))


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.out(x - self.mean)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("make", [Dropped, Spectral, Buffered, lambda: Recurrent(dropout=0.5)])
def test_a_module_that_draws_or_keeps_a_state_is_refused(make, chunk):
    net = FlatModule(make())
    with pytest.raises(UfomError, match=r"a loss must be a function|changed its buffer") as caught:
        hypergradient(learning(net), net.vector(), regression(), EXACT, chunk=chunk)
    assert "chunk" not in str(caught.value)


def _counter():
    calls = iter(range(10**6))
    return lambda theta, phi, t: (phi - t).square().sum() * (1 + next(calls) % 3)


GENERATOR = torch.Generator()
NOISY = {
    "torch": (lambda theta, phi, t: (phi - t + torch.randn(4)).square().sum(), "torch's generator moved"),
    "numpy": (lambda theta, phi, t: (phi - t).square().sum() * np.random.rand(), "numpy's generator moved"),  # noqa: NPY002
    "python": (lambda theta, phi, t: (phi - t).square().sum() * random.random(), "Python's generator moved"),
    "own": (
        lambda theta, phi, t: (phi - t + torch.randn(4, generator=GENERATOR)).square().sum(),
        "differs by .* of its norm",
    ),
    "iterator": (_counter(), "differs by .* of its norm"),
    "without effect": (lambda theta, phi, t: (phi - t).square().sum() + 0 * torch.rand(()), "generator moved"),
}


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("place", ["inner_loss", "outer_loss"])
def test_a_loss_that_is_not_a_function_is_refused(kind, place):
    loss, message = NOISY[kind]
    problem = replace(vectors(lambda theta, phi, t: (phi - t).square().sum()), **{place: loss})
    for n in (1, 3):
        with pytest.raises(UfomError, match=message):
            hypergradient(problem, normal(4), normal(n, 4), FOM)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Detached(Hidden):
    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * g


@pytest.mark.parametrize("function", [Hidden, Detached])
@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_hidden_second_derivative_beside_another_term_is_refused(function, sweep):
    problem = vectors(lambda theta, phi, t: function.apply(phi).sum() / 3 + (phi - t).square().sum())
    theta, tasks = normal(4), normal(1, 4, seed=2)
    hypergradient(problem, theta, tasks, FOM)  # needs no second derivative
    with pytest.raises(UfomError, match="autograd does not see"):
        hypergradient(problem, theta, tasks, sweep)


class Cubed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Rounded(torch.autograd.Function):
    """A straight-through estimator: its gradient is not that of what it computes, on purpose."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return (4 * x).round() / 4

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g


def _stopped(theta, phi, t):
    with torch.no_grad():
        weight = phi.square().sum() + 1
    return (phi - t).square().sum() * weight + (phi * theta).sum()


RIGHT = {
    "no_grad": _stopped,
    "detach": lambda theta, phi, t: (
        ((phi - t).square() * phi.detach().exp()).sum() + (phi * theta.detach() * theta).sum()
    ),
    "custom": lambda theta, phi, t: Cubed.apply(phi - t).sum() + (phi * theta).square().sum(),
    "straight-through": lambda theta, phi, t: (Rounded.apply(phi) - t).square().sum() * theta.square().sum(),
    "kinks": lambda theta, phi, t: ((phi - t).relu() * theta).square().sum() + (phi * t).abs().sum(),
}


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_detached_on_purpose_is_as_in_plain_autograd(kind, dtype):
    problem = vectors(RIGHT[kind])
    theta, tasks = normal(4, seed=7).to(dtype), normal(3, 4, seed=8).to(dtype)
    expected = unrolled_gradient(problem, theta, tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sweep in SWEEPS:
            found = hypergradient(problem, theta.expand(4), tasks, sweep, per_task=True)
            torch.testing.assert_close(found, expected)


def test_forward_takes_an_expanded_theta():
    problem = vectors(lambda theta, phi, t: (phi - theta * t).square().sum() * phi.sum().cos())
    theta, tasks = torch.tensor(0.3).expand(4), normal(2, 4)
    expected = hypergradient(problem, theta, tasks, EXACT)
    torch.testing.assert_close(hypergradient(problem, theta, tasks, Forward(chunk=3)), expected)


def test_the_check_leaves_no_trace():
    problem, theta, tasks = vectors(RIGHT["custom"]), normal(4), normal(3, 4)
    states = torch.get_rng_state(), random.getstate()
    with count_calls() as first:
        hypergradient(problem, theta, tasks, EXACT)
    with count_calls() as second:
        hypergradient(problem, theta, tasks, EXACT)
    assert first == second
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    noisy = vectors(NOISY["torch"][0])
    with pytest.raises(UfomError):
        hypergradient(noisy, theta, tasks, FOM)
    assert torch.equal(states[0], torch.get_rng_state())


def test_it_runs_once_and_does_not_keep_the_problem():
    evaluations = []

    def inner(theta, phi, t):
        evaluations.append(1)
        return (phi - t).square().sum() + (phi * theta).square().sum()

    problem, theta, tasks = vectors(inner, r=2), normal(4), normal(1, 4)
    hypergradient(problem, theta, tasks, EXACT)
    first = len(evaluations)
    for _ in range(3):
        hypergradient(problem, theta, tasks, EXACT)
    assert len(evaluations) - first == 3 * 4 < 3 * first
    gone = weakref.ref(problem)
    del problem
    gc.collect()
    assert gone() is None


def test_attention_is_named():
    def inner(theta, phi, t):
        return F.scaled_dot_product_attention(*[(phi * t).reshape(1, 1, 2, 2)] * 3).square().sum()

    with pytest.raises(UfomError, match=r"sdpa_kernel\(SDPBackend.MATH\)"):
        hypergradient(vectors(inner), normal(4), normal(1, 4), EXACT)


def test_gradient_hooks_on_parameters_are_said_to_be_ignored():
    module = nn.Linear(4, 1)
    module.weight.register_hook(lambda g: 2 * g)
    with pytest.warns(UserWarning, match="hooks .* are ignored"):
        FlatModule(module)
