"""A study's configuration, a frozen dataclass, with some of its values given by a TOML file or all by a stored JSON."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import dacite

from ufom_runtime.files import read_whole
from ufom_theory import UfomError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)

_MOST_BYTES, _MOST_DOTS = 2**16, 1000  # tomllib's time and memory grow with the square of a dotted key
_LARGEST = 10**12


def read_config(path: str | Path, base: Config) -> Config:
    """`base` with the values that the TOML file gives: `config = read_config("mine.toml", SIZES["quick"])`.

    A key is a field's name; a tuple is an array, a nested dataclass a table, which must be given whole.

    Raises:
        UfomError: a file that is missing, not a regular one, larger than 64 KiB, with more than 1000 dots, or not TOML;
            and as `build`.
    """
    path = Path(path)
    try:
        text = read_whole(path, _MOST_BYTES).decode()
        if (dots := text.count(".")) > _MOST_DOTS:
            raise UfomError(f"it has {dots} dots, of numbers and keys: give no more than {_MOST_DOTS}")
        given = tomllib.loads(text)
        return build(type(base), {field.name: getattr(base, field.name) for field in fields(base)} | given)
    except UfomError as error:
        raise UfomError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UfomError(f"{path} cannot be read as TOML: {error}") from error


def keys(config: DataclassInstance) -> list[str]:
    """The lines of a TOML file that would give `config`, a key each; of one that is None, its name."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return [f"# {name}: none" if value is None else f"{name} = {_toml(value)}" for name, value in values.items()]


def _toml(value: Any) -> str:
    """A value as TOML has it; what is None is left out there."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {_toml(x)}' for name, x in value.items() if x is not None)}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def build(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A dataclass from its values, as JSON or TOML have them.

    Raises:
        UfomError: an unknown or missing key; a value that is not of the field's type; an integer that is negative or
            above 10¹², since all are sizes and counts; a float that is not finite; or what the dataclass itself
            refuses.
    """
    try:
        return dacite.from_dict(kind, values, _RULES)
    except (dacite.DaciteError, TypeError, ValueError) as error:
        names = ", ".join(field.name for field in fields(kind))
        raise UfomError(f"{error!s:.300}; a {kind.__name__} has {names}") from error


class _Refused(dacite.exceptions.DaciteFieldError):
    """A value that its field does not take; dacite completes the field's name."""

    def __init__(self, value: object, rule: str) -> None:
        super().__init__()
        self.said = f"{value!r:.60} must be {rule}"

    def __str__(self) -> str:
        return f"{self.field_path} = {self.said}"


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise _Refused(value, "an integer")
    if not 0 <= value <= _LARGEST:
        raise _Refused(value, f"between 0 and {_LARGEST:.0e}: it is a size or a count")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise _Refused(value, "a number")
    if abs(value) > _LARGEST or not math.isfinite(value):
        raise _Refused(value, f"a finite number, at most {_LARGEST:.0e} in size")
    return float(value)


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise _Refused(value, "true or false")
    return value


def _array(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):  # a text would be cast to its letters
        raise _Refused(value, "an array")
    return tuple(value)


_HOOKS: dict[Any, Any] = {int: _integer, float: _number, bool: _truth}
_HOOKS |= {tuple[kind, ...]: _array for kind in (str, int, float)}  # type: ignore[valid-type]
_RULES = dacite.Config(type_hooks=_HOOKS, cast=[tuple], strict=True)
