"""LaTeX in the paper's notation: 𝔻², 𝕍², C_det, and sums that begin with a positive term."""

from __future__ import annotations

from typing import Any

import sympy as sp
from sympy.printing.latex import LatexPrinter

from ufom_theory.derivations.symbols import A_Q, C_DET, C_RND, D2, GAP, L_EFF, V2

# braces around the squares: D2**2 would otherwise have two superscripts
NAMES = {
    D2: r"{\mathbb{D}^2}",
    V2: r"{\mathbb{V}^2}",
    C_DET: "C_{det}",
    C_RND: "C_{rnd}",
    A_Q: "A(q)",
    L_EFF: r"L_{\mathrm{eff}}",
    GAP: r"\Delta",
}


class _Printer(LatexPrinter):  # type: ignore[misc]
    def _as_ordered_terms(self, expr: sp.Add, order: Any = None) -> list[sp.Expr]:
        return sorted(super()._as_ordered_terms(expr, order), key=lambda term: term.could_extract_minus_sign())


def latex(expression: Any) -> str:
    """LaTeX of a sympy expression, or of a relation."""
    settings = {"symbol_names": NAMES, "order": "rev-lex", "long_frac_ratio": 3}
    return str(_Printer(settings).doprint(expression)).replace("+ - ", "- ")
