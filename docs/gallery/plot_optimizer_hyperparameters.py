"""
Hyperparameters of an optimizer
===============================

The rate, the momentum and the weight decay of a net's training, learnt by the gradient
of its validation loss through 15 steps. θ holds three numbers; a task is a random start
of the net.
"""

import torch
from plain import assert_plain, print_q
from torch import nn
from torch.nn.functional import cross_entropy

from ufom_runtime import HELD, UFOM, BilevelProblem, FlatModule, losses, train
from ufom_runtime.inner import momentum
from ufom_runtime.problems.data import digits
from ufom_theory import Sweep

x, y = digits()
torch.manual_seed(0)
net = FlatModule(nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)))


def training_loss(theta, phi, start):
    return (
        cross_entropy(net(phi, x[:100]), y[:100])
        + theta[2].exp() * phi.square().sum() / 2
    )


problem = BilevelProblem(
    inner_loss=training_loss,
    outer_loss=lambda theta, phi, start: cross_entropy(
        net(phi, x[100:300]), y[100:300]
    ),
    start=lambda theta, start: start,
    update=momentum(
        lr=lambda theta: theta[0].exp(), beta=lambda theta: theta[1].sigmoid()
    ),
    steps=15,
    sample_tasks=lambda n, g: (
        net.vector() + 0.1 * torch.randn(n, len(net.vector()), generator=g)
    ),
)
theta = torch.tensor([-3.0, 0.0, -5.0])  # rate 0.05, momentum 0.5, decay 0.007
tasks = problem.sample(32, torch.Generator().manual_seed(0))
assert_plain(problem, theta, tasks[:2])

# %%
# FOM is zero, since neither the start nor the outer loss contains θ. HELD gives the
# rate and the momentum a gradient, but none to the decay, which acts through the inner
# loss.

print_q(problem, theta, HELD, tasks)

# %%
# Twenty outer steps, with a correction for one task in four: more than q*, since the
# run is short.

estimator = UFOM(0.25, Sweep.stored(), proxy=HELD)
run = train(
    problem, theta, estimator, optimizer="adam:0.15", steps=20, batch=2, log_every=20
)
before, after = (losses(problem, t, tasks)[1].mean() for t in (theta, run.theta))
rate, beta, decay = run.theta
print(f"validation loss {before:.2f} before, {after:.2f} after")
print(f"rate {rate.exp():.3f}, momentum {beta.sigmoid():.2f}, decay {decay.exp():.4f}")
