"""One inner step, one backward step and the outer gradient: plain, or traced once and compiled.

`torch.compile` cannot be differentiated twice, so what is compiled is the functional graph of the derivative itself,
traced by `make_fx`. A trace bakes in what the losses close over; it is made anew when any of that is rebound.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import cast

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ufom_runtime.convolutions import rewrite_convolutions
from ufom_runtime.derivatives import count_rows, hessian_vector_products, inner_gradient, outer_gradients
from ufom_runtime.problem import BilevelProblem, Task, parts
from ufom_theory import UfomError

Found = tuple[Tensor | None, ...]
Graph = Callable[..., Found]  # of θ, the tensors of the tasks, φ and what else the step takes


def inner_step(problem: BilevelProblem, theta: Tensor, tasks: Task, phi: Tensor, alpha: Tensor) -> Found:
    """φ − α·∂L_in/∂φ."""
    return (phi - alpha * inner_gradient(problem, theta, phi, tasks),)


def outer_step(problem: BilevelProblem, theta: Tensor, tasks: Task, phi: Tensor) -> Found:
    """∂L_out/∂θ and ∂L_out/∂φ."""
    return outer_gradients(problem, theta, phi, tasks)


def backward_step(problem: BilevelProblem, theta: Tensor, tasks: Task, phi: Tensor, alpha: Tensor, b2: Tensor) -> Found:
    """(∂²L_in/∂θ∂φ)ᵀb2 and b2 − α·(∂²L_in/∂φ²)ᵀb2."""
    h1, h2 = hessian_vector_products(problem, theta, phi, tasks, b2)
    return h1, None if h2 is None else b2 - alpha * h2


class Steps:
    """The steps of a sweep at rows of θ, shape (n, s), and their tasks; they are counted here."""

    def __init__(self, problem: BilevelProblem, theta: Tensor, tasks: Task) -> None:
        self.problem, self._theta, self._tasks = problem, theta.detach(), tasks
        if problem.compile:
            self._inputs = tuple(t.contiguous() for t in (self._theta, *parts(tasks)))
            self._alphas = torch.tensor(problem.alphas, dtype=theta.dtype, device=theta.device).unbind()
            self._baked = list(_reached((problem.inner_loss, problem.outer_loss), set()))
            self._graphs: dict[Callable[..., Found], Graph] = {}

    def inner(self, phi: Tensor, j: int) -> Tensor:
        """φ_{j+1} from φ_j, (3); j counts from 0."""
        count_rows("gradients", len(phi))
        if self.problem.compile:
            return cast(Tensor, self._run(inner_step, phi, self._alphas[j])[0])
        g = inner_gradient(self.problem, self._theta, phi, self._tasks)
        return phi.sub(g, alpha=self.problem.alphas[j])

    def outer(self, phi: Tensor) -> tuple[Tensor | None, Tensor]:
        """b1 = ∂L_out/∂θ, None where L_out is free of θ, and b2 = ∂L_out/∂φ."""
        count_rows("gradients", len(phi))
        if self.problem.compile:
            b1, b2 = self._run(outer_step, phi)
            return b1, cast(Tensor, b2)
        return outer_gradients(self.problem, self._theta, phi, self._tasks)

    def back(self, phi: Tensor, j: int, b2: Tensor) -> tuple[Tensor | None, Tensor]:
        """(∂²L_in/∂θ∂φ)ᵀb2, None where it is identically zero, and b2 − α_{j+1}(∂²L_in/∂φ²)ᵀb2, both at φ_j."""
        count_rows("hessian_vector_products", len(phi))
        if self.problem.compile:
            h1, earlier = self._run(backward_step, phi, self._alphas[j], b2)
            return h1, b2 if earlier is None else earlier
        h1, h2 = hessian_vector_products(self.problem, self._theta, phi, self._tasks, b2)
        return h1, b2 if h2 is None else b2.sub(h2, alpha=self.problem.alphas[j])

    def _run(self, step: Callable[..., Found], *state: Tensor) -> Found:
        arguments = (*self._inputs, *(t.contiguous() for t in state))
        graph = self._graphs.get(step)
        if graph is None:
            key = (step, *((t.shape, t.dtype, t.device) for t in arguments))
            baked, graph = self.problem.graphs.get(key, (None, None))
            if graph is None or not _same(baked, self._baked):
                graph = _compile(self.problem, step, isinstance(self._tasks, tuple), arguments)
                self.problem.graphs[key] = self._baked, graph
            self._graphs[step] = graph
        with torch.no_grad():
            return graph(*arguments)


def _compile(problem: BilevelProblem, step: Callable[..., Found], tupled: bool, arguments: tuple[Tensor, ...]) -> Graph:
    """The step as a compiled graph, held to the plain one; or the plain one, with a warning, where none can be made."""
    n_tasks = len(arguments) - 1 - (step.__code__.co_argcount - 3)

    @torch.enable_grad()
    def plain(theta: Tensor, *rest: Tensor) -> Found:
        tasks = rest[:n_tasks]
        return step(problem, theta, tasks if tupled else tasks[0], *rest[n_tasks:])

    expected = plain(*arguments)  # first, so that an error of the user's own comes out as it is
    present = [i for i, tensor in enumerate(expected) if tensor is not None]
    if not present:
        return plain
    try:
        # clones, since one tensor given twice would become one input of the graph
        traced = make_fx(lambda *a: [t for t in plain(*a) if t is not None])(*(t.clone() for t in arguments))
        rewrite_convolutions(traced)
        on_cuda = arguments[0].device.type == "cuda"
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the compiler says of its own parts
            if on_cuda:  # small steps are bound by their launches: CUDA graphs
                compiled = torch.compile(traced, dynamic=False, fullgraph=True, mode="reduce-overhead")
            else:  # straight to inductor: dynamo's guards, checked at every call, take a tenth of a small step
                compiled = torch._inductor.compile(traced, list(arguments))

            def graph(*a: Tensor) -> Found:
                found: list[Tensor | None] = [None] * len(expected)
                for i, tensor in zip(present, compiled(*a), strict=True):
                    found[i] = tensor.clone() if on_cuda else tensor  # a CUDA graph writes its next result there
                return tuple(found)

            found = graph(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's or the tracer's: many kinds, none of them the user's to mend here
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warnings.warn(f"the plain path is used, since the {step.__name__} cannot be compiled: {reason}", stacklevel=2)
        return plain
    for i in present:
        _hold(step, cast(Tensor, found[i]), cast(Tensor, expected[i]))
    return graph


def _hold(step: Callable[..., Found], found: Tensor, expected: Tensor) -> None:
    allowed = 10 * torch.finfo(expected.dtype).eps ** 0.5
    error = float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(expected.dtype).tiny))
    if not error <= allowed and expected.isfinite().all():
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
