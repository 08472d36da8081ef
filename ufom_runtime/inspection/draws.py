"""Draws from global generators: refused in every call, since a loss that draws is not a function; or taken back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufom_theory import UfomError

REMEDY = (
    "draw what is random in sample_tasks and pass it in the task, T = (x, y, noise), or switch it off (.eval(), "
    "dropout=0)"
)


@contextmanager
def refuse_draws(allowed: object = None) -> Iterator[None]:
    """`UfomError` where a global generator of torch moves in the block, unless it is the one allowed to."""
    before = _states()
    yield
    moved = any(not torch.equal(*pair) for pair in zip(before, _states(), strict=False))
    if moved and allowed is not torch.default_generator:
        raise UfomError(
            "torch's generator moved while a hypergradient was computed, so a loss, the start or the inner update "
            f"draws from it and is not a function of (θ, φ, T): {REMEDY}; give a thread that draws beside this one "
            "another generator"
        )


def _states() -> list[torch.Tensor]:
    """On the CPU; those of CUDA once it is in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states += torch.cuda.get_rng_state_all()
    return states


def generators() -> dict[str, Any]:
    """The states of all global generators, by their names."""
    cpu, *cuda = _states()
    states = {
        "torch's generator": cpu,
        "numpy's generator": np.random.get_state(),  # noqa: NPY002
        "Python's generator": random.getstate(),
    }
    return {**states, "CUDA's generator": cuda} if cuda else states


_SETTERS: dict[str, Callable[[Any], None]] = {
    "torch's generator": torch.set_rng_state,
    "numpy's generator": np.random.set_state,
    "Python's generator": random.setstate,
    "CUDA's generator": torch.cuda.set_rng_state_all,
}


def moved(before: dict[str, Any]) -> list[str]:
    """The generators that have drawn since."""
    now = generators()
    return [name for name, state in before.items() if not _same(state, now[name])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, tuple | list) and any(isinstance(x, Tensor | np.ndarray) for x in a):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


@contextmanager
def generators_put_back() -> Iterator[None]:
    """Whatever the block draws from the global generators, they go on as if it had not."""
    before = generators()
    try:
        yield
    finally:
        for name in moved(before):
            _SETTERS[name](before[name])
