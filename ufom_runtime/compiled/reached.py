"""What a trace of the losses may have baked in, as a fingerprint to compare later; it keeps nothing alive.

Followed are closures, the globals and the attributes of modules that the code names, defaults, attributes (class
attributes and `__slots__` among them), containers, and the contents of numpy arrays and buffers. Code that looks names
up (`getattr`, `globals`) and objects written in C cannot be followed, and are reported as such. Files are not looked
into. Tensors are followed by identity: a graph reads their present numbers.
"""

from __future__ import annotations

import dis
import sys
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
from torch import Tensor

_VALUES = {int, float, complex, bool, str, bytes, type(None), type(...), range, slice}
_LIKE_VALUES = (int, float, complex, str, bytes, np.generic)  # an enumeration's members
_CONTAINERS = (dict, MappingProxyType, list, tuple, set, frozenset, deque)
_TAKEN_AS_THEY_ARE = {"torch", "numpy", "builtins", "types", "typing", "_thread", "_io", "_abc", "re"}
_COMPUTED = {"globals", "vars", "getattr", "eval", "exec", "__import__", "import_module"}  # what finds computed names
_MOST = 100_000


@dataclass(frozen=True, eq=False)
class Reached:
    """What was reached: values as text, objects as weak references, in the order of the walk.

    `followed` is False where something was met whose state cannot be seen, or more than can be looked through.
    """

    names: list[object]
    followed: bool

    def same(self, other: Reached) -> bool:
        """Whether the same objects and equal values were reached."""
        return len(self.names) == len(other.names) and all(
            a is b or (type(a) is str and a == b) for a, b in zip(self.names, other.names, strict=True)
        )


def reach(*functions: object) -> Reached:
    """Walk over all that the functions can reach."""
    names: list[object] = []
    met: dict[tuple[int, int], tuple[int, object]] = {}  # with the values, so that no address is used twice
    followed = True
    waiting: list[tuple[object, frozenset[str]]] = [(f, frozenset()) for f in functions]
    while waiting:
        value, used = waiting.pop()
        if type(value) in _VALUES or isinstance(value, _LIKE_VALUES):
            names.append(repr(value))
            continue
        if isinstance(value, _CONTAINERS) and not value:
            names.append(type(value).__name__)
            continue
        key = (id(value), id(used) if isinstance(value, ModuleType) else 0)
        if key in met:
            names.append(f"again {met[key][0]}")
            continue
        met[key] = len(met), value
        names.append(_name(value))
        try:
            inside = _inside(value, used)
        except Exception:  # an object may raise whatever it likes when it is looked at
            inside = None
        if inside is None or len(met) > _MOST:
            followed = False
        elif type(value) is FunctionType:
            used = _names(value.__code__)
            followed = followed and (not inside or _COMPUTED.isdisjoint(used))
        waiting.extend([(x, used) for x in inside or ()])
        if len(met) > _MOST:
            break
    return Reached(names, followed)


def _name(value: object) -> object:
    """A weak reference, the same one as long as the object lives; the type and size of what cannot have one."""
    if isinstance(value, dict | MappingProxyType):
        return f"{type(value).__name__} {list(value)}" if all(type(k) is str for k in value) else f"dict {len(value)}"
    if isinstance(value, _CONTAINERS):
        return f"{type(value).__name__} {len(value)}"
    try:
        return ref(value)
    except TypeError:
        return type(value).__qualname__


def _inside(value: Any, used: frozenset[str]) -> list[object] | None:
    """What the value holds, None where that cannot be seen; `used` are the names in the code around it."""
    if isinstance(value, Tensor):
        return []
    if isinstance(value, ModuleType):
        public = vars(value)
        return [] if _library(value.__name__) else [public[n] for n in sorted(used) if n in public]
    look = _LOOKS.get(type(value))
    if look is not None:
        return list(look(value))
    held = [] if isinstance(value, type) else _attributes(value)
    if isinstance(value, tuple(_LOOKS)):  # a subclass, or a class with a metaclass
        look = next(look for kind, look in _LOOKS.items() if isinstance(value, kind))
        return [type(value), *list(look(value)), *held]
    return None if _hides(type(value)) else [type(value), *held]


def _in_dict(value: dict[Any, Any]) -> Iterator[object]:
    yield from value.values()
    if not all(type(k) is str for k in value):
        yield from value


def _in_function(function: FunctionType) -> Iterator[object]:
    if _library(function.__module__):
        return
    yield from function.__closure__ or ()
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield function.__globals__[name]
    yield from (sys.modules[name] for name in _imported(function.__code__) if name in sys.modules)
    yield from (function.__code__, function.__defaults__, function.__kwdefaults__, function.__dict__)


def _in_cell(cell: CellType) -> Iterator[object]:
    try:
        yield cell.cell_contents
    except ValueError:  # not filled yet
        return


def _in_class(cls: type) -> Iterator[object]:
    """Methods and class attributes, those of its bases and its metaclass too."""
    for base in [*cls.__mro__, *type.mro(type(cls))]:
        if not _library(base.__module__):
            for name, value in list(vars(base).items()):
                if isinstance(value, FunctionType) or not (name.startswith("__") or name == "_abc_impl"):
                    yield name
                    yield value


def _in_buffer(value: Any) -> Iterator[object]:
    if isinstance(value, np.ndarray) and value.dtype == object:
        yield value.tolist()
    else:
        yield zlib.crc32(np.ascontiguousarray(value).tobytes())


_LOOKS: dict[type, Callable[[Any], Any]] = {
    dict: _in_dict,
    OrderedDict: _in_dict,
    MappingProxyType: _in_dict,
    **dict.fromkeys((list, tuple, set, frozenset, deque), iter),
    FunctionType: _in_function,
    CellType: _in_cell,
    type: _in_class,
    MethodType: lambda method: (method.__func__, method.__self__),
    BuiltinFunctionType: lambda f: () if isinstance(f.__self__, ModuleType) else (f.__self__,),
    partial: lambda p: (p.func, p.args, p.keywords),
    property: lambda p: (p.fget,),
    staticmethod: lambda f: (f.__func__,),
    classmethod: lambda f: (f.__func__,),
    ContextVar: lambda v: (v.get(None),),
    ReferenceType: lambda r: (r(),),
    np.ndarray: _in_buffer,
    bytearray: _in_buffer,
    memoryview: _in_buffer,
}


def _attributes(value: object) -> list[object]:
    """The object's `__dict__`, and what its `__slots__` hold."""
    held: list[object] = [vars(value)] if hasattr(value, "__dict__") else []
    for cls in type(value).__mro__:
        held += [d.__get__(value) for d in _members(cls) if hasattr(value, d.__name__)]
    return held


def _hides(cls: type) -> bool:
    """Whether objects of the class may have a state that Python cannot see: iterators, and what is written in C."""
    if hasattr(cls, "__next__"):
        return True
    slots = sum(len(_members(base)) for base in cls.__mro__)
    seen = object.__basicsize__ + 8 * (slots + bool(cls.__dictoffset__) + bool(cls.__weakrefoffset__))
    return not _library(cls.__module__) and (cls.__basicsize__ > seen or cls.__itemsize__ > 0)


def _members(cls: type) -> list[Any]:
    """The descriptors of the class's `__slots__`."""
    own = vars(cls)
    return [d for d in own.values() if isinstance(d, MemberDescriptorType)] if "__slots__" in own else []


def _library(module: object) -> bool:
    return str(module).partition(".")[0] in _TAKEN_AS_THEY_ARE


@lru_cache(maxsize=1000)
def _names(code: CodeType) -> frozenset[str]:
    """The names that a function and those inside it use for globals, modules and attributes."""
    return frozenset(code.co_names).union(*map(_names, _inner(code)))


@lru_cache(maxsize=1000)
def _imported(code: CodeType) -> frozenset[str]:
    """The modules that a function and those inside it import."""
    own = set()
    if dis.opmap["IMPORT_NAME"] in code.co_code[::2]:  # to take every function apart would be slow
        own = {i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"}
    return frozenset(own).union(*map(_imported, _inner(code)))


def _inner(code: CodeType) -> list[CodeType]:
    return [c for c in code.co_consts if isinstance(c, CodeType)]
