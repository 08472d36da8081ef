"""How the outer steps are taken, named: the texts that `outer=` and `optimizer=` accept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ufom_theory.checks import UfomError

_GRAMMAR = "write sgd:γ, adam:γ, tuned, decay:s, decay:s:γ₁ or paper, as in 'sgd:0.05', 'adam:1e-3' or 'decay:0.5:1'"


@dataclass(frozen=True)
class Outer:
    """One way to take the outer steps.

    Attributes:
        kind: "sgd", a fixed step γ; "adam", at a fixed rate γ; "tuned", a fixed step tuned to the estimator; "decay",
            γ_k = γ₁·k^(−s); "paper", the reading of (19) with m = 2.
        rate: γ, or γ₁ of "decay"; None where the text gives none, and nothing can be trained with it.
        power: s of "decay", in (0, 1]; else None.
    """

    kind: Literal["sgd", "adam", "tuned", "decay", "paper"]
    rate: float | None = None
    power: float | None = None


def parse_outer(text: str) -> Outer:
    """The outer steps that `text` names.

    The grammar: `sgd:γ`, `adam:γ`, `tuned`, `decay:s` or `decay:s:γ₁` (γ_k = γ₁·k^(−s)), `paper`.

    >>> parse_outer("decay:0.5:0.1")
    Outer(kind='decay', rate=0.1, power=0.5)

    Raises:
        UfomError: a text outside the grammar, a rate that is not a finite number > 0, or s outside (0, 1].
    """
    match text.split(":") if isinstance(text, str) else ():
        case ["sgd" | "adam" as kind, rate]:
            return Outer(kind, rate=_number(text, "the rate", rate))
        case ["tuned" | "paper" as kind]:
            return Outer(kind)
        case ["decay", power, *rest] if len(rest) <= 1:
            s = _number(text, "s", power)
            if s > 1:
                raise UfomError(f"{text!r}: s = {s:g} must lie in (0, 1]: beyond 1 the steps sum to a finite length")
            return Outer("decay", rate=_number(text, "γ₁", rest[0]) if rest else None, power=s)
        case _:
            raise UfomError(f"{text!r} does not name an outer optimizer: {_GRAMMAR}")


def _number(text: str, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UfomError(f"{text!r}: {name} {value!r} must be a finite number > 0: {_GRAMMAR}")
    return number
