"""Outer SGD, Algorithm 1: plain steps θ_k = θ_{k−1} − γ_k·G, any γ, any estimator, a tidy log.

A torch optimiser may take the steps instead. A run that was stopped goes on to the same bits.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ufom_runtime.derivatives import count_calls
from ufom_runtime.estimators import Method, refuse_other
from ufom_runtime.problem import BilevelProblem, all_finite, finite_theta
from ufom_runtime.training.resume import Checkpoint, describe, pack, same_form, unpack
from ufom_runtime.training.seeds import check_seed, generator
from ufom_theory import UfomError
from ufom_theory.checks import integer, plain, positive

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Run:
    """The end of a run and its log.

    Attributes:
        theta: θ after the last step, shape (s,).
        log: one row a logged step: step, gamma (an optimiser's lr), exact (tasks whose coin was 1), gradients and
            hessian_vector_products (calls so far), seconds (so far), gradient_norm, with AdaptiveUFOM the q of this
            step and the estimates d2 and v2 it came from, what a method reports (its mean over the tasks), and what
            `evaluate` returned.
    """

    theta: Tensor
    log: pd.DataFrame


def outer_sgd(
    problem: BilevelProblem,
    theta: Tensor,
    estimator: Method,
    step_sizes: Callable[[int], float] | Sequence[float] | None = None,
    steps: int = 0,
    *,
    optimiser: Callable[[list[Tensor]], Optimizer] | None = None,
    seed: int = 0,
    batch: int = 1,
    log_every: int = 1,
    evaluate: Callable[[Tensor], Mapping[str, float]] | None = None,
    until: Callable[[Mapping[str, float]], bool] | None = None,
    progress: Callable[[float], object] | None = None,
    chunk: int | None = None,
    compile: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
) -> Run:
    """Run `steps` outer steps from θ; every step draws `batch` tasks, each with a coin of its own.

    Args:
        problem: the problem.
        theta: θ_0, shape (s,).
        estimator: FOM, EXACT, RECOMPUTED, UFOM(q, ...), AdaptiveUFOM(...), a method of `ufom_runtime.methods`, or
            REPTILE, which is no estimate of ∇M.
        step_sizes: γ_k as a function of k = 1, 2, …, or a sequence of at least `steps` of them.
        steps: outer steps, ≥ 1.
        optimiser: instead of step_sizes: makes a torch optimiser of parameters, `lambda p: torch.optim.Adam(p, 1e-3)`.
        seed: of tasks and coins, ≥ 0; two estimators with one seed see the same tasks and paired coins.
        batch: tasks a step.
        log_every: a row is logged every so many steps, and for the last one.
        evaluate: columns to add to a logged row, from θ; its time is not counted.
        until: ends the run sooner, after the first logged row of which it is true: a budget of calls or of seconds.
        progress: called with the share of the steps that are done.
        chunk, compile: as in `hypergradient`.
        checkpoint: a folder of this run alone, made if missing, that keeps its state: called again with the same
            arguments, a run that was stopped goes on from there to the same θ and log (but for seconds), to the last
            bit where `chunk`, `compile` and device are the same, too. Ctrl-C saves before it stops the run.
        checkpoint_every: the state is saved every so many steps, and after the last one.

    Returns:
        The last θ and the log.

    Raises:
        UfomError: steps, batch, log_every or checkpoint_every that are no integers ≥ 1, a seed that is none ≥ 0, both
            or neither of step_sizes and optimiser, too few step sizes or one that is not a finite number > 0, an inner
            loop that diverged, θ that is no longer finite, a checkpoint that is damaged or of another run.
        ModuleNotFoundError: a checkpoint is asked for, and safetensors is not installed.
    """
    for name, value, least in (
        ("steps", steps, 1),
        ("batch", batch, 1),
        ("log_every", log_every, 1),
        ("checkpoint_every", checkpoint_every, 1),
    ):
        integer(name, value, least)
    seed = check_seed(seed)
    if (step_sizes is None) == (optimiser is None):
        raise UfomError("give either step_sizes or an optimiser: one of them takes the outer steps")
    refuse_other(estimator)
    finite_theta("theta", theta, (1,))
    import pandas as pd

    theta, rows, seconds, first = theta.detach().clone(), [], 0.0, 1
    leaf = torch.nn.Parameter(theta.clone())
    outer = _function_of_k(step_sizes, steps) if optimiser is None else _optimiser(optimiser, leaf)
    state = estimator.begin()
    store = kept = None
    with count_calls() as calls:
        if checkpoint is not None:
            asked = {"seed": seed, "batch": batch, "log_every": log_every, "estimator": repr(estimator)}
            drawn = problem.sample(batch, generator(seed, 1, "tasks"))
            config = {**asked, **describe(problem, theta, drawn, outer, steps)}
            store = Checkpoint(Path(checkpoint), config, most_bytes=2**20 + 64 * theta.nbytes)
            if found := store.load():
                try:
                    theta, values = _restore(*found, theta, state, vars(calls), outer)
                except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                    said = f"{type(error).__name__}: {error}"
                    raise UfomError(f"{checkpoint} is damaged: it holds no such state ({said}); remove it") from error
                rows, seconds, state = values["rows"], values["seconds"], tuple(values["state"])
                first = values["step"] + 1
                leaf.data.copy_(theta)
        try:
            for k in range(first, steps + 1):
                if until and rows and until(rows[-1]):
                    if store and kept:
                        kept.save(store, rows)
                    break
                begin = time.perf_counter()
                gamma = float(
                    outer.param_groups[0]["lr"] if isinstance(outer, Optimizer) else positive("γ_k", outer(k))
                )
                tasks = problem.sample(batch, generator(seed, k, "tasks"))
                draws = generator(seed, k, "coins")
                given = estimator.direction(problem, theta, tasks, state, draws, chunk=chunk, compile=compile)
                gradient, state = given.value, given.state
                if isinstance(outer, Optimizer):
                    leaf.grad = gradient
                    outer.step()
                    theta = leaf.detach().clone()
                else:
                    theta = theta - gamma * gradient
                if not all_finite(theta):
                    raise UfomError(
                        f"θ is not finite after step {k}: γ_k = {gamma:g} is too large; take smaller outer steps"
                    )
                seconds += time.perf_counter() - begin
                if k % log_every == 0 or k == steps:
                    row = {"step": k, "gamma": gamma, "exact": given.corrected, **vars(calls), "seconds": seconds}
                    row["gradient_norm"] = float(gradient.norm())
                    with count_calls():  # evaluation is nobody's cost
                        columns = evaluate(theta) if evaluate else {}
                    if not isinstance(columns, Mapping):
                        raise UfomError(
                            f"evaluate returned {columns!r}: it must return names and numbers, {{'loss': 0.1}}"
                        )
                    rows.append({**row, **given.columns, **{name: plain(value) for name, value in columns.items()}})
                if store:
                    inside = copy.deepcopy(outer.state_dict()) if isinstance(outer, Optimizer) else None
                    values = {"step": k, "state": list(state), "calls": dict(vars(calls)), "seconds": seconds}
                    kept = _State(theta, inside, len(rows), values)
                    if k % checkpoint_every == 0 or k == steps:
                        kept.save(store, rows)
                if progress:
                    progress(k / steps)
        except KeyboardInterrupt:
            if store and kept:
                kept.save(store, rows)
            raise
    return Run(theta, pd.DataFrame(rows))


def _restore(
    tensors: dict[str, Tensor],
    values: dict[str, Any],
    theta: Tensor,
    state: tuple[float, ...],
    calls: dict[str, int],
    outer: Callable[[int], float] | Optimizer,
) -> tuple[Tensor, dict[str, Any]]:
    """θ and the values of a stored state, if of the form that `_State` stores; calls and optimiser in place."""
    found = {**values, "theta": tensors["theta"], "optimiser": unpack(values["optimiser"], tensors)}
    expected: dict[str, Any] = {"theta": theta, "step": 1, "state": list(state), "calls": calls, "seconds": 0.0}
    if isinstance(outer, Optimizer):
        trial = copy.deepcopy(outer)
        for parameter in (x for group in trial.param_groups for x in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        trial.step()  # an optimiser makes its tensors at its first step
        expected["optimiser"] = trial.state_dict()  # load_state_dict would cast, or keep, what differs
    for name, value in expected.items():
        same_form(name, found[name], value)
    rows = values["rows"]
    if values["step"] < 1 or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("a step < 1, or rows of another kind")
    calls.update(values["calls"])
    if isinstance(outer, Optimizer):
        outer.load_state_dict(found["optimiser"])
    finite_theta("θ", found["theta"], (1,))
    return found["theta"].to(theta.device), values


@dataclass(frozen=True, eq=False)
class _State:
    """A run after a whole step, in copies: an optimiser changes its tensors in place, and Ctrl-C comes at any time."""

    theta: Tensor
    optimiser: Any
    logged: int
    values: dict[str, Any]

    def save(self, store: Checkpoint, rows: list[dict[str, Any]]) -> None:
        tensors = {"theta": self.theta}
        optimiser = pack(self.optimiser, tensors, "optimiser")
        store.save(tensors, {**self.values, "optimiser": optimiser, "rows": rows[: self.logged]})


def _function_of_k(step_sizes: Callable[[int], float] | Sequence[float] | None, steps: int) -> Callable[[int], float]:
    if callable(step_sizes):
        return step_sizes
    if not isinstance(step_sizes, Sequence) or len(step_sizes) < steps:
        raise UfomError(f"step_sizes = {step_sizes!r} for {steps} steps: give one a step, or a function of k")
    return lambda k: step_sizes[k - 1]


def _optimiser(make: Callable[[list[Tensor]], Optimizer], leaf: Tensor) -> Optimizer:
    made = make([leaf])
    if not isinstance(made, Optimizer):
        raise UfomError(f"optimiser returned a {type(made).__name__}: give a function of parameters, lambda p: Adam(p)")
    return made
