"""Outer SGD, Algorithm 1: plain steps θ_k = θ_{k−1} − γ_k·G, any γ, any estimator, a tidy log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor

from ufom_runtime.derivatives import count_calls
from ufom_runtime.estimators import Estimator, draw_coins, hypergradient
from ufom_runtime.problem import BilevelProblem, finite_theta
from ufom_theory import UfomError
from ufom_theory.quantities import integer, positive

if TYPE_CHECKING:
    import pandas as pd

_STREAMS = {"tasks": 0, "coins": 1}


def generator(seed: int, step: int, stream: str) -> Generator:
    """The CPU generator of one outer step: "tasks" and "coins" are independent streams (Theorem 1 needs them so).

    A function of (seed, step), so that no generator state is ever saved.
    """
    words = np.random.SeedSequence([seed, step, _STREAMS[stream]]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


@dataclass(frozen=True, eq=False)
class Run:
    """The end of a run and its log.

    Attributes:
        theta: θ after the last step, shape (s,).
        log: one row a logged step: step, gamma, exact (tasks whose coin was 1), gradients and
            hessian_vector_products (calls so far), seconds (so far), gradient_norm, and what `evaluate` returned.
    """

    theta: Tensor
    log: pd.DataFrame


def outer_sgd(
    problem: BilevelProblem,
    theta: Tensor,
    estimator: Estimator,
    step_sizes: Callable[[int], float] | Sequence[float],
    steps: int,
    *,
    seed: int = 0,
    batch: int = 1,
    log_every: int = 1,
    evaluate: Callable[[Tensor], Mapping[str, float]] | None = None,
    progress: Callable[[float], object] | None = None,
    chunk: int | None = None,
) -> Run:
    """Run `steps` outer steps from θ; every step draws `batch` tasks, each with a coin of its own.

    Args:
        problem: the problem.
        theta: θ_0, shape (s,).
        estimator: FOM, EXACT, RECOMPUTED, UFOM(q, ...).
        step_sizes: γ_k as a function of k = 1, 2, …, or a sequence of at least `steps` of them.
        steps: outer steps.
        seed: of tasks and coins, ≥ 0; two estimators with one seed see the same tasks and paired coins.
        batch: tasks a step.
        log_every: a row is logged every so many steps, and for the last one.
        evaluate: columns to add to a logged row, from θ; its time is not counted.
        progress: called with the share of the steps that are done.
        chunk: tasks run together, as in `hypergradient`.

    Returns:
        The last θ and the log.

    Raises:
        UfomError: steps, batch or log_every that are no integers ≥ 1, a seed that is none ≥ 0, too few step sizes or
            one that is not a finite number > 0, an inner loop that diverged, or θ that is no longer finite.
    """
    for name, value, least in (
        ("steps", steps, 1),
        ("batch", batch, 1),
        ("log_every", log_every, 1),
        ("seed", seed, 0),
    ):
        integer(name, value, least)
    if not callable(step_sizes) and (not isinstance(step_sizes, Sequence) or len(step_sizes) < steps):
        raise UfomError(f"step_sizes = {step_sizes!r} for {steps} steps: give one a step, or a function of k")
    finite_theta("theta", theta, (1,))
    import pandas as pd

    theta, rows, seconds = theta.detach().clone(), [], 0.0
    with count_calls() as calls:
        for k in range(1, steps + 1):
            begin = time.perf_counter()
            gamma = float(positive("γ_k", step_sizes(k) if callable(step_sizes) else step_sizes[k - 1]))
            tasks = problem.sample(batch, generator(seed, k, "tasks"))
            coins = draw_coins(batch, estimator, generator(seed, k, "coins"))
            gradient = hypergradient(problem, theta, tasks, estimator, coins=coins, chunk=chunk)
            theta = theta - gamma * gradient
            if not torch.isfinite(theta).all():
                raise UfomError(
                    f"θ is not finite after step {k}: γ_k = {gamma:g} is too large; take smaller outer steps"
                )
            seconds += time.perf_counter() - begin
            if k % log_every == 0 or k == steps:
                row = {"step": k, "gamma": gamma, "exact": int(coins.sum()), **vars(calls), "seconds": seconds}
                row["gradient_norm"] = float(gradient.norm())
                with count_calls():  # evaluation is nobody's cost
                    columns = evaluate(theta) if evaluate else {}
                if not isinstance(columns, Mapping):
                    raise UfomError(f"evaluate returned {columns!r}: it must return names and numbers, {{'loss': 0.1}}")
                rows.append({**row, **columns})
            if progress:
                progress(k / steps)
    return Run(theta, pd.DataFrame(rows))
