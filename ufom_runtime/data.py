"""Real images: scikit-learn's digits (embedded), MNIST and Omniglot from the folder that UFOM_DATA names.

Sizes are checked before memory is taken; a missing or damaged file is a `UfomError` that names it.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import struct
import zipfile
import zlib
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ufom_theory import UfomError

_MOST_BYTES = 2**28  # no file read here decodes to more
OMNIGLOT_CHARACTERS, OMNIGLOT_DRAWERS, OMNIGLOT_TRAIN = 242, 20, 182


def data_folder() -> Path:
    """The folder that UFOM_DATA names."""
    name = os.environ.get("UFOM_DATA")
    if not name:
        raise UfomError("UFOM_DATA is not set: point it at the folder that holds mnist/ and omniglot/")
    folder = Path(name)
    if not folder.is_dir():
        raise UfomError(f"UFOM_DATA = {name!r} is not a folder: point it at the one that holds mnist/ and omniglot/")
    return folder


def _file(*names: str) -> Path:
    path = data_folder().joinpath(*names)
    if not path.is_file():
        raise UfomError(f"{path} is missing: put the original file there, or point UFOM_DATA elsewhere")
    return path


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes (LeCun et al.) as an array; its length must be what its header says."""
    try:
        with gzip.open(path, "rb") as stream:
            head = stream.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] != 8 or not 1 <= head[3] <= 3:
                raise UfomError(f"{path} is no IDX file of unsigned bytes: its header reads {head.hex() or 'nothing'}")
            sizes = stream.read(4 * head[3])
            if len(sizes) < 4 * head[3]:
                raise UfomError(f"{path} is truncated within its header: fetch it again")
            shape = struct.unpack(f">{head[3]}I", sizes)
            if prod(shape) > _MOST_BYTES:
                raise UfomError(f"{path} claims shape {shape}, more than {_MOST_BYTES} bytes: it is damaged")
            body = stream.read(prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UfomError(f"{path} cannot be read: {error}; fetch it again") from error
    if len(body) != prod(shape):
        raise UfomError(f"{path} claims shape {shape} but does not hold {prod(shape)} bytes: fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


@lru_cache(maxsize=1)
def mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST: train images (60000, 784) in [0, 1] float32, train labels, test images (10000, 784), test labels."""
    out: list[Tensor] = []
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        images = read_idx(_file("mnist", f"{part}-images-idx3-ubyte.gz"))
        labels = read_idx(_file("mnist", f"{part}-labels-idx1-ubyte.gz"))
        if images.shape != (n, 28, 28) or labels.shape != (n,) or labels.max() > 9:
            raise UfomError(f"MNIST {part}: shapes {images.shape}, {labels.shape} are not MNIST's; fetch it again")
        out += [torch.tensor(images).reshape(n, 784) / 255, torch.tensor(labels).long()]
    return out[0], out[1], out[2], out[3]


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's bundled digits: images (1797, 64) in [0, 1] float32, labels (1797,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target).long()


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
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if match := _OMNIGLOT_NAME.fullmatch(info.filename):
                        drawers = characters.setdefault(match[1], {})
                        if int(match[2]) not in drawers:
                            drawers[int(match[2])] = _read_png(path, archive, info)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
            raise UfomError(f"{path} cannot be read: {error}; fetch it again") from error
    drawn = {len(drawers) for drawers in characters.values()}
    if len(characters) != OMNIGLOT_CHARACTERS or drawn != {OMNIGLOT_DRAWERS}:
        raise UfomError(
            f"Omniglot holds {len(characters)} characters of {sorted(drawn)} drawings, not {OMNIGLOT_CHARACTERS} of "
            f"{OMNIGLOT_DRAWERS}: fetch both archives again"
        )
    images = np.stack([[drawers[i] for i in sorted(drawers)] for _, drawers in sorted(characters.items())])
    order = np.random.default_rng(0).permutation(OMNIGLOT_CHARACTERS)
    return torch.tensor(images[order])[:, :, None]


def _read_png(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One 105×105 drawing, as 28×28 float32 in [0, 1] with ink = 1."""
    from PIL import Image, UnidentifiedImageError

    if info.file_size > 2**16:
        raise UfomError(f"{path}: {info.filename} claims {info.file_size} bytes, too many for a drawing")
    try:
        with Image.open(io.BytesIO(archive.read(info)), formats=["PNG"]) as image:
            if image.size != (105, 105):
                raise UfomError(f"{path}: {info.filename} is {image.size}, not (105, 105)")
            small = image.convert("L").resize((28, 28), Image.Resampling.BOX)
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        if isinstance(error, UfomError):
            raise
        raise UfomError(f"{path}: {info.filename} is no readable PNG: {error}") from error
    return 1 - np.asarray(small, dtype=np.float32) / 255
