"""A study's configuration, a frozen dataclass, with some of its values given by a TOML file."""

from __future__ import annotations

import math
import tomllib
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ufom_theory import UfomError

Config = TypeVar("Config")
_MOST_BYTES, _MOST_DOTS = 2**16, 1000  # tomllib's time and memory grow with the square of a dotted key
_LARGEST = 10**12
_CALLED = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def read_config(path: str | Path, base: Config) -> Config:
    """`base` with the values that the TOML file gives: `config = read_config("mine.toml", SIZES["quick"])`.

    A key is a field's name; a tuple is an array, a nested dataclass a table. A table overrides the fields that it
    names; in an array each table is a whole one.

    Raises:
        UfomError: a file that is missing, larger than 64 KiB, with more than 1000 dots, or no TOML; an unknown key; a
            value that is not of the field's type; an integer that is negative or above 10¹², since all are sizes and
            counts; a float that is not finite; or what the dataclass itself refuses.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise UfomError(f"it has {size} bytes: a configuration has no more than {_MOST_BYTES}")
        text = path.read_bytes().decode()
        if (dots := text.count(".")) > _MOST_DOTS:
            raise UfomError(f"it has {dots} dots, of numbers and keys: give no more than {_MOST_DOTS}")
        return replace(base, **_values(type(base), tomllib.loads(text), "", base))  # type: ignore[type-var]
    except UfomError as error:
        raise UfomError(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UfomError(f"{path} cannot be read as TOML: {error}") from error


def _values(kind: Any, table: Any, name: str, base: Any = None) -> dict[str, Any]:
    """Arguments for the dataclass `kind` from a TOML table; nested ones are altered copies of those in `base`."""
    if not isinstance(table, dict):
        raise UfomError(f"{name} = {_short(table)} must be a table of {kind.__name__}'s values")
    types, prefix = get_type_hints(kind), f"{name}." if name else ""
    known = [field for field in fields(kind) if field.init]
    if unknown := table.keys() - {field.name for field in known}:
        names = ", ".join(field.name for field in known)
        raise UfomError(f"{prefix}{min(unknown):.80} is unknown: give {names}")
    if base is None:
        for field in known:
            if field.name not in table and field.default is MISSING and field.default_factory is MISSING:
                raise UfomError(f"{prefix}{field.name} is missing: give a whole {kind.__name__}")
    return {key: _value(types[key], x, f"{prefix}{key}", getattr(base, key, None)) for key, x in table.items()}


def _value(kind: Any, value: Any, name: str, base: Any = None) -> Any:
    """A value of TOML as one of the annotated type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # T | None: TOML has no null
        (kind,) = (t for t in inner if t is not NoneType)
        return _value(kind, value, name, base)
    if is_dataclass(kind):
        values = _values(kind, value, name, base)
        return kind(**values) if base is None else replace(base, **values)
    if origin is tuple:
        several = inner[-1] is Ellipsis
        if not isinstance(value, list) or (not several and len(value) != len(inner)):
            raise UfomError(f"{name} = {_short(value)} must be an array" + ("" if several else f" of {len(inner)}"))
        kinds = inner[:1] * len(value) if several else inner
        return tuple(_value(k, x, f"{name}[{i}]") for i, (k, x) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise UfomError(f"{name} = {_short(value)} must be a table")
        return {key: _value(inner[1], x, f"{name}.{key:.80}") for key, x in value.items()}
    if kind is Any:
        kind = type(value)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) <= _LARGEST else math.inf
    if type(value) is not kind or kind not in _CALLED:
        raise UfomError(f"{name} = {_short(value)} must be {_CALLED.get(kind, 'a number, a string, true or false')}")
    if kind is int and not 0 <= value <= _LARGEST:
        raise UfomError(f"{name} = {_short(value)} must lie between 0 and {_LARGEST:.0e}: it is a size or a count")
    if kind is float and not math.isfinite(value):
        raise UfomError(f"{name} = {_short(value)} must be a finite number")
    return value


def _short(value: Any) -> str:
    return f"{value!r:.60}"
