"""What the study of regret runs: its problems, a pilot at q = 1 for each, and the steps to a precision at one q."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime import EXACT, Estimator, hypergradient, measure_cost, measure_moments, outer_sgd
from ufom_runtime.algorithms import first_state, inner_loop
from ufom_runtime.problem import BilevelProblem, Task, Tasks
from ufom_runtime.problems.few_shot import omniglot_few_shot
from ufom_runtime.problems.hypercleaning import digits_hypercleaning, mnist_hypercleaning
from ufom_runtime.problems.quadratic import QuadraticProblem, quadratic
from ufom_runtime.steps import Steps
from ufom_theory import CostModel, Moments, Sweep, Truncated, UfomError, optimal_q
from ufom_theory.two_tasks import second_moment

Array = NDArray[np.float64]
MAKERS: dict[str, Callable[..., BilevelProblem]] = {
    "quadratic": quadratic,
    "digits-hypercleaning": digits_hypercleaning,
    "mnist-hypercleaning": mnist_hypercleaning,
    "omniglot": omniglot_few_shot,
}
READINGS = {  # name: (exponent m, where the moments are taken, sweep of the cost)
    "m = 2, start": (2.0, "start", Sweep.recomputed()),
    "m = 1, end": (1.0, "end", Sweep.recomputed()),
    "m = 1, path": (1.0, "path", Sweep.recomputed()),
    "released, m = 1/2": (0.5, "start", Sweep.stored()),
}
VERSION = 1  # of the cells
PILOT_SEED, EVALUATION_SEED, MOMENT_SEED = 1_000_001, 1_000_002, 1_000_003


@dataclass(frozen=True)
class Setting:
    """A problem and how it is run.

    Attributes:
        name: in tables and figures.
        problem: one of `MAKERS`.
        arguments: of its maker.
        gamma: γ of the outer steps γ·k0/(k + k0).
        delay: k0.
        steps: of the pilot.
        every: steps between two evaluations of the precision.
        proxy: K of the truncated proxy that is debiased.
        batch: tasks a step, each with its own coin.
        tasks: sampled for the evaluation, and four times as many for the moments; none where expectations are exact.
    """

    name: str
    problem: str
    arguments: dict[str, Any]
    gamma: float
    delay: int
    steps: int
    every: int = 1
    proxy: int = 0
    batch: int = 1
    tasks: int = 0

    def make(self) -> BilevelProblem:
        """The problem."""
        return MAKERS[self.problem](**self.arguments)

    def outer_step_size(self, k: int) -> float:
        """γ_k."""
        return self.gamma * self.delay / (k + self.delay)


def pilot(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """δ, the costs C1 and C2 in seconds, and for each reading its moments and q: the cell of one problem."""
    setting = Setting(**cell["setting"])
    problem = setting.make()
    if isinstance(problem, QuadraticProblem):
        precision, moments = quadratic_pilot(setting, problem)
    else:
        precision, moments = sampled_pilot(setting, problem)
    delta = float(np.exp(np.log(precision[-max(1, len(precision) // 4) :]).mean()))
    if delta >= precision[0]:
        raise UfomError(
            f"the pilot of {setting.name} ends at {delta:g}, above its start: take another γ, or more steps"
        )
    assert problem.initial is not None
    timed = measure_cost(problem, problem.initial, problem.sample(1, torch.Generator().manual_seed(0)), seconds=0.5)
    row = {
        "name": setting.name, "delta": delta, "c1": timed.c1, "c2": timed.c2,
        "r": problem.r, "proxy": setting.proxy, "batch": setting.batch,
    }  # fmt: skip
    places = {"start": moments[:1], "end": moments[-1:], "path": moments}
    for reading, (m, place, sweep) in READINGS.items():
        d2, v2, gradient_sq = np.array([(x.d2, x.v2, x.mean_gradient_sq) for x in places[place]], float).mean(axis=0)
        at = Moments(d2, v2, mean_gradient_sq=gradient_sq)
        q = optimal_q(at, CostModel(r=problem.r, sweep=sweep, proxy=Truncated(setting.proxy)), m, batch=setting.batch).q
        row |= {f"q: {reading}": q, f"d2: {reading}": d2, f"v2: {reading}": v2}
    return [row]


def run(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps to δ at one q, one row a seed."""
    setting, q, delta = Setting(**cell["setting"]), cell["q"], cell["delta"]
    problem = setting.make()
    cost = CostModel(r=problem.r, proxy=Truncated(setting.proxy), as_printed=True)
    charged = cost.c_det + np.array([q, 1.0]) * cost.c_rnd
    most = setting.every * math.ceil(cell["budget"] * setting.steps * charged[1] / charged[0] / setting.every)
    rows = []
    for seed in range(cell["seeds"]):
        ended = ""
        if isinstance(problem, QuadraticProblem):
            precision = [x for x, _ in quadratic_run(setting, problem, q, start(setting, seed) ** 2, most, delta)]
        else:
            estimator = Estimator(q, Sweep.stored(), Truncated(setting.proxy))
            precision, _, ended = sampled_run(setting, problem, estimator, seed, most, delta)
        steps = steps_to(delta, np.array(precision), setting.every)
        reached, steps = steps is not None, most if steps is None else steps
        rows.append({"name": setting.name, "seed": seed, "steps": steps, "reached": reached, "ended": ended})
    return rows


def steps_to(delta: float, precision: Array, every: int) -> float | None:
    """The step at which the precision, evaluated at regular steps from 0 on, first falls to δ; None if it does not.

    Between two evaluations its logarithm is taken to be linear.
    """
    below = np.flatnonzero(precision <= delta)
    if not len(below):
        return None
    if (i := int(below[0])) == 0:
        return 0.0
    before, after = np.log(np.maximum(precision[i - 1 : i + 1], np.finfo(np.float64).tiny))
    return every * float(i - 1 + (before - math.log(delta)) / (before - after))


def start(setting: Setting, seed: int) -> Array:
    """θ_0 ~ N(0, I) of one seed, in the eigenbasis of H."""
    drawn: Array = np.random.default_rng([PILOT_SEED, seed]).standard_normal(setting.arguments["dim"])
    return drawn


def slopes(setting: Setting, problem: QuadraticProblem) -> tuple[Array, Array]:
    """The eigenvalues of the maps θ − c ↦ G_K and θ − c ↦ G; all of the maps have H's eigenvectors."""
    eigenvalues = np.linalg.eigvalsh(problem.hessian.numpy())
    factors = 1 - np.outer(problem.alphas, eigenvalues)
    after = factors.prod(0)
    return eigenvalues * after * factors[problem.r - setting.proxy :].prod(0), eigenvalues * after**2


def quadratic_run(
    setting: Setting, problem: QuadraticProblem, q: float, square: Array, steps: int, delta: float = 0.0
) -> Iterator[tuple[float, Array]]:
    """E‖∇M(θ_k)‖² and E θ_k² (in H's eigenbasis) for k = 0, 1, …, exactly, until δ or `steps`; one task a step.

    θ_k = (1 − γ_k·a)·θ_{k−1} + γ_k·a·c with a random a, the map's eigenvalue, and c ~ N(0, σ²) independent of θ_{k−1}.
    """
    proxy, exact = slopes(setting, problem)
    mean, mean_square = (proxy, proxy**2) if q == 0 else (exact, exact**2 + (1 / q - 1) * (proxy - exact) ** 2)
    for k in range(steps + 1):
        if k:
            square = second_moment(
                square, setting.outer_step_size(k), mean, mean_square, mean_square * problem.noise**2
            )
        precision = float(exact**2 @ square)
        yield precision, square
        if precision <= delta:
            return


def quadratic_pilot(setting: Setting, problem: QuadraticProblem) -> tuple[list[float], list[Moments]]:
    """The precision and the moments along the run at q = 1, expectations over starts, tasks and coins."""
    proxy, exact = slopes(setting, problem)
    path = list(quadratic_run(setting, problem, 1.0, np.ones(len(exact)), setting.steps))
    moments = [
        Moments((proxy - exact) ** 2 @ (square + problem.noise**2), exact**2 @ (square + problem.noise**2),
                mean_gradient_sq=precision)
        for precision, square in path
    ]  # fmt: skip
    return [precision for precision, _ in path], moments


def sampled_run(
    setting: Setting, problem: BilevelProblem, estimator: Estimator, seed: int, steps: int, delta: float = 0.0
) -> tuple[list[float], list[Tensor], str]:
    """Outer SGD until δ or `steps`: the precision and θ every `setting.every` steps from 0 on, and why it diverged."""
    initial = problem.initial
    assert initial is not None
    held = problem.tasks or problem.sample(setting.tasks, torch.Generator().manual_seed(EVALUATION_SEED))
    precision, path = [evaluate(problem, initial, held)], [initial]

    def record(theta: Tensor) -> dict[str, float]:
        path.append(theta)
        precision.append(evaluate(problem, theta, held))
        if precision[-1] <= delta:
            raise _Reached
        return {}

    try:
        outer_sgd(
            problem, initial, estimator, setting.outer_step_size, steps,
            seed=seed, batch=setting.batch, log_every=setting.every, evaluate=record,
        )  # fmt: skip
    except _Reached:
        pass
    except UfomError as error:  # a q that diverges is a finding
        return precision, path, str(error)
    return precision, path, ""


class _Reached(Exception):
    """The precision is reached: no further step is needed."""


@torch.no_grad()
def evaluate(problem: BilevelProblem, theta: Tensor, tasks: Task) -> float:
    """The precision at θ: ‖∇M‖² where Ω is finite, an exact sum; else M, the outer loss on the given tasks."""
    if problem.tasks is not None:
        gradient = hypergradient(problem, theta, tasks, EXACT)
        return float(gradient @ gradient)
    held = Tasks.of(tasks)
    rows = theta.expand(len(held), -1)
    with torch.enable_grad():
        phi = inner_loop(Steps(problem, rows, held), first_state(problem, rows, held))
    return float(torch.func.vmap(problem.outer_loss)(rows, phi, tasks).mean())


def sampled_pilot(setting: Setting, problem: BilevelProblem) -> tuple[list[float], list[Moments]]:
    """The precision along the run at q = 1, and the moments at its start, its quarters and its end."""
    precision, path, ended = sampled_run(setting, problem, EXACT, PILOT_SEED, setting.steps)
    if ended:
        raise UfomError(f"the pilot of {setting.name} diverged: {ended}")
    tasks = problem.tasks or problem.sample(4 * setting.tasks, torch.Generator().manual_seed(MOMENT_SEED))
    places = np.linspace(0, len(path) - 1, 5).round().astype(int)
    return precision, [measure_moments(problem, path[i], tasks, Truncated(setting.proxy)) for i in places]
