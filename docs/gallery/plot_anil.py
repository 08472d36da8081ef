"""
ANIL: adapt the head alone
==========================

ANIL (Raghu et al. 2020) adapts the last layer in the inner loop, and the outer loop
trains all layers. θ holds every parameter; φ those of the head, which
`FlatModule.index` finds in θ.
"""

import torch
from plain import assert_plain, print_q
from torch import nn
from torch.nn.functional import cross_entropy

from ufom_runtime import FOM, UFOM, BilevelProblem, FlatModule, losses, train
from ufom_runtime.inner import sgd
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_theory import Sweep

torch.manual_seed(0)
net = FlatModule(
    nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5))
)
head = net.index(["3.weight", "3.bias"])


def loss(theta, phi, x, y):
    return cross_entropy(net(theta.scatter(0, head, phi), x), y)


problem = BilevelProblem(
    inner_loss=lambda theta, phi, task: loss(theta, phi, task[0], task[1]),
    outer_loss=lambda theta, phi, task: loss(theta, phi, task[2], task[3]),
    start=lambda theta, task: theta[head],
    update=sgd(lr=0.3),
    steps=5,
    sample_tasks=digits_few_shot().sample_tasks,
)
theta = net.vector()
assert_plain(problem, theta, problem.sample(2, torch.Generator().manual_seed(1)))

# %%
# The body stands in the inner loss, too, so FOM is biased: it ignores how the features
# change the adapted head.

tasks = problem.sample(64, torch.Generator().manual_seed(0))
print_q(problem, theta, FOM, tasks)

# %%
# So UFOM corrects three tasks in ten.

run = train(
    problem,
    theta,
    UFOM(0.3, Sweep.stored()),
    optimizer="adam:0.01",
    steps=40,
    batch=4,
    log_every=40,
)
before, after = (losses(problem, t, tasks)[1].mean() for t in (theta, run.theta))
print(f"loss after five inner steps: {before:.2f} before training, {after:.2f} after")
