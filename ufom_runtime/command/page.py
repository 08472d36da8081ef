"""`ufom explore`: a page that explores q*."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ufom_runtime.command.options import refuse_folder


def explore_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")],
) -> None:
    """Write a page with sliders that explores when UFOM pays.

    It is one HTML file, which needs no server and no network.
    """
    from ufom_runtime.command.explorer import write_explorer

    refuse_folder(output)
    write_explorer(output)
    print(f"open {output} in a browser")
