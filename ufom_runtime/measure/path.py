"""The θ along a run at which a decision is made, and what is measured at each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufom_runtime.estimators import Method
from ufom_runtime.measure.chances import DRAWS, Key, Path, draws
from ufom_runtime.measure.coordinates import measure_coordinates
from ufom_runtime.measure.curvature import curvatures
from ufom_runtime.measure.moments import MeasuredMoments, moments_by_proxy, proxy_rows
from ufom_runtime.methods.debiased import Proxy
from ufom_runtime.methods.implicit import Implicit
from ufom_runtime.problem import BilevelProblem, Task, Tasks
from ufom_runtime.training.train import train
from ufom_theory import UfomError
from ufom_theory.laws import Outer, Progress
from ufom_theory.quantities import Z95
from ufom_theory.scores import takes_fixed_steps

Shortlist = Callable[[Path], Sequence[Key]]
_POINTS = 3  # of a pilot run, its start among them
_LEAST_CURVED = 8  # tasks that curvatures are measured on


class CannotTell(Exception):
    """Why no decision can be made, and what would tell."""


def pilot_points(
    problem: BilevelProblem, theta: Tensor, method: Method, outer: Outer, batch: int, steps: int, seed: int
) -> tuple[Tensor, tuple[int, ...]]:
    """θ at the start, the middle and the end of a run of `steps`, and those steps; θ alone where steps < 2."""
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


def usable(problem: BilevelProblem, thetas: Tensor, tasks: Tasks) -> list[Proxy]:
    """Implicit differentiation by either solver, where it runs at every θ of shape (k, s) without an objection."""
    steps = min(max(problem.r // 4, 2), 10)

    def runs(method: Implicit) -> bool:
        try:
            method.direction(problem, thetas[0], tasks.take(slice(1)))  # most that cannot run fail here
            proxy_rows(problem, thetas, tasks, method, None, False)
        except (UfomError, UserWarning):
            return False
        return True

    # debiased, it need not be near a stationary point: how far it is shows in its D²
    every = [Implicit(solver, steps, warn_above=1e300) for solver in ("cg", "neumann")]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the Neumann series diverges")
        return [method for method in every if runs(method)]


@dataclass(frozen=True, eq=False)
class Measuring:
    """What is measured on, and how.

    Attributes:
        problem: the problem.
        tasks: the tasks; a finite Ω, or drawn ones.
        outer: how the outer steps are taken.
        batch: tasks an outer step.
        chunk, compile: as in `hypergradient`.
        most: exact gradients that the curvatures may take, by fewer tasks where there are many; None: any.
    """

    problem: BilevelProblem
    tasks: Task | Tasks
    outer: Outer
    batch: int
    chunk: int | None = None
    compile: bool = False
    most: float | None = None

    def path(
        self, thetas: Tensor, steps: tuple[int, ...], horizon: int, proxies: Sequence[Key], shortlist: Shortlist
    ) -> Path:
        """What the law of the outer steps needs at each θ of shape (k, s), for these proxies.

        Curvatures, for fixed steps, and moments by coordinate, for Adam, cost several times what plain moments do: they
        are measured for the proxies that `shortlist` names, by what the law of tuned steps says of them all.

        Raises:
            CannotTell: ‖∇M‖² is not above its noise, curvatures that do not settle, or no expected progress at this
                step.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the Neumann series")
            found = [self._moments(theta, proxies) for theta in thetas]
            for moments, step in zip(found, steps, strict=True):
                _refuse_noise(moments[proxies[0]], step)
            path = self._plain(found, steps, horizon)
            if takes_fixed_steps(self.outer):
                path = replace(path, progress=self._curved(thetas, steps, found, shortlist(path)))
            elif self.outer.kind == "adam":
                path = replace(path, progress=self._by_coordinate(thetas, shortlist(path)))
        if not (path.exact[:, 0] > 0).all():
            stuck = steps[int((path.exact[:, 0] <= 0).argmax())]
            raise CannotTell(
                f"at '{self.outer}' and a batch of {self.batch} the exact gradient itself makes no expected progress "
                f"from step {stuck} on: take smaller outer steps, or a larger batch"
            )
        return path

    def at(self, theta: Tensor, proxies: Sequence[Key]) -> Path:
        """The same at one θ by moments alone, which an exponent m asks for: ‖∇M‖² may lie within its noise."""
        return self._plain([self._moments(theta, proxies)], (0,), 1)

    def _moments(self, theta: Tensor, proxies: Sequence[Key]) -> dict[Key, MeasuredMoments]:
        return moments_by_proxy(self.problem, theta, self.tasks, proxies, chunk=self.chunk, compile=self.compile)

    def _plain(self, found: Sequence[Mapping[Key, MeasuredMoments]], steps: tuple[int, ...], horizon: int) -> Path:
        measured: dict[Key, list[Progress]] = {p: [draws(m[p], None) for m in found] for p in found[0]}
        first = [next(iter(m.values())) for m in found]
        return Path(
            self.outer, self.batch, horizon, steps, weights_of(steps, horizon), measured, measured, first=first[0],
            noiseless=all(m.noiseless for m in first), vanishes=first[0].vanishes,
        )  # fmt: skip

    def _curved(
        self, thetas: Tensor, steps: Sequence[int], found: Sequence[Mapping[Key, MeasuredMoments]], kept: Sequence[Key]
    ) -> dict[Key, list[Progress]]:
        few = self._few(len(thetas) * (5 + 6 * len(kept)))
        options: dict[str, Any] = {"chunk": self.chunk, "compile": self.compile, "settled": False}
        try:
            each = [
                curvatures(self.problem, theta, few, kept, self.outer.rate_at(step + 1), **options)
                for theta, step in zip(thetas, steps, strict=True)
            ]
        except UfomError as error:
            raise CannotTell(f"{error}; or outer = 'tuned', whose law needs no curvature") from error
        return {p: [draws(m[p], c[p]) for m, c in zip(found, each, strict=True)] for p in kept}

    def _few(self, each: int) -> Task | Tasks:
        """The first of the tasks where their curvatures, at `each` gradients a task, would take more than `most`.

        Over a whole finite Ω each direction meets all n tasks.
        """
        every = Tasks.of(self.tasks)
        n, whole = len(every), self.tasks is self.problem.tasks
        if self.most is None or n <= _LEAST_CURVED or each * n * (n if whole else 1) <= self.most:
            return self.tasks
        return every.take(slice(min(n, max(_LEAST_CURVED, int(self.most / each)))))

    def _by_coordinate(self, thetas: Tensor, kept: Sequence[Key]) -> dict[Key, list[Progress]]:
        found = [
            measure_coordinates(self.problem, theta, self.tasks, kept, DRAWS, self.chunk, self.compile)
            for theta in thetas
        ]
        return {p: [at[p] for at in found] for p in kept}


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
    more = f"give about {4 * n if square <= sem else 2 * n} tasks or more"
    if moments.tail and moments.tail.warning:
        more = moments.tail.warning
    raise CannotTell(f"‖∇M‖² = {square:.2g} ± {sem:.2g} is not above its noise{where} on {n} tasks: {more}")
