"""`ufom explore`: a page that explores q*."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ufom_runtime.command.options import refuse_folder


def explore_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")],
) -> None:
    """Write a page that explores q*, the time curve and where UFOM pays: one file, no server and no network."""
    from ufom_runtime.command.explorer import write_explorer

    refuse_folder(output)
    write_explorer(output)
    print(f"open {output} in a browser")
