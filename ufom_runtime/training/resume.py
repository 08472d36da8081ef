"""The state of an outer run on disk: tensors as safetensors, all else as JSON, the log in a file that grows.

Nothing is pickled. Saving costs the same at the millionth step as at the tenth.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ufom_runtime.files import MissingFile, digest, make_folder, read_sealed, read_whole, write_sealed, write_whole
from ufom_runtime.problem import BilevelProblem, Task, Tasks
from ufom_theory import UfomError

_TENSORS = re.compile(r"tensors-[0-9a-f]{16}\.safetensors")  # no path: nothing outside of the folder is read


class Log:
    """The rows of a run in `log.jsonl`, a line of JSON each, appended. The state beside it says where they end.

    What lies beyond, such as the torn last line of a run that was killed, is cut off when rows are appended.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self._bytes, self._digest = 0, hashlib.sha256()

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows; `UfomError` where they are not JSON, or the file cannot be written."""
        content = b"".join(_line(row) for row in rows)
        try:
            if self.path.exists() and not self.path.is_file():
                raise OSError("it is not a regular file")
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as stream:
                stream.truncate(self._bytes)
                stream.seek(self._bytes)
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise UfomError(
                f"{self.path} cannot be written: {error.strerror or error}; make room, run again"
            ) from error
        self._bytes, self.rows = self._bytes + len(content), self.rows + len(rows)
        self._digest.update(content)

    def seal(self) -> dict[str, Any]:
        """What the state keeps of the log: its length, and the digest by which `read` knows it whole."""
        return {"bytes": self._bytes, "rows": self.rows, "sha256": self._digest.hexdigest()}

    def read(self, seal: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows that `seal` is of; rows are appended after them from now on.

        Raises:
            UfomError: a file that is damaged or cannot be read.
        """
        length = int(seal["bytes"])
        try:
            fits = self.path.is_file() and 0 <= length <= self.path.stat().st_size
            with open(self.path if fits else os.devnull, "rb") as stream:
                content = stream.read(length) if fits else b""
        except OSError as error:
            raise UfomError(f"{self.path} cannot be read: {error.strerror}; mend that and run again") from error
        if not fits or digest(content) != seal["sha256"]:
            raise UfomError(f"{self.path} is damaged: it is not what state.json says; remove {self.path.parent}")
        rows = [json.loads(line) for line in content.splitlines()]
        self._bytes, self.rows, self._digest = length, len(rows), hashlib.sha256(content)
        return rows


def _line(row: dict[str, Any]) -> bytes:
    """A row as a line of JSON, its columns in their order."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UfomError(f"{row!r:.200} cannot be stored as JSON: {error}; give plain numbers and strings") from error


@dataclass(frozen=True)
class Checkpoint:
    """A folder with one state. `state.json` names the tensor file of its step: it is written last, and decides.

    The folder is one run's at a time: two would delete each other's tensors, and leave a state that is damaged.

    Attributes:
        folder: where the state is; made if missing.
        config: what the run was asked for, as JSON; a state of another one is refused.
        most_bytes: of the tensors; what holds more is neither written nor read.
        log: the rows of the run.

    Raises:
        UfomError: a folder that cannot be made.
        ModuleNotFoundError: safetensors is not installed.
    """

    folder: Path
    config: dict[str, Any]
    most_bytes: int
    log: Log = field(init=False)

    def __post_init__(self) -> None:
        _safetensors()
        make_folder(self.folder)
        object.__setattr__(self, "log", Log(self.folder / "log.jsonl"))

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any], rows: Sequence[dict[str, Any]] = ()) -> None:
        """Append `rows` to the log and store a state; the state before is removed once this one is whole.

        Raises:
            UfomError: more than `most_bytes` of tensors, values that are not JSON, or a file that cannot be written.
        """
        # copied: one tensor under two names, as θ while it is the best, is refused by safetensors
        whole = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        content: bytes = _safetensors().save(whole)
        if len(content) > self.most_bytes:
            raise UfomError(f"a state of {len(content)} bytes, more than {self.most_bytes}: run without checkpoint=")
        self.log.append(rows)
        name = f"tensors-{digest(content)[:16]}.safetensors"
        write_whole(self.folder / name, content)
        record = {"config": self.config, "tensors": name, "tensors_sha256": digest(content), "log": self.log.seal()}
        write_sealed(self.folder / "state.json", {**record, **values})
        with suppress(OSError):  # the next state removes what stays
            for old in (*self.folder.glob("tensors-*.safetensors"), *self.folder.glob(".*.tmp")):
                if old.name != name:
                    old.unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The stored tensors, on the CPU, and values; None where nothing is stored.

        Raises:
            UfomError: a file that is damaged or cannot be read, or a state of another configuration.
        """
        path = self.folder / "state.json"
        try:
            values = read_sealed(path)
        except MissingFile:
            return None
        stored, name = values.get("config"), str(values.get("tensors"))
        if not isinstance(stored, dict) or not _TENSORS.fullmatch(name):
            raise UfomError(
                f"{path} is damaged: it is not a state, or names {name!r} as its tensors; remove {self.folder}"
            )
        for key in {**self.config, **stored}:
            if stored.get(key) != self.config.get(key):
                raise UfomError(
                    f"{path} is of another run: its {key} is {stored.get(key)}, not {self.config.get(key)}; give "
                    "checkpoint= another folder, or remove this one"
                )
        file = self.folder / name
        try:
            content = read_whole(file, self.most_bytes)
        except MissingFile:
            content = b""
        if digest(content) != values.get("tensors_sha256"):
            raise UfomError(f"{file} is damaged: its content is not what {path.name} says; remove {self.folder}")
        try:
            return _safetensors().load(content), values
        except Exception as error:  # the library's own class is not public
            raise UfomError(f"{file} is damaged: {error}; remove {self.folder}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "checkpoint= needs safetensors: pip install '.[runtime]' from a checkout of ufom", name=error.name
        ) from error
    return safetensors.torch


def describe(problem: BilevelProblem, theta: Tensor, tasks: Task) -> dict[str, Any]:
    """What tells one run from another to the bit, as JSON: θ_0, the inner steps, and the first tasks drawn."""
    return {
        "form": 3,
        "problem": type(problem).__name__,
        "r": problem.r,
        "inner step sizes": None if problem.update else fingerprint(torch.tensor(problem.alphas, dtype=torch.float64)),
        "θ_0": fingerprint(theta),
        "first tasks": fingerprint(*Tasks.of(tasks).parts),
    }


def fingerprint(*tensors: Tensor) -> str:
    """Dtypes, shapes and 16 digits of the digest of the bits."""
    kinds = ", ".join(f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in tensors)
    content = b"".join(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    return f"{kinds} {digest(content)[:16]}"


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A nested state, such as an optimiser's `state_dict()`, as JSON; its tensors are put into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs: JSON has no integer keys
        return {"dict": [[key, pack(v, tensors, f"{name}.{key}")] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    return value


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(v, tensors) for key, v in content}
    return {"list": list, "tuple": tuple}[kind](unpack(v, tensors) for v in content)


def same_form(name: str, found: Any, expected: Any) -> None:
    """Raises a ValueError that names the first part of a nested state whose type, shape or dtype differs."""
    is_, must_be = _forms(name, found), _forms(name, expected)
    for part in must_be | is_:
        if is_.get(part) != must_be.get(part):
            raise ValueError(f"{part} is {is_.get(part, 'absent')}, not {must_be.get(part, 'absent')}")


def _forms(name: str, value: Any) -> dict[str, str]:
    """The type of each part, by name; of a tensor dtype and shape."""
    if isinstance(value, Tensor):
        return {name: f"{value.dtype} {tuple(value.shape)}"}
    found = {name: type(value).__name__}
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in inside:
        found |= _forms(f"{name}[{key!r}]", part)
    return found
