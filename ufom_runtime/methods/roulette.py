"""A roulette over the backward loop: how many backward steps a task takes is drawn before it goes forward.

Derived in `ufom_theory/derivations/roulette.py`. (The roulette over the length of the inner loop is `Telescoping`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from ufom_runtime.algorithms import sweep_gradients
from ufom_runtime.derivatives import Calls
from ufom_runtime.measure.moments import moments_by_proxy
from ufom_runtime.methods.method import RowMethod, Rows
from ufom_runtime.problem import BilevelProblem, Task, Tasks, cpu_generator
from ufom_theory import Sweep, Truncated, UfomError, optimal_survival
from ufom_theory.checks import finite, instance, integer


@dataclass(frozen=True)
class Roulette(RowMethod):
    """F + Σ_i 1{u < q_i}/q_i·(G_{K_i} − G_{K_{i−1}}), one uniform u a task; unbiased. One level, (0, r), is UFOM(q).

    G_K keeps the last K backward steps, and F = G_0 is FOM. A task that stops at K_i holds φ_{r−K_i} and what the sweep
    keeps of the K_i states from there on, on its only way forward; with the recomputed sweep that is O(1) memory.

    Attributes:
        levels: 0 = K_0 < K_1 < … < K_n = r.
        survival: 1 ≥ q_1 ≥ … ≥ q_n > 0, the probability to reach each level after the first.
        sweep: how the states are recovered; recomputed if not given.

    Raises:
        UfomError: levels or probabilities of another kind; when it runs, a last level that is not r, or no generator.
    """

    levels: tuple[int, ...]
    survival: tuple[float, ...]
    sweep: Sweep = field(default_factory=Sweep.recomputed)

    def __post_init__(self) -> None:
        instance("sweep", self.sweep, Sweep, "write Sweep.stored()")
        k = tuple(np.atleast_1d(integer("levels", self.levels, 0)).tolist())
        if len(k) < 2 or k[0] != 0 or list(k) != sorted(set(k)):
            raise UfomError(f"levels = {k} must rise from 0 to r: give 0 = K_0 < K_1 < … < K_n = r")
        q = tuple(np.atleast_1d(finite("survival", self.survival)).astype(float).tolist())
        if len(q) != len(k) - 1 or not (q[0] <= 1 and q[-1] > 0) or list(q) != sorted(q, reverse=True):
            raise UfomError(f"survival = {q}: give 1 ≥ q_1 ≥ … ≥ q_n > 0, one for each of the levels {k[1:]}")
        object.__setattr__(self, "levels", k)
        object.__setattr__(self, "survival", q)

    @classmethod
    def tuned(
        cls,
        problem: BilevelProblem,
        theta: Tensor,
        tasks: Task | Tasks,
        levels: Sequence[int],
        sweep: Sweep | None = None,
        m: float = 1.0,
        *,
        c1: float = 1.0,
        c2: float = 1.0,
        chunk: int | None = None,
    ) -> Roulette:
        """The survival that minimises A^m·C (`optimal_survival`), by moments measured at θ and the calls as they run.

        Args:
            problem: the problem.
            theta: θ, shape (s,).
            tasks: n stacked tasks, other ones than those that it will run on.
            levels, sweep: as above.
            m: exponent of the time to precision.
            c1, c2: costs of a gradient and of a Hessian-vector product.
            chunk: as in `hypergradient`.

        Raises:
            UfomError: as `measure_moments`; a level after which the gradient no longer changes.
        """
        equal = cls(tuple(levels), (1.0,) * (len(levels) - 1), sweep or Sweep.recomputed())
        equal._refuse(problem.r)
        proxies = [Truncated(k) for k in equal.levels[:-1]]
        moments = moments_by_proxy(problem, theta, tasks, proxies, chunk=chunk)
        d2 = [float(moments[proxy].d2) for proxy in proxies]
        best = optimal_survival(d2, float(moments[proxies[0]].v2), equal.costs(c1, c2), m)
        if not best.q.all():
            raise UfomError(f"after level {levels[int(best.q.argmin())]} no gradient changes: leave the next level out")
        return cls(equal.levels, tuple(best.q.tolist()), equal.sweep)

    def costs(self, c1: float = 1.0, c2: float = 1.0) -> NDArray[np.float64]:
        """c_0 … c_n: what a task that stops at level i costs more than one that stops at the level before."""
        runs = [c2 * k + c1 * self.sweep.extra_steps(k, as_printed=False) for k in self.levels]
        return np.array([c1 * (self.levels[-1] + 1), *np.diff(runs)])

    def calls(self, r: int, s: int = 1) -> Calls:
        """r + 1 gradients, and of each level what it adds, times the probability to reach it."""
        gradients, products = self.costs(1.0, 0.0), self.costs(0.0, 1.0)
        return Calls(float(gradients[0] + gradients[1:] @ self.survival), float(products[1:] @ self.survival))

    def states(self, r: int, s: int = 1) -> int:
        """Those of the sweep, for a task that reaches the last level."""
        return self.sweep.states_held(r)

    def at(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, reached: Tensor, compile: bool = False
    ) -> Tensor:
        """The estimates where row i reaches level `reached[i]`: rows of θ, (n, s), and n tasks → (n, s)."""
        if compile and len(set(reached.tolist())) > 1:  # compiled steps are for one number of rows
            rows = [slice(i, i + 1) for i in range(len(theta))]
            return torch.cat([self.at(problem, theta[i], tasks.take(i), reached[i], True) for i in rows])
        levels = self.levels[: int(reached.max()) + 1]
        stops = torch.tensor(self.levels, device="cpu")[reached]
        found = sweep_gradients(problem, theta, tasks, levels, self.sweep, compile=compile, stops=stops)
        total = found[0].clone()
        for i in range(1, len(levels)):
            on, before = (reached >= i).to(theta.device), (reached[reached >= i - 1] >= i).to(theta.device)
            total[on] += (found[i] - found[i - 1][before]) / self.survival[i - 1]
        return total

    def rows(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, generator: Generator | None, compile: bool
    ) -> Rows:
        """As `RowMethod.rows`."""
        self._refuse(problem.r)
        cpu_generator(generator)
        u = torch.rand(len(theta), generator=generator, dtype=torch.float64, device="cpu")
        reached = (u[:, None] < torch.tensor(self.survival, dtype=torch.float64, device="cpu")).sum(1)
        found = self.at(problem, theta, tasks, reached, compile)
        return found, {"level": torch.tensor(self.levels, device=theta.device)[reached.to(theta.device)]}

    def _refuse(self, r: int) -> None:
        if self.levels[-1] != r:
            raise UfomError(f"levels = {self.levels} must end at r = {r}, or the sum is another gradient")
