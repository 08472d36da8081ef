"""Unbiased stochastic truncation (Beatson & Adams 2019): the inner loop is cut at random, and the cut weighted away.

With horizons h_1 < … < h_m = r, G_i the gradient of the outer loss after h_i steps and Δ_i = G_i − G_{i−1}, G_0 = 0,
the exact gradient is the sum of the Δ_i. With N drawn, Russian roulette returns Σ_{i≤N} Δ_i/P(N ≥ i), and the single
sample Δ_N/p_N, p_i = P(N = i).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from ufom_runtime.algorithms import first_state
from ufom_runtime.derivatives import Calls, pull_back
from ufom_runtime.estimators import EXACT, hypergradient
from ufom_runtime.methods.method import RowMethod, Rows
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check, cpu_generator
from ufom_runtime.steps import Steps, minus
from ufom_theory import UfomError
from ufom_theory.checks import finite, integer

Kind = Literal["roulette", "single"]


def powers_of_two(r: int) -> tuple[int, ...]:
    """1, 2, 4, … and r."""
    return (*(2**i for i in range((r - 1).bit_length())), r)


@dataclass(frozen=True)
class Telescoping(RowMethod):
    """Unbiased for ∇M^(r), by a randomly truncated loop. A rare long loop holds up to r states all the same.

    Both estimators are one backward loop of h_N steps, into which the outer gradients enter where their horizons are.
    `horizon` reports h_N of each task.

    Attributes:
        horizons: h_1 < … < h_m, the last of which must be r.
        probabilities: P(N = i), > 0, summing to 1; None: all equal. `tuned` measures the best.
        kind: "roulette" or "single".

    Raises:
        UfomError: horizons that do not increase from ≥ 1, probabilities that are not m positive numbers summing to 1,
            another kind; when it runs, a last horizon that is not r, or no generator.
    """

    horizons: tuple[int, ...]
    probabilities: tuple[float, ...] | None = None
    kind: Kind = "roulette"

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in ("roulette", "single"):
            raise UfomError(f"kind {self.kind!r} is unknown: use roulette or single")
        h = tuple(np.atleast_1d(integer("horizons", self.horizons, 1)).tolist())
        if list(h) != sorted(set(h)):
            raise UfomError(f"horizons = {h} must increase: give h_1 < … < h_m = r")
        p = self.probabilities if self.probabilities is not None else (1 / len(h),) * len(h)
        p = tuple(torch.as_tensor(finite("probabilities", p), dtype=torch.float64, device="cpu").reshape(-1).tolist())
        never = p[-1:] if self.kind == "roulette" else p
        if len(p) != len(h) or min(p) < 0 or min(never) == 0 or abs(sum(p) - 1) > 1e-9:
            raise UfomError(
                f"probabilities = {p}: give {len(h)} numbers > 0 that sum to 1, one a horizon; roulette alone may pass "
                "over a horizon before r, with 0"
            )
        object.__setattr__(self, "horizons", h)
        object.__setattr__(self, "probabilities", p)

    @classmethod
    def tuned(
        cls,
        problem: BilevelProblem,
        theta: Tensor,
        tasks: Task | Tasks,
        kind: Kind = "roulette",
        horizons: tuple[int, ...] | None = None,
        chunk: int | None = None,
        compile: bool = False,
    ) -> Telescoping:
        """The probabilities that minimise E‖G‖²·E[h_N], Beatson & Adams's criterion, from measured differences.

        Single sample: p_i ∝ √(E‖Δ_i‖²/h_i). Roulette: E‖G‖² = Σ_i a_i/P(N ≥ i) with a_i = E‖G_r − G_{i−1}‖² −
        E‖G_r − G_i‖², so P(N ≥ i) ∝ √(a_i/(h_i − h_{i−1})); where that would increase, neighbours share one value.

        Args:
            problem: the problem.
            theta: outer parameters, shape (s,), where the differences are measured.
            tasks: n stacked tasks, over which they are averaged; to stay unbiased, not those that it then runs on.
            kind: "roulette" or "single".
            horizons: powers of two and r if not given.
            chunk, compile: as in `hypergradient`.

        Raises:
            UfomError: as `hypergradient`, or a difference that vanishes on all tasks.
        """
        h = horizons or powers_of_two(problem.r)
        equal = cls(h, kind=kind)
        equal._refuse(problem.r)
        tasks = check(problem, theta, tasks)
        g = [
            hypergradient(
                problem.cut(steps),
                theta,
                tasks,
                EXACT,
                per_task=True,
                chunk=chunk,
                compile=compile,
            )
            for steps in h
        ]
        if kind == "single":
            ratios = [_square(x - y) / steps for x, y, steps in zip(g, [torch.zeros_like(g[0]), *g], h, strict=False)]
        else:
            left = [_square(g[-1]), *(_square(g[-1] - x) for x in g)]
            ratios = _decreasing([x - y for x, y in pairwise(left)], [y - x for x, y in pairwise((0, *h))])
        if min(ratios) <= 0:
            raise UfomError(f"between two of the horizons {h} no gradient changes: leave one of them out")
        weights = [ratio**0.5 for ratio in ratios]
        if kind == "roulette":
            weights = [x - y for x, y in zip(weights, [*weights[1:], 0.0], strict=True)]
        return cls(h, tuple(w / sum(weights) for w in weights), kind)

    def calls(self, r: int, s: int = 1) -> Calls:
        """h_N steps forwards and backwards, and an outer gradient at every horizon that enters, in expectation."""
        chances = list(enumerate(self.probabilities or ()))
        steps = sum(p * self.horizons[i] for i, p in chances)
        return Calls(steps + sum(p * sum(c != 0 for c in self.coefficients(i)) for i, p in chances), steps)

    def states(self, r: int, s: int = 1) -> int:
        """r: the longest loop's."""
        return self.horizons[-1]

    def coefficients(self, drawn: int) -> list[float]:
        """What G_1 … G_N are multiplied by where N = `drawn`, counted from 0."""
        assert self.probabilities is not None
        if self.kind == "single":
            weight = 1 / self.probabilities[drawn]
            return [0.0] * (drawn - 1) + [-weight] * (drawn > 0) + [weight]
        inverse = [1 / sum(self.probabilities[i:]) for i in range(drawn + 1)]
        return [x - y for x, y in zip(inverse, [*inverse[1:], 0.0], strict=True)]

    def at(self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, drawn: int, compile: bool = False) -> Tensor:
        """The estimates of a problem where N = `drawn`, counted from 0: rows of theta, (n, s), and n tasks → (n, s)."""
        enters = {h: c for h, c in zip(self.horizons, self.coefficients(drawn), strict=False) if c}
        steps, states = Steps(problem, theta, tasks, compile=compile), []
        phi = first_state(problem, theta, tasks)
        for j in range(self.horizons[drawn]):
            states.append(phi)
            phi = steps.inner(phi, j)
        b1, b2 = None, torch.zeros_like(phi)
        for j in range(self.horizons[drawn], -1, -1):
            if j in enters:
                outer1, outer2 = steps.outer(phi)
                b1, b2 = minus(b1, -enters[j], outer1), b2 + enters[j] * outer2
            if j:
                phi = states.pop()
                b1, b2 = steps.back(phi, j - 1, b1, b2)
        return pull_back(problem, theta, tasks, b1, b2)

    def rows(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, generator: Generator | None, compile: bool
    ) -> Rows:
        """As `RowMethod.rows`."""
        self._refuse(problem.r)
        cpu_generator(generator)
        reached = torch.tensor(self.probabilities, dtype=torch.float64, device="cpu").cumsum(0)
        reached[-1] = 1.0
        drawn = torch.searchsorted(
            reached, torch.rand(len(theta), generator=generator, dtype=torch.float64, device="cpu"), right=True
        )
        found = torch.zeros_like(theta)
        for i in sorted(set(drawn.tolist())):
            index = torch.nonzero(drawn == i)[:, 0]
            found[index.to(theta.device)] = self.at(problem, theta[: len(index)], tasks.take(index), i, compile)
        return found, {"horizon": torch.tensor(self.horizons, device=theta.device)[drawn.to(theta.device)]}

    def _refuse(self, r: int) -> None:
        if self.horizons[-1] != r:
            raise UfomError(f"horizons = {self.horizons} must end at r = {r}, or the sum is another gradient")


def _square(x: Tensor) -> float:
    return float(x.double().square().sum(1).mean())


def _decreasing(gains: list[float], costs: list[int]) -> list[float]:
    """gain/cost, neighbours pooled until it decreases: Q², where the decreasing Q minimises Σ gain/Q·Σ cost·Q."""
    pools: list[tuple[float, float, int]] = []
    for gain, cost in zip(gains, costs, strict=True):
        pools.append((gain, cost, 1))
        while len(pools) > 1 and pools[-1][0] / pools[-1][1] >= pools[-2][0] / pools[-2][1]:
            later, earlier = pools.pop(), pools.pop()
            pools.append((earlier[0] + later[0], earlier[1] + later[1], earlier[2] + later[2]))
    return [gain / cost for gain, cost, size in pools for _ in range(size)]
