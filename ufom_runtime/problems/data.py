"""Real images: scikit-learn's digits (embedded), MNIST, Omniglot and CIFAR-100 from the folder that UFOM_DATA names.

Each file is held to its digest before it is parsed. A missing file, or one of other content, is a `UfomError` that
names it. Nothing is fetched unless `downloads.fetch` is called.
"""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from ufom_runtime.problems.sources import gunzip, original

OMNIGLOT_TRAIN = 182


@lru_cache(maxsize=1)
def mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST: train images (60000, 784) in [0, 1] float32, train labels, test images (10000, 784), test labels."""
    out: list[Tensor] = []
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        files = (original("mnist", f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        # an IDX file (LeCun et al.): a number of 4 bytes, as many for each axis, and the items
        images, labels = (np.frombuffer(b"".join(gunzip(file)), np.uint8) for file in files)
        images, labels = images[16:], labels[8:]
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
        with zipfile.ZipFile(original("omniglot", f"images_background_small{number}.zip")) as archive:
            for name in archive.namelist():
                if match := _OMNIGLOT_NAME.fullmatch(name):
                    drawers = characters.setdefault(match[1], {})
                    if int(match[2]) not in drawers:
                        drawers[int(match[2])] = _read_png(archive.read(name))
    images = np.stack([[drawers[i] for i in sorted(drawers)] for _, drawers in sorted(characters.items())])
    order = np.random.default_rng(0).permutation(len(images))
    return torch.tensor(images[order], device="cpu")[:, :, None]


def _read_png(content: bytes) -> np.ndarray:
    """One 105×105 drawing, as 28×28 float32 in [0, 1] with ink = 1."""
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        small = image.convert("L").resize((28, 28), Image.Resampling.BOX)
    return 1 - np.asarray(small, dtype=np.float32) / 255


CIFAR100_CLASSES = 100
_CIFAR_PIXELS = (3, 32, 32)
_CIFAR_RECORD = 2 + prod(_CIFAR_PIXELS)  # coarse label, fine label, pixels


@lru_cache(maxsize=1)
def cifar100() -> Tensor:
    """CIFAR-100 (Krizhevsky 2009): (100, 600, 3, 32, 32) uint8, the fine classes in a fixed order.

    Training and test images are pooled, as few-shot problems split by class: 500 of the first, then 100 of the second.
    The order of the classes is a fixed shuffle of their labels, so that the held-out ones are those at the end.
    """
    parts = []
    with tarfile.open(original("cifar100", "cifar-100-binary.tar.gz")) as archive:
        for name in ("train", "test"):
            stream = archive.extractfile(f"cifar-100-binary/{name}.bin")
            assert stream is not None
            records = np.frombuffer(stream.read(), np.uint8).reshape(-1, _CIFAR_RECORD)
            by_class = records[np.argsort(records[:, 1], kind="stable"), 2:]
            parts.append(by_class.reshape(CIFAR100_CLASSES, -1, *_CIFAR_PIXELS))
    images = np.concatenate(parts, axis=1)
    return torch.from_numpy(images[np.random.default_rng(0).permutation(CIFAR100_CLASSES)])
