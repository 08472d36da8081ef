"""A comparison of what was predicted with what was measured, and whether they agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ufom_theory import UfomError
from ufom_theory.checks import scalar
from ufom_theory.quantities import t_interval

Agreement = Literal["yes", "no", "inconclusive"]
TOLERATED = 1.05  # the predicted q may be this much slower than the best of the grid
WIDEST = 2 * math.log(TOLERATED)  # a log-time's interval of at most this width is judged by its centre


@dataclass(frozen=True)
class Verdict:
    """One comparison of what was predicted with what was measured.

    Attributes:
        subject: what is compared.
        relation: what the theory says of measured against predicted.
        predicted: the predicted value or bound.
        measured: the measured value.
        tolerance: how far measured may be off, in the unit of both: a 95 % half-width, or 0 for exact values.
        agrees: "inconclusive" where the tolerance is too wide to decide.
    """

    subject: str
    relation: Literal["=", "<=", ">="]
    predicted: float
    measured: float
    tolerance: float
    agrees: Agreement

    @classmethod
    def from_paired(
        cls,
        subject: str,
        relation: Literal["=", "<=", ">="],
        bound: float,
        differences: ArrayLike,
        widest: float = 0.0,
        margin: float = 0.0,
    ) -> Verdict:
        """Judge the mean of paired `differences`, shape (n,), n ≥ 2, against a bound by its 95 % t-interval.

        `subject` says what is compared; an error names it.

        "yes" where the whole interval keeps the bound, "no" where it breaks it as a whole; else "inconclusive", unless
        the interval is at most `widest` wide, in the unit of the differences: then its centre decides. What is narrow
        depends on what is judged: 0.02 is much for an accuracy in [0, 1] and little for one in %, so it is given by the
        caller, who says which difference would not matter; by default no interval is narrow enough. With "=", the bound
        is kept within ± `margin`. Differences that are not all finite (a run given up) are "inconclusive" too.

        Raises:
            UfomError: another relation, fewer than 2 differences, or differences that are not numbers.
        """
        if relation not in ("=", "<=", ">="):
            raise UfomError(f"{subject}: relation {relation!r} is unknown: use =, <= or >=")
        bound = scalar("bound", bound)
        try:
            x = np.asarray(differences, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise UfomError(f"{subject}: the differences are not one vector of numbers") from error
        if x.ndim != 1 or len(x) < 2:
            raise UfomError(f"{subject}: {x.size} paired difference(s), but an interval needs at least 2")
        with np.errstate(invalid="ignore"):  # a run that was given up took infinite time
            mean, half = map(float, t_interval(x))
        verdict = cls.from_interval(subject, relation, bound, mean, half, margin)
        if verdict.agrees == "inconclusive" and 2 * half <= widest:
            return replace(cls.from_interval(subject, relation, bound, mean, 0.0, margin), tolerance=half)
        return verdict

    @classmethod
    def from_interval(
        cls,
        subject: str,
        relation: Literal["=", "<=", ">="],
        predicted: float,
        measured: float,
        half: float = 0.0,
        margin: float = 0.0,
    ) -> Verdict:
        """Judge the 95 % interval `measured` ± `half` of a `subject` against a `predicted` value or bound.

        "yes" where all of it keeps the `relation`, "no" where all of it breaks it, else "inconclusive", as where a
        number is nan; the relation is kept within `margin`.
        """
        over = {"<=": measured - predicted, ">=": predicted - measured, "=": abs(measured - predicted)}[relation]
        agrees: Agreement = "yes" if over - margin + half <= 0 else "no" if over - margin - half > 0 else "inconclusive"
        return cls(subject, relation, predicted, measured, half, agrees)


def halves(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The even seeds, which choose, and the odd ones, which judge; `seed` is a column or the index."""
    odd = np.asarray(runs.get("seed", runs.index)) % 2 == 1
    return runs[~odd], runs[odd]


def log_regret(subject: str, logs: pd.DataFrame, q: float) -> tuple[Verdict, float, bool]:
    """Is q at most `TOLERATED` times as slow as the fastest q of a grid? Chosen on the even seeds, judged on the odd.

    Args:
        subject: what is compared.
        logs: log-times, a row a seed and a column a q, ascending.
        q: one of the columns.

    Returns:
        The verdict, the fastest q, and whether that is the smallest of the grid, so that a smaller one may be faster.
    """
    chosen, held_out = halves(logs)
    best = chosen.mean().idxmin()
    verdict = Verdict.from_paired(subject, "<=", math.log(TOLERATED), held_out[q] - held_out[best], WIDEST)
    return verdict, best, best == logs.columns[0]
