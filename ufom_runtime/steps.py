"""One inner step, one backward step and the outer gradient: plain, or traced once and compiled.

`torch.compile` cannot be differentiated twice, so what is compiled is the functional graph of the derivative itself,
traced by `make_fx`. A trace bakes in what the losses close over; it is made anew when any of that is rebound.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ufom_runtime.compiled.convolutions import rewrite_convolutions
from ufom_runtime.compiled.residuals import split
from ufom_runtime.derivatives import (
    count_rows,
    gradient_and_products,
    hessian_vector_products,
    inner_gradient,
    outer_gradients,
)
from ufom_runtime.kept import kept
from ufom_runtime.problem import BilevelProblem, Form, Tasks
from ufom_theory import UfomError

T = TypeVar("T")
Found = tuple[Tensor | None, ...]
Graph = Callable[..., Found]  # of θ, the tensors of the tasks, φ and what else the step takes
Record = Tensor | list[Tensor]
"""What is kept of an inner step for its backward step: its state, or a compiled step's residuals."""


def inner_step(problem: BilevelProblem, theta: Tensor, tasks: Tasks, phi: Tensor, alpha: Tensor) -> Found:
    """φ − α·∂L_in/∂φ."""
    return (phi - alpha * inner_gradient(problem, theta, phi, tasks),)


def outer_step(problem: BilevelProblem, theta: Tensor, tasks: Tasks, phi: Tensor) -> Found:
    """∂L_out/∂θ and ∂L_out/∂φ."""
    return outer_gradients(problem, theta, phi, tasks)


def backward_step(
    problem: BilevelProblem, theta: Tensor, tasks: Tasks, phi: Tensor, alpha: Tensor, b2: Tensor
) -> Found:
    """(∂²L_in/∂θ∂φ)ᵀb2 and b2 − α·(∂²L_in/∂φ²)ᵀb2."""
    h1, h2 = hessian_vector_products(problem, theta, phi, tasks, b2)
    return h1, None if h2 is None else b2 - alpha * h2


def joint_step(problem: BilevelProblem, theta: Tensor, tasks: Tasks, phi: Tensor, alpha: Tensor, b2: Tensor) -> Found:
    """An inner step and its backward step from one gradient: φ − α·∂L_in/∂φ, and what `backward_step` gives."""
    g, h1, h2 = gradient_and_products(problem, theta, phi, tasks, b2)
    return phi - alpha * g, h1, None if h2 is None else b2 - alpha * h2


class Steps:
    """The steps of a sweep at rows of θ, shape (n, s), and their tasks; they are counted here.

    With `compile` they are traced and compiled where they are first used; with `unrolled`, `record` then keeps a step's
    residuals, whatever their size.
    """

    def __init__(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, unrolled: bool = False, compile: bool = False
    ) -> None:
        self.problem, self._theta, self._tasks, self._unrolled = problem, theta.detach(), tasks, unrolled
        self._compile = compile
        if compile:
            self._inputs = tuple(t.contiguous() for t in (self._theta, *tasks.parts))
            self._alphas = torch.tensor(problem.alphas, dtype=theta.dtype, device=theta.device).unbind()
            self._baked = list(_reached((problem.inner_loss, problem.outer_loss), set()))
            self._made: dict[object, Any] = {}

    def inner(self, phi: Tensor, j: int) -> Tensor:
        """φ_{j+1} from φ_j, (3); j counts from 0."""
        count_rows("gradients", len(phi))
        if self._compile:
            return cast(Tensor, self._run(inner_step, phi, self._alphas[j])[0])
        g = inner_gradient(self.problem, self._theta, phi, self._tasks)
        return phi.sub(g, alpha=self.problem.alphas[j])

    def record(self, phi: Tensor, j: int) -> tuple[Tensor, Record]:
        """φ_{j+1} from φ_j, and what `back` will need of this step.

        That is φ_j; or a compiled step's residuals, if they take no more bytes than φ_j or the sweep is unrolled.
        """
        if self._compile:
            arguments = (*self._inputs, phi.contiguous(), self._alphas[j])
            if halves := self._once(joint_step, arguments):
                count_rows("gradients", len(phi))
                following, *residuals = halves[0](*arguments)
                return cast(Tensor, following), residuals
        return self.inner(phi, j), phi

    def outer(self, phi: Tensor) -> tuple[Tensor | None, Tensor]:
        """b1 = ∂L_out/∂θ, None where L_out is free of θ, and b2 = ∂L_out/∂φ."""
        count_rows("gradients", len(phi))
        if self._compile:
            b1, b2 = self._run(outer_step, phi)
            return b1, cast(Tensor, b2)
        return outer_gradients(self.problem, self._theta, phi, self._tasks)

    def back(self, record: Record, j: int, b2: Tensor) -> tuple[Tensor | None, Tensor]:
        """(∂²L_in/∂θ∂φ)ᵀb2, None where it is identically zero, and b2 − α_{j+1}(∂²L_in/∂φ²)ᵀb2, both at φ_j.

        `record` is φ_j, or what `record` kept of the step from it.
        """
        count_rows("hessian_vector_products", len(b2))
        if not self._compile:
            h1, h2 = hessian_vector_products(self.problem, self._theta, cast(Tensor, record), self._tasks, b2)
            return h1, b2 if h2 is None else b2.sub(h2, alpha=self.problem.alphas[j])
        if isinstance(record, Tensor):
            h1, earlier = self._run(backward_step, record, self._alphas[j], b2)
        else:
            backward = self._made[joint_step][1]
            h1, earlier = backward(*self._inputs, self._alphas[j], b2.contiguous(), *record)
        return h1, b2 if earlier is None else earlier

    def _run(self, step: Callable[..., Found], *state: Tensor) -> Found:
        arguments = (*self._inputs, *(t.contiguous() for t in state))
        return cast(Found, self._once(step, arguments)(*arguments))

    def _once(self, step: Callable[..., Found], arguments: tuple[Tensor, ...]) -> Any:
        """The compiled step, or the joint step's halves; kept with the problem while a trace would be the same."""
        if step not in self._made:
            joint, form = step is joint_step, self._tasks.form
            key = (step, joint and self._unrolled, form, *((t.shape, t.dtype, t.device) for t in arguments))
            graphs = kept(self.problem, "graphs")
            baked, made = graphs.get(key, (None, None))
            if baked is None or not _same(baked, self._baked):
                if joint:
                    made = _compile_halves(self.problem, form, arguments, self._unrolled)
                else:
                    made = _compile(self.problem, step, form, arguments)
                graphs[key] = self._baked, made
            self._made[step] = made
        return self._made[step]


def _compile(problem: BilevelProblem, step: Callable[..., Found], form: Form, arguments: tuple[Tensor, ...]) -> Graph:
    """The step as a compiled graph, held to the plain one; or the plain one, with a warning, where none can be made."""
    plain = _plain(problem, step, form, arguments)
    expected = plain(*arguments)  # first, so that an error of the user's own comes out as it is
    if not any(tensor is not None for tensor in expected):
        return plain

    def compiled() -> tuple[Graph, Found]:
        graph = _built(_traced(plain, arguments), arguments, expected)
        return graph, graph(*arguments)

    made = _attempt(compiled, f"the plain path is used, since the {step.__name__} cannot be compiled")
    if made is None:
        return plain
    _hold(step, made[1], expected)
    return made[0]


def _compile_halves(
    problem: BilevelProblem, form: Form, arguments: tuple[Tensor, ...], unrolled: bool
) -> tuple[Graph, Graph] | None:
    """The joint step's two halves as compiled graphs, held to the plain ones; None where the state is to be kept.

    That is, where the residuals take more bytes than it, unless the sweep is unrolled; where no second derivative is;
    and, with a warning, where they cannot be made.
    """
    *inputs, phi, alpha = arguments
    generator = torch.Generator().manual_seed(0)
    noise, b2 = (
        torch.randn(phi.shape, generator=generator, dtype=phi.dtype, device="cpu").to(phi.device) for _ in range(2)
    )
    # any φ and b2 will do; but since the halves are held to the plain step there, let them be no special ones
    phi = phi + 0.01 * (1 + phi.abs()) * noise
    given = (*inputs, phi, alpha, b2)
    plain = _plain(problem, joint_step, form, given)
    expected = plain(*given)
    if not any(tensor is not None for tensor in expected[1:]):
        return None

    def compiled() -> tuple[tuple[Graph, Graph], Found] | None:
        first, second, size = split(_small(_traced(plain, given), given))
        if size > phi.nbytes and not unrolled:
            return None
        forward = _built(first, given[:-1])
        following, *residuals = forward(*given[:-1])
        passed = (*inputs, alpha, b2, *cast(list[Tensor], residuals))
        backward = _built(second, passed, expected[1:])
        return (forward, backward), (following, *backward(*passed))

    made = _attempt(compiled, "no residuals are kept, since the steps cannot be traced and compiled together")
    if made is None:
        return None
    _hold(joint_step, made[1], expected)
    return made[0]


def _plain(
    problem: BilevelProblem, step: Callable[..., Found], form: Form, arguments: tuple[Tensor, ...]
) -> Callable[..., Found]:
    """The step as a function of tensors alone."""
    n_tasks = len(arguments) - 1 - (step.__code__.co_argcount - 3)

    @torch.enable_grad()
    def plain(theta: Tensor, *rest: Tensor) -> Found:
        return step(problem, theta, Tasks(rest[:n_tasks], form), *rest[n_tasks:])

    return cast(Callable[..., Found], plain)


def _traced(plain: Callable[..., Found], arguments: tuple[Tensor, ...]) -> GraphModule:
    """What the function does, without what it gives None for."""
    # clones, since one tensor given twice would become one input of the graph
    traced = make_fx(lambda *a: [t for t in plain(*a) if t is not None])(*(t.clone() for t in arguments))
    rewrite_convolutions(traced)
    return traced


def _small(traced: GraphModule, arguments: tuple[Tensor, ...]) -> GraphModule:
    """The same in the compiler's own small operations, most of which are cheap to repeat, and none of them in place."""
    from torch._inductor.decomposition import select_decomp_table

    pure = torch.func.functionalize(traced, remove="mutations")
    return make_fx(pure, decomposition_table=select_decomp_table())(*(t.clone() for t in arguments))


def _built(traced: GraphModule, arguments: tuple[Tensor, ...], like: Found | None = None) -> Graph:
    """The trace, compiled, with None again where `like` has it."""
    present = None if like is None else [tensor is not None for tensor in like]
    on_cuda = arguments[0].device.type == "cuda"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler says of its own parts
        if on_cuda:  # small steps are bound by their launches: CUDA graphs
            compiled = torch.compile(traced, dynamic=False, fullgraph=True, mode="reduce-overhead")
            compiled(*arguments)  # compiles it
        else:  # straight to inductor: dynamo's guards, checked at every call, take a tenth of a small step
            compiled = torch._inductor.compile(traced, list(arguments))

    @torch.no_grad()
    def graph(*a: Tensor) -> Found:
        found = compiled(*a)
        if on_cuda:  # a CUDA graph writes its next result into these
            found = [t.clone() for t in found]
        if present is None:
            return tuple(found)
        given = iter(found)
        return tuple(next(given) if there else None for there in present)

    return cast(Graph, graph)


def _attempt(make: Callable[[], T], otherwise: str) -> T | None:
    """What is made, or None and a warning: of the compiler's or the tracer's errors none is the user's to mend here."""
    try:
        return make()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warnings.warn(f"{otherwise}: {reason}", stacklevel=2)
        return None


def _hold(step: Callable[..., Found], found: Found, expected: Found) -> None:
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            continue
        allowed = 10 * torch.finfo(b.dtype).eps ** 0.5
        error = float((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))
        if not error <= allowed and b.isfinite().all():
            raise UfomError(
                f"the compiled {step.__name__} differs from the plain one by {error:.2g} of its norm, more than "
                f"{allowed:.2g}: leave compile=False for this problem"
            )


_VALUES = (int, float, complex, str, bytes)  # compared as such, all else by identity


def _reached(value: object, met: set[int]) -> Iterator[object]:
    """What a trace of the functions in `value` may bake in, as reached by closures, globals and attributes.

    Classes, modules, and torch's and numpy's functions are taken as they are.
    """
    if isinstance(value, _VALUES):
        yield value
        return
    if id(value) in met:
        return
    met.add(id(value))
    inside: Iterable[object] = ()
    if isinstance(value, tuple | list):
        inside = value
    elif isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, MethodType):
        inside = (value.__func__, value.__self__)
    elif isinstance(value, partial):
        inside = (value.func, value.args, value.keywords)
    else:
        yield value
        if isinstance(value, FunctionType):
            if value.__module__.partition(".")[0] not in ("torch", "numpy"):
                cells = (cell.cell_contents for cell in value.__closure__ or ())
                named = (value.__globals__[n] for n in _names(value.__code__) if n in value.__globals__)
                inside = (*cells, *named, value.__defaults__, value.__kwdefaults__)
        elif hasattr(value, "__dict__") and not isinstance(value, Tensor | BilevelProblem | ModuleType | type):
            methods = (f for f in vars(type(value)).values() if isinstance(f, FunctionType))
            inside = (*vars(value).values(), *methods)
    for item in inside:
        yield from _reached(item, met)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _same(old: list[object], new: list[object]) -> bool:
    """Whether the same objects are reached; numbers and text are compared by value."""
    return len(old) == len(new) and all(
        a is b or (type(a) is type(b) and isinstance(a, _VALUES) and a == b) for a, b in zip(old, new, strict=True)
    )
