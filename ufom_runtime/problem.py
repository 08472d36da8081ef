"""The problem (2)–(4): losses, start, step sizes and tasks, as functions of flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor

from ufom_runtime.inner import Update
from ufom_runtime.inspection.trial import draw_apart
from ufom_runtime.tasks import Task as Task
from ufom_runtime.tasks import Tasks as Tasks
from ufom_theory import UfomError
from ufom_theory.checks import instance, integer, scalar

Loss = Callable[[Tensor, Tensor, Task], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class BilevelProblem:
    """min_θ E_T L_out(θ, φ_r, T), where φ_0 = V(θ, T) and φ_j = φ_{j−1} − α_j·∂L_in/∂φ(θ, φ_{j−1}, T); (2)–(4).

    With an `update`, φ_j is what it makes of φ_{j−1}, its own state and ∂L_in/∂φ.

    The functions see one θ of shape (s,), one φ of shape (p,) and one task; batches are made around them by
    `torch.func.vmap`, so they must be written in torch, deterministic, and free of data-dependent branches.

    Attributes:
        inner_loss: L_in(θ, φ, T), a scalar.
        outer_loss: L_out(θ, φ, T), a scalar.
        start: V(θ, T), shape (p,).
        step_sizes: α_1 … α_r, shape (r,), copied to float64 on the CPU. Give floats or a float64 tensor: a float32 0.01
            is off by 2e-8, and stays so. They are constants; for learnt ones give an `update`, and `steps`.
        sample_tasks: draws n tasks, stacked in the leading dimension, from a CPU generator. If None, tasks are drawn
            from `tasks` with equal probabilities. Before tasks that were not drawn by `sample` are used, one task may
            be drawn to see how many dimensions a stack has.
        tasks: the finite, equally likely Ω, if the problem has one: expectations are then exact sums.
        initial: θ where training starts, shape (s,), or several worth measuring at, shape (k, s); optional. Where it is
            given, θ of another length is refused.
        update: the inner update, as those of `ufom_runtime.inner`; None: gradient descent with `step_sizes`.
        steps: r, the number of inner steps, with an `update`.
        inner_batch: (task, j) → the task that inner step j = 1 … r sees, such as its mini-batch, of one shape for all
            j. The start and the outer loss see the whole task.
        compile: refused; pass compile=True to the call, as `hypergradient(..., compile=True)`.

    >>> def loss(theta, phi, task):
    ...     return (phi - theta * task).square().sum()
    >>> BilevelProblem(loss, loss, start=lambda theta, task: theta, step_sizes=[0.1] * 10, tasks=torch.ones(4, 3))
    BilevelProblem(r = 10, 4 tasks)

    Raises:
        UfomError: step sizes that are not r ≥ 1 finite numbers > 0 or that require a gradient; both or neither of them
            and of `update` with `steps` ≥ 1; neither `sample_tasks` nor `tasks`; an `initial` that is not a finite
            floating-point tensor of one of these shapes.
    """

    inner_loss: Loss
    outer_loss: Loss
    start: Callable[[Tensor, Task], Tensor]
    step_sizes: Tensor | Sequence[float] | None = None
    sample_tasks: Callable[[int, Generator], Task] | None = None
    tasks: Task | None = None
    initial: Tensor | None = None
    update: Update | None = None
    steps: int | None = None
    inner_batch: Callable[[Task, int], Task] | None = None
    compile: InitVar[bool] = False

    def __post_init__(self, compile: bool) -> None:
        if compile:
            raise UfomError(
                "compile is how a problem is run, not a part of it: pass compile=True to the call, as "
                "hypergradient(problem, theta, tasks, estimator, compile=True)"
            )
        if self.update is None:
            object.__setattr__(self, "step_sizes", self._checked_step_sizes())
        else:
            self._check_update()
        if self.tasks is not None:
            Tasks.of(self.tasks)
        elif self.sample_tasks is None:
            raise UfomError("the problem has no tasks: give sample_tasks, or the finite set of tasks")
        if self.initial is not None:
            finite_theta("initial", self.initial, (1, 2))

    def _checked_step_sizes(self) -> Tensor:
        if self.steps is not None:
            raise UfomError("steps is for an inner update; r is the number of step_sizes: leave steps out")
        if self.step_sizes is None:
            raise UfomError("the inner loop has no steps: give step_sizes, or an update and the number of its steps")
        given = self.step_sizes if isinstance(self.step_sizes, list | tuple) else (self.step_sizes,)
        if any(isinstance(alpha, Tensor) and alpha.requires_grad for alpha in given):
            raise UfomError(
                "step_sizes require a gradient, but they are constants here: give step_sizes.detach(); to learn a "
                "rate, make it a part of θ, update=sgd(lr=lambda theta: theta[-1].exp())"
            )
        try:
            alphas = torch.as_tensor(self.step_sizes, dtype=torch.float64, device="cpu").clone()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UfomError(f"step_sizes = {self.step_sizes!r}: give α_1 … α_r as floats or as a tensor") from error
        if alphas.ndim != 1 or not len(alphas):
            raise UfomError(f"step_sizes have shape {tuple(alphas.shape)}: give α_1 … α_r, shape (r,) with r ≥ 1")
        bad = alphas[~(torch.isfinite(alphas) & (alphas > 0))]
        if len(bad):
            raise UfomError(f"step size α = {bad[0].item():g} must be a finite number > 0")
        return alphas

    def _check_update(self) -> None:
        if self.step_sizes is not None:
            raise UfomError("both step_sizes and an update are given: rates are the update's, as in momentum(lr=0.1)")
        for name in ("init", "update"):
            if not callable(getattr(self.update, name, None)):
                raise UfomError(
                    f"update = {self.update!r} has no function {name}: give an update of ufom_runtime.inner, or an "
                    "object with init(theta, phi, task) and update(theta, phi, state, grad, task, j)"
                )
        if self.steps is None:
            raise UfomError("an update needs the number of inner steps: give steps=")
        scalar("steps, the number of inner steps,", self.steps, integer, 1)

    def __repr__(self) -> str:
        of = "tasks drawn by sample_tasks" if self.tasks is None else f"{len(Tasks.of(self.tasks))} tasks"
        s = "" if self.initial is None else f", s = {self.initial.shape[-1]}"
        return f"{type(self).__name__}(r = {self.r}{s}, {of})"

    @property
    def r(self) -> int:
        """Number of inner steps."""
        return len(self.alphas) if self.steps is None else self.steps

    @cached_property
    def alphas(self) -> tuple[float, ...]:
        """α_1 … α_r as Python floats, so that a step costs no transfer between devices.

        Raises:
            UfomError: an inner update takes the steps.
        """
        if self.step_sizes is None:
            raise UfomError("the steps of this problem are taken by its inner update, which has no step_sizes")
        return tuple(torch.as_tensor(self.step_sizes, device="cpu").tolist())

    def cut(self, steps: int) -> BilevelProblem:
        """The same problem with the first `steps` inner steps alone."""
        if self.update is None:
            return replace(self, step_sizes=self.alphas[:steps])
        bare = SimpleNamespace(  # whose rates are not checked again
            init=self.update.init, update=self.update.update, held_identity=held_identity(self)
        )
        return replace(self, update=cast(Update, bare), steps=steps)

    def sample(self, n: int, generator: Generator) -> Task:
        """Draw n ≥ 1 tasks from a CPU `generator`, stacked in the leading dimension; else `UfomError`."""
        if n < 1:
            raise UfomError(f"n = {n} tasks were asked for: give n ≥ 1")
        cpu_generator(generator)
        if self.sample_tasks is not None:
            try:
                tasks = self.sample_tasks(n, generator)
            except (UfomError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # it is the user's function
                said = f"{type(error).__name__}: {error}"
                raise UfomError(f"sample_tasks(n, generator) failed for n = {n}: {said}") from error
            stack = Tasks.of(tasks)
            if len(stack) != n:
                raise UfomError(
                    f"sample_tasks returned {len(stack)} task(s) where n = {n} were asked for: stack n of them"
                )
            kept(self, "ranks")["of a stack"] = stack.ranks
            return tasks
        assert self.tasks is not None
        known = Tasks.of(self.tasks)
        return known.take(torch.randint(len(known), (n,), generator=generator, device="cpu")).stack


_KEPT: WeakKeyDictionary[object, dict[str, dict[Any, Any]]] = WeakKeyDictionary()


def kept(problem: object, kind: str) -> dict[Any, Any]:
    """What is found once about a problem and kept as long as it lives: compiled steps, passed checks, bytes of a row.

    One dictionary for each kind, empty at first; no value in it may refer to the problem.
    """
    return _KEPT.setdefault(problem, {}).setdefault(kind, {})


def one_theta(problem: BilevelProblem) -> Tensor:
    """The problem's θ, of several the first; `UfomError` where it names none."""
    if problem.initial is None:
        raise UfomError("the problem names no θ: give BilevelProblem(initial=...)")
    return problem.initial if problem.initial.ndim == 1 else problem.initial[0]


def refuse_update(problem: BilevelProblem, what: str, why: str) -> None:
    """`UfomError` where the inner loop is not plain gradient descent on all of each task."""
    instance("problem", problem, BilevelProblem, "give the problem itself")
    if problem.update is not None or problem.inner_batch is not None:
        named = "an inner update" if problem.update is not None else "other data at each inner step"
        raise UfomError(f"{what} cannot be used with {named}: {why}")


def held_identity(problem: BilevelProblem) -> bool:
    """Whether the inner step, its gradient held constant, has the identity for a Jacobian and no θ in it."""
    return problem.update is None or bool(getattr(problem.update, "held_identity", False))


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or ±inf; by its extremes, in one pass, which `isfinite` needs several for."""
    return all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor))


def finite_theta(name: str, theta: Tensor, dimensions: tuple[int, ...]) -> None:
    """Refuse what is not a finite, floating-point, non-empty tensor of one of the given numbers of dimensions."""
    shapes = " or ".join({1: "one vector, (s,),", 2: "several, (k, s)"}[d] for d in dimensions).rstrip(",")
    if not isinstance(theta, Tensor) or not theta.is_floating_point():
        kind = f"of {theta.dtype}" if isinstance(theta, Tensor) else f"a {type(theta).__name__}"
        raise UfomError(f"{name} is {kind}: give a tensor of floating-point numbers, {shapes}")
    if theta.ndim not in dimensions:
        raise UfomError(f"{name} has shape {tuple(theta.shape)}: give {shapes}; theta.flatten() makes one of it")
    if not theta.numel():
        raise UfomError(f"{name} has shape {tuple(theta.shape)}, which is empty: give at least one outer parameter")
    if not all_finite(theta):
        raise UfomError(f"{name} holds NaN or ±inf: give finite outer parameters")


def check(problem: BilevelProblem, theta: Tensor, tasks: Task | Tasks, dimensions: tuple[int, ...] = (1,)) -> Tasks:
    """The tasks as a stack; refused are a bad θ (of another length than `problem.initial`, too) and bad tasks."""
    instance("problem", problem, BilevelProblem, "write BilevelProblem(inner_loss=..., outer_loss=..., start=..., ...)")
    if isinstance(theta, Tensor) and theta.device.type == "meta":
        raise UfomError("theta is on the meta device, which holds no numbers: make it on cpu or cuda")
    finite_theta("theta", theta, dimensions)
    if problem.initial is not None and theta.shape[-1] != problem.initial.shape[-1]:
        raise UfomError(f"theta has {theta.shape[-1]} parameters, but problem.initial {problem.initial.shape[-1]}")
    if torch.is_inference_mode_enabled():
        raise UfomError("torch.inference_mode() forbids derivatives: leave it, or use torch.no_grad()")
    if theta.is_inference():
        raise UfomError("theta was made in torch.inference_mode(), so it has no derivatives: give theta.clone()")
    stack = Tasks.of(tasks)
    for tensor in stack.parts:
        if tensor.device != theta.device:
            raise UfomError(f"theta is on {theta.device} but a task on {tensor.device}: move both to one device")
    if stack is not tasks:
        _refuse_other_ranks(problem, stack)
    return stack


def _refuse_other_ranks(problem: BilevelProblem, stack: Tasks) -> None:
    """Refuse a single task, not stacked: losses that take any number of examples would take each for a task."""
    known = kept(problem, "ranks")
    if "of a stack" not in known:
        example = problem.tasks if problem.tasks is not None else draw_apart(problem.sample_tasks)
        try:
            known["of a stack"] = Tasks.of(example).ranks
        except UfomError:  # sample_tasks draws nothing: there is nothing to compare with
            known["of a stack"] = None
    ranks = known["of a stack"]
    if ranks in (None, stack.ranks) or len(ranks) != len(stack.ranks):
        return
    shapes = ", ".join(str(tuple(t.shape)) for t in stack.parts)
    if all(given == rank - 1 for given, rank in zip(stack.ranks, ranks, strict=True)):
        raise UfomError(
            f"the tasks are a single one, not a stack: shapes {shapes}, but a stack of the problem has {ranks} "
            "dimensions; give tasks[:1] of a stack, or t[None] for every tensor t"
        )
    raise UfomError(
        f"the tasks have shapes {shapes}, but a stack of the problem (by its tasks or sample_tasks) has {ranks} "
        "dimensions: give tasks of the same form, one leading dimension for the tasks"
    )


def cpu_generator(generator: Generator | None) -> None:
    """Refuse what is not a CPU generator: tasks and coins are drawn there, and moved."""
    if generator is None:
        raise UfomError(
            "no generator is given to what draws: pass generator=torch.Generator(), which must be a CPU one; as UFOM's "
            "proxy take a method that does not draw"
        )
    if not isinstance(generator, Generator) or generator.device.type != "cpu":
        raise UfomError("the generator must be a CPU one, torch.Generator(): what is drawn is moved to θ's device")
