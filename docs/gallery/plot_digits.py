"""
Three estimators on handwritten digits
======================================

Five-way MAML on the digits that come with the package, with a small net. FOM, UFOM at its predicted q and the
exact gradient see the same tasks; what differs is what a step costs.
"""

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

from ufom_runtime import FOM, RECOMPUTED, UFOM, BilevelProblem, FlatModule, measure_moments, train
from ufom_runtime.command.style import LOOKS, SHEET
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_theory import CostModel, optimal_q

torch.manual_seed(0)
net = FlatModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5)))
problem = BilevelProblem(
    inner_loss=lambda theta, phi, task: cross_entropy(net(phi, task[0]), task[1]),
    outer_loss=lambda theta, phi, task: cross_entropy(net(phi, task[2]), task[3]),
    start=lambda theta, task: theta,
    step_sizes=[0.3] * 5,
    sample_tasks=digits_few_shot().sample_tasks,
    initial=net.vector(),
)
theta = problem.initial
moments = measure_moments(problem, theta, problem.sample(64, torch.Generator().manual_seed(0)))
p = optimal_q(moments, CostModel(r=problem.r, c1=1.0, c2=2.0), outer="paper")  # the paper's sweep: no state is kept
print(f"D²/V² = {p.rho:.3f}, q* = {p.q:.3f}, predicted {p.speedup_over_exact:.2f} times sooner than exact")

# %%
# Sixty outer steps of each. The log counts gradients and Hessian-vector products, so time can be charged as the
# theory does: a gradient 1, a Hessian-vector product 2.

held_out = problem.sample(64, torch.Generator().manual_seed(1))


def loss(theta):
    """The outer loss after the inner loop, a mean over held-out tasks."""
    phi = theta.expand(64, -1)
    inner = torch.func.vmap(torch.func.grad(lambda phi, task: problem.inner_loss(theta, phi, task)))
    for alpha in problem.alphas:
        phi = phi - alpha * inner(phi, held_out)
    return {
        "loss": torch.func.vmap(lambda phi, task: problem.outer_loss(theta, phi, task))(phi, held_out).mean().item()
    }


logs = {}
for name, estimator in (("FOM", FOM), ("UFOM", UFOM(p.q)), ("exact", RECOMPUTED)):
    run = train(problem, theta, estimator, lambda k: 0.5, steps=60, batch=4, log_every=5, evaluate=loss)
    logs[name] = run.log.assign(cost=run.log.gradients + 2 * run.log.hessian_vector_products)
    print(f"{name}: loss {run.log.loss.iloc[-1]:.3f} at a cost of {logs[name].cost.iloc[-1]} gradients")

# %%
# One run of each, so no more than a picture of what a step costs; the studies repeat runs, and say how sure they are.

with rc_context(SHEET):
    figure = Figure(figsize=(6.5, 4))
    axes = figure.subplots()
    for name, log in logs.items():
        axes.semilogx(log.cost, log.loss, label=name, markevery=3, **LOOKS[name])
    axes.set(xlabel="cost so far, in gradients", ylabel="outer loss, cross entropy (nats)")
    axes.legend()
