"""
A learnt optimizer
==================

An inner update may be any object with `init` and `update`. Here it is a small recurrent
rule whose weights are θ, trained to solve least squares quickly (after Andrychowicz et
al. 2016).
"""

import torch
from plain import assert_plain, print_q
from torch.nn.functional import softplus

from ufom_runtime import HELD, UFOM, BilevelProblem, losses, train
from ufom_theory import Sweep


class Rule:
    """φ ← φ − softplus(w₀)·tanh(w₁·g + w₂·h), h ← tanh(w₃·g + w₄·h), elementwise."""

    def init(self, theta, phi, task):
        return torch.zeros_like(phi)

    def update(self, theta, phi, h, g, task, j):
        w = theta
        return phi - softplus(w[0]) * torch.tanh(w[1] * g + w[2] * h), torch.tanh(
            w[3] * g + w[4] * h
        )


def fit(theta, phi, task):
    matrix, target = task
    return (matrix @ phi - target).square().mean()


def draw(n, generator):
    return torch.randn(n, 8, 8, generator=generator) / 3, torch.randn(
        n, 8, generator=generator
    )


problem = BilevelProblem(
    fit,
    fit,
    lambda theta, task: torch.zeros(8),
    update=Rule(),
    steps=10,
    sample_tasks=draw,
)
theta = torch.tensor([-2.0, 1.0, 0.5, 1.0, 0.5])
tasks = problem.sample(64, torch.Generator().manual_seed(0))
assert_plain(problem, theta, problem.sample(2, torch.Generator().manual_seed(1)))

# %%
# θ stands in the update alone, so FOM is zero. HELD differentiates the update and holds
# g constant: what is usually meant by a first-order gradient of a learnt optimizer.

print_q(problem, theta, HELD, tasks)

# %%
# Forty outer steps, with a correction for one task in four: more than q*, since the run
# is short.

estimator = UFOM(0.25, Sweep.stored(), proxy=HELD)
run = train(
    problem, theta, estimator, optimizer="adam:0.1", steps=40, batch=4, log_every=40
)
before, after = (losses(problem, t, tasks)[1].mean() for t in (theta, run.theta))
print(f"loss after ten steps: {before:.3f} before training, {after:.3f} after")
