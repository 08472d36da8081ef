"""What is found once about a problem, and kept as long as it lives: compiled steps, passed checks, bytes of a row."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

_kept: WeakKeyDictionary[object, dict[str, dict[Any, Any]]] = WeakKeyDictionary()


def kept(problem: object, kind: str) -> dict[Any, Any]:
    """The dictionary of one kind for this problem, empty at first; no value in it may refer to the problem."""
    return _kept.setdefault(problem, {}).setdefault(kind, {})
