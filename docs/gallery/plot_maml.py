"""
MAML
====

Model-agnostic meta-learning (Finn et al. 2017) learns the start of the inner loop: φ_0
= θ. A task has five digits, one image of each to train on, and one to test on.
"""

import torch
from plain import assert_plain, print_q
from torch import nn
from torch.nn.functional import cross_entropy

from ufom_runtime import FOM, UFOM, BilevelProblem, FlatModule, losses, train
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_theory import Sweep

torch.manual_seed(0)
net = FlatModule(
    nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5))
)
problem = BilevelProblem(
    inner_loss=lambda theta, phi, task: cross_entropy(net(phi, task[0]), task[1]),
    outer_loss=lambda theta, phi, task: cross_entropy(net(phi, task[2]), task[3]),
    start=lambda theta, task: theta,
    step_sizes=[0.3] * 5,
    sample_tasks=digits_few_shot().sample_tasks,
)
theta = net.vector()
assert_plain(problem, theta, problem.sample(2, torch.Generator().manual_seed(1)))

# %%
# FOM leaves the second derivatives out. Whether to correct it is a question of D²/V².

tasks = problem.sample(64, torch.Generator().manual_seed(0))
print_q(problem, theta, FOM, tasks)

# %%
# So UFOM corrects one task in three.

run = train(
    problem,
    theta,
    UFOM(0.33, Sweep.stored()),
    optimizer="adam:0.01",
    steps=40,
    batch=4,
    log_every=40,
)
before, after = (losses(problem, t, tasks)[1].mean() for t in (theta, run.theta))
print(f"loss after five inner steps: {before:.2f} before training, {after:.2f} after")
