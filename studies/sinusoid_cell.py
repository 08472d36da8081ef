"""What the study of sinusoid regression computes: many runs of outer Adam at once, stacked in one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from studies.shared.lanes import Adam, both_gradients, estimates, follow
from ufom_runtime import AdaptiveUFOM, losses, measure_moments
from ufom_runtime.estimators import State
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_runtime.problems.sinusoid import sample_waves, sinusoid
from ufom_theory import CostModel, UfomError

TEST_SEED = 10**6  # of the tasks that judge, the same for all runs


def rule_of(method: str, r: int, rate: float) -> float | AdaptiveUFOM:
    """A fixed q, or an adaptive rule, which is told the printed cost of the recomputed sweep."""
    cost = CostModel(r=r, as_printed=True)
    if method == "adaptive":
        return AdaptiveUFOM(cost=cost)
    if method == "law of one step":
        return AdaptiveUFOM(law="step", outer=f"adam:{rate:g}", cost=cost)
    return {"FOM": 0.0, "exact": 1.0}[method] if method in ("FOM", "exact") else float(method.split()[1])


class Runs:
    """All runs of a problem and where they are: θ, shape (runs, s), and the states of the rules.

    A run whose gradients overflow is lost: it stays at its start, and `lost` says so.

    Args:
        problem: the problem.
        theta: where each run starts.
        rules: of each run.
        stream: whose tasks and coins each run sees.
        rate: of outer Adam.
    """

    def __init__(
        self, problem: BilevelProblem, theta: Tensor, rules: list[float | AdaptiveUFOM], stream: Tensor, rate: float
    ) -> None:
        self.problem, self.theta, self.rules, self.stream, self.rate = problem, theta, rules, stream, rate
        self.start, self.lost = theta, torch.zeros(len(theta), dtype=torch.bool)
        self.states: list[State] = [rule.begin() if isinstance(rule, AdaptiveUFOM) else (rule,) for rule in rules]
        self.corrected, self.adam, self.steps = torch.zeros(len(theta)), Adam(theta), 0

    @property
    def q(self) -> Tensor:
        """In force, of each run."""
        return torch.tensor([float(state[0]) for state in self.states], dtype=torch.float64)

    def step(self, tasks: Tasks, uniform: Tensor) -> None:
        """One step of all runs, on stacked tasks and uniform numbers of each stream, shape (streams, batch)."""
        batch, q = uniform.shape[1], self.q
        task = self.stream[:, None] * batch + torch.arange(batch)
        coins = uniform[self.stream] < q[:, None]
        try:
            proxy, exact = both_gradients(self.problem, self.theta, tasks, task, coins)
        except UfomError:
            self._lose([i for i in range(len(self.theta)) if self._overflows(i, tasks, task, coins)])
            proxy, exact = both_gradients(self.problem, self.theta, tasks, task, coins)
        gradient = estimates(coins, q, proxy, exact)
        for i, rule in enumerate(self.rules):
            if isinstance(rule, AdaptiveUFOM) and not self.lost[i]:
                rows = coins[i], proxy[i], exact[i]
                found = follow(rule, self.states[i], self.problem, self.theta[i], tasks.take(task[i]), *rows)
                gradient[i], self.states[i] = found.value, found.state
        self.steps += 1
        self.corrected += coins.sum(1)
        self.theta = self.theta - self.rate * self.adam.direction(gradient, self.steps)
        self._lose((~self.theta.isfinite().all(1) | self.lost).nonzero()[:, 0].tolist())

    def _overflows(self, i: int, tasks: Tasks, task: Tensor, coins: Tensor) -> bool:
        one = slice(i, i + 1)
        try:
            both_gradients(self.problem, self.theta[one], tasks, task[one], coins[one])
        except UfomError:
            return True
        return False

    def _lose(self, runs: list[int]) -> None:
        self.lost[runs] = True
        self.theta[runs] = self.start[runs]


def run_cell(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All methods on some seeds at one K and r; a row for each run and record."""
    torch.set_num_threads(1)
    shots, r, batch, seeds = (cell[name] for name in ("shots", "r", "batch", "seeds"))
    named = [(method, seed) for method in cell["methods"] for seed in seeds]
    stream = torch.tensor([seeds.index(seed) for _, seed in named])
    problems = [sinusoid(shots, r, cell["alpha"], cell["width"], seed=seed) for seed in seeds]
    starts = torch.stack([x.initial for x in problems if x.initial is not None]).to(torch.float32)
    runs = Runs(problems[0], starts[stream], [rule_of(m, r, cell["rate"]) for m, _ in named], stream, cell["rate"])
    streams = [torch.Generator().manual_seed(10_000 * shots + 100 * r + seed) for seed in seeds]
    test = Tasks.of(sample_waves(cell["test"], shots, torch.Generator().manual_seed(TEST_SEED))).to(torch.float32)
    since, rows, every = torch.zeros_like(runs.theta), list[dict[str, Any]](), cell["steps"] // cell["records"]
    for step in range(1, cell["steps"] + 1):
        drawn = [sample_waves(batch, shots, stream) for stream in streams]
        uniform = torch.stack([torch.rand(batch, generator=stream) for stream in streams])
        q = runs.q.tolist()
        runs.step(Tasks.of(tuple(torch.cat(part) for part in zip(*drawn, strict=True))).to(torch.float32), uniform)
        since += runs.theta
        if step % every == 0:
            average, since = since / every, torch.zeros_like(since)
            done = runs.corrected.tolist()
            for i, (method, seed) in enumerate(named):
                loss = math.nan if runs.lost[i] else float(losses(problems[0], average[i], test)[1].mean())
                rows.append(
                    {"method": method, "seed": seed, "step": step, "loss": loss, "corrected": done[i], "q": q[i]}
                )
    for row, theta, lost in zip(rows[-len(named) :], average, runs.lost.tolist(), strict=True):
        if lost:
            continue
        found = measure_moments(problems[0], theta, test)
        row |= {"gradient_sq": found.mean_gradient_sq, "d2": found.d2, "v2": found.v2}
    return rows
