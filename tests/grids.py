"""Grids of cases of which `make test` runs those that differ in kind, and `make test-all` every one."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(quick: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters, tuples as several; those that are not quick are marked slow."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=() if quick(case) else pytest.mark.slow))
    return found
