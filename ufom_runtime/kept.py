"""What is found once about a problem, and kept as long as it lives: compiled steps, passed checks, bytes of a row."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from ufom_runtime.problem import BilevelProblem

_kept: WeakKeyDictionary[BilevelProblem, dict[str, dict[Any, Any]]] = WeakKeyDictionary()


def kept(problem: BilevelProblem, kind: str) -> dict[Any, Any]:
    """The dictionary of one kind for this problem, empty at first; no value in it may refer to the problem."""
    return _kept.setdefault(problem, {}).setdefault(kind, {})
