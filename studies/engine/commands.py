"""What the command line asks of stores: their state, their rows, and with which executor to fill them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from studies.engine.sweep import STATES, Store
from ufom_runtime.command.printing import print_table
from ufom_theory import UfomError

CELLS = Path(__file__).parents[1] / "cells"
Size = Annotated[str, typer.Option(help="quick (kept out of git), standard (minutes), or another.")]
Kind = Annotated[
    str | None, typer.Option("--executor", help="local (processes) or slurm; otherwise as the study says.")
]
Jobs = Annotated[int | None, typer.Option(help="Processes, or jobs of the SLURM array: 2.")]
Partition = Annotated[str | None, typer.Option(help="SLURM's; otherwise its default.")]
Minutes = Annotated[int | None, typer.Option("--time", help="Minutes a SLURM job may take before it is requeued: 60.")]
CellMinutes = Annotated[
    float | None, typer.Option(help="Minutes a cell may take, by local processes, before it is given up: a day.")
]
Gpus = Annotated[int | None, typer.Option("--gpus-per-job", help="GPUs of each job: 0.")]


def status() -> None:
    """How many cells of each study are done, failed or missing.

    Missing ones were asked for, and not run. Damaged ones cannot be read.
    """
    rows = []
    for folder in sorted(CELLS.glob("*/")):
        counts = Counter(Store(folder).states().values())
        rows.append((folder.name, *(str(counts[state]) for state in STATES)))
    if rows:
        print_table(("study", *STATES), rows, left=("study",))
    else:
        print(f"no cells in {CELLS}")


def export(name: Annotated[str, typer.Argument(help="A study.")], size: Size = "quick") -> None:
    """Print the rows of every cell that is done, as CSV.

    Each row begins with the configuration of its cell.
    """
    folder = CELLS / f"{name}-{size}"
    if not folder.is_dir():
        kept = ", ".join(path.name for path in sorted(CELLS.glob("*/"))) or "none"
        raise UfomError(f"{folder} is missing: stores are {kept}")
    Store(folder).everything().to_csv(sys.stdout, index=False)
