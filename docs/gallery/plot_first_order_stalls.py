"""
Where the first-order method stalls
===================================

Theorem 2: for every D there is a problem on which FOM converges to a point where the
gradient does not vanish. Here it is built for D = 0.06, and the expected squared
gradient of outer SGD is computed exactly, without sampling.
"""

from itertools import islice

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ufom_runtime.command.style import BLACK, LOOKS, SHEET
from ufom_theory import diverging_problem, squared_gradient_norms

D, steps = 0.06, 10_000
problem = diverging_problem(D, r=10, alpha=0.1)
print(f"FOM goes to θ = {problem.theta_fo:.2f}: ‖∇M‖² = {problem.gradient**2:.2f}")
print(f"the minimum is at {problem.theta_star:.2f}")

# %%
# Two tasks, outer steps 10/(k + 100). UFOM with q = 0.1 pays for one exact gradient in
# ten.

k = np.arange(1, steps + 1)
norms = {
    name: np.array(
        list(islice(squared_gradient_norms(problem, q, 10 / (k + 100)), steps))
    )
    for name, q in (("FOM", 0.0), ("UFOM", 0.1), ("exact", 1.0))
}
for name, norm in norms.items():
    print(f"{name}: E‖∇M‖² = {norm[-1]:.2g} after {steps} steps")

# %%
# FOM comes to rest at 2D, above the floor D that the theorem promises; the two unbiased
# estimators go on. UFOM is noisier than exact in each step, and each of its steps is
# cheaper.

with rc_context(SHEET):
    figure = Figure(figsize=(6.5, 4))
    axes = figure.subplots()
    for name, norm in norms.items():
        axes.loglog(k, norm, label=name, markevery=(0.12, 0.12), **LOOKS[name])
    axes.axhline(2 * D, color=BLACK, lw=0.8, ls=(0, (1, 2)))
    axes.annotate("2D", (1.2, 2 * D), va="bottom")
    axes.set(xlabel="outer step", ylabel="E‖∇M‖², squared gradient of the objective")
    axes.legend()
