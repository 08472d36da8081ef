"""The cells of a study, each run once and kept: one sealed JSON file a cell, named by the hash of its configuration.

A cell is whatever JSON can say: `{"study": "table_2", "estimator": "fom", "seed": 3}`. The code that runs it is not
part of its name: give the configuration a version, if the code may change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.engine.cell import Cell, Config, Function, name_of
from studies.engine.executors import Executor
from ufom_runtime.files import MissingFile, canonical, digest, make_folder
from ufom_theory import UfomError

if TYPE_CHECKING:
    import pandas as pd

Rows = list[dict[str, Any]]
STATES = ("done", "failed", "damaged", "missing")


@dataclass(frozen=True)
class Outcome:
    """What `Store.run` did.

    Attributes:
        found: cells that were done before.
        ran: cells that were run now, and are done.
        failed: configuration and error of each cell that failed, now or before.
    """

    found: int
    ran: int
    failed: tuple[tuple[Config, str], ...]

    def refuse_failed(self, name: Callable[[Config], str]) -> None:
        """`UfomError` where a cell failed, with the name of the first and its error."""
        if self.failed:
            cell, error = self.failed[0]
            raise UfomError(f"{len(self.failed)} cells failed; {name(cell)}: {error}")


@dataclass(frozen=True)
class Store:
    """A folder of cells. Two may write to it at once, even the same cell: a file is whole or absent, the last stays.

    One that is killed while it writes leaves a file `.*.tmp`, which counts for nothing and is never removed.

    Attributes:
        folder: where the files are; made if missing.
        executor: runs the cells; None: this process does, which a cell that crashes would end. The function that runs
            a cell must be importable for it, not a lambda or one defined in another.
        retry: run failed cells again, whatever `run` is asked for.
        partial: run nothing, and leave cells that are not done out of tables.

    Raises:
        UfomError: a folder that cannot be made.
    """

    folder: Path
    executor: Executor | None = None
    retry: bool = False
    partial: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        make_folder(self.folder)

    def cell(self, config: Config) -> Cell:
        """The files of a cell; `UfomError` for what is not JSON, or holds nan or ±inf."""
        return Cell(self.folder, digest(_plain(config))[:32])

    def path(self, config: Config) -> Path:
        """Where the cell is kept once it is done; errors as `cell`."""
        return self.cell(config).done

    def load(self, config: Config) -> Rows | None:
        """The rows of a finished cell; None where it is not finished. A damaged file is moved aside, with a warning."""
        cell = self.cell(config)
        content = cell.read(cell.done)
        return None if content is None else content["rows"]

    def failure(self, config: Config) -> str | None:
        """The error of a cell that failed and has not succeeded since; None if there is none."""
        cell = self.cell(config)
        content = cell.read(cell.failed)
        return None if content is None else content["error"]

    def run(
        self,
        cells: Iterable[Config],
        function: Function,
        *,
        retry: bool = False,
        progress: Callable[[float], object] = lambda share: None,
    ) -> Outcome:
        """Run the cells that are not done. Ctrl-C keeps those that are, and starts no other.

        Args:
            cells: configurations; one that stands there twice is run once.
            function: from a configuration, as JSON gives it back, to its rows, a table or a list of mappings of plain
                numbers and strings. An exception makes the cell a failed one, which is recorded and not run again.
            retry: run failed cells again.
            progress: called with the share of the cells that are done or failed.

        Raises:
            UfomError: a function that other processes cannot import, a job that died, a store that cannot be read or
                written; what is done is kept.
        """
        if self.partial:
            return Outcome(sum(self.load(config) is not None for config in cells), 0, ())
        runner = self.executor
        name = name_of(function) if runner else ""
        wanted = {self.cell(config): config for config in cells}
        found, errors, missing = 0, {}, {}
        for cell, config in wanted.items():
            if self.load(config) is not None:
                found += 1
            elif not (retry or self.retry) and (error := self.failure(config)) is not None:
                errors[cell] = error
            else:
                missing[cell.id] = cell
        for cell in missing.values():
            cell.want(wanted[cell])
        settled = len(wanted) - len(missing)
        each = runner.each(self.folder, name, list(missing)) if runner and missing else _here(missing, function)
        with closing(each):  # closed at once, also where `progress` raises
            for id in each:
                cell, settled = missing[id], settled + 1
                if not os.path.exists(cell.done):  # Path.exists may raise
                    error = self.failure(wanted[cell])
                    if error is None:
                        raise UfomError(f"{dict(wanted[cell])} was not run: {cell.wanted} was lost; run again")
                    errors[cell] = error
                progress(settled / len(wanted))
        failed = tuple((config, errors[cell]) for cell, config in wanted.items() if cell in errors)
        return Outcome(found, len(wanted) - found - len(failed), failed)

    def table(self, cells: Iterable[Config]) -> pd.DataFrame:
        """The rows of all cells, in their order, beside the configuration; where both name a column, the row decides.

        Raises:
            UfomError: a cell that is not done, unless the store is `partial`; no row at all.
        """
        rows, missing = [], []
        for config in cells:
            found = self.load(config)
            if found is None:
                missing.append(config)
            else:
                rows += [{**config, **row} for row in found]
        if missing and not self.partial:
            error = self.failure(missing[0])
            why = f"failed: {error}; run it with retry=True (python -m studies retry)" if error else "was not run"
            raise UfomError(f"{len(missing)} cells are not done; the first, {dict(missing[0])}, {why}")
        if not rows:
            what = "no cell is done yet" if missing else "a size of 0 or an empty list leaves nothing to measure"
            raise UfomError(f"the table has no rows: {what}")
        return _table(rows)

    def seconds(self) -> float:
        """The time of all cells that are done, in whatever run, one after the other."""
        return sum(float(content["seconds"]) for _, content in self._done())

    def states(self) -> dict[str, str]:
        """Each cell's id, and whether it is done, failed, damaged or missing: wanted, and none of these.

        Every file is read; none is changed. `UfomError` for a folder that cannot be read.
        """
        found: dict[str, set[str]] = {}
        try:
            paths = list(self.folder.glob("*.json*"))
        except OSError as error:
            raise UfomError(f"{self.folder} cannot be read: {error.strerror}; mend that and run again") from error
        for path in paths:
            id, _, kind = path.name.partition(".")
            if id and (state := _state(Cell(self.folder, id), path, kind)):  # an unfinished file begins with a point
                found.setdefault(id, set()).add(state)
        return {id: next(state for state in STATES if state in found[id]) for id in sorted(found)}

    def everything(self) -> pd.DataFrame:
        """The rows of all cells that are done, by id, beside the configuration; what is nested, as JSON."""
        rows = [{"cell": id, **content["config"], **row} for id, content in self._done() for row in content["rows"]]
        nested = [{k: canonical(v) if isinstance(v, dict | list) else v for k, v in row.items()} for row in rows]
        return _table(nested)

    def _done(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The id and the content of each cell that is done, by id."""
        for id, state in self.states().items():
            if state == "done":
                cell = Cell(self.folder, id)
                yield id, cell.check(cell.done)


def _table(rows: Rows) -> pd.DataFrame:
    import pandas as pd  # not where cells are run alone, as in each process of a sweep

    return pd.DataFrame(rows)


def _here(cells: dict[str, Cell], function: Function) -> Generator[str, None, None]:
    for id, cell in cells.items():
        cell.run(function)
        yield id


def _state(cell: Cell, path: Path, kind: str) -> str:
    if path.suffix != ".json":
        return "damaged"
    try:
        cell.check(path)
    except MissingFile:
        return ""  # a sweep that goes on removed it
    except UfomError:
        return "damaged"
    return {"json": "done", "failed.json": "failed", "wanted.json": "missing"}.get(kind, "")  # not a copy


def _plain(config: Config) -> str:
    if not isinstance(config, Mapping) or any(not isinstance(key, str) for key in config):
        raise UfomError(f"the cell {config!r} is not a mapping: give a dict")
    return canonical(config, finite=True)
