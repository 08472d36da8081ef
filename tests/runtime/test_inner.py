"""The ready-made inner updates against torch's own optimizers, differentiated through their loops."""

import pytest
import torch

from ufom_runtime.inner import adam, adamw, chain, clip_by_global_norm, momentum, sgd
from ufom_theory import UfomError

STEPS = 7


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A = data(5, 5)


@pytest.fixture
def float64():
    """torch counts an optimizer's steps in the default dtype, and would correct the bias in float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inner(theta, phi):
    return (torch.tanh(A @ phi) - theta[:5]).square().sum() + 0.1 * (phi * theta[5:10]).square().sum()


def ours(update, theta, steps=STEPS):
    phi = theta[:5] * theta[5:10]
    state = update.init(theta, phi, None)
    for j in range(1, steps + 1):
        (g,) = torch.autograd.grad(inner(theta, phi), phi, create_graph=True)
        phi, state = update.update(theta, phi, state, g, None, j)
    return phi


def torchs(make, theta, clip=None):
    phi = theta[:5] * theta[5:10]
    parameter = torch.nn.Parameter(phi.detach().clone())
    optimizer = make([parameter])
    optimizer.param_groups[0]["params"] = [phi]
    for _ in range(STEPS):
        (phi,) = optimizer.param_groups[0]["params"]
        (g,) = torch.autograd.grad(inner(theta, phi), phi, create_graph=True)
        phi = phi.clone()
        phi.grad = g if clip is None else g * torch.clamp(clip / g.norm(), max=1)
        optimizer.state[phi] = optimizer.state.pop(optimizer.param_groups[0]["params"][0], {})
        optimizer.param_groups[0]["params"] = [phi]
        optimizer.step()
    return optimizer.param_groups[0]["params"][0]


def hypergradient_of(run, theta):
    theta = theta.clone().requires_grad_()
    phi = run(theta)
    return phi.detach(), torch.autograd.grad((phi**2 * torch.arange(1, 6)).sum(), theta)[0]


@pytest.mark.parametrize(
    ("update", "make", "clip"),
    [
        (adam(lr=0.05, betas=(0.8, 0.9)), lambda p: torch.optim.Adam(p, 0.05, (0.8, 0.9), differentiable=True), None),
        (
            chain(clip_by_global_norm(1.0), adamw(lr=0.05, weight_decay=0.3)),
            lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.3, differentiable=True),
            1.0,
        ),
    ],
)
def test_adam_and_its_derivative_are_torchs(update, make, clip, float64):
    theta = 1 + 0.3 * data(10, seed=1)
    for found, expected in zip(
        hypergradient_of(lambda t: ours(update, t), theta),
        hypergradient_of(lambda t: torchs(make, t, clip), theta),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_takes_torchs_steps(nesterov):
    theta = 1 + 0.3 * data(10, seed=1)
    parameter = torch.nn.Parameter(theta[:5] * theta[5:])
    optimizer = torch.optim.SGD([parameter], 0.05, momentum=0.8, nesterov=nesterov)
    for _ in range(STEPS):
        optimizer.zero_grad()
        inner(theta, parameter).backward()
        optimizer.step()
    found, _ = hypergradient_of(lambda t: ours(momentum(0.05, 0.8, nesterov), t), theta)
    torch.testing.assert_close(found, parameter.detach(), rtol=1e-12, atol=0)


def test_hyperparameters_may_be_tensors_or_functions_of_theta_of_every_shape():
    theta = 1 + 0.3 * data(10, seed=1)
    rates = 0.02 + 0.01 * torch.arange(STEPS, dtype=torch.float64)
    whole = rates[:, None].expand(STEPS, 5)
    expected, _ = hypergradient_of(lambda t: ours(momentum(rates, 0.8), t), theta)
    for shaped in (rates, rates[:, None], whole):
        found, _ = hypergradient_of(
            lambda t, s=shaped: ours(momentum(lambda _: s, lambda _: torch.tensor(0.8)), t), theta
        )
        torch.testing.assert_close(found, expected)
    for shape in ((5,), (1, 5)):
        each = (0.01 + 0.01 * torch.arange(5, dtype=torch.float64)).reshape(shape)
        whole, _ = hypergradient_of(lambda t, e=each: ours(sgd(lambda _: e.expand(STEPS, 5)), t), theta)
        found, _ = hypergradient_of(lambda t, e=each: ours(sgd(lambda _: e), t), theta)
        torch.testing.assert_close(found, whole)


def test_learnt_hyperparameters_have_the_finite_difference_for_a_derivative():
    theta = torch.cat([1 + 0.3 * data(10, seed=1), torch.tensor([-3.0, 2.0, -4.0], dtype=torch.float64)])
    update = adamw(lambda t: t[10].exp(), (lambda t: t[11].sigmoid(), 0.95), weight_decay=lambda t: t[12].exp())
    _, g = hypergradient_of(lambda t: ours(update, t), theta)
    for i in (10, 11, 12):
        step = torch.zeros_like(theta)
        step[i] = 1e-6
        with_graph = [
            (ours(update, t.requires_grad_()) ** 2 * torch.arange(1, 6)).sum() for t in (theta + step, theta - step)
        ]
        torch.testing.assert_close(g[i], (with_graph[0] - with_graph[1]).detach() / 2e-6, rtol=1e-5, atol=1e-7)


def test_a_parameter_without_a_gradient_gets_no_nan():
    theta = torch.ones(10, dtype=torch.float64)
    theta[5:] = 0.5
    flat = lambda t, phi: (phi[:3] - t[:3]).square().sum() + 0 * phi.sum()  # noqa: E731
    for update in (adam(0.1), chain(clip_by_global_norm(1.0), sgd(0.1))):
        leaf = theta.clone().requires_grad_()
        phi, state = leaf[:5] * leaf[5:], update.init(leaf, leaf[:5], None)
        for j in (1, 2, 3):
            loss = flat(leaf, phi) if j < 3 else 0 * phi.sum()
            (g,) = torch.autograd.grad(loss, phi, create_graph=True)
            phi, state = update.update(leaf, phi, state, g, None, j)
        assert torch.autograd.grad(phi.square().sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sgd(-0.1), r"lr = -0.1 must lie in \[0, inf\)"),
        (lambda: momentum(0.1, 1.0), r"beta = 1 must lie in \[0, 1\)"),
        (lambda: adam(betas=0.9), "give two"),
        (lambda: sgd(torch.ones(3, requires_grad=True)), "make it a part of θ"),
        (lambda: sgd("fast"), "lr"),
        (lambda: sgd([0.1, 0.2]), r"lr = \[0.1, 0.2\]: give one float, or one a step in a tensor of floats"),
        (lambda: sgd(torch.tensor([1, 2])), "one a step in a tensor of floats"),
        (lambda: chain(), "one or more"),
        (lambda: chain(sgd(0.1), torch.optim.SGD), "chain takes updates"),
        (lambda: sgd(torch.tensor([0.1, float("nan")])), "lr = nan"),
    ],
)
def test_bad_hyperparameters_are_named(make, said):
    with pytest.raises(UfomError, match=said):
        make()


@pytest.mark.parametrize(
    ("lr", "said"),
    [
        (torch.ones(4), r"lr has shape \(4,\): for r = 7 steps of p = 5 parameters give \(7,\)"),
        (lambda t: t[:3], r"lr has shape \(3,\)"),
        (lambda t: 0.1, "must be a floating-point tensor"),
    ],
)
def test_shapes_that_do_not_fit_are_named(lr, said):
    with pytest.raises(UfomError, match=said):
        sgd(lr).check(torch.ones(10), torch.ones(5), 7)
    with pytest.raises(UfomError, match=r"return \(1, 5\) for one a parameter"):
        sgd(lambda t: t[:5]).check(torch.ones(10), torch.ones(5), 5)


def test_adams_bias_correction_keeps_the_digits_of_float32():
    update, phi = adam(1.0), torch.zeros(2)
    moved, _ = update.update(phi, phi, update.init(phi, phi, None), torch.ones(2), None, 1)
    torch.testing.assert_close(moved, torch.full((2,), -1.0), rtol=1e-6, atol=0)  # m̂ = v̂ = 1
