"""`ufom derive`: a numbered result derived again under assumptions of one's own."""

from __future__ import annotations

from typing import Annotated

import typer


def derive_command(
    number: Annotated[str, typer.Argument(help="15, 18, 20, 21 or local.")],
    m: Annotated[float | None, typer.Option(help="Exponent of the time to precision (20, 21).")] = None,
    batch: Annotated[int | None, typer.Option(help="Tasks an outer step, each with its own coin.")] = None,
    c_det: Annotated[float | None, typer.Option(help="C_det, the proxy's cost (20, 21).")] = None,
    c_rnd: Annotated[float | None, typer.Option(help="C_rnd, the correction's cost (20, 21).")] = None,
    kept: Annotated[int | None, typer.Option(help="Backward steps that the proxy keeps (15).")] = None,
    s: Annotated[float | None, typer.Option(help="Outer steps c·k^(−s) (local).")] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX in the paper's notation.")] = False,
) -> None:
    """Derive a result of the paper again, under your assumptions.

    15 is D_bound, 18 the rate, 20 the condition, 21 the quadratic; local is the local law. Sympy derives them.
    """
    from ufom_theory import derive

    result = derive(number, m=m, batch=batch, c_det=c_det, c_rnd=c_rnd, kept=kept, s=s)
    print(result.latex() if latex else result.text())
