"""Binomial checkpointing (Griewank 1992): visit the states of a loop backwards while few of them are held."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

State = TypeVar("State")


def next_checkpoint(states: int, slots: int) -> int:
    """How many steps ahead the next checkpoint goes, when `states` ≥ 2 states from here on are to be visited backwards.

    With c = slots + 1 and n the least integer with C(c + n, c) ≥ states, the part before the checkpoint may hold up to
    C(c + n − 1, c) states and the part after it up to C(c − 1 + n, c − 1); any split within both ranges is optimal.
    """
    c, n = slots + 1, 1
    while math.comb(c + n, c) < states:
        n += 1
    return max(1, math.comb(c + n - 2, c), states - math.comb(c - 1 + n, c - 1))


def backwards(step: Callable[[State, int], State], first: State, states: int, slots: int) -> Iterator[State]:
    """Yield x_{states−1}, …, x_0, where x_0 = `first` and x_{j+1} = step(x_j, j).

    Holds `slots` states besides x_0 and the current one, and takes the fewest steps possible with them:
    `ufom_theory.Sweep.checkpointed(slots).extra_steps(states)`; slots = 0 starts from x_0 each time (Algorithm 4).
    """
    held = [(0, first)]
    for target in range(states - 1, -1, -1):
        at, state = held[-1]
        if at == target:
            held.pop()
        while at < target:
            free = slots - (len(held) - 1)
            stop = at + next_checkpoint(target - at + 1, free) if free else target
            for j in range(at, stop):
                state = step(state, j)
            at = stop
            if at < target:
                held.append((at, state))
        yield state
