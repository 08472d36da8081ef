"""
The time curve of a problem where UFOM pays
===========================================

On a quadratic, D² and V² are known exactly. The inner loop is long (r = 30) and its
steps are short, so FOM is nearly right: D²/V² is 0.07. Both moments are measured on 64
tasks, as a user would, and the optimal q is held against the true one.
"""

import torch

from ufom_runtime import measure_moments
from ufom_runtime.command.time_curve import draw_time_curve
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import CostModel, optimal_q

problem = quadratic(r=30, alpha=0.005)
tasks = problem.sample(64, torch.Generator().manual_seed(0))
measured = measure_moments(problem, problem.initial, tasks)
true = problem.moments(problem.initial)
print(f"D² = {measured.d2:.3f} ± {measured.d2_sem:.3f}, truly {true.d2:.3f}")
print(f"V² = {measured.v2:.3f} ± {measured.v2_sem:.3f}, truly {true.v2:.3f}")

# %%
# The cost of a gradient and of a Hessian-vector product, in units of a gradient; on a
# problem of your own, ``measure_cost`` times them. The outer steps are of one size,
# tuned to q, so that the time is proportional to the second moment (m = 1).

cost = CostModel(r=problem.r, c1=1.0, c2=2.0)
p = optimal_q(measured, cost, outer="tuned")
low, high = p.interval
truth = optimal_q(true, cost, outer="tuned").q
print(f"q* = {p.q:.3f}, 95 % interval [{low:.3f}, {high:.3f}]; truly {truth:.3f}")
print(f"{p.speedup_over_exact:.2f} times sooner than q = 1; pays: {p.pays}")
assert p.pays == "yes"

# %%
# Lower is sooner. To the left of q* the rare correction weighs too much, to the right
# it is paid too often. The black lines are the exact gradient with more memory. With
# all states stored it is a strong competitor: look at them before UFOM is chosen.

figure = draw_time_curve(p)
