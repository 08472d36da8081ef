"""What several commands share: options, and a check of the file to write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ufom_theory import UfomError

ExponentOption = Annotated[float | None, typer.Option(help="Exponent m of the time to precision; or --outer.")]
OuterOption = Annotated[
    str | None, typer.Option(help="How the outer steps are taken: tuned, decay:S, adam:RATE or paper (m = 2); or --m.")
]


def refuse_folder(path: Path) -> None:
    """Raise a `UfomError` where a folder, or nothing, is named as the file to write."""
    if path.is_dir():
        raise UfomError(f"{str(path)!r} is a folder, or empty: name the file to write, for example q.html")
