"""What `audit_gradient` holds a gradient against: every G_K in float64, its rounding error, and the usual slips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from ufom_runtime.batching import in_chunks, refuse_divergence, rows_together
from ufom_runtime.estimators import EXACT
from ufom_runtime.inner import Update
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_theory import UfomError

_MARGIN = 5  # tolerance over the measured rounding error, which in the user's code is another draw


@dataclass(frozen=True, eq=False)
class Oracle:
    """G_0 … G_r, (r + 1, rows·s) in float64, with rounding errors and tolerances, (r + 1,); and what gave them."""

    problem: BilevelProblem
    theta: Tensor
    tasks: Tasks
    per_task: bool
    table: Tensor
    noise: Tensor
    limits: Tensor
    chunk: int | None

    @classmethod
    def of(
        cls, problem: BilevelProblem, theta: Tensor, tasks: Tasks, per_task: bool, chunk: int | None, compile: bool
    ) -> Oracle:
        lengths = tuple(range(problem.r + 1))
        own = theta.dtype
        for dtype in (torch.float64, own):
            fine = _starting(problem, partial(Tensor.to, dtype=dtype))
            fine_theta, fine_tasks = theta.detach().to(dtype), tasks.to(dtype)
            try:
                if chunk is None and not compile:  # weighed once; what it is compared with takes as much
                    pairs = _pairs(len(tasks))
                    chunk = rows_together(fine, fine_theta[None], fine_tasks, pairs, lengths, EXACT.sweep, None)
                table = refuse_divergence(_gradients(fine, fine_theta, fine_tasks, lengths, per_task, chunk, compile))
                break
            except UfomError:  # perhaps tensors of another dtype, closed over: θ's own is the last resort
                if dtype == own:
                    raise
        eps = torch.finfo(own).eps
        noise = torch.zeros(len(table), dtype=torch.float64, device=theta.device)
        for factor in (1 - eps, 1 + eps) if own == dtype else (1, 1 - eps, 1 + eps):
            moved = _starting(problem, partial(torch.mul, other=factor))
            again = refuse_divergence(_gradients(moved, theta, tasks, lengths, per_task, chunk, compile))
            noise = torch.maximum(noise, (again - table).norm(dim=1))
        limits = (_MARGIN * noise + eps**0.5 * table.norm(dim=1)) * (1 if dtype == torch.float64 else 2)
        return cls(fine, fine_theta, fine_tasks, per_task, table, noise, limits, chunk)

    def agreeing(self, g: Tensor) -> tuple[int, ...]:
        """The lengths K whose gradient g is, to within the tolerance."""
        return tuple(torch.nonzero((g.flatten() - self.table).norm(dim=1) <= self.limits)[:, 0].tolist())

    def slips(self) -> Iterator[tuple[str, Tensor, float]]:
        """(name, gradient, tolerance) of usual slips, first-order and exact, where they are no G_K."""
        relative = float(self.limits[-1] / self.table[-1].norm())
        for what, changed in _slips(self.problem, self.tasks):
            lengths = (0, changed.r)
            try:
                first_order, exact = _gradients(changed, self.theta, self.tasks, lengths, self.per_task, self.chunk)
            except UfomError:  # this slip diverges, so it is not what was done
                continue
            found = [("exact ", exact), ("first-order ", first_order)]
            if (exact - first_order).norm() <= relative * exact.norm():
                found = [("", exact)]
            for kind, g in found:
                if not self.agreeing(g):
                    yield f"the {kind}gradient {what}", g, relative * float(g.norm())


def _starting(problem: BilevelProblem, change: Callable[[Tensor], Tensor]) -> BilevelProblem:
    """The problem from `change`(φ_0), bare of what its class adds, to be differentiated with any tasks."""
    return BilevelProblem(
        problem.inner_loss,
        problem.outer_loss,
        lambda theta, task: change(problem.start(theta, task)),
        problem.step_sizes,
        tasks=torch.zeros(1, device="cpu"),
        update=problem.update,
        steps=problem.steps,
        inner_batch=problem.inner_batch,
    )


def _gradients(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Tasks,
    lengths: tuple[int, ...],
    per_task: bool,
    chunk: int | None,
    compile: bool = False,
) -> Tensor:
    """G_K for each length, the mean over the tasks or all of them: (lengths, s) or (lengths, n·s), in float64."""
    n = len(tasks)
    found = torch.zeros(len(lengths), n if per_task else 1, len(theta), dtype=torch.float64, device=theta.device)
    pieces = in_chunks(problem, theta.detach()[None], tasks, _pairs(n), lengths, EXACT.sweep, chunk, compile=compile)
    for piece, gradients in pieces:
        for row, g in zip(found, gradients, strict=True):
            if per_task:
                row[piece[1].to(theta.device)] = g.double()
            else:
                row[0] += g.double().sum(0) / n
    return found.flatten(1)


def _pairs(n: int) -> Tensor:
    """One θ with each of n tasks, as `in_chunks` takes them."""
    return torch.stack([torch.zeros(n, dtype=torch.int64, device="cpu"), torch.arange(n, device="cpu")])


def _slips(problem: BilevelProblem, tasks: Tasks) -> Iterator[tuple[str, BilevelProblem]]:
    """Usual slips, as the problems that would be differentiated correctly: (in words, problem)."""

    def without_theta(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda theta, *rest: function(theta.detach(), *rest)

    yield "without ∂L_out/∂θ", replace(problem, outer_loss=without_theta(problem.outer_loss))
    yield "without the derivative of the start", replace(problem, start=without_theta(problem.start))
    yield "without ∂²L_in/∂θ∂φ", replace(problem, inner_loss=without_theta(problem.inner_loss))
    yield "with the inner loss for the outer (on the support set?)", replace(problem, outer_loss=problem.inner_loss)
    yield "of the outer loss at the start φ_0", _updated(problem, 1, lambda theta, phi, state, *_: (phi, state))
    if problem.r > 1:
        yield "after one inner step too few", problem.cut(problem.r - 1)
    yield from _slips_of_descent(problem, tasks) if problem.update is None else _slips_of_update(problem)


def _slips_of_descent(problem: BilevelProblem, tasks: Tasks) -> Iterator[tuple[str, BilevelProblem]]:
    alphas = problem.alphas
    yield "after one inner step too many", replace(problem, step_sizes=[*alphas, alphas[-1]])
    examples = {t.shape[1] for t in tasks.parts if t.ndim > 1}
    for m in sorted({2, 10} | examples - {1}):
        why = " (a sum over the examples for a mean?)" * (m in examples), " (a mean for a sum?)" * (m in examples)
        yield f"with inner steps {m} × as long{why[0]}", replace(problem, step_sizes=[m * a for a in alphas])
        yield f"with inner steps 1/{m} as long{why[1]}", replace(problem, step_sizes=[a / m for a in alphas])


def _slips_of_update(problem: BilevelProblem) -> Iterator[tuple[str, BilevelProblem]]:
    update = cast(Update, problem.update).update
    yield "after one inner step too many", problem.cut(problem.r + 1)
    yield (
        "with the inner gradients held constant (HELD)",
        _updated(problem, problem.r, lambda theta, phi, state, g, *rest: update(theta, phi, state, g.detach(), *rest)),
    )
    yield (
        "without the derivative of the inner update by θ",
        _updated(problem, problem.r, lambda theta, *rest: update(theta.detach(), *rest)),
    )


def _updated(problem: BilevelProblem, steps: int, function: Callable[..., Any]) -> BilevelProblem:
    """The problem with steps of another function."""
    init = (lambda theta, phi, task: ()) if problem.update is None else problem.update.init
    changed = cast(Update, SimpleNamespace(init=init, update=function))
    return replace(problem, step_sizes=None, update=changed, steps=steps)
