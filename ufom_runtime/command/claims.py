"""`ufom claims`: every numbered statement of the paper, decided again."""

from __future__ import annotations

from typing import Annotated

import typer

from ufom_runtime.command.plain import json_text


def claims_command(
    id: Annotated[str | None, typer.Argument(help="One claim; all of them if not given.")] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print the forms in LaTeX.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/equations.md, deciding nothing.")] = False,
) -> None:
    """Decide every numbered statement of the paper again.

    The exit status is 1 if one comes out other than recorded.
    """
    from ufom_runtime.command.verdicts import stored_verdicts
    from ufom_theory.derivations.report import chosen, decide, markdown

    if as_markdown:
        print(markdown(), end="")
        return
    claims = chosen(id)
    found = list(zip(claims, decide(claims, stored_verdicts()), strict=True))
    if as_json or latex:
        rows = [
            {"id": c.id, "equation": c.equation, "statement": c.statement,
             "printed": "" if c.printed is None else c.latex(c.printed),
             "derived": "" if c.form is None else c.latex(c.form),
             "recorded": c.status, "found": status, "agrees": status == c.status}
            for c, status in found
        ]  # fmt: skip
        if as_json:
            print(json_text(rows))
        else:
            print("\n".join(f"% {row['id']}: {row['found']}\n{row['printed']}\n{row['derived']}\n" for row in rows))
    else:
        from ufom_runtime.command.printing import print_claims

        print_claims(found)
    if any(status != claim.status for claim, status in found):
        raise typer.Exit(1)
