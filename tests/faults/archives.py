"""Malformed files of MNIST and Omniglot: what is decoded before a digest is known to be right."""

from __future__ import annotations

import gzip
import io
import os
import struct
import zipfile
import zlib
from functools import cache, partial
from pathlib import Path

from tests.faults.fuzz import mutate
from ufom_runtime.problems import sources

MIB = 2**20


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, 1)


def write(name: str, make, title: str):
    """Writes what `make` makes; a number is the length of an empty file."""

    def dangerous(folder: Path) -> None:
        content = make()
        if isinstance(content, int):
            (folder / name).write_bytes(b"")
            os.truncate(folder / name, content)
        else:
            (folder / name).write_bytes(content)

    dangerous.__name__ = title
    return dangerous


# IDX

IDX = bytes([0, 0, 8, 3]) + struct.pack(">3I", 5, 4, 3) + bytes(range(60))


def data_files(name, **files):
    """Writes the original files of a data set, and gives the function that reads them."""

    def valid(folder):
        os.environ["UFOM_DATA"] = str(folder)
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_bytes(content())
        pins = {file: "sha256:" + sources.content_digest(folder / name / file) for file in files}
        sources.SOURCES[name] = sources.Source((), pins)
        return lambda: [sources.original(name, file) for file in files]

    return valid


def idx_mutated(folder, chance):
    beneath = chance.random() < 0.3
    (folder / "mnist/x.gz").write_bytes(zipped(mutate(IDX, chance)) if beneath else mutate(zipped(IDX), chance))


def idx_claiming(*shape, body=0):
    return lambda: zipped(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(body))


def named_gzip(flags):
    whole = zipped(IDX)
    return lambda: whole[:3] + bytes([flags]) + whole[4:10] + b"x" * (20 * MIB)


idx_file = partial(write, "mnist/x.gz")
IDX_DANGEROUS = (
    idx_file(idx_claiming(2**32 - 1, 2**32 - 1, 2**32 - 1), "claims 2^96"),
    idx_file(idx_claiming(0, 2**32 - 1, 2**32 - 1), "claims nothing, of large sizes"),
    idx_file(idx_claiming(2**26), "claims 64 MiB, holds none"),
    idx_file(idx_claiming(2**26, body=2**26), "claims and holds 64 MiB"),
    idx_file(idx_claiming(2**10, body=300 * MIB), "a bomb of 300 MiB"),
    idx_file(named_gzip(8), "a name without end"),
    idx_file(named_gzip(16), "a comment without end"),
    idx_file(lambda: zipped(IDX) * 1000, "a thousand members"),
    idx_file(lambda: 2**40, "a terabyte of zeros"),
)

# Omniglot


@cache
def png(text: bytes = b"", size: int = 105) -> bytes:
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress((b"\0" + b"\xff" * 14) * min(size, 105), 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 1, 0, 0, 0, 0))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(text, 9)) if text else b""
    return b"\x89PNG\r\n\x1a\n" + head + text + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def drawings(number, contents=(None, None), name="Greek/character{0:02}/0001_{1:02}.png", method=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method, compresslevel=1) as archive:
        for i, content in enumerate(contents, 1):
            path = f"images_background_small{number}/" + name.format(number, i)
            archive.writestr(path, png() if content is None else content)
    return out.getvalue()


OMNIGLOT = "omniglot/images_background_small1.zip"
omniglot_file = partial(write, OMNIGLOT)
NAMES = (
    "../../etc/{0}_{1}.png", "/abs/character{0:02}/0001_{1:02}.png", "Greek/character01/{1:04}_99.png", "{0}{1}" * 9999,
    "Gr{1}\0ek/character{0:02}/0001_{1:02}.png", "../../Greek/character{0:02}/0001_{1:02}.png",
)  # fmt: skip


def omniglot_mutated(folder, chance):
    kind = chance.random()
    if kind < 0.45:
        content = mutate(drawings(1), chance)
    elif kind < 0.9:
        content = drawings(1, (mutate(png(), chance), None), method=chance.choice((0, 8)))
    else:
        content = drawings(1, name=chance.choice(NAMES))
    (folder / OMNIGLOT).write_bytes(content)


def claiming(archive: bytes, size: int) -> bytes:
    """The archive with another decoded size of its first file, in both of its headers."""
    at = archive.index(b"PK\1\2")
    packed = struct.pack("<I", size)
    return archive[:22] + packed + archive[26 : at + 24] + packed + archive[at + 28 :]


def crowded(most=2**22):
    """A directory that names one file often."""
    one = drawings(1, (None,))
    at, end = one.index(b"PK\1\2"), one.index(b"PK\5\6")
    directory = one[at:end] * (most // (end - at) - 10)
    return one[:at] + directory + one[end : end + 12] + struct.pack("<II", len(directory), at) + one[end + 20 :]


OMNIGLOT_DANGEROUS = (
    omniglot_file(lambda: claiming(drawings(1, (bytes(300 * MIB), None)), 60_000), "deflates to 300 MiB, claims less"),
    omniglot_file(lambda: drawings(1, (bytes(10 * MIB), None)), "deflates to 10 MiB"),
    omniglot_file(lambda: claiming(drawings(1, (bytes(300 * MIB), None), method=zipfile.ZIP_BZIP2), 60_000), "bzip2"),
    omniglot_file(lambda: drawings(1, method=zipfile.ZIP_LZMA), "lzma"),
    omniglot_file(lambda: drawings(1, (png(size=2**31 - 1), None)), "a drawing of 2^62 pixels"),
    omniglot_file(lambda: drawings(1, (png(size=20_000), None)), "a drawing of 400 million pixels"),
    omniglot_file(lambda: drawings(1, (png(text=bytes(40 * MIB)), None)), "a text of 40 MiB in a drawing"),
    omniglot_file(lambda: drawings(1).replace(b"\x14\0\0\0\x08", b"\x14\0\1\0\x08"), "encrypted"),
    omniglot_file(crowded, "one file in all of a directory"),
    omniglot_file(lambda: crowded(2**23), "a directory that is too long"),
    omniglot_file(lambda: drawings(1, name="Greek{1}/character{0:02}/0001_01.png", contents=(None,) * 99), "too many"),
    omniglot_file(lambda: 2**40, "a terabyte of zeros"),
)
