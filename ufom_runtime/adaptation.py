"""What the inner loop ends at, without derivatives by θ: the adapted parameters, and both losses there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ufom_runtime.algorithms import first_state, inner_loop
from ufom_runtime.batching import rows_together
from ufom_runtime.derivatives import Losses, inner_tasks, phi_of, row_losses, watch_losses
from ufom_runtime.inspection.draws import refuse_draws
from ufom_runtime.inspection.non_finite import refuse_non_finite
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_runtime.steps import Steps
from ufom_theory import Sweep
from ufom_theory.checks import typed


@typed
def adapt(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks,
    *,
    with_state: bool = False,
    chunk: int | None = None,
    compile: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """φ_r of each task, shape (n, p): the parameters that the inner loop ends at.

    Args:
        problem: the problem.
        theta: outer parameters, shape (s,).
        tasks: n tasks, stacked in the leading dimension.
        with_state: return (φ_r, state), the state of the inner update after its last step as one vector a task.
        chunk, compile: as in `hypergradient`.

    >>> from ufom_runtime.problems.quadratic import quadratic
    >>> problem = quadratic()
    >>> adapt(problem, problem.initial, problem.sample(3, torch.Generator().manual_seed(0))).shape
    torch.Size([3, 5])

    Raises:
        UfomError: as `hypergradient`.
    """
    tasks = check(problem, theta, tasks)
    found: list[tuple[Tensor, Tensor]] = []
    with watch_losses(seen := Losses()):
        for index, rows, piece, x in _ends(problem, theta, tasks, chunk, compile):
            refuse_non_finite(problem, rows, piece, [x], seen, index.tolist(), "φ_r")
            found.append((phi_of(problem, rows, x, piece), x))
    phi = torch.cat([phi for phi, _ in found])
    return (phi, torch.cat([x[:, phi.shape[1] :] for _, x in found])) if with_state else phi


@typed
def losses(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks,
    *,
    chunk: int | None = None,
    compile: bool = False,
) -> tuple[Tensor, Tensor]:
    """L_in(θ, φ_r, T) and L_out(θ, φ_r, T) of each task, shapes (n,) and (n,).

    With an `inner_batch` the inner loss is that of the data that the last step saw. Arguments and errors as `adapt`'s,
    but that losses which are not finite are returned as they are.

    >>> from ufom_runtime.problems.quadratic import quadratic
    >>> problem = quadratic()
    >>> inner, outer = losses(problem, problem.initial, problem.sample(3, torch.Generator().manual_seed(0)))
    >>> inner.shape, outer.shape
    (torch.Size([3]), torch.Size([3]))
    """
    tasks = check(problem, theta, tasks)
    inner, outer = [], []
    for _, rows, piece, x in _ends(problem, theta, tasks, chunk, compile):
        phi, last = phi_of(problem, rows, x, piece), inner_tasks(problem, piece, problem.r - 1)
        with torch.no_grad():
            inner.append(row_losses(problem, "inner_loss", rows, phi, last).reshape(-1))
            outer.append(row_losses(problem, "outer_loss", rows, phi, piece).reshape(-1))
    return torch.cat(inner), torch.cat(outer)


def _ends(
    problem: BilevelProblem, theta: Tensor, tasks: Tasks, chunk: int | None, compile: bool
) -> Iterator[tuple[Tensor, Tensor, Tasks, Tensor]]:
    """Numbers of the tasks, rows of θ, these tasks and x_r, chunk by chunk."""
    index = torch.arange(len(tasks), device="cpu")
    pairs = torch.stack([torch.zeros_like(index), index])
    size = rows_together(problem, theta[None], tasks, pairs, (0,), Sweep.recomputed(), chunk, 0, compile)
    for piece in torch.split(index, size):
        some = tasks.take(piece)
        rows = theta.detach().expand(len(piece), -1)
        with torch.enable_grad(), refuse_draws():
            x = inner_loop(
                Steps(problem, rows, some, compile=compile, products=False), first_state(problem, rows, some)
            )
        yield piece, rows, some, x
