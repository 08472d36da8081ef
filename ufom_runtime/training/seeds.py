"""Random streams as functions of (seed, step, stream): two that differ never begin in the same state."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator

from ufom_theory import UfomError

STREAMS = {"tasks": 0, "coins": 1}
LARGEST_SEED = 2**63 - 1
_KEY = 0x5546_4F4D  # one key for all: Philox with one key is a bijection, so distinct counters give distinct words
_WORDS = 624  # of the Mersenne Twister, 32 bits each, in slots of 64
_STATE = np.dtype([("seed", "u8"), ("left", "i4"), ("seeded", "i4"), ("next", "u8"), ("words", "u8", _WORDS)])


def generator(seed: int, step: int, stream: str) -> Generator:
    """The CPU generator of one outer step: "tasks" and "coins" are independent streams, as Theorem 1 needs.

    The whole state of the Mersenne Twister is filled by Philox, whose counter holds (seed, step, stream): a seed of 32
    bits, which is all that `manual_seed` uses on the CPU, would repeat itself. No state of it is ever saved.

    Raises:
        UfomError: this torch keeps the state of its CPU generator in a form that is not known here.
    """
    _check_layout()
    words = np.empty(_WORDS, np.uint64)
    words[0] = 2**31  # the Twister uses one bit of its first word; set, it rules out the state of all zeros
    counter = (seed << 192) | (step << 128) | (STREAMS[stream] << 64)
    raw = np.random.Philox(key=_KEY, counter=counter).random_raw(_WORDS // 2)
    words[1:] = raw.astype("<u8").view("<u4")[: _WORDS - 1]
    return _with_state(_state(words, seed))


def seeded(seed: Any) -> Generator:
    """One CPU generator by `manual_seed`, which takes 32 bits there; `UfomError` for a seed that it would wrap."""
    if check_seed(seed) >= 2**32:
        raise UfomError(f"seed = {seed} must be below 2^32: torch's CPU generator would take {seed % 2**32} for it")
    return Generator(device="cpu").manual_seed(int(seed))


def check_seed(seed: Any) -> int:
    """The seed as an int in [0, 2^63); else `UfomError`."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
        raise UfomError(f"seed = {seed!r} must be an integer")
    if not 0 <= seed <= LARGEST_SEED:
        raise UfomError(f"seed = {seed} must be at least 0 and below 2^63")
    return int(seed)


def _state(words: NDArray[np.uint64], seed: int) -> NDArray[np.uint8]:
    """The bytes of a CPU generator whose Twister has these words and has drawn nothing yet."""
    state = np.zeros((), _STATE)
    state["seed"], state["left"], state["seeded"], state["words"] = seed, 1, 1, words
    content = np.frombuffer(state.tobytes(), np.uint8)
    return np.concatenate([content, np.zeros(_size() - len(content), np.uint8)])  # no normal number is kept


def _with_state(state: NDArray[np.uint8]) -> Generator:
    made = torch.Generator(device="cpu")
    made.set_state(torch.from_numpy(state))
    return made


@cache
def _size() -> int:
    return len(torch.Generator(device="cpu").get_state())


@cache
def _check_layout() -> None:
    """Refuse a torch whose `manual_seed` gives other bytes than `_state` of the same words."""
    seed, words = 20260726, np.empty(_WORDS, np.uint64)
    words[0] = seed
    for j in range(1, _WORDS):  # Matsumoto & Nishimura's initialisation, which manual_seed uses
        before = int(words[j - 1])
        words[j] = (1812433253 * (before ^ before >> 30) + j) & 0xFFFFFFFF
    expected = torch.Generator(device="cpu").manual_seed(seed).get_state().numpy()
    if _size() < _STATE.itemsize or not np.array_equal(_state(words, seed), expected):
        raise UfomError(
            f"torch {torch.__version__} keeps the state of its CPU generator in another form than 2.11 to 2.13 do: "
            "install one of these"
        )
