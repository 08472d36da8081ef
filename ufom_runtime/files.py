"""Small files that are whole or absent: written beside their place and renamed, JSON sealed with its own digest."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from ufom_theory import UfomError

_MOST_BYTES, _MOST_VALUES = 2**24, 2**20  # of a sealed file: what it takes in memory is then below 256 MiB


class DamagedFile(UfomError):
    """A file whose content is not what was written."""


class MissingFile(UfomError):
    """A file that is not there."""


def canonical(value: Any, finite: bool = False) -> str:
    """JSON of `value` in the one form that is hashed: sorted keys, no spaces, floats to the last bit.

    Raises:
        UfomError: something that JSON does not have, such as a tensor or a lone surrogate; if `finite`, nan and ±inf.
    """
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=not finite)
        text.encode()
        return text
    except (TypeError, ValueError) as error:
        raise UfomError(f"{value!r:.200} cannot be stored as JSON: {error}; give plain numbers and strings") from error


def digest(content: str | bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def write_whole(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file so that a reader, or the machine after a crash, sees all of it or what was there before.

    A symbolic link stays, and the file that it points to is written. If not `durable`, the file is whole for readers,
    but a crash of the machine may cut or lose it; that is quicker.

    Raises:
        UfomError: the path is a folder, a device or a pipe; the disk is full, the folder cannot be written, or any
            other error of the file system.
    """
    try:
        path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():  # as root, the renaming below would replace a device
            raise UfomError(f"{path} is not a regular file: write to another path")
        _write_beside(path, content, durable)
    except OSError as error:
        raise UfomError(
            f"{path} cannot be written: {error.strerror or error}; make room in {path.parent} or make it writable, and "
            "run again: what is there is kept"
        ) from error


def _write_beside(path: Path, content: bytes, durable: bool) -> None:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as stream:
            stream.write(content)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    if durable and hasattr(os, "O_DIRECTORY"):  # the name, too, survives a crash; Windows has no such call
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_whole(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file of at most `most_bytes`. Nothing else is read, and a pipe is not waited for.

    Raises:
        DamagedFile: a device, a pipe or a larger file.
        MissingFile: there is none.
        UfomError: a file that cannot be read; it may be whole.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DamagedFile(f"{path} is damaged: it is not a regular file; remove it")
            if status.st_size > most_bytes:
                raise DamagedFile(
                    f"{path} is damaged: it has {status.st_size} bytes, more than {most_bytes}; remove it"
                )
            content = stream.read(status.st_size + 1)  # a file of /proc says 0, whatever it holds
    except OSError as error:
        kind = MissingFile if isinstance(error, FileNotFoundError) else UfomError
        raise kind(f"{path} cannot be read: {error.strerror or error}; mend that and run again") from error
    if len(content) > status.st_size:
        raise DamagedFile(f"{path} is damaged: it holds more than the {status.st_size} bytes that it says; remove it")
    return content


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def sealed(content: dict[str, Any]) -> bytes:
    """`content` as JSON, with the digest by which `read_sealed` knows it whole.

    Raises:
        UfomError: as `canonical`; or more than `read_sealed` would read.
    """
    content = {"sha256": digest(canonical(content)), **content}
    text = (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
    if excess := _excess(text):
        raise UfomError(f"a sealed file would hold {excess}: keep fewer rows in it")
    return text


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write `content` for `read_sealed`; errors as `sealed` and `write_whole`."""
    write_whole(path, sealed(content))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing; `UfomError` if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        said = getattr(error, "strerror", None) or error
        raise UfomError(f"{folder} cannot be made: {said}; give a folder to write in") from error


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        DamagedFile: a file that is cut short, altered, too large or not a regular one.
        MissingFile: there is none.
        UfomError: a file that cannot be read; it may be whole.
    """
    found = read_whole(path, _MOST_BYTES)
    try:
        if excess := _excess(found):
            raise ValueError(excess)
        content = json.loads(found)
        seal = content.pop("sha256")
        whole = isinstance(content, dict) and digest(canonical(content)) == seal
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {type(error).__name__}: {error}; remove it") from error
    if not whole:
        raise DamagedFile(f"{path} is damaged: its content is not what its digest says; remove it")
    return content  # type: ignore[no-any-return]


def _excess(text: bytes) -> str:
    """What there is too much of in a JSON text; nothing if all is well."""
    if len(text) > _MOST_BYTES:
        return f"{len(text)} bytes, more than {_MOST_BYTES}"
    values = text.count(b",") + text.count(b"[") + text.count(b"{")
    return f"about {values} values, more than {_MOST_VALUES}" if values > _MOST_VALUES else ""
