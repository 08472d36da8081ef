"""`ufom data`: a data set, fetched into the folder that UFOM_DATA names."""

from __future__ import annotations

from typing import Annotated

import typer


def data_command(name: Annotated[str, typer.Argument(help="mnist, omniglot or cifar100.")]) -> None:
    """Fetch a data set into the folder that UFOM_DATA names.

    Files that are there are left alone; each is held to its digest.
    """
    from ufom_runtime.problems.downloads import fetch

    fetched = fetch(name)
    print("\n".join(map(str, fetched)) if fetched else f"all files of {name} are there")
