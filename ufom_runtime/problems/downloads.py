"""MNIST, Omniglot and CIFAR-100, fetched on request into the folder that UFOM_DATA names, held to pinned digests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ufom_runtime.problems.sources import SOURCES, data_folder, refuse_another
from ufom_theory import UfomError


def fetch(name: str) -> list[Path]:
    """Fetch those files of a data set that UFOM_DATA lacks.

    A file takes its place only once its digest is right, so that what stands there is whole. A file that is there
    already is left alone: the readers check it.

    Args:
        name: mnist, omniglot or cifar100.

    Returns:
        The files that were fetched.

    Raises:
        UfomError: another name, a UFOM_DATA that is not a folder, or a file that no mirror
            served with the right content.
        ModuleNotFoundError: pooch is not installed.
    """
    if name not in SOURCES:
        raise UfomError(f"data set {name!r} is unknown: fetch {', '.join(SOURCES)}")
    folder = data_folder() / name
    folder.mkdir(exist_ok=True)
    wanted = {folder / file: pin for file, pin in SOURCES[name].files.items() if not (folder / file).is_file()}
    for path, pin in wanted.items():
        _fetch(path, pin, SOURCES[name].mirrors)
    return list(wanted)


def _fetch(path: Path, pin: str, mirrors: tuple[str, ...]) -> None:
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "fetching data needs pooch: pip install '.[runtime]' from a checkout of ufom", name=error.name
        ) from error
    failures = []
    for mirror in mirrors:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as beside:
            got = Path(beside) / path.name
            try:
                pooch.HTTPDownloader()(mirror + path.name, str(got), None)
                refuse_another(got, pin)
            except (OSError, UfomError) as error:  # requests' errors are OSErrors
                failures.append(f"{mirror}: {_reason(error).removeprefix(f'{got} ')}")
                continue
            os.replace(got, path)
            return
    raise UfomError(f"{path.name} could not be fetched: {'; '.join(failures)}; put it into {path.parent} by hand")


def _reason(error: Exception) -> str:
    """In a few words; requests and urllib3 tell the whole story of a connection."""
    from requests import ConnectionError, Timeout

    if isinstance(error, ConnectionError | Timeout):
        return "no answer in time" if isinstance(error, Timeout) else "no connection"
    return f"{error!s:.200}".partition("\n")[0]
