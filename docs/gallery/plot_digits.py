"""
Three estimators on handwritten digits
======================================

Five-way MAML on the digits that come with the package, with a small net. FOM, UFOM at
its predicted q and the exact gradient see the same tasks. What differs is what a step
costs, and where FOM goes.
"""

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

from ufom_runtime import (
    FOM,
    RECOMPUTED,
    UFOM,
    BilevelProblem,
    FlatModule,
    losses,
    measure_moments,
    run_seeds,
)
from ufom_runtime.command.style import LOOKS, SHEET
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_theory import CostModel, optimal_q

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
    initial=net.vector(),
)
theta = problem.initial
moments = measure_moments(
    problem, theta, problem.sample(64, torch.Generator().manual_seed(0))
)
cost = CostModel(r=problem.r, c1=1.0, c2=2.0)  # the paper's sweep: no state is kept
p = optimal_q(moments, cost, outer="paper")
print(f"D²/V² = {p.rho:.3f}, q* = {p.q:.3f}")
print(f"predicted: {p.speedup_over_exact:.2f} times sooner than exact")

# %%
# Thirty outer steps of each, with four seeds. The log counts gradients and products
# of Hessians and vectors, so that time can be charged as the theory does: 1 and 2.

held_out = problem.sample(64, torch.Generator().manual_seed(1))


def loss(theta):
    """The outer loss after the inner loop, a mean over held-out tasks."""
    return {"loss": losses(problem, theta, held_out)[1].mean().item()}


runs = run_seeds(
    problem,
    {"FOM": FOM, "UFOM": UFOM(p.q), "exact": RECOMPUTED},
    seeds=4,
    theta=theta,
    optimizer="sgd:0.5",
    steps=30,
    batch=4,
    log_every=6,
    evaluate=loss,
)
logs = runs.table
logs["cost"] = logs.gradients + 2 * logs.hessian_vector_products
print(runs.summary("loss", at=logs[logs.method == "FOM"].cost.max(), x="cost"))

# %%
# Means over the seeds, with the bands of their 95 % t-intervals. At equal cost UFOM is
# ahead of the exact gradient, and FOM is ahead of both: at the start its bias is short
# beside the gradient. It stops where the two are as long, which unbiased gradients pass
# (:doc:`plot_first_order_stalls`). So FOM first and then UFOM is often the best plan,
# and ``compare(..., steps=...)`` says when to switch.

with rc_context(SHEET):
    figure = Figure(figsize=(6.5, 4))
    axes = figure.subplots()
    runs.plot("loss", x="cost", axes=axes)
    for line, band in zip(axes.lines, axes.collections, strict=True):
        line.set_color(LOOKS[line.get_label()]["color"])
        band.set_facecolor(LOOKS[line.get_label()]["color"])
    axes.legend()
    axes.set(xscale="log", xlabel="cost so far, in gradients")
    axes.set(ylabel="outer loss, cross entropy (nats)")
