"""The compiled steps of a problem: made where first used, kept with the problem, and never used when they are stale."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar, cast

import torch
from torch import Tensor

from ufom_runtime.compiled.reached import reach
from ufom_runtime.compiled.residuals import split
from ufom_runtime.compiled.trace import Found, Graph, Part, build, coarsest, difference, in_small_operations, trace
from ufom_runtime.derivatives import watch_losses
from ufom_runtime.problem import BilevelProblem, Tasks, kept
from ufom_theory import UfomError

T = TypeVar("T")
Tensors = tuple[Tensor, ...]
Step = Callable[..., Found]  # of the problem, θ, the tasks and other tensors; φ and α are the first two of these
_MOST_CHANGES = 2
_CHANGING = (
    "what the losses read outside their arguments keeps changing, and steps would be traced and compiled again each "
    "time: the plain steps are used from here on. Pass a changing number in the task or in θ, or keep it in a 0-d "
    "tensor that is changed in place (fill_)"
)


@dataclass(frozen=True)
class _Made:
    """A compiled step: what it does as a whole, the graph or the two halves that do it, and its rounding error.

    `keeps_state` says that the second half takes φ instead of residuals.
    """

    whole: Graph
    graphs: tuple[Graph, ...]
    eps: float
    keeps_state: bool = False


@dataclass(frozen=True)
class _Wanted:
    """A step that is to be compiled, and what to say where it cannot be.

    `making` traces it, asks for the compiled parts and gives what was made of them.
    """

    step: Step
    plain: Graph
    arguments: Tensors
    making: Generator[list[Part], list[Graph], _Made]
    otherwise: str


class Graphs:
    """The compiled steps at rows of θ, shape (n, s).

    A trace bakes in what the losses read outside their arguments. So all that they can reach is compared with what they
    reached when the steps were made; where it cannot be followed, each step is compared with the plain one at its first
    call here. What is stale is made anew, but no more than twice for a problem.
    """

    def __init__(self, problem: BilevelProblem, theta: Tensor, unrolled: bool) -> None:
        self._problem, self._unrolled, self._theta = problem, unrolled, theta.detach().contiguous()
        self._ready: dict[Step, _Made | None] = {}
        device = theta.device.type
        self._state = (
            torch.get_default_dtype(),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        )
        self._reached, self._graphs = (
            reach(problem.inner_loss, problem.outer_loss, problem.update),
            kept(problem, "graphs"),
        )
        self._known = kept(problem, "reached")
        if "last" in self._known and not self._known["last"].same(self._reached):
            self._forget()
        self._known["last"] = self._reached

    def run(self, step: Step, tasks: Tasks, *state: Tensor) -> Found:
        """The step, compiled; or as it is, where it cannot be or what the losses read keeps changing."""
        arguments = self._arguments(tasks, state)
        if step not in self._ready:
            self._ready[step] = self._find(step, tasks, arguments)
        made = self._ready[step]
        return made.whole(*arguments) if made else self._plain(step, tasks)(*arguments)

    def first(
        self, step: Step, tasks: Tasks, phi: Tensor, alpha: Tensor, beside: tuple[Step, Tasks]
    ) -> tuple[Tensor, list[Tensor]] | None:
        """The first half of a step of φ, α and b2 that is cut in two: the next φ, and the residuals.

        These are φ itself where the others take more bytes, unless the sweep is unrolled. None where the second
        derivative is zero, or, with a warning, where the halves cannot be made. `beside` is another step, of φ alone,
        that will be wanted: it is compiled at the same time.
        """
        if step not in self._ready:
            generator = torch.Generator().manual_seed(0)
            b2 = torch.randn(phi.shape, generator=generator, dtype=phi.dtype, device="cpu").to(phi.device)
            other = (*beside, self._arguments(beside[1], (phi,)))
            self._ready[step] = self._find(step, tasks, self._arguments(tasks, (phi, alpha, b2)), True, other)
        made = self._ready[step]
        if made is None:
            return None
        arguments = self._arguments(tasks, (phi, alpha))
        following, *residuals = made.graphs[0](*arguments)
        return cast(Tensor, following), [arguments[-2]] if made.keeps_state else cast(list[Tensor], residuals)

    def second(self, step: Step, tasks: Tasks, alpha: Tensor, b2: Tensor, residuals: list[Tensor]) -> Found:
        """The second half: what the step gives besides the next φ."""
        made = self._ready[step]
        assert made is not None
        return made.graphs[1](*self._arguments(tasks, (alpha, b2)), *residuals)

    def _arguments(self, tasks: Tasks, state: Tensors) -> Tensors:
        return (self._theta, *(t.contiguous() for t in (*tasks.parts, *state)))

    def _plain(self, step: Step, tasks: Tasks) -> Graph:
        """The step as a function of tensors alone."""
        problem, form, n = self._problem, tasks.form, 1 + len(tasks.parts)

        @torch.enable_grad()
        def plain(*tensors: Tensor) -> Found:
            with watch_losses(None):  # a trace's losses are not numbers
                return step(problem, tensors[0], Tasks(tensors[1:n], form), *tensors[n:])

        return cast(Graph, plain)

    def _find(
        self,
        step: Step,
        tasks: Tasks,
        arguments: Tensors,
        halve: bool = False,
        beside: tuple[Step, Tasks, Tensors] | None = None,
    ) -> _Made | None:
        if self._known.get("changes", 0) > _MOST_CHANGES:
            return None
        key = self._key(step, tasks, arguments, halve)
        if key not in self._graphs:
            wanted = {key: (self._in_two if halve else self._whole)(step, tasks, arguments)}
            if beside and (other := self._key(*beside)) not in self._graphs:
                with suppress(Exception):  # an error of the user's own comes out where that step is run
                    wanted[other] = self._whole(*beside)
            self._graphs.update(_compiled(wanted))
            return cast(_Made | None, self._graphs[key])
        made: _Made | None = self._graphs[key]
        if made and not self._reached.followed and _how_different(made, self._plain(step, tasks), arguments):
            self._forget()
            return self._find(step, tasks, arguments, halve, beside)
        return made

    def _key(self, step: Step, tasks: Tasks, arguments: Tensors, halve: bool = False) -> tuple[object, ...]:
        kinds = ((t.shape, t.dtype, t.device) for t in arguments)
        return (step, halve and self._unrolled, tasks.form, self._state, *kinds)

    def _forget(self) -> None:
        """Drop the steps that are stale, and whether the update uses j; after too many times, for good."""
        self._graphs.clear()
        kept(self._problem, "numbered").clear()
        self._known["changes"] = self._known.get("changes", 0) + 1
        if self._known["changes"] == _MOST_CHANGES + 1:
            warnings.warn(_CHANGING, stacklevel=2)

    def _whole(self, step: Step, tasks: Tasks, arguments: Tensors) -> _Wanted | None:
        plain = self._plain(step, tasks)
        expected = plain(*arguments)  # first, so that an error of the user's own comes out as it is
        if not any(tensor is not None for tensor in expected):
            return None

        def making() -> Generator[list[Part], list[Graph], _Made]:
            traced = trace(plain, arguments)
            (graph,) = yield [(in_small_operations(traced, arguments), arguments, expected)]
            graph(*arguments)
            return _Made(graph, (graph,), coarsest(traced, arguments))

        otherwise = f"the plain path is used, since the {step.__name__} cannot be compiled"
        return _Wanted(step, plain, arguments, making(), otherwise)

    def _in_two(self, step: Step, tasks: Tasks, arguments: Tensors) -> _Wanted | None:
        *inputs, phi, alpha, b2 = arguments
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(phi.shape, generator=generator, dtype=phi.dtype, device="cpu").to(phi.device)
        # any state will do; but since the halves are compared with the plain step there, let it not be a special one;
        # upwards and by little, since it may hold means of squares and a count of steps
        given = (*inputs, phi + 0.01 * noise.abs(), alpha, b2)
        plain = self._plain(step, tasks)
        expected = plain(*given)
        if not any(tensor is not None for tensor in expected[1:]):
            return None

        def making() -> Generator[list[Part], list[Graph], _Made]:
            traced = trace(plain, given)
            most = math.inf if self._unrolled else phi.nbytes
            first, second, keeps_state = split(in_small_operations(traced, given), most)
            with torch.no_grad():
                residuals = given[-3:-2] if keeps_state else first(*given[:-1])[1:]
            later = (*inputs, alpha, b2, *residuals)
            forward, backward = yield [(first, given[:-1], None), (second, later, expected[1:])]

            def whole(*tensors: Tensor) -> Found:
                following, *residuals = forward(*tensors[:-1])
                record = tensors[-3:-2] if keeps_state else cast(list[Tensor], residuals)
                return (following, *backward(*tensors[:-3], *tensors[-2:], *record))

            return _Made(whole, (forward, backward), coarsest(traced, given), keeps_state)

        otherwise = "no residuals are kept, since the steps cannot be traced and compiled together"
        return _Wanted(step, plain, given, making(), otherwise)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pauses the garbage collector, which would look through all that is loaded and traced again and again."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@_without_collections()
def _compiled(wanted: dict[T, _Wanted | None]) -> dict[T, _Made | None]:
    """Steps compiled at the same time; each does what the plain one does, else `UfomError`."""
    traced = {k: parts for k, w in wanted.items() if w and (parts := _attempt(partial(next, w.making), w.otherwise))}
    graphs: dict[T, list[Graph]] = {}
    if len(traced) > 1:
        with suppress(Exception):  # one of them cannot be compiled: which one is seen where each is compiled alone
            built = iter(build(*chain(*traced.values())))
            graphs = {k: [next(built) for _ in parts] for k, parts in traced.items()}
    found: dict[T, _Made | None] = dict.fromkeys(wanted)
    for key, parts in traced.items():
        w = cast(_Wanted, wanted[key])
        made = found[key] = _attempt(partial(_finished, w, parts, graphs.get(key)), w.otherwise)
        if made and (how := _how_different(made, w.plain, w.arguments)):
            name = w.step.__name__
            raise UfomError(f"the compiled {name} differs from the plain one {how}: leave compile=False here")
    return found


def _finished(wanted: _Wanted, parts: list[Part], graphs: list[Graph] | None) -> _Made:
    try:
        wanted.making.send(graphs or build(*parts))
    except StopIteration as stop:
        return cast(_Made, stop.value)
    raise AssertionError


def _how_different(made: _Made, plain: Graph, arguments: Tensors) -> str:
    return difference(made.whole(*arguments), plain, arguments, made.eps)


def _attempt(make: Callable[[], T], otherwise: str) -> T | None:
    """What is made, or None and a warning: of the compiler's or the tracer's errors none is the user's to mend here."""
    try:
        return make()
    except torch.OutOfMemoryError:
        raise
    except Exception as raised:
        error: BaseException = raised
        while error.__cause__ is not None:
            error = error.__cause__
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warnings.warn(f"{otherwise}: {reason}", stacklevel=2)
        return None
