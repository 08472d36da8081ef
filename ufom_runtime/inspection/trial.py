"""One draw of a user's sampler, made to see what a stack of tasks looks like; nothing else notices it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Generator, Tensor

from ufom_runtime.inspection.draws import generators_put_back

_MOST = 10_000  # objects that are looked at
_GENERATORS = (Generator, np.random.Generator, np.random.RandomState, random.Random)


def draw_apart(sample_tasks: Callable[[int, Generator], Any] | None) -> Any:
    """One task from a separate generator, or None where none comes out.

    The global generators are put back. A function that reaches a generator or an iterator of the user's is not called,
    since it would draw other tasks afterwards.
    """
    if sample_tasks is None or _remembers(sample_tasks):
        return None
    try:
        with generators_put_back():
            return sample_tasks(1, Generator().manual_seed(0))
    except (
        Exception
    ):  # it is the user's function, and was not asked for by the user: where tasks are drawn, it says why
        return None


def _remembers(function: object) -> bool:
    """Whether a generator or an iterator is reached by closures, globals, defaults and attributes, or too much else."""
    met: set[int] = set()
    left = [function]
    while left and len(met) < _MOST:
        value = left.pop()
        if id(value) in met or isinstance(value, Tensor | ModuleType | type):
            continue
        met.add(id(value))
        if isinstance(value, _GENERATORS) or hasattr(value, "__next__"):
            return True
        left += _inside(value)
    return bool(left)


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, FunctionType):
        if str(value.__module__).partition(".")[0] in ("torch", "numpy"):
            return ()
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        named = [value.__globals__[n] for n in _names(value.__code__) if n in value.__globals__]
        return (*cells, *named, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, dict):
        return islice(value.values(), _MOST)
    if isinstance(value, list | tuple):
        return value[:_MOST]
    return (*getattr(value, "__dict__", {}).values(), vars(type(value)).get("__call__"))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
