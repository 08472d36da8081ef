"""One cell of a study: its files in a store, and running it.

`ID.wanted.json` holds the configuration of a cell that is to be run, `ID.json` what came of it, `ID.failed.json` how
it failed. All are sealed with their digest, written whole or not at all, and named by the configuration's hash: who
runs a cell needs the folder and the id, no data.
"""

from __future__ import annotations

import importlib.metadata
import platform
import secrets
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from ufom_runtime.files import DamagedFile, MissingFile, canonical, digest, read_sealed, sealed, write_whole
from ufom_theory import UfomError
from ufom_theory.checks import plain

Config = Mapping[str, Any]
Function = Callable[[Config], "pd.DataFrame | Iterable[Mapping[str, Any]]"]


@dataclass(frozen=True)
class Cell:
    """The files of one cell. Two may run it at once: each file is whole or absent, and the last stays.

    Attributes:
        folder: of the store.
        id: the start of the SHA-256 of the configuration.
    """

    folder: Path
    id: str

    @property
    def done(self) -> Path:
        """The file of what came of it."""
        return self.folder / f"{self.id}.json"

    @property
    def failed(self) -> Path:
        """The file of the error."""
        return self.folder / f"{self.id}.failed.json"

    @property
    def wanted(self) -> Path:
        """The file of the configuration, until the cell is done or failed."""
        return self.folder / f"{self.id}.wanted.json"

    def want(self, config: Config) -> None:
        """Write down what is to be run; should a crash of the machine lose that, the sweep is begun again anyway."""
        write_whole(self.wanted, sealed({"config": dict(config)}), durable=False)

    def check(self, path: Path) -> dict[str, Any]:
        """The content of one of its files.

        Raises:
            DamagedFile: it is cut short, altered or another cell's.
            MissingFile: there is none.
            UfomError: it cannot be read.
        """
        content = read_sealed(path)
        if digest(canonical(content.get("config")))[:32] != self.id:
            raise DamagedFile(f"{path} is damaged: it holds another cell than its name says")
        return content

    def read(self, path: Path) -> dict[str, Any] | None:
        """The content of one of its files; None where there is none. A damaged one is moved aside, with a warning.

        Raises:
            UfomError: it cannot be read.
        """
        try:
            return self.check(path)
        except MissingFile:
            return None
        except DamagedFile as error:
            aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(8)}")
            moved = f"it was moved to {aside.name}"
            try:
                path.rename(aside)
            except OSError as kept:  # a folder that is read-only; or another process moved it
                moved = f"it cannot be moved aside: {kept.strerror}"
            warnings.warn(f"{error}; {moved}; the cell counts as not run", stacklevel=3)
            return None

    def run(self, function: Function) -> None:
        """Run it, if it is wanted and not done, and write what came of it or, if it raised an exception, that.

        Raises:
            UfomError: the store cannot be read or written; this is no failure of the cell.
        """
        wanted = self.read(self.wanted)
        if wanted is not None and self.read(self.done) is None:
            self._run(wanted["config"], function)
        with suppress(OSError):  # one that stays counts for nothing beside the others
            self.wanted.unlink(missing_ok=True)

    def _run(self, config: Config, function: Function) -> None:
        begin = time.perf_counter()
        record = {"config": config, "seed": config.get("seed"), "versions": _versions(), "commit": _commit()}
        try:
            record["device"] = _device(str(config.get("device", "cpu")))
            found = function(config)
            table = found.to_dict("records") if isinstance(found, pd.DataFrame) else found
            rows = [{name: plain(value) for name, value in row.items()} for row in table]
            path, content = self.done, sealed({**record, "seconds": time.perf_counter() - begin, "rows": rows})
        except Exception as error:  # it is the study's function: whatever it raises, write it down
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
            said = f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()  # may name any file
            path, content = self.failed, sealed({**record, "error": said, "where": where})
        write_whole(path, content)
        if path == self.done:
            with suppress(OSError):
                self.failed.unlink(missing_ok=True)


def run_cells(folder: str, function: str, ids: str) -> None:
    """Run cells in another process, which is given nothing but names; the ids stand between spaces."""
    for name in ids.split():
        Cell(Path(folder), name).run(_find(function))


def name_of(function: Function) -> str:
    """`module:function`, by which another process finds it; `UfomError` where it would not."""
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    with suppress(ImportError, AttributeError, ValueError):
        if _find(name) is function:
            return name
    raise UfomError(f"{function!r} cannot run in other processes: define it at the top of a module")


def _find(name: str) -> Function:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)  # type: ignore[no-any-return]


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
