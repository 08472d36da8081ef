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
from typing import TYPE_CHECKING, Any

from ufom_runtime.files import DamagedFile, MissingFile, canonical, digest, read_sealed, sealed, write_whole
from ufom_theory import UfomError
from ufom_theory.checks import plain

if TYPE_CHECKING:
    import pandas as pd

Config = Mapping[str, Any]
_MOST_WORDS = 10_000  # of an error
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
            DamagedFile: it is cut short, altered, another cell's or not of a cell's form.
            MissingFile: there is none.
            UfomError: it cannot be read.
        """
        content = read_sealed(path)
        config, rows, error = content.get("config"), content.get("rows"), content.get("error")
        if not isinstance(config, dict) or digest(canonical(config))[:32] != self.id:
            raise DamagedFile(f"{path} is damaged: it holds another cell than its name says")
        if path == self.done and not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise DamagedFile(f"{path} is damaged: it holds no list of rows; remove it")
        if path == self.failed and not isinstance(error, str):
            raise DamagedFile(f"{path} is damaged: it holds no error; remove it")
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

        `sys.exit` in a cell is a failure, too.

        Raises:
            UfomError: the store cannot be read or written; the cell itself has not failed.
        """
        wanted = self.read(self.wanted)
        if wanted is not None and self.read(self.done) is None:
            self._run(wanted["config"], function)
        with suppress(OSError):  # one that stays counts for nothing beside the others
            self.wanted.unlink(missing_ok=True)

    def _run(self, config: Config, function: Function) -> None:
        begin = time.perf_counter()
        try:
            device = _device(str(config.get("device", "cpu")))
            found = function(config)
            table = found.to_dict("records") if hasattr(found, "to_dict") else found
            rows = [{name: plain(value) for name, value in row.items()} for row in table]
            content = sealed(
                {**_record(config), "device": device, "seconds": time.perf_counter() - begin, "rows": rows}
            )
        except (Exception, SystemExit) as error:  # it is the study's function: whatever it raises, write it down
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
            self._fail(config, f"{type(error).__name__}: {_text(error)}", where)
            return
        write_whole(self.done, content)
        with suppress(OSError):
            self.failed.unlink(missing_ok=True)

    def give_up(self, why: str) -> None:
        """Write down that the process that ran it was ended; nothing, if it was done before that.

        Raises:
            UfomError: the store cannot be read or written.
        """
        wanted = self.read(self.wanted)
        if wanted is not None and self.read(self.done) is None:
            self._fail(wanted["config"], why, [])
        with suppress(OSError):
            self.wanted.unlink(missing_ok=True)

    def _fail(self, config: Config, said: str, where: list[str]) -> None:
        said = said[:_MOST_WORDS].encode(errors="backslashreplace").decode()  # it may name any file
        write_whole(self.failed, sealed({**_record(config), "error": said, "where": where}))


def _record(config: Config) -> dict[str, Any]:
    return {"config": config, "seed": config.get("seed"), "versions": _versions(), "commit": _commit()}


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:
        return f"(its text raises a {type(second).__name__})"


def name_of(function: Function) -> str:
    """`module:function`, by which another process finds it; `UfomError` where it would not."""
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    with suppress(ImportError, AttributeError, ValueError):
        if find(name) is function:
            return name
    raise UfomError(f"{function!r} cannot run in other processes: define it at the top of a module")


def find(name: str) -> Function:
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
