"""Change every part of every form that holds, and see whether its status changes: `python -m
ufom_theory.derivations.mutate`.

One part at a time: the sign of a term, an index or a limit, a factor, an exponent. A mutant that comes out as the form
itself does has survived, unless sympy proves the two equal: then it is an equivalent one, listed and counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import sympy as sp
from sympy.concrete.expr_with_limits import ExprWithLimits
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.matrices.expressions import Identity, MatAdd, MatrixSymbol

from ufom_theory.derivations.registry import Claim, load
from ufom_theory.derivations.symbols import COIN, OWN

KINDS = ("sign", "index", "factor", "exponent")
HOLDS = ("proved", "checked", "measured", "not established")


class Mutant(NamedTuple):
    """A changed form: what kind of part was changed, and which."""

    kind: str
    part: str
    form: Any


def _here(node: Any) -> Iterator[Mutant]:
    """Changes of this node itself."""
    part = str(node)
    if isinstance(node, sp.Number):
        yield Mutant("sign", part, -node) if node == -1 else Mutant("factor", part, node + 1)
    elif isinstance(node, sp.Add | MatAdd):
        yield from (Mutant("sign", str(term), node - 2 * term) for term in node.args)
    elif isinstance(node, sp.Pow) and not node.exp.free_symbols:
        yield Mutant("exponent", part, node.base ** (node.exp + 1))
    elif isinstance(node, sp.Symbol | sp.Indexed | AppliedUndef):
        yield Mutant("factor", part, 2 * node)
        yield Mutant("exponent", part, node**2)
    elif isinstance(node, MatrixSymbol | Identity):
        yield Mutant("factor", part, 2 * node)
    elif isinstance(node, sp.Min | sp.Max):
        yield Mutant("sign", part, (sp.Max if isinstance(node, sp.Min) else sp.Min)(*node.args))
    elif isinstance(node, Relational) and not isinstance(node, sp.Eq | sp.Ne):
        yield Mutant("sign", part, node.func(node.rhs, node.lhs))
    if isinstance(node, sp.Indexed):
        yield Mutant("index", part, node.base[node.indices[0] + 1])
    if isinstance(node, ExprWithLimits):
        (variable, low, high) = node.limits[0]
        for shift in (1, -1):
            yield Mutant("index", part, node.func(node.function, (variable, low + shift, high)))
            yield Mutant("index", part, node.func(node.function, (variable, low, high + shift)))


def _below(node: Any) -> Iterator[Mutant]:
    """Changes of the parts of this node."""
    if isinstance(node, sp.Symbol | sp.Indexed | sp.Number | AppliedUndef | MatrixSymbol | Identity | sp.Derivative):
        return
    fixed = isinstance(node, sp.Pow) and not node.exp.free_symbols
    for i, child in enumerate(node.args):
        if i and (fixed or isinstance(node, ExprWithLimits)):  # the limits and a plain exponent are changed above
            continue
        for kind, part, changed in (*_here(child), *_below(child)):
            yield Mutant(kind, part, node.func(*node.args[:i], changed, *node.args[i + 1 :]))


def mutants(form: Any) -> list[Mutant]:
    """Every change of one part of a form; of a tuple, of one of its entries."""
    signs = (
        []
        if isinstance(form, sp.Tuple | Relational | sp.Add | sp.Number | sp.Set)
        else [Mutant("sign", str(form), -form)]
    )
    found = {m.form: m for m in (*signs, *_here(form), *_below(form)) if m.form != form}
    return list(found.values())


def equal(left: Any, right: Any) -> bool:
    """Does sympy prove the two forms equal, entry by entry, and for both values of the coin?"""
    if isinstance(left, sp.Tuple):
        return all(a == b or equal(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, sp.Set):
        return bool(left == right)
    if isinstance(left, Relational):
        return bool(left.func == right.func and sp.simplify(left.lhs - left.rhs - right.lhs + right.rhs) == 0)
    difference = (left - right).doit()
    cases = [difference]
    for binary in difference.free_symbols & {COIN, OWN}:
        cases = [case.subs(binary, value) for case in cases for value in (0, 1)]
    return all(x == 0 or sp.simplify(x.expand()) == 0 for x in cases)


class Row(NamedTuple):
    """What came of the mutants of one form: how many of each kind, the equivalent ones, the survivors."""

    id: str
    which: str
    counts: Counter[str]
    equivalent: list[str]
    survived: list[str]


def forms(claim: Claim) -> Iterator[tuple[str, Any]]:
    """The forms of a claim that hold: these are changed. One that is loose or refuted is itself a change of another."""
    if claim.form is not None and claim.holds.startswith(HOLDS):
        yield claim.holds, claim.form
    if claim.printed is not None and claim.printed != claim.form and claim.status.startswith(HOLDS):
        yield claim.status, claim.printed


def changes(claim: Claim, mutant: Mutant, status: str) -> bool:
    """Does the mutant come out other than the form itself? Where nothing can be computed from it, it does."""
    try:
        return claim.on(mutant.form) != status
    except (ArithmeticError, TypeError, ValueError):
        return True


def row(id: str) -> list[Row]:
    """Decide every mutant of a claim's forms."""
    claim, rows = load()[id], []
    for status, form in forms(claim):
        counts: Counter[str] = Counter()
        equivalent: list[str] = []
        survived: list[str] = []
        for mutant in mutants(form):
            counts[mutant.kind] += 1
            if not changes(claim, mutant, status):
                kept = equivalent if equal(mutant.form, form) else survived
                kept.append(f"{mutant.kind} of {mutant.part}: {mutant.form}")
        rows.append(Row(id, "form" if form == claim.form else "printed", counts, equivalent, survived))
    return rows


def table(rows: list[Row]) -> str:
    """The whole table, the equivalent mutants, the survivors and the counts as Markdown."""
    lines = ["| claim | " + " | ".join(KINDS) + " | equivalent | survived |", "|---|" + "---|" * 6]
    for r in rows:
        name = r.id if r.which == "form" else f"{r.id}, as printed"
        counts = " | ".join(str(r.counts[kind] or "") for kind in KINDS)
        lines.append(f"| {name} | {counts} | {len(r.equivalent) or ''} | {len(r.survived) or ''} |")
    for title, found in (
        ("Equivalent", [(r.id, x) for r in rows for x in r.equivalent]),
        ("Survived", [(r.id, x) for r in rows for x in r.survived]),
    ):
        lines += ["", f"{title}: {len(found)}.", *(f"\n- {id}: {text}" for id, text in found)]
    total = sum(sum(r.counts.values()) for r in rows)
    return "\n".join([f"{len({r.id for r in rows})} claims and steps, {total} mutants.", "", *lines]) + "\n"


def main(names: list[str]) -> int:
    """Print the table for the claims named, all of them by default; 1 if a mutant survives."""
    with ProcessPoolExecutor(2) as pool:
        rows = [r for found in pool.map(row, names or load(), chunksize=1) for r in found]
    print(table(rows), end="")
    return int(any(r.survived for r in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
