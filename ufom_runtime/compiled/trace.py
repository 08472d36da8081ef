"""A function of tensors as a graph of small operations, compiled, and compared with the function itself."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from ufom_runtime.compiled.cache import keep_privately
from ufom_runtime.compiled.convolutions import rewrite_convolutions
from ufom_runtime.compiled.kernels import built_together
from ufom_runtime.inspection import tf32

Found = tuple[Tensor | None, ...]
Graph = Callable[..., Found]  # of tensors
Part = tuple[GraphModule, Sequence[Tensor], Found | None]  # a trace, its arguments, and what its results are like
_NUMBERS = {"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__index__", "__bool__", "__complex__"}


class NotTraceable(Exception):
    """What a trace would bake in without a sign of it."""


class _NoNumbers(TorchFunctionMode):
    """Refuses to take the numbers out of a tensor: a trace would keep those of the first call."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _NUMBERS:
            raise NotTraceable(f"a loss reads numbers out of a tensor ({name}), which a trace would never read again")
        return function(*args, **(kwargs or {}))


def trace(function: Callable[..., Found], arguments: Sequence[Tensor]) -> GraphModule:
    """The graph of a function, without what it gives None for.

    It is made without the numbers of the arguments, so that none of them can get into it.

    Raises:
        NotTraceable: numbers taken out of a tensor, or a result whose shape depends on them.
    """

    def present(*given: Tensor) -> list[Tensor]:
        with _NoNumbers():
            return [t for t in function(*given) if t is not None]

    traced = _make(present, arguments)
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) or any(isinstance(n, torch.SymInt) for n in getattr(value, "shape", ())):
            raise NotTraceable(f"the shape of {node.target} depends on the numbers in a tensor (a mask as an index?)")
    rewrite_convolutions(traced)
    return traced


def differ(functions: Sequence[Callable[..., Found]], arguments: Sequence[Tensor]) -> bool:
    """Whether functions of the same arguments have different traces, or one that cannot be made."""
    try:
        first, *others = (trace(function, arguments) for function in functions)
    except Exception:  # of the user's function, or of the tracer
        return True
    held = _constants(first)
    for other in others:
        constants = _constants(other)
        if other.code != first.code or not all(torch.equal(t, constants[name]) for name, t in held.items()):
            return True
    return False


def _constants(traced: GraphModule) -> dict[str, Tensor]:
    """The tensors that a trace found outside its arguments."""
    names = [str(node.target) for node in traced.graph.nodes if node.op == "get_attr"]
    return {name: getattr(traced, name) for name in names}


def in_small_operations(traced: GraphModule, arguments: Sequence[Tensor]) -> GraphModule:
    """The same in the compiler's own small operations, most of which are cheap to repeat, and none of them in place."""
    from torch._inductor.decomposition import select_decomp_table

    pure, table = torch.func.functionalize(traced, remove="mutations"), select_decomp_table()
    try:
        return _make(pure, arguments, decomposition_table=table)
    except AttributeError:  # that of max-pooling looks up the lowerings without importing them, which takes seconds
        importlib.import_module("torch._inductor.lowering")
        return _make(pure, arguments, decomposition_table=table)


def _make(function: Callable[..., Any], arguments: Sequence[Tensor], **options: Any) -> GraphModule:
    # clones, since one tensor given twice would become one input of the graph
    made = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True, **options)
    return made(*(t.clone() for t in arguments))


def coarsest(traced: GraphModule, arguments: Sequence[Tensor]) -> float:
    """The largest rounding error, relative, of the floating-point types that the graph computes in."""
    values = [*arguments, *(node.meta.get("val") for node in traced.graph.nodes)]
    kinds = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
    eps = max(torch.finfo(kind).eps for kind in kinds)
    return max(eps, tf32.EPS) if arguments[0].is_cuda and torch.float32 in kinds and tf32.used_by(traced) else eps


def build(*wanted: Part) -> list[Graph]:
    """Traces, compiled at the same time; with None again where what it is like has it."""
    device = wanted[0][1][0].device
    generators = torch.random.fork_rng([device] if device.type == "cuda" else [])  # the compiler may draw
    with torch.no_grad(), _uncast(device)(), generators, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the compiler's own parts
        keep_privately()
        if device.type == "cuda":  # small steps are bound by their launches: CUDA graphs
            compiled = [_with_cuda_graphs(traced, arguments) for traced, arguments, _ in wanted]
        else:  # straight to inductor: dynamo's guards, checked at every call, take a tenth of a small step
            try:
                with built_together():
                    compiled = [by_inductor(traced, arguments) for traced, arguments, _ in wanted]
            except Exception:  # of a torch whose inductor builds its kernels in another way: let it
                compiled = [by_inductor(traced, arguments) for traced, arguments, _ in wanted]
    return [_completed(graph, device, like) for graph, (_, _, like) in zip(compiled, wanted, strict=True)]


def _completed(function: Callable[..., Sequence[Tensor]], device: torch.device, like: Found | None) -> Graph:
    """What a trace gives, without autograd and autocast, with None again where `like` has it."""
    present = None if like is None else [tensor is not None for tensor in like]
    uncast = _uncast(device)

    @torch.no_grad()
    def graph(*given: Tensor) -> Found:
        with uncast():
            found = function(*given)
        if device.type == "cuda":  # a CUDA graph writes its next result into these
            found = [t.clone() for t in found]
        if present is None:
            return tuple(found)
        left = iter(found)
        return tuple(next(left) if there else None for there in present)

    return graph


def _uncast(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Switches autocast off where it is on: its casts are in a trace already."""
    on = torch.is_autocast_enabled(device.type)
    return partial(torch.autocast, device.type, enabled=False) if on else nullcontext


def _with_cuda_graphs(traced: GraphModule, arguments: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    compiled: Callable[..., list[Tensor]] = torch.compile(traced, dynamic=False, fullgraph=True, mode="reduce-overhead")
    compiled(*arguments)  # compiles it
    return compiled


def by_inductor(traced: GraphModule, arguments: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """What is in small operations, compiled, or found in inductor's cache.

    The cache keeps what has a shape environment, though no shape here varies. `torch._inductor.compile` would trace the
    graph again, and load its patterns of attention, before it came to the same.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    shapes: list[Any] = [fake.from_tensor(t, static_shapes=True) for t in arguments]
    results = traced.graph.output_node()
    results.meta["user_visible_output_idxs"] = range(len(cast(Any, results.args[0])))  # whose strides are to be kept
    with tracing(TracingContext(fake)), V.set_fake_mode(fake):
        compiled: Any = compile_fx_inner(traced, shapes, is_inference=True)
    return lambda *given: cast(list[Tensor], compiled([*given]))  # it empties the list


def difference(found: Found, plain: Graph, arguments: Sequence[Tensor], eps: float) -> str:
    """How far results are from those of the plain function, in words; empty where rounding explains it.

    That is up to 4·eps^⅔ of the norm, or ten times what moving the arguments by one rounding error changes.
    """
    moved: Found = ()
    for i, (a, b) in enumerate(zip(found, plain(*arguments), strict=True)):
        if a is None or b is None:
            if a is not b:
                return "in which derivatives vanish"
            continue
        error, size = (float(x.detach().double().norm()) for x in (a - b, b))
        bound = 4 * eps ** (2 / 3) * size
        if error <= bound or not b.isfinite().all():
            continue
        moved = moved or plain(*_moved(arguments, eps))
        again = moved[i]
        bound = bound if again is None else max(bound, 10 * float((again - b).double().norm()))
        if not error <= bound:
            size = max(size, 1e-300)
            return f"by {error / size:.2g} of its norm, more than the {bound / size:.2g} that rounding allows"
    return ""


def _moved(arguments: Sequence[Tensor], eps: float) -> list[Tensor]:
    """The arguments, every floating-point number moved by one rounding error up or down."""
    generator = torch.Generator().manual_seed(1)

    def signs(t: Tensor) -> Tensor:
        return torch.randint(0, 2, t.shape, generator=generator, device="cpu").mul(2).sub(1).to(t)

    return [t + t * (eps * signs(t)) if t.is_floating_point() else t for t in arguments]
