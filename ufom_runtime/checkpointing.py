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


def checkpoints(states: int, slots: int) -> list[int]:
    """Which of the first `states` states of a loop are kept on the first way through it: the last one, too."""
    kept, target = [0] if states else [], states - 1
    while kept and kept[-1] < target:
        free = slots - (len(kept) - 1)
        kept.append(kept[-1] + next_checkpoint(target - kept[-1] + 1, free) if free else target)
    return kept


def backwards(step: Callable[[State, int], State], held: list[tuple[int, State]], slots: int) -> Iterator[State]:
    """Yield x_n, x_{n−1}, … down to the first state held, where x_{j+1} = step(x_j, j); x_n is the last one held.

    `held` are pairs (j, x_j) at the places that `checkpoints` names, or at all; it is emptied. With the first state and
    `slots` more it takes the fewest steps possible, as `ufom_theory.Sweep` counts them; slots = 0 starts from the first
    state each time (Algorithm 4).
    """
    if not held:
        return
    for target in range(held[-1][0], held[0][0] - 1, -1):
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
