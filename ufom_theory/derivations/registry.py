"""What a claim is, and how one is decided.

A derivation file reads as its proof does: its functions derive, its `step`s state what they come to, its `claim`s say
what follows. Steps and claims are one thing: forms in sympy, shown and decided as they are, and the function that
decides them. Change a form, and its status must change: `python -m ufom_theory.derivations.mutate` changes every part
of every form.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import sympy as sp
from sympy.core.relational import Relational

from ufom_theory.derivations.latex import latex

MODULES = (
    "chain_rule",
    "second_moment",
    "bias_bound",
    "smoothness",
    "convergence",
    "exponents",
    "local_law",
    "complexity",
    "optimum",
    "adaptive",
    "divergence",
    "scaled_proxy",
    "roulette",
    "stratified",
    "one_step",
    "general_update",
    "errata",
    "figures",
)
DIGITS = 50
MEANING = {
    "proved": "for all admissible values of its symbols, by exact simplification; over r by induction",
    "checked": "on the instances that are named, exactly, or to 50 digits at random admissible points",
    "measured": "by a run, or by the stored verdicts of a study",
    "loose": "true of a bound, but a smaller one holds too: the derived form",
    "refuted": "comes out other than it says; the derived form is what does hold",
    "not established": "neither proved nor refuted here",
}
Verdicts = Sequence[Mapping[str, Any]]  # of one study, as it stores them


@dataclass(frozen=True, eq=False)
class Claim:
    """One statement in forms, and the function that decides them.

    Attributes:
        id: name on the command line.
        equation: the paper's number, "ours", or "step" for a step of a proof.
        statement: what is said, in a sentence or two.
        says: LaTeX with one %s for every entry of a form.
        printed: the form that the paper has; None where it has none.
        form: the form that holds; the printed one where that does.
        status: recorded outcome for the printed form, or for `form` where there is none.
        holds: recorded outcome for `form`.
        decide_form: decides a form, given entry by entry; given the verdicts of `study` alone where the claim has none.
        study: name of the study whose stored verdicts decide.
        module: the derivation file.
    """

    id: str
    equation: str
    statement: str
    says: str
    printed: sp.Basic | None
    form: sp.Basic | None
    status: str
    holds: str
    decide_form: Callable[..., str]
    study: str
    module: str

    def decide(self, verdicts: Mapping[str, Verdicts] | None = None) -> str:
        """Decide the printed form now, or `form` where nothing is printed."""
        if self.study:
            return self.decide_form((verdicts or {}).get(self.study, ()))
        if self.form is None:
            return self.decide_form()
        return self.on(self.form if self.printed is None else self.printed)

    def on(self, form: Any) -> str:
        """Decide any form."""
        return self.decide_form(*_entries(form))

    def latex(self, form: sp.Basic) -> str:
        """A form as it is shown."""
        return self.says % tuple(map(latex, _entries(form)))


def _entries(form: Any) -> tuple[Any, ...]:
    return tuple(form.args) if isinstance(form, sp.Tuple) else (form,)


CLAIMS: dict[str, Claim] = {}


def claim(
    id: str,
    equation: str,
    status: str = "proved",
    says: str = "%s",
    *,
    printed: Any = None,
    form: Any = None,
    holds: str = "",
    study: str = "",
) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register a deciding function; its docstring is the statement. A tuple is a form of several entries."""

    def basic(value: Any) -> Any:
        return (
            None
            if value is None
            else sp.Tuple(*value)
            if isinstance(value, tuple)
            else sp.S.Zero + value
            if isinstance(value, int | float)
            else value
        )

    def register(decide: Callable[..., str]) -> Callable[..., str]:
        if id in CLAIMS:
            raise ValueError(f"two claims are named {id}")
        statement = " ".join((decide.__doc__ or "").split())
        right, stated = basic(printed if form is None else form), basic(printed)
        outcome = holds or (status if form is None or printed is None else "proved")
        module = decide.__module__.rpartition(".")[2]
        CLAIMS[id] = Claim(id, equation, statement, says, stated, right, status, outcome, decide, study, module)
        return decide

    return register


def step(id: str, form: Any, says: str = "%s", status: str = "proved") -> Callable[..., Any]:
    """Register one step of a proof."""
    return claim(id, "step", status, says, form=form)


@cache
def load() -> dict[str, Claim]:
    """All claims and steps, in the order of the proofs."""
    for name in MODULES:
        import_module(f"ufom_theory.derivations.{name}")
    return {c.id: c for name in MODULES for c in list(CLAIMS.values()) if c.module == name}


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


def _zero(expression: sp.Expr, point: dict[sp.Symbol, sp.Expr]) -> bool:
    """Is it zero to 50 digits at a point, by the size of its terms?"""
    value = expression.subs(point).evalf(DIGITS)
    if not (value.is_number and value.is_finite):
        return False
    size = sum(abs(term.subs(point).evalf(DIGITS)) for term in sp.Add.make_args(expression))
    return bool(abs(value) <= sp.Float(10) ** (5 - DIGITS) * (size + 1))


def vanishes(*differences: Any) -> str:
    """Are these expressions (or explicit matrices of them) zero wherever their symbols may be?"""
    entries = [sp.S.Zero + x for d in differences for x in (d if isinstance(d, sp.MatrixBase) else [d])]
    left = [x for x in entries if sp.expand(x) != 0]
    if not all(_zero(x, random_point(x.free_symbols, seed)) for seed in range(5) for x in left):
        return "refuted"
    return "proved" if all(sp.simplify(x) == 0 for x in left) else "checked to 50 digits"


def same(*pairs: tuple[Any, Any]) -> str:
    """Are both expressions of every pair equal: matrices of any size, or scalars?"""
    for left, right in pairs:
        if getattr(left, "is_Matrix", False) and not isinstance(left, sp.MatrixBase):
            if left.shape != getattr(right, "shape", None):
                return "refuted"
            difference = (left - right).doit().expand()
            if not (difference == 0 or getattr(difference, "is_ZeroMatrix", False)):
                return "refuted"
        elif (outcome := vanishes(left - right)) != "proved":
            return outcome
    return "proved"


def bounds(form: Any, attained: Any) -> str:
    """Is this the least bound of what is attained? "loose" where form − attained is > 0, with positive coefficients
    only."""
    raw = sp.S.Zero + form - attained
    if sp.expand(sp.fraction(sp.together(raw))[0]) == 0:
        return "proved"
    symbols = sorted(raw.free_symbols, key=str)
    values = [raw.subs(random_point(symbols, seed)).evalf(DIGITS) for seed in range(8)]
    if not all(v.is_real and v >= -(sp.Float(10) ** -40) for v in values):
        return "refuted"
    if any(v > sp.Float(10) ** -40 for v in values):
        polynomial = raw.is_polynomial(*symbols) and symbols
        positive = all(c > 0 for c in sp.Poly(raw, *symbols).coeffs()) if polynomial else raw.is_positive
        return "loose" if positive else "checked to 50 digits"
    return "proved" if sp.simplify(raw) == 0 else "checked to 50 digits"


def holds(*conditions: Any) -> str:
    """Exact facts, each true or not; what sympy leaves open is not."""
    return (
        "proved" if all(not isinstance(c, Relational) and c is not None and bool(c) for c in conditions) else "refuted"
    )


def worst(*found: str | Iterable[str]) -> str:
    """What several decisions come to, the worst of them; after one that is refuted no other is asked for."""
    ranks = ("proved", "checked", "measured", "loose", "not established", "refuted")
    outcome = "proved"
    for status in (s for part in found for s in ((part,) if isinstance(part, str) else part)):
        outcome = max(outcome, status, key=lambda x: next(i for i, rank in enumerate(ranks) if x.startswith(rank)))
        if outcome == "refuted":
            break
    return outcome


def instances(outcome: str, status: str) -> str:
    """A proof of instances only: "checked on 3 instances" and the like where they all hold."""
    return status if outcome == "proved" else outcome


def studied(verdicts: Verdicts, subject: str) -> str:
    """What the stored verdicts of a study on these subjects come to; "not established" where there are none."""
    found = {v["agrees"] for v in verdicts if v["subject"].startswith(subject)}
    return "refuted" if "no" in found else "measured" if found == {"yes"} else "not established"


def measures(value: float, stated: Any, tolerance: float) -> str:
    """Is a number computed in floating point the one that is stated, within a relative tolerance?"""
    return "measured" if abs(value - float(stated)) <= tolerance * abs(float(stated)) else "refuted"
