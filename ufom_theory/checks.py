"""Input checks: every bad value becomes a `UfomError` that names the value, the rule and the remedy."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from functools import wraps
from types import NoneType
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

P = ParamSpec("P")
R = TypeVar("R")
Number = float | NDArray[np.float64]
LARGEST = 3_000_000_000  # of any count: r(r − 1) then fits in int64
_MOST = sys.float_info.max


class UfomError(ValueError):
    """Bad input: the message names the value, the rule it broke and the remedy."""


def plain(value: Any) -> Any:
    """A 0-d array or tensor as a Python scalar; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _numbers(name: str, value: Any, kind: str) -> NDArray[Any]:
    """`value` as an array of real numbers; truth values, masked arrays, complex numbers, dates and text are not."""
    reason = ""
    try:
        array = np.asarray(value)
        array = array.astype(np.float64) if array.dtype == object else array
        if array.dtype.kind in "iuf" and not isinstance(value, np.ma.MaskedArray):
            return array
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # ragged, or a tensor that requires grad
        reason = f": {error}"
    raise UfomError(f"{name} = {value!r:.200} is not {kind}{reason}")


def finite(name: str, value: ArrayLike, rule: str = "finite", at_least: float = -math.inf) -> Number:
    """`value` as float64 (a float, or an array), finite and no smaller than `at_least`; else `UfomError`."""
    array = _numbers(name, value, "a number or an array of numbers").astype(np.float64, copy=False)
    if array.size == 0:
        raise UfomError(f"{name} is empty: give at least one value")
    if not max(at_least, -_MOST) <= array.min() <= array.max() <= _MOST:
        bad = ~np.isfinite(array) | (array < at_least)
        raise UfomError(f"{name} = {array[bad].flat[0]:g} must be {rule}")
    return plain(array + 0.0)  # type: ignore[no-any-return]  # −0.0 becomes 0.0: D²/V² must not be −∞


def positive(name: str, value: ArrayLike) -> Number:
    """`value` as float64, finite and above zero; else `UfomError`."""
    return finite(name, value, "a finite number > 0", at_least=math.ulp(0.0))


def integer(name: str, value: Any, at_least: int) -> Any:
    """`value` as an int (or an int64 array), no smaller than `at_least`; else `UfomError`."""
    array = _numbers(name, value, f"an integer or an array of integers, at most {LARGEST:.0e}")
    if not (np.issubdtype(array.dtype, np.integer) and array.size):
        raise UfomError(f"{name} = {value!r:.200} must be an integer, at most {LARGEST:.0e}")
    if (array < at_least).any():
        raise UfomError(f"{name} = {array.min()} must be at least {at_least}")
    if (array > LARGEST).any():
        raise UfomError(f"{name} = {array.max()} must be at most {LARGEST:.0e}: its square no longer fits in 64 bits")
    return plain(array.astype(np.int64))


def scalar(name: str, value: Any, check: Callable[..., Any] = finite, *rule: Any) -> Any:
    """`value` as `finite`, `positive` or `integer` returns it, and a single number; else `UfomError`."""
    checked = check(name, value, *rule)
    if np.ndim(checked):
        raise UfomError(f"{name} has shape {np.shape(checked)}, but must be one number: call once for each value")
    return checked


def instance(name: str, value: Any, kind: type, remedy: str) -> None:
    """`UfomError` where `value` is of another type."""
    if not isinstance(value, kind):
        raise UfomError(f"{name} = {value!r:.200} must be of type {kind.__name__}: {remedy}")


_WRITTEN = {
    "bool": "write True or False",
    "BilevelProblem": "write BilevelProblem(inner_loss=..., outer_loss=..., start=..., ...)",
    "Sweep": 'write Sweep.stored(), or Sweep.parse("checkpointed:3")',
    "Truncated": "write Truncated(K), K = 0 for FOM",
    "Moments": "write Moments(d2, v2)",
    "CostModel": "write CostModel(r=10)",
}


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments of another type where the annotation is a class above, or that or None: `sweep: Sweep | None`.

    A wrong one is otherwise met far inside, or only asked whether it is true.
    """
    kinds: dict[str, tuple[type, ...]] = {}
    for name, annotation in function.__annotations__.items():
        written = str(annotation).removesuffix(" | None")
        if name != "return" and written in _WRITTEN:
            kind = bool if written == "bool" else function.__globals__[written]
            kinds[name] = (kind,) if written == annotation else (kind, NoneType)
    names = function.__code__.co_varnames

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in kinds and not isinstance(value, kinds[name]):
                instance(name, value, kinds[name][0], _WRITTEN[kinds[name][0].__name__])
        return function(*args, **kwargs)

    return checked


def broadcast(**shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to which all of these broadcast; else `UfomError`."""
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError as error:
        named = ", ".join(f"{name} {shape}" for name, shape in shapes.items() if shape)
        raise UfomError(f"the shapes of {named} do not broadcast: give single values or arrays of one shape") from error


_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def byte_count(name: str, value: Any) -> int:
    """A number of bytes, at least 1, from an integer or a text with a unit: "50MB" is 5·10⁷, "1GiB" 2³⁰.

    Raises:
        UfomError: another text, a number that is not finite, less than one byte.
    """
    if isinstance(value, str):
        written = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d{1,2})?)\s*([A-Za-z]*)\s*", value)
        if written is None or written[2] not in _UNITS:
            raise UfomError(f"{name} = {value!r}: give bytes as a number and one of {', '.join(filter(None, _UNITS))}")
        value = float(written[1]) * _UNITS[written[2]]
    return int(scalar(name, value, finite, "at least one byte", 1.0))


def bytes_text(count: int) -> str:
    """Bytes in three digits and a unit: 50000000 is "50 MB"; below 1000 the number alone."""
    power = min(max(len(str(count)) - 1, 0) // 3, 3)
    return f"{count / 1000**power:.3g}{('', ' kB', ' MB', ' GB')[power]}"
