"""Small files that are whole or absent: written beside their place and renamed, JSON sealed with its own digest."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from ufom_theory import UfomError


def canonical(value: Any, finite: bool = False) -> str:
    """JSON of `value` in the one form that is hashed: sorted keys, no spaces, floats to the last bit.

    Raises:
        UfomError: something that JSON does not have, such as a tensor; if `finite`, nan and ±inf too.
    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=not finite)
    except (TypeError, ValueError) as error:
        raise UfomError(f"{value!r:.200} cannot be stored as JSON: {error}; give plain numbers and strings") from error


def digest(content: str | bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or the machine after a crash, sees all of it or what was there before."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the name, too, survives a crash; Windows has no such call
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, with the digest by which `read_sealed` knows it whole; errors as `canonical`."""
    sealed = {"sha256": digest(canonical(content)), **content}
    write_whole(path, (json.dumps(sealed, ensure_ascii=False, indent=1) + "\n").encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote; a file that is cut short or altered is a `UfomError` that names it."""
    try:
        content = json.loads(path.read_bytes())
        seal = content.pop("sha256")
        whole = isinstance(content, dict) and digest(canonical(content)) == seal
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UfomError(f"{path} is damaged: {type(error).__name__}: {error}; remove it") from error
    if not whole:
        raise UfomError(f"{path} is damaged: its content is not what its digest says; remove it")
    return content  # type: ignore[no-any-return]
