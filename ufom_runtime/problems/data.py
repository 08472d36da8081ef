"""Real images: scikit-learn's digits (embedded), MNIST, Omniglot and CIFAR-100 from the folder that UFOM_DATA names.

Sizes are checked before memory is taken; a missing or damaged file is a `UfomError` that names it. Nothing is fetched
unless `downloads.fetch` is called.
"""

from __future__ import annotations

import io
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ufom_theory import UfomError

MOST_BYTES = 2**28  # no file read here decodes to more
_MOST_IDX_BYTES = 2**26  # MNIST's largest has 47 million
_MOST_ZIP_BYTES = 2**22  # Omniglot's have 3 million
_MOST_MEMBERS = 100  # CIFAR-100's archive has six
_MOST_DRAWING_BYTES = 2**16
_PIECE = 2**16
OMNIGLOT_CHARACTERS, OMNIGLOT_DRAWERS, OMNIGLOT_TRAIN = 242, 20, 182


def data_folder() -> Path:
    """The folder that UFOM_DATA names."""
    name = os.environ.get("UFOM_DATA")
    if not name:
        raise UfomError("UFOM_DATA is not set: point it at the folder that holds mnist/, omniglot/ and cifar100/")
    folder = Path(name)
    if not folder.is_dir():
        raise UfomError(
            f"UFOM_DATA = {name!r} is not a folder: point it at the one that holds mnist/, omniglot/ and cifar100/"
        )
    return folder


def _file(*names: str) -> Path:
    path = data_folder().joinpath(*names)
    if not path.is_file():
        fetch = f"ufom_runtime.problems.downloads.fetch({names[0]!r})"
        raise UfomError(f"{path} is missing: put the original file there, call {fetch}, or point UFOM_DATA elsewhere")
    return path


def gunzip(path: Path, most_bytes: int) -> Iterator[bytes]:
    """What a .gz of one member decodes to, piece by piece; zlib skips the texts of its header.

    Raises:
        UfomError: a file that is damaged, cut short, of several members, or decodes to more than `most_bytes`.
    """
    decoder, left = zlib.decompressobj(31), most_bytes
    try:
        with open(path, "rb") as stream:
            while rest := stream.read(_PIECE):
                while rest:
                    piece = decoder.decompress(rest, _PIECE)
                    rest, left = decoder.unconsumed_tail, left - len(piece)
                    if left < 0:
                        raise UfomError(
                            f"{path} decodes to more than {most_bytes} bytes: it is damaged; fetch it again"
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


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes (LeCun et al.) as an array; its length must be what its header says."""
    content = b"".join(gunzip(path, 16 + _MOST_IDX_BYTES))
    head = content[:4]
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != 8 or not 1 <= head[3] <= 3:
        raise UfomError(f"{path} is not an IDX file of unsigned bytes: its header reads {head.hex() or 'nothing'}")
    start = 4 + 4 * head[3]
    if len(content) < start:
        raise UfomError(f"{path} is truncated within its header: fetch it again")
    shape = struct.unpack(f">{head[3]}I", content[4:start])
    if not 0 < prod(shape) == len(content) - start:
        raise UfomError(f"{path} claims shape {shape} but does not hold {prod(shape)} bytes: fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


@lru_cache(maxsize=1)
def mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST: train images (60000, 784) in [0, 1] float32, train labels, test images (10000, 784), test labels."""
    out: list[Tensor] = []
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        images = read_idx(_file("mnist", f"{part}-images-idx3-ubyte.gz"))
        labels = read_idx(_file("mnist", f"{part}-labels-idx1-ubyte.gz"))
        if images.shape != (n, 28, 28) or labels.shape != (n,) or labels.max() > 9:
            raise UfomError(f"MNIST {part}: shapes {images.shape}, {labels.shape} are not MNIST's; fetch it again")
        flat = torch.tensor(images, dtype=torch.float32, device="cpu").reshape(n, 784)
        out += [flat / 255, torch.tensor(labels, dtype=torch.int64, device="cpu")]
    return out[0], out[1], out[2], out[3]


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's bundled digits: images (1797, 64) in [0, 1] float32, labels (1797,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.data / 16, dtype=torch.float32, device="cpu")
    return images, torch.tensor(bunch.target, dtype=torch.int64, device="cpu")


_OMNIGLOT_NAME = re.compile(r"images_background_small[12]/([^/]+/character\d\d)/\d{4}_(\d\d)\.png")


@lru_cache(maxsize=1)
def omniglot() -> Tensor:
    """Omniglot's two reduced background sets: (242, 20, 1, 28, 28) float32, ink = 1; characters in a fixed order.

    A character that stands in both archives (Greek and Latin do) is counted once. The first `OMNIGLOT_TRAIN` of the
    characters are for training, the other 60 for testing; the order is a fixed shuffle of the sorted names.
    """
    characters: dict[str, dict[int, np.ndarray]] = {}
    for number in (1, 2):
        path = _file("omniglot", f"images_background_small{number}.zip")
        if path.stat().st_size > _MOST_ZIP_BYTES:  # its directory is read at once
            raise UfomError(f"{path} has {path.stat().st_size} bytes, more than {_MOST_ZIP_BYTES}: fetch it again")
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if match := _OMNIGLOT_NAME.fullmatch(info.filename):
                        drawers = characters.setdefault(match[1], {})
                        if len(characters) > OMNIGLOT_CHARACTERS or int(match[2]) > OMNIGLOT_DRAWERS:
                            raise UfomError(f"{path}: {info.filename} is one more than Omniglot has; fetch it again")
                        if int(match[2]) not in drawers:
                            drawers[int(match[2])] = _read_png(path, archive, info)
        except UfomError:
            raise
        except Exception as error:  # of a damaged archive, zipfile's are of every kind
            raise UfomError(f"{path} cannot be read: {error}; fetch it again") from error
    drawn = {len(drawers) for drawers in characters.values()}
    if len(characters) != OMNIGLOT_CHARACTERS or drawn != {OMNIGLOT_DRAWERS}:
        raise UfomError(
            f"Omniglot holds {len(characters)} characters of {sorted(drawn)} drawings, not {OMNIGLOT_CHARACTERS} of "
            f"{OMNIGLOT_DRAWERS}: fetch both archives again"
        )
    images = np.stack([[drawers[i] for i in sorted(drawers)] for _, drawers in sorted(characters.items())])
    order = np.random.default_rng(0).permutation(OMNIGLOT_CHARACTERS)
    return torch.tensor(images[order], device="cpu")[:, :, None]


def _read_png(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One 105×105 drawing, as 28×28 float32 in [0, 1] with ink = 1."""
    from PIL import Image

    if info.file_size > _MOST_DRAWING_BYTES or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UfomError(
            f"{path}: {info.filename} claims {info.file_size} bytes, too many for a drawing, or is not zipped"
        )
    with archive.open(info) as stream:
        content = stream.read(_MOST_DRAWING_BYTES + 1)  # read() without a number decodes all, whatever is claimed
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (105, 105):  # what Pillow is about to decode, whatever stands where in the file
                raise UfomError(f"{path}: {info.filename} is {image.size}, not (105, 105)")
            small = image.convert("L").resize((28, 28), Image.Resampling.BOX)
    except UfomError:
        raise
    except Exception as error:  # of a damaged image, Pillow's are of every kind
        raise UfomError(f"{path}: {info.filename} is not a readable PNG: {error}") from error
    return 1 - np.asarray(small, dtype=np.float32) / 255


CIFAR100_CLASSES, CIFAR100_TRAIN, CIFAR100_TEST = 100, 500, 100  # images of a class in train.bin and in test.bin
_CIFAR_NAME = re.compile(r"cifar-100-binary(/\w[\w.-]*)?")
_CIFAR_PIXELS = (3, 32, 32)
_CIFAR_RECORD = 2 + prod(_CIFAR_PIXELS)  # coarse label, fine label, pixels


@lru_cache(maxsize=1)
def cifar100() -> Tensor:
    """CIFAR-100 (Krizhevsky 2009): (100, 600, 3, 32, 32) uint8, the fine classes in a fixed order.

    Training and test images are pooled, as few-shot problems split by class: 500 of the first, then 100 of the second.
    The order of the classes is a fixed shuffle of their labels, so that the held-out ones are those at the end.
    """
    parts = read_cifar100(_file("cifar100", "cifar-100-binary.tar.gz"))
    images = np.concatenate([_by_class(*part) for part in parts], axis=1)
    return torch.from_numpy(images[np.random.default_rng(0).permutation(CIFAR100_CLASSES)])


def _by_class(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return images[np.argsort(labels, kind="stable")].reshape(CIFAR100_CLASSES, -1, *_CIFAR_PIXELS)


def read_cifar100(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The binary archive, `cifar-100-binary.tar.gz`, read as a stream: nothing is extracted to the disk.

    Returns:
        For the training and then for the test part, images (n, 3, 32, 32) and fine labels (n,), uint8.

    Raises:
        UfomError: an archive that is damaged, decodes to more than it should, holds a name or an entry that does not
            belong there, lacks a part, or parts of other sizes or labels than CIFAR-100's.
    """
    sizes = {"train.bin": CIFAR100_TRAIN, "test.bin": CIFAR100_TEST}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    try:
        stream: Any = _Stream(gunzip(path, MOST_BYTES))
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Plain) as archive:
            for number, member in enumerate(archive):
                if not _CIFAR_NAME.fullmatch(member.name) or number == _MOST_MEMBERS:
                    raise UfomError(f"{path} holds {member.name!r}, which is not of CIFAR-100: fetch it again")
                name = member.name.rpartition("/")[2]
                if name in found:
                    raise UfomError(f"{path} holds {name} twice: fetch it again")
                if name in sizes:
                    found[name] = _read_cifar_part(path, archive, member, CIFAR100_CLASSES * sizes[name])
    except UfomError:
        raise
    except Exception as error:  # of a damaged archive, tarfile's are of every kind
        raise UfomError(f"{path} cannot be read: {error}; fetch it again") from error
    if missing := sorted(sizes.keys() - found.keys()):
        raise UfomError(f"{path} lacks {missing[0]}: fetch the binary version of CIFAR-100 again")
    return [found[name] for name in sizes]


def _read_cifar_part(
    path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, n: int
) -> tuple[np.ndarray, np.ndarray]:
    if member.size != n * _CIFAR_RECORD:
        raise UfomError(f"{path}: {member.name} claims {member.size} bytes, not {n} records of {_CIFAR_RECORD}")
    stream: Any = archive.extractfile(member)
    records = np.empty((n, _CIFAR_RECORD), np.uint8)
    rest = memoryview(records.data).cast("B")
    while rest:  # in pieces: tarfile holds what it reads at once twice
        got = stream.readinto(rest[:_PIECE])
        if not got:
            raise UfomError(f"{path} is cut short within {member.name}: fetch it again")
        rest = rest[got:]
    labels = records[:, 1]
    if (np.bincount(labels, minlength=CIFAR100_CLASSES) != n // CIFAR100_CLASSES).any():
        raise UfomError(f"{path}: the labels of {member.name} are not {n // CIFAR100_CLASSES} of each class")
    return records[:, 2:].reshape(n, *_CIFAR_PIXELS), labels


class _Plain(tarfile.TarInfo):
    """A header of a plain file or a folder: of an extended one tarfile would read all at once, whatever it claims."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        found = super().frombuf(buf, encoding, errors)
        if found.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
            raise ValueError(f"it holds {found.name!r}, which is not of CIFAR-100: no plain file")
        return found


class _Stream:
    """Pieces, read as a file is."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.rest = pieces, b""

    def read(self, size: int) -> bytes:
        while len(self.rest) < size and (piece := next(self.pieces, None)) is not None:
            self.rest += piece
        found, self.rest = self.rest[:size], self.rest[size:]
        return found
