"""Where the cells of a sweep run: in processes beside this one, or as an array of SLURM jobs.

Whoever runs cells is given their ids, reads what they are from the store, and writes there what came of them: no data
travels.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Protocol

from studies.engine.local import Local
from studies.engine.slurm import Slurm
from ufom_theory import UfomError
from ufom_theory.checks import integer, positive

DAY = 86_400.0  # seconds that a cell may take, unless it is said otherwise


class Executor(Protocol):
    """Runs the cells of a store."""

    def each(self, folder: Path, function: str, ids: list[str]) -> Generator[str, None, None]:
        """Run cells, and give the id of each once it is done or failed. Closed, it ends those that still run.

        Args:
            folder: the store, where the cells are wanted.
            function: `module:function`.
            ids: of the cells.

        Raises:
            UfomError: the store cannot be written, or whoever ran the cells ended without them.
        """


def executor(
    kind: str | None,
    jobs: int | None,
    partition: str | None,
    minutes: int | None,
    gpus: int | None,
    cell_minutes: float | None = None,
) -> Executor | None:
    """What the options say; None: the study's own number of processes.

    Raises:
        UfomError: another kind, numbers out of range, or an option that this kind does not have.
    """
    given = {
        "--jobs": jobs,
        "--gpus-per-job": gpus,
        "--partition": partition,
        "--time": minutes,
        "--cell-minutes": cell_minutes,
    }
    known: dict[str | None, tuple[str, ...]] = {
        None: (),
        "local": ("--jobs", "--gpus-per-job", "--cell-minutes"),
        "slurm": ("--jobs", "--gpus-per-job", "--partition", "--time"),
    }
    if kind not in known:
        raise UfomError(f"executor {kind!r} is unknown: use local or slurm")
    for option, value in given.items():
        if value is not None and option not in known[kind]:
            kinds = " or ".join(str(k) for k, options in known.items() if option in options)
            raise UfomError(f"{option} goes with --executor {kinds}")
    jobs, gpus = integer("--jobs", 2 if jobs is None else jobs, 1), integer("--gpus-per-job", gpus or 0, 0)
    if kind == "slurm":
        return Slurm(jobs, partition, integer("--time", 60 if minutes is None else minutes, 5), gpus)
    if kind == "local":
        return Local(jobs, gpus, 60 * float(positive("--cell-minutes", cell_minutes)) if cell_minutes else DAY)
    return None
