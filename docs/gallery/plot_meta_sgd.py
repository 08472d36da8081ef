"""
Meta-SGD: learnt step sizes
===========================

Meta-SGD (Li et al. 2017) learns a rate for every parameter together with the start.
Hyperparameters of an inner update may be functions of θ.
"""

import torch
from plain import assert_plain, print_q
from torch import nn
from torch.nn.functional import cross_entropy

from ufom_runtime import HELD, UFOM, BilevelProblem, FlatModule, losses, train
from ufom_runtime.inner import sgd
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_theory import Sweep

torch.manual_seed(0)
net = FlatModule(
    nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5))
)
p = len(net.vector())
problem = BilevelProblem(
    inner_loss=lambda theta, phi, task: cross_entropy(net(phi, task[0]), task[1]),
    outer_loss=lambda theta, phi, task: cross_entropy(net(phi, task[2]), task[3]),
    start=lambda theta, task: theta[:p],
    update=sgd(lr=lambda theta: theta[p:].exp()),  # one rate a parameter
    steps=5,
    sample_tasks=digits_few_shot().sample_tasks,
)
theta = torch.cat([net.vector(), torch.full((p,), 0.1).log()])
tasks = problem.sample(64, torch.Generator().manual_seed(0))
assert_plain(problem, theta, problem.sample(2, torch.Generator().manual_seed(1)))

# %%
# FOM gives the rates no gradient at all. HELD holds the inner gradients constant, as
# other libraries do, and gives them a biased one, which UFOM corrects.

print_q(problem, theta, HELD, tasks)

# %%
# Thirty outer steps, with a correction for one task in five.

estimator = UFOM(0.2, Sweep.stored(), proxy=HELD)
run = train(
    problem, theta, estimator, optimizer="adam:0.02", steps=30, batch=4, log_every=30
)
before, after = (losses(problem, t, tasks)[1].mean() for t in (theta, run.theta))
rates = run.theta[p:].exp()
print(f"loss on test images: {before:.2f} before training, {after:.2f} after")
print(
    f"the rates began at 0.1, and lie between {rates.min():.3f} and {rates.max():.3f}"
)
