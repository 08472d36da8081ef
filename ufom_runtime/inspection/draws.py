"""Draws from torch's global generators, looked for in every call: a loss that draws is not a function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
