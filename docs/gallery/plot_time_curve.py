"""
The time curve of a problem that is known in closed form
========================================================

On a quadratic, D² and V² are known exactly. They are measured on 64 tasks as a user would, and the optimal q that
follows is held against the true one.
"""

import torch

from ufom_runtime import measure_moments
from ufom_runtime.command.time_curve import draw_time_curve
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import CostModel, optimal_q

problem = quadratic(r=30, alpha=0.02)
tasks = problem.sample(64, torch.Generator().manual_seed(0))
measured = measure_moments(problem, problem.initial, tasks)
true = problem.moments(problem.initial)
print(f"D² = {measured.d2:.3f} ± {measured.d2_sem:.3f}, truly {true.d2:.3f}")
print(f"V² = {measured.v2:.3f} ± {measured.v2_sem:.3f}, truly {true.v2:.3f}")

# %%
# The cost of a gradient and of a Hessian-vector product, in units of a gradient; on a problem of your own,
# ``measure_cost`` times them.

cost = CostModel(r=problem.r, c1=1.0, c2=2.0)
p = optimal_q(measured, cost, outer="paper")
low, high = p.interval
truth = optimal_q(true, cost, outer="paper").q
print(f"q* = {p.q:.3f}, 95 % interval [{low:.3f}, {high:.3f}]; from the true moments {truth:.3f}")
print(p.why)

# %%
# Lower is sooner. To the left of q* the rare correction weighs too much, to the right it is paid too often. The black
# lines are the exact gradient with more memory: check them before UFOM is chosen.

figure = draw_time_curve(p)
