"""The cells of a study, each run once and kept: one sealed JSON file a cell, named by the hash of its configuration.

A cell is whatever JSON can say: `{"study": "table_2", "estimator": "fom", "seed": 3}`. The code that runs it is not
part of its name: give the configuration a version, if the code may change.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import signal
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pandas as pd

from ufom_runtime.files import canonical, digest, read_sealed, write_sealed
from ufom_theory import UfomError
from ufom_theory.quantities import integer, plain

Config = Mapping[str, Any]
Rows = list[dict[str, Any]]
Function = Callable[[Config], "pd.DataFrame | Iterable[Mapping[str, Any]]"]


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


@dataclass(frozen=True)
class Store:
    """A folder of cells. Two may write to it at once, even the same cell: a file is whole or absent, the last stays.

    Attributes:
        folder: where the files are; made if missing.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, config: Config) -> Path:
        """Where the cell is kept once it is done; `UfomError` for what is not JSON, or holds nan or ±inf."""
        return self.folder / f"{digest(_plain(config))[:32]}.json"

    def load(self, config: Config) -> Rows | None:
        """The rows of a finished cell; None where it is not finished. A damaged file is moved aside, with a warning."""
        content = self._read(self.path(config), config)
        return None if content is None else content["rows"]

    def failure(self, config: Config) -> str | None:
        """The error of a cell that failed and has not succeeded since; None if there is none."""
        content = self._read(_failed(self.path(config)), config)
        return None if content is None else content["error"]

    def run(
        self,
        cells: Iterable[Config],
        function: Function,
        *,
        jobs: int = 1,
        retry: bool = False,
        progress: Callable[[float], object] = lambda share: None,
    ) -> Outcome:
        """Run the cells that are not done. Ctrl-C keeps those that are, and starts no other.

        Args:
            cells: configurations; one that stands there twice is run once.
            function: from a configuration to its rows, a table or a list of mappings of plain numbers and strings. An
                exception makes the cell a failed one, which is recorded and not run again.
            jobs: 1 runs the cells here, more in so many new processes of one thread each; `function` must then be
                importable, not a lambda or one defined in another.
            retry: run failed cells again.
            progress: called with the share of the cells that are done or failed.

        Raises:
            UfomError: jobs that is no integer ≥ 1, a function that other processes cannot import, a process that died.
        """
        integer("jobs", jobs, 1)
        wanted = {self.path(config): config for config in cells}
        found, errors, missing = 0, {}, {}
        for path, config in wanted.items():
            if self.load(config) is not None:
                found += 1
            elif not retry and (error := self.failure(config)) is not None:
                errors[path] = error
            else:
                missing[path] = config
        settled_before = len(wanted) - len(missing)
        with closing(self._each(missing, function, jobs)) as each:  # closed at once, also where `progress` raises
            for settled, (path, error) in enumerate(each, settled_before + 1):
                if error is not None:
                    errors[path] = error
                progress(settled / len(wanted))
        failed = tuple((config, errors[path]) for path, config in wanted.items() if path in errors)
        return Outcome(found, len(wanted) - found - len(failed), failed)

    def table(self, cells: Iterable[Config]) -> pd.DataFrame:
        """The rows of all cells, in their order, beside the configuration; where both name a column, the row decides.

        Raises:
            UfomError: a cell that is not done.
        """
        rows, missing = [], []
        for config in cells:
            found = self.load(config)
            if found is None:
                missing.append(config)
            else:
                rows += [{**config, **row} for row in found]
        if missing:
            error = self.failure(missing[0])
            why = f"failed: {error}; run it with retry=True" if error else "was not run"
            raise UfomError(f"{len(missing)} cells are not done; the first, {dict(missing[0])}, {why}")
        return pd.DataFrame(rows)

    def _each(self, cells: dict[Path, Config], function: Function, jobs: int) -> Iterator[tuple[Path, str | None]]:
        """Each cell's place and error, as it is done."""
        if jobs == 1:
            for path, config in cells.items():
                yield path, _run(self, config, function)
            return
        try:
            ForkingPickler.dumps(function)
        except Exception as error:
            raise UfomError(f"{function!r} cannot run in other processes: define it at the top of a module") from error
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
        )
        try:
            with _one_thread():  # the processes start with the first cell, and inherit this
                futures = {pool.submit(_run, self, config, function): path for path, config in cells.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UfomError(
                "a process of the sweep died (out of memory?): what is done is kept; run again, with fewer jobs"
            ) from error
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # only a whole cell has a file
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, path: Path, config: Config) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            content = read_sealed(path)
            if canonical(content.get("config")) != _plain(config):
                raise UfomError(f"{path} is damaged: it holds another cell than its name says")
        except UfomError as error:
            aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
            with suppress(FileNotFoundError):  # another process moved it
                path.rename(aside)
            warnings.warn(f"{error}; it was moved to {aside.name}, and the cell counts as not run", stacklevel=3)
            return None
        return content


def _run(store: Store, config: Config, function: Function) -> str | None:
    """Run a cell and write what came of it; the error, if it failed."""
    path, begin = store.path(config), time.perf_counter()
    record = {"config": dict(config), "seed": config.get("seed"), "versions": _versions(), "commit": _commit()}
    try:
        record["device"] = _device(str(config.get("device", "cpu")))
        found = function(config)
        table = found.to_dict("records") if isinstance(found, pd.DataFrame) else found
        rows = [{name: plain(value) for name, value in row.items()} for row in table]
        write_sealed(path, {**record, "seconds": time.perf_counter() - begin, "rows": rows})
    except Exception as error:  # it is the study's function: whatever it raises, write it down
        said = f"{type(error).__name__}: {error}"
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
        write_sealed(_failed(path), {**record, "error": said, "where": where})
        return said
    _failed(path).unlink(missing_ok=True)
    return None


def _failed(path: Path) -> Path:
    return path.with_suffix(".failed.json")


def _plain(config: Config) -> str:
    if not isinstance(config, Mapping) or any(not isinstance(key, str) for key in config):
        raise UfomError(f"the cell {config!r} is no mapping of names: give a dict")
    return canonical(config, finite=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@cache
def _versions() -> dict[str, str]:
    names = ("numpy", "pandas", "torch")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


@cache
def _device(name: str) -> str:
    """What the cell ran on, by the configuration's "device"."""
    if name.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(name)
    return f"{name}, {platform.machine()}"


@cache
def _commit() -> str:
    """The commit of this checkout, with a + where files differ from it; "unknown" without git."""
    git = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, cwd=Path(__file__).parent, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
