"""What a claim is, and how one is decided: exact simplification first, then 50 digits at random admissible points."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import sympy as sp

from ufom_theory.derivations.symbols import A_Q, C_DET, C_RND, D2, V2

Status = Literal["proved", "checked to 50 digits", "loose", "refuted", "measured", "awaits a study"]
DIGITS = 50
# braces around the squares: D2**2 would otherwise have two superscripts
NAMES = {D2: r"{\mathbb{D}^2}", V2: r"{\mathbb{V}^2}", C_DET: r"C_{det}", C_RND: r"C_{rnd}", A_Q: "A(q)"}


@dataclass(frozen=True, eq=False)
class Claim:
    """One statement, and the function that decides it.

    Attributes:
        id: name on the command line.
        equation: the paper's number, or "ours".
        statement: what is said, in a sentence.
        printed: LaTeX as the paper has it; "" where the paper has no formula.
        derived: LaTeX as it comes out of `ufom_theory.derivations`, or a remark.
        status: the recorded outcome.
        evidence: decides a form, its own by default; None where an experiment must.
        other: a form on which the evidence must come out differently, so that it is known to be able to.
        test: the test that holds the claim, besides the one that runs them all.
    """

    id: str
    equation: str
    statement: str
    printed: str
    derived: Callable[[], Any] | str
    status: Status
    evidence: Callable[..., Status] | None
    other: Any
    test: str

    def decide(self) -> Status:
        """Run the evidence now."""
        return self.evidence() if self.evidence else "awaits a study"

    def decide_other(self) -> Status:
        """Run it on the form that must not pass as this one does."""
        assert self.evidence is not None
        return self.evidence(self.other)

    @property
    def derived_latex(self) -> str:
        """The derived form in LaTeX, a remark as it is."""
        return self.derived if isinstance(self.derived, str) else sp.latex(self.derived(), symbol_names=NAMES)


CLAIMS: dict[str, Claim] = {}


def claim(
    id: str,
    equation: str,
    status: Status,
    *,
    other: Any,
    printed: str = "",
    derived: Callable[[], Any] | str = "",
    test: str = "",
) -> Callable[[Callable[..., Status]], Callable[..., Status]]:
    """Register a deciding function; its docstring is the statement, its default argument the form to be judged."""

    def register(evidence: Callable[..., Status]) -> Callable[..., Status]:
        statement = " ".join((evidence.__doc__ or "").split())
        CLAIMS[id] = Claim(id, equation, statement, printed, derived, status, evidence, other, test)
        return evidence

    return register


def awaits(id: str, equation: str, statement: str, printed: str = "") -> None:
    """Register a claim that only an experiment can decide."""
    CLAIMS[id] = Claim(id, equation, statement, printed, "", "awaits a study", None, None, "")


def random_point(symbols: Iterable[sp.Symbol], seed: int) -> dict[sp.Symbol, sp.Expr]:
    """Random admissible values: small integers, rationals in (0, 2] for positive symbols, else of any sign."""
    draw = random.Random(seed)
    point: dict[sp.Symbol, sp.Expr] = {}
    for symbol in sorted(symbols, key=str):
        if symbol.is_integer:
            point[symbol] = sp.Integer(draw.randint(1, 6))
        else:
            sign = 1 if symbol.is_nonnegative else draw.choice((-1, 1))
            point[symbol] = sp.Rational(sign * draw.randint(1, 2000), 1009)
    return point


def vanishes(*differences: Any) -> Status:
    """Are these expressions (or matrices of them) zero wherever their symbols may be?"""
    entries = [sp.S.Zero + x for d in differences for x in (d if isinstance(d, sp.MatrixBase) else [d])]
    left = [x for x in entries if sp.expand(x) != 0]
    for seed in range(5):
        for x in left:
            point = random_point(x.free_symbols, seed)
            value = x.subs(point).evalf(DIGITS)
            terms = sum(abs(term.subs(point).evalf(DIGITS)) for term in sp.Add.make_args(x))
            if not abs(value) <= sp.Float(10) ** (5 - DIGITS) * (terms + 1):
                return "refuted"
    return "proved" if all(sp.simplify(x) == 0 for x in left) else "checked to 50 digits"


def bounds(difference: sp.Expr) -> Status:
    """Is this polynomial in positive symbols, bound minus what it bounds, ≥ 0? "loose" where it is never zero."""
    expanded = sp.expand(difference)
    if expanded == 0:
        return "proved"
    symbols = sorted(expanded.free_symbols, key=str)
    if all(c > 0 for c in sp.Poly(expanded, *symbols).coeffs()):
        return "loose"
    negative = any(expanded.subs(random_point(symbols, seed)) < 0 for seed in range(50))
    return "refuted" if negative else "checked to 50 digits"


def holds(*conditions: Any) -> Status:
    """Exact facts, each true or not."""
    return "proved" if all(bool(c) for c in conditions) else "refuted"


def measures(value: float, stated: float, tolerance: float) -> Status:
    """Is a number computed in floating point the one that is stated, within a relative tolerance?"""
    return "measured" if abs(value - stated) <= tolerance * abs(stated) else "refuted"
