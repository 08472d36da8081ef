"""
Implicit MAML
=============

iMAML (Rajeswaran et al. 2019) pulls φ towards θ by a proximal term, and differentiates
the minimiser implicitly, so that no state of the inner loop is held.
"""

import torch
from plain import assert_plain, print_q
from torch import nn
from torch.nn.functional import cross_entropy

from ufom_runtime import EXACT, FOM, BilevelProblem, FlatModule, Implicit, hypergradient
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.few_shot import digits_few_shot

torch.manual_seed(0)
net = FlatModule(
    nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5)).double()
)
few_shot = digits_few_shot(dtype=torch.float64)
problem = BilevelProblem(
    inner_loss=lambda theta, phi, task: (
        cross_entropy(net(phi, task[0]), task[1]) + (phi - theta).square().sum() / 2
    ),
    outer_loss=lambda theta, phi, task: cross_entropy(net(phi, task[2]), task[3]),
    start=lambda theta, task: theta,
    step_sizes=[0.3] * 20,
    sample_tasks=few_shot.sample_tasks,
)
theta, tasks = net.vector(), problem.sample(16, torch.Generator().manual_seed(0))
assert_plain(problem, theta, Tasks.of(tasks).take(slice(2)).stack)

# %%
# After 20 steps φ is near the minimiser, so the implicit gradient is near the exact one
# of the loop. (The steps must be plain gradient descent: the minimiser does not depend
# on how it was found, but this check of it does.)

exact = hypergradient(problem, theta, tasks, EXACT)
error = (
    hypergradient(problem, theta, tasks, Implicit("cg")) - exact
).norm() / exact.norm()
print(f"relative difference {error:.1e}")
assert error < 1e-2

# %%
# FOM, on the other hand, takes φ_r for θ plus a constant, while the proximal term makes
# it forget where it began.

print_q(problem, theta, FOM, tasks)
