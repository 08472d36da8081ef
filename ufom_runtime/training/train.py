"""Outer training, Algorithm 1: θ_k = θ_{k−1} − γ_k·G with any method's direction, any optimizer, and a tidy log.

A run that was stopped goes on to the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ufom_runtime.derivatives import Calls, count_calls
from ufom_runtime.estimators import Method, refuse_other
from ufom_runtime.methods.adaptive import AdaptiveUFOM
from ufom_runtime.problem import BilevelProblem, Tasks, all_finite, check, finite_theta
from ufom_runtime.training.identity import Watch
from ufom_runtime.training.log import Best, Now, Rows, Run, Stopped
from ufom_runtime.training.optimizers import Factory, OuterSteps
from ufom_runtime.training.processes import Processes, ProcessLost
from ufom_runtime.training.resume import fingerprint
from ufom_runtime.training.saving import Kept, asked
from ufom_runtime.training.seeds import check_seed, generator
from ufom_runtime.training.warm import WarmStarts
from ufom_theory import UfomError
from ufom_theory.checks import instance, integer, typed

Row = dict[str, Any]
_JOIN = "write `with join() as processes:`, of ufom_runtime.training.processes"


@typed
def train(
    problem: BilevelProblem,
    theta: Tensor,
    estimator: Method,
    step_sizes: Callable[[int], float] | Sequence[float] | None = None,
    steps: int = 0,
    *,
    optimizer: str | float | Factory | None = None,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    clip: float | None = None,
    seed: int = 0,
    batch: int = 1,
    log_every: int = 1,
    evaluate: Callable[[Tensor], Mapping[str, float]] | None = None,
    until: Callable[[Mapping[str, float]], bool] | None = None,
    patience: int | None = None,
    keep: Literal["last", "best"] = "last",
    column: str | None = None,
    progress: Callable[[float], object] | None = None,
    chunk: int | None = None,
    compile: bool = False,
    warm_start: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    processes: Processes | None = None,
) -> Run:
    """Run `steps` outer steps from θ; every step draws `batch` tasks, each with its own coin.

    Args:
        problem: the problem.
        theta: θ_0, shape (s,).
        estimator: any method: FOM, EXACT, RECOMPUTED, UFOM(q, ...), AdaptiveUFOM(...), one of METHODS, or REPTILE,
            whose direction is not a gradient.
        step_sizes: γ_k as a function of k = 1, 2, …, or a sequence of at least `steps` of them.
        steps: outer steps, ≥ 1. More than a finished run took: it is extended.
        optimizer: instead of step_sizes: "sgd:0.05", "adam:1e-3", "decay:0.5:1" (γ_k = γ₁·k^(−s)), a rate for plain
            steps, or a factory of parameters, `lambda p: torch.optim.Adam(p, lr=1e-3)`.
        scheduler: a function of the optimizer that returns a torch scheduler of it, stepped after every outer step.
        clip: the gradient is shortened to this norm before the step; an unbiased estimate is then biased.
        seed: of tasks and coins, in [0, 2^63); two methods with one seed see the same tasks and paired coins.
        batch: tasks a step.
        log_every: steps between two logged rows; the last step is always logged.
        evaluate: columns to add to a logged row, from θ; its calls and its time are not counted.
        until: ends the run sooner, after the first logged row of which it is true: a budget of calls or of seconds.
        patience: ends the run after this many logged rows without a smaller value of `column`.
        keep: "best" returns θ of the logged row with the smallest value of `column`.
        column: a column of the log; None: the one that `evaluate` returns.
        progress: called with the share of the steps that are done, by the first process alone.
        chunk, compile: as in `hypergradient`.
        warm_start: the inner loop of a task starts where it last ended, a constant: ∂V/∂θ = 0 but at its first visit.
            For a finite Ω; r gradients a task more each step.
        checkpoint: a folder of this run alone, made if missing, that keeps its state: called again with the same
            arguments, a run that was stopped goes on from there to the same θ and log (but for seconds), to the last
            bit where `chunk`, `compile` and device are the same, too.
        checkpoint_every: steps between two saves; the last state is always saved.
        processes: those of torchrun, `with join() as processes`: they share the tasks of each step, and all return the
            same run, on CPUs of one kind to the last bit the same for any number of them. The first evaluates and
            saves.

    Returns:
        θ and the log.

    >>> from ufom_runtime import UFOM
    >>> from ufom_runtime.problems.quadratic import quadratic
    >>> problem = quadratic()
    >>> run = train(problem, problem.initial, UFOM(0.2), optimizer="adam:0.01", steps=5, batch=4)
    >>> run.theta.shape, len(run.log)
    (torch.Size([5]), 5)

    Raises:
        Stopped: Ctrl-C; a `KeyboardInterrupt` whose `run` has what was done. A checkpoint is saved before.
        UfomError: an argument outside its range, an optimizer that cannot take these steps, an inner loop that
            diverged, θ that becomes NaN or infinite, a start that changes, a checkpoint that is damaged or of another
            run, processes that were given different arguments.
        ProcessLost: a process died; the first saves a checkpoint before it raises this.
        ModuleNotFoundError: a checkpoint is asked for, and safetensors is not installed.
    """
    counts = {"steps": steps, "batch": batch, "log_every": log_every, "checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        integer(name, value, 1)
    refuse_other(estimator)
    if isinstance(estimator, AdaptiveUFOM):
        estimator = estimator.trained_by(optimizer)
    finite_theta("theta", theta, (1,))
    theta = theta.detach().clone()
    outer = OuterSteps.of(theta, optimizer, step_sizes, steps, scheduler, clip)
    if processes is not None:
        instance("processes", processes, Processes, _JOIN)
    group, sharing = (Processes(0, 1), nullcontext) if processes is None else (processes, processes.sharing)
    rows = Rows(log_every, steps, evaluate, Best.of(keep, column, patience, evaluate), group)
    for name, function in {"evaluate": evaluate, "until": until, "progress": progress}.items():
        if function is not None and not callable(function):
            raise UfomError(f"{name} = {function!r} must be a function")
    with count_calls() as calls:
        warmed = WarmStarts.of(problem) if warm_start else None
        loop = Loop(problem, estimator, outer, rows, calls, check_seed(seed), batch, chunk, compile, sharing, warmed)
        first = Tasks.of(problem.sample(batch, generator(loop.seed, 1, "tasks"))).take(slice(0, 1))
        check(problem, theta, first)
        warm = warmed.begin(theta, problem) if warmed else None
        now = Now(theta, state=estimator.begin(), outer=outer.state(), warm=warm)
        kept = None if checkpoint is None else Kept.of(checkpoint, loop, theta, first)
        if kept:
            now = kept.load(now, loop)
        if group.size > 1:
            every = {"checkpoint_every": checkpoint_every, "patience": patience, "until": until is not None}
            how = {"chunk": chunk, "compile": compile, "checkpoint": kept is not None, "step to start from": now.step}
            group.agree({**asked(loop, theta), "steps": steps, **every, **how})
        return _run(loop, now, kept, Watch.of(problem, theta, first), until, patience, progress, checkpoint_every)


def _run(
    loop: Loop, now: Now, kept: Kept | None, watch: Watch, until: Any, patience: int | None, progress: Any, every: int
) -> Run:
    """All steps after `now`."""
    rows, group, saved = loop.rows, loop.rows.processes, now.step
    ended: Literal["steps", "until", "patience"] = "steps"
    try:
        for k in range(now.step + 1, rows.steps + 1):
            if stop := rows.stop(now, until, patience):
                ended = stop
                break
            now = loop.step(now, k)
            if k <= 2 or k % every == 0:
                watch.refuse_changed(k)
                if group.size > 1:
                    group.agree({f"θ after step {k}": fingerprint(now.theta)})
            if kept and k % every == 0:
                group.first(partial(kept.save, now, rows.regular))
                saved = k
            if progress and group.rank == 0:
                progress(k / rows.steps)
        if kept and saved != now.step:
            group.first(partial(kept.save, now, rows.regular))
    except (KeyboardInterrupt, ProcessLost) as error:
        if kept and saved != now.step and group.rank == 0:
            kept.save(now, rows.regular)
        if isinstance(error, ProcessLost):
            raise
        raise Stopped(rows.run(now, "Ctrl-C")) from error
    return rows.run(now, ended)


@typed
def outer_sgd(
    problem: BilevelProblem,
    theta: Tensor,
    estimator: Method,
    step_sizes: Callable[[int], float] | Sequence[float] | None = None,
    steps: int = 0,
    *,
    optimiser: Factory | None = None,
    **options: Any,
) -> Run:
    """The name of `train` until 0.3, with `optimiser=` for its `optimizer=`."""
    return train(problem, theta, estimator, step_sizes, steps, optimizer=optimiser, **options)


@dataclass(eq=False)
class Loop:
    """What one step needs."""

    problem: BilevelProblem
    estimator: Method
    outer: OuterSteps
    rows: Rows
    calls: Calls
    seed: int
    batch: int
    chunk: int | None
    compile: bool
    sharing: Callable[[], AbstractContextManager[None]] = nullcontext
    warm: WarmStarts | None = None
    keeps: bool = False  # whether the optimizer's state is kept after every step

    def step(self, now: Now, k: int) -> Now:
        """The run after step k."""
        begin = time.perf_counter()
        gamma = self.outer.gamma(k)
        drawing, draws = generator(self.seed, k, "tasks"), generator(self.seed, k, "coins")
        problem, warm = self.problem, now.warm
        if self.warm and warm:
            problem = self.warm.problem
            index, tasks = self.warm.sample(self.batch, drawing, warm)
        else:
            tasks = problem.sample(self.batch, drawing)
        with self.sharing():
            given = self.estimator.direction(
                problem, now.theta, tasks, now.state, draws, chunk=self.chunk, compile=self.compile
            )
            if self.warm and warm:
                warm = self.warm.after(now.theta, index, tasks, warm, self.compile)
        theta = self.outer.take(given.value)
        if not all_finite(theta):
            raise UfomError(f"θ is not finite after step {k}: γ_k = {gamma:g} is too large; take smaller outer steps")
        after = replace(
            now, theta=theta, step=k, state=given.state, seconds=now.seconds + time.perf_counter() - begin,
            calls=tuple(vars(self.calls).items()), outer=self.outer.state() if self.keeps else None,
            warm=warm,
        )  # fmt: skip
        return self.rows.add(after, gamma, given)
