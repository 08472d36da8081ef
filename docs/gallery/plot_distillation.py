"""
A data set distilled into ten images
====================================

θ is one synthetic image for each digit. A classifier is trained on these ten, from
random starts, and tested on real digits (Wang et al. 2018).
"""

import torch
from matplotlib.figure import Figure
from plain import assert_plain, print_q
from torch import nn
from torch.nn.functional import cross_entropy

from ufom_runtime import EXACT, BilevelProblem, Estimator, FlatModule, losses, train
from ufom_runtime.inner import sgd
from ufom_runtime.problems.data import digits
from ufom_theory import Truncated

x, y = digits()
torch.manual_seed(0)
net = FlatModule(nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)))
problem = BilevelProblem(
    inner_loss=lambda theta, phi, start: cross_entropy(
        net(phi, theta.view(10, 64)), torch.arange(10)
    ),
    outer_loss=lambda theta, phi, start: cross_entropy(net(phi, x[:200]), y[:200]),
    start=lambda theta, start: start,
    update=sgd(lr=0.5),
    steps=15,
    sample_tasks=lambda n, g: (
        net.vector() + 0.1 * torch.randn(n, len(net.vector()), generator=g)
    ),
)
theta = torch.rand(640, generator=torch.Generator().manual_seed(0))
tasks = problem.sample(16, torch.Generator().manual_seed(0))
assert_plain(problem, theta, tasks[:2])

# %%
# θ stands in the inner loss alone, so FOM is zero, and HELD with it. The last five
# backward steps make a proxy that is not.

print_q(problem, theta, Estimator(0.0, proxy=Truncated(5)), tasks)

# %%
# The proxy is too far from the gradient for a correction to be rare: the choice is the
# exact gradient.

run = train(
    problem, theta, EXACT, optimizer="adam:0.05", steps=25, batch=2, log_every=25
)
before, after = (losses(problem, t, tasks)[1].mean() for t in (theta, run.theta))
print(f"loss on real digits: {before:.2f} before, {after:.2f} after")

figure = Figure(figsize=(6.5, 0.8))
for k, axes in enumerate(figure.subplots(1, 10)):
    axes.imshow(run.theta.view(10, 8, 8)[k].numpy(), cmap="gray_r")
    axes.set_axis_off()
