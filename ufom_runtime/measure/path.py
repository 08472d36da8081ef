"""The θ along a run at which a decision is made, and what is measured at each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ufom_runtime.estimators import Method
from ufom_runtime.measure.chances import Path, draws
from ufom_runtime.measure.curvature import measure_curvature
from ufom_runtime.measure.moments import MeasuredMoments, moments_by_proxy
from ufom_runtime.problem import BilevelProblem, Task, Tasks
from ufom_runtime.training.train import train
from ufom_theory import Truncated, UfomError
from ufom_theory.laws import Outer, Progress
from ufom_theory.quantities import Z95
from ufom_theory.scores import takes_fixed_steps

_POINTS = 3  # of a pilot run, its start among them


class CannotTell(Exception):
    """Why no decision can be made, and what would tell."""


def pilot_points(
    problem: BilevelProblem, theta: Tensor, method: Method, outer: Outer, batch: int, steps: int, seed: int
) -> tuple[Tensor, tuple[int, ...]]:
    """θ at the start, the middle and the end of a run of so many steps, and those steps; θ alone where steps < 2."""
    if steps < 2:
        return theta[None], (0,)
    found, every = [theta], steps // (_POINTS - 1)

    def keep(now: Tensor) -> Mapping[str, float]:
        found.append(now.detach().clone())
        return {}

    steps = every * (_POINTS - 1)
    train(
        problem, theta, method, optimizer=str(outer), steps=steps, batch=batch, seed=seed, log_every=every,
        evaluate=keep,
    )  # fmt: skip
    return torch.stack(found), tuple(range(0, steps + 1, every))


def weights_of(steps: Sequence[int], horizon: int) -> tuple[float, ...]:
    """The share of the steps 0 … horizon that is nearest to each point; what lies beyond the last one is its own."""
    ends = [0.0, *((a + b) / 2 for a, b in pairwise(steps)), float(max(horizon, steps[-1], 1))]
    return tuple(float(x) for x in np.diff(ends) / ends[-1])


def measure_path(
    problem: BilevelProblem,
    thetas: Tensor,
    steps: tuple[int, ...],
    horizon: int,
    tasks: Task | Tasks,
    outer: Outer,
    batch: int,
    proxies: Sequence[Truncated],
    shortlist: Callable[[Path], Sequence[Truncated]],
    chunk: int | None = None,
    compile: bool = False,
) -> tuple[Path, bool]:
    """Moments, and for a fixed step curvatures, at each point, for these proxies.

    Curvatures cost several times what moments do: they are measured for those that `shortlist` names, by what the
    law of tuned steps says of them all. Also returned is whether FOM is identically zero.

    Raises:
        CannotTell: ‖∇M‖² is not above its noise, curvatures that do not settle, or no expected progress at this step.
    """
    found = [moments_by_proxy(problem, theta, tasks, proxies, chunk=chunk, compile=compile) for theta in thetas]
    for moments, step in zip(found, steps, strict=True):
        _refuse_noise(moments[proxies[0]], step)
    weights, kept = weights_of(steps, horizon), list(proxies)
    progress: dict[Truncated, list[Progress]] = {p: [draws(m[p], None) for m in found] for p in proxies}
    if takes_fixed_steps(outer):
        kept = list(shortlist(Path(horizon, steps, weights, progress)))
        try:
            for p in kept:
                curved = [measure_curvature(problem, theta, tasks, p, chunk=chunk, compile=compile) for theta in thetas]
                progress[p] = [draws(m[p], c) for m, c in zip(found, curved, strict=True)]
        except UfomError as error:
            raise CannotTell(f"{error}; or outer = 'tuned', whose law needs no curvature") from error
    path = Path(horizon, steps, weights, {p: progress[p] for p in kept})
    exact = path.exact(outer, batch)
    if not (exact[:, 0] > 0).all():
        raise CannotTell(
            f"at '{outer}' and a batch of {batch} the exact gradient itself makes no expected progress from step "
            f"{steps[int((exact[:, 0] <= 0).argmax())]} on: take smaller outer steps, or a larger batch"
        )
    return path, found[0][proxies[0]].vanishes


def _refuse_noise(moments: MeasuredMoments, step: int) -> None:
    assert moments.mean_gradient_sq is not None
    square, sem = float(moments.mean_gradient_sq), float(moments.sem("mean_gradient_sq"))
    if square > Z95 * sem:
        return
    if not sem:
        raise CannotTell(f"∇M = 0 at step {step}: there is nothing to descend; measure at another θ")
    where = "" if step == 0 else f" at step {step}"
    n = moments.n or 0
    # the error of ‖∇M‖² falls as 1/n where ∇M is small beside the noise of a task
    more = f"about {4 * n} tasks" if square <= sem else f"about {2 * n} tasks"
    raise CannotTell(
        f"‖∇M‖² = {square:.2g} ± {sem:.2g} is not above its noise{where} on {n} tasks: give {more} or more"
    )
