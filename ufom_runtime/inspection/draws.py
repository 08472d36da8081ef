"""Draws from torch's global generators, looked for in every call: a loss that draws is not a function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

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
    if _states() != before and allowed is not torch.default_generator:
        raise UfomError(
            "torch's generator moved while a hypergradient was computed, so a loss, the start or the inner update "
            f"draws from it and is not a function of (θ, φ, T): {REMEDY}; a thread that draws beside this one needs a "
            "generator of its own"
        )


def _states() -> list[bytes]:
    with _disable_current_modes():  # a state is not among the bytes of a call
        states = [torch.get_rng_state()]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            states += torch.cuda.get_rng_state_all()
        return [state.numpy().tobytes() for state in states]
