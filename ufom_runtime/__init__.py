"""Hypergradient estimators in torch, and the measurement of their bias, second moment and cost.

Names are handed out lazily, so that `ufom q` starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME: dict[str, str] = {}

if TYPE_CHECKING:
    pass

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ufom_runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ufom_runtime.{_HOME[name]}"), name)
