"""
Data cleaning: a weight for every example
=========================================

Half of the training labels are replaced at random. The inner loop trains a classifier
on weighted examples, the outer loss is that of clean validation data, and θ holds a
logit for every weight.
"""

import torch
from plain import assert_plain, print_q
from torch.nn.functional import cross_entropy

from ufom_runtime import EXACT, BilevelProblem, Estimator, train
from ufom_runtime.inner import momentum
from ufom_runtime.problems.data import digits
from ufom_theory import Truncated

x, y = digits()
n, g = 100, torch.Generator().manual_seed(0)
labels = torch.where(
    torch.rand(n, generator=g) < 0.5, torch.randint(10, (n,), generator=g), y[:n]
)


def inner_loss(theta, phi, task):
    return (
        theta.sigmoid()
        * cross_entropy(x[:n] @ phi.view(64, 10), labels, reduction="none")
    ).mean()


problem = BilevelProblem(
    inner_loss,
    outer_loss=lambda theta, phi, task: cross_entropy(
        x[n : 4 * n] @ phi.view(64, 10), y[n : 4 * n]
    ),
    start=lambda theta, task: torch.zeros(640),
    update=momentum(lr=0.5, beta=0.5),
    steps=30,
    tasks=torch.zeros(1, 1),  # a single task, of no content
)
theta = torch.zeros(n)
assert_plain(problem, theta, problem.tasks)

# %%
# FOM and HELD are zero: neither start, nor update, nor outer loss contains θ. The last
# ten backward steps make a proxy that is not.

print_q(problem, theta, Estimator(0.0, proxy=Truncated(10)))

# %%
# The gain is small, and that q* is for steps which noise keeps small. Here is a single
# task, so the exact gradient has no noise, and exact steps are the choice.

theta = train(problem, theta, EXACT, optimizer="adam:0.2", steps=30, log_every=30).theta
right, wrong = (
    theta[labels == y[:n]].sigmoid().mean(),
    theta[labels != y[:n]].sigmoid().mean(),
)
print(f"mean weight of right labels {right:.2f}, of wrong ones {wrong:.2f}")
assert right > wrong
