"""The readers and their malformed inputs: IDX, Omniglot, CIFAR-100, a sealed cell, an outer run's state, TOML."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from dataclasses import fields
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from studies import regret
from studies.engine.configuration import read_config
from tests.faults.fuzz import Reader, mutate, mutate_json
from ufom_runtime import UFOM, outer_sgd
from ufom_runtime.files import digest, read_sealed, write_sealed
from ufom_runtime.problems import data
from ufom_runtime.problems.quadratic import quadratic

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


def idx_valid(folder):
    (folder / "x.gz").write_bytes(zipped(IDX))

    def read():
        found = data.read_idx(folder / "x.gz")
        assert (found.dtype, 1 <= found.ndim <= 3) == (np.uint8, True)

    return read


def idx_mutated(folder, chance):
    beneath = chance.random() < 0.6
    (folder / "x.gz").write_bytes(zipped(mutate(IDX, chance)) if beneath else mutate(zipped(IDX), chance))


def idx_claiming(*shape, body=0):
    return lambda: zipped(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(body))


def named_gzip(flags):
    whole = zipped(IDX)
    return lambda: whole[:3] + bytes([flags]) + whole[4:10] + b"x" * (20 * MIB)


idx_file = partial(write, "x.gz")
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
    with zipfile.ZipFile(out, "w", method) as archive:
        for i, content in enumerate(contents, 1):
            path = f"images_background_small{number}/" + name.format(number, i)
            archive.writestr(path, png() if content is None else content)
    return out.getvalue()


def omniglot_valid(folder):
    os.environ["UFOM_DATA"] = str(folder)
    data.OMNIGLOT_CHARACTERS, data.OMNIGLOT_DRAWERS = 2, 2
    (folder / "omniglot").mkdir()
    for number in (1, 2):
        (folder / f"omniglot/images_background_small{number}.zip").write_bytes(drawings(number))

    def read():
        data.omniglot.cache_clear()
        found = data.omniglot()
        assert (found.shape, found.min() >= 0, found.max() <= 1) == ((2, 2, 1, 28, 28), True, True)

    return read


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

# CIFAR-100


def cifar(*changed, pixels=0):
    """The members' names and contents, 1 image a class in each part; `changed` replace or follow them."""
    labels = np.arange(100, dtype=np.uint8)
    part = np.column_stack([labels // 5, labels, np.full((100, 3072), pixels, np.uint8)]).tobytes()
    return dict([("cifar-100-binary/test.bin", part), ("cifar-100-binary/train.bin", part), *changed])


def tarred(members, **attributes):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def header(size, kind=tarfile.REGTYPE, name="cifar-100-binary/train.bin"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@cache
def cifar_tar():
    return tarred(cifar())


def cifar_valid(folder):
    data.CIFAR100_TRAIN = data.CIFAR100_TEST = 1
    path = folder / "cifar.tar.gz"
    path.write_bytes(zipped(cifar_tar()))

    def read():
        for images, labels in data.read_cifar100(path):
            assert (images.shape, images.dtype) == ((100, 3, 32, 32), np.uint8)
            assert sorted(labels) == list(range(100))

    return read


def cifar_mutated(folder, chance):
    kind = chance.random()
    if kind < 0.3:
        content = mutate(zipped(cifar_tar()), chance)
    elif kind < 0.8:
        block = chance.choice((0, 512 + 2 * 2**10 * 150 + 712, len(cifar_tar()) - 2048))  # by preference, a header
        near = block - block % 512
        whole = cifar_tar()
        content = zipped(whole[:near] + mutate(whole[near : near + 512], chance) + whole[near + 512 :])
    else:
        content = zipped(mutate(cifar_tar(), chance))
    (folder / "cifar.tar.gz").write_bytes(content)


cifar_file = partial(write, "cifar.tar.gz")
ELSEWHERE = ("../x", "/etc/passwd", "cifar-100-binary/../../x", "cifar-100-binary/a/b", "C:\\x", "cifar-100-binary/\0")
CIFAR_DANGEROUS = (
    cifar_file(lambda: zipped(header(2**33 - 1)), "claims 8 GiB"),
    cifar_file(lambda: zipped(header(2**62)), "claims 2^62"),
    cifar_file(lambda: zipped(header(-1)), "claims -1"),
    cifar_file(lambda: zipped(tarred({"cifar-100-binary/x": bytes(290 * MIB)})), "a file of 290 MiB"),
    cifar_file(lambda: zipped(header(250 * MIB, tarfile.XHDTYPE) + bytes(250 * MIB)), "an extended header of 250 MiB"),
    *(cifar_file(lambda k=k: zipped(header(MIB, k) + bytes(MIB)), f"a header of kind {k!r}")
      for k in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"X")),
    *(cifar_file(lambda k=k: zipped(tarred(cifar(), type=k)), f"of kind {k!r}")
      for k in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"V")),
    *(cifar_file(lambda n=n: zipped(tarred({n: b"x", **cifar()})), f"named {n!r}") for n in ELSEWHERE),
    cifar_file(lambda: zipped(cifar_tar()[:-1024] + cifar_tar()), "everything twice"),
    cifar_file(lambda: zipped(b"".join(header(0, name=f"cifar-100-binary/{i}") for i in range(20_000))), "files"),
    cifar_file(lambda: 2**40, "a terabyte of zeros"),
)  # fmt: skip

# A sealed cell

CELL = {"config": {"study": "x", "q": 0.1, "é": [1, None]}, "seconds": 0.5, "rows": [{"a": 1.5, "b": "c"}] * 4}


def sealed_valid(folder):
    path = folder / "x.json"
    write_sealed(path, CELL)

    def read():
        assert isinstance(read_sealed(path), dict)

    return read


def sealed_mutated(folder, chance):
    write_sealed(folder / "x.json", CELL)
    kind = chance.random()
    if kind < 0.1:  # under a seal that fits
        write_sealed(folder / "x.json", {**CELL, "rows": mutate_json(CELL["rows"], chance)})
    elif kind < 0.3:
        changed = mutate_json({"sha256": "0" * 64, **CELL}, chance)
        (folder / "x.json").write_text(json.dumps(changed))
    else:
        (folder / "x.json").write_bytes(mutate((folder / "x.json").read_bytes(), chance))


sealed_file = partial(write, "x.json")
LARGE = 2**24 - 100
JSON_TEXTS = {
    "deep arrays": b"[" * 10**6,
    "deep objects": b'{"a":' * 10**6,
    "empty arrays": b"[" + b"[]," * (LARGE // 3) + b"1]",
    "objects": b'{"x":[' + b"{}," * (2**19 - 9) + b"1]}",
    "floats": b"[" + b"1.5," * (2**20 - 9) + b"1]",
    "a wide text": b'{"sha256":"","x":"' + "\U0001f3d6".encode() + b"a" * (LARGE - 50) + b'"}',
    "escapes": b'{"sha256":"","x":"' + b"\\ud800" * (LARGE // 6 - 9) + b'"}',
    "a long number": b'{"sha256":' + b"9" * 10**6 + b"}",
    "a long fraction": b'{"sha256":0.' + b"9" * 10**6 + b"}",
    "no object": b"[1]",
    "nothing": b"",
    "nan": b'{"sha256":NaN,"x":Infinity}',
    "a mark": b"\xef\xbb\xbf{}",
}
SEALED_DANGEROUS = (
    *(sealed_file(lambda text=text: text, title) for title, text in JSON_TEXTS.items()),
    sealed_file(lambda: 2**40, "a terabyte of zeros"),
)

# The state of an outer run


def run(folder):
    problem = quadratic(dim=3, r=2)
    return outer_sgd(
        problem, problem.initial, UFOM(0.5), steps=3, checkpoint=folder / "run", optimiser=torch.optim.Adam
    )


@cache
def state_files(folder):
    run(folder)
    (tensors,) = (folder / "run").glob("*.safetensors")
    return read_sealed(folder / "run/state.json"), tensors.read_bytes()


def restore_files(folder, state, tensors, seal=True):
    for old in (folder / "run").iterdir():
        if old.name != "log.jsonl":
            old.unlink()
    if seal:
        state = {**state, "tensors": f"tensors-{digest(tensors)[:16]}.safetensors", "tensors_sha256": digest(tensors)}
    (folder / f"run/tensors-{digest(tensors)[:16]}.safetensors").write_bytes(tensors)
    write_sealed(folder / "run/state.json", state)


def state_valid(folder):
    state_files(folder)

    def read():
        found = run(folder)
        assert found.theta.shape == (3,)
        assert torch.isfinite(found.theta).all()

    return read


def state_mutated(folder, chance):
    state, tensors = state_files(folder)
    kind = chance.random()
    if kind < 0.25:
        restore_files(folder, state, tensors)
        path = chance.choice(list((folder / "run").iterdir()))
        path.write_bytes(mutate(path.read_bytes(), chance))
    elif kind < 0.6:  # under a seal that fits
        restore_files(folder, state, mutate(tensors, chance))
    else:
        changed = mutate_json(state, chance)
        restore_files(folder, changed if isinstance(changed, dict) else {"x": changed}, tensors, seal=False)


def state_with(title, content=None, **changed):
    def dangerous(folder):
        state, whole = state_files(folder)
        restore_files(folder, state, whole if content is None else content)
        if changed:
            write_sealed(folder / "run/state.json", {**read_sealed(folder / "run/state.json"), **changed})

    dangerous.__name__ = title
    return dangerous


def safetensors(size, text):
    return struct.pack("<Q", size) + text


STATE_DANGEROUS = (
    *(state_with(f"names {name!r}", tensors=name) for name in ("../x", "/etc/passwd", "x", "", 3)),
    state_with("a header of 2^63", safetensors(2**63, b"{}")),
    state_with("a header of 2^64 - 1", safetensors(2**64 - 1, b"{}")),
    state_with(
        "a tensor of 2^60", safetensors(61, b'{"theta":{"dtype":"F64","shape":[%d],"data_offsets":[0,8]}}' % 2**60)
    ),
    state_with("deep", safetensors(10**5, b"[" * 10**5)),
    state_with("no theta", safetensors(2, b"{}")),
    state_with("more than a run's", bytes(3 * MIB)),
)

# TOML

TOML = b"""
seeds = 4
budget = 1.5
grid = [0.1, 0.5]
[[settings]]
name = "a"
problem = "quadratic"
arguments = {dim = 3, alpha = 0.1}
gamma = 0.1
delay = 10
steps = 5
[[settings]]
name = "b"
problem = "quadratic"
gamma = 1e-1
delay = 0x0a
steps = 5
[settings.arguments]
dim = 2
"""
TOKENS = (b"[", b"]", b"{", b"}", b"=", b"[[", b'"""', b"'''", b"\n", b"inf", b"-nan", b"1979-05-27T07:32:00Z", b"0b1",
          b"9" * 5000, b"true", b"\\U00110000", b"\0", b"\r", b"grid.x", b"settings = 1\n", b'"\\u0041" = 1\n', b"-1",
          b"1e999", b"seeds = 1.0\n", b'grid = ["x"]\n', b"extra = 1\n", b"[[[", b".")  # fmt: skip


def toml_valid(folder):
    path = folder / "mine.toml"
    path.write_bytes(TOML)

    def read():
        found = read_config(path, regret.SIZES["quick"])
        assert type(found) is regret.Config
        assert all(type(x) is float for x in (*found.grid, found.budget))
        assert type(found.seeds) is int
        for setting in found.settings:
            assert type(setting) is regret.Setting
            kinds = {"str": str, "float": float, "int": int}
            assert all(type(getattr(setting, f.name)) is kinds.get(f.type, dict) for f in fields(setting))

    return read


def toml_mutated(folder, chance):
    if chance.random() < 0.5:
        content = mutate(TOML, chance)
    else:
        at, to = chance.randrange(len(TOML)), chance.randint(0, 8)
        content = TOML[:at] + chance.choice(TOKENS) * chance.choice((1, 1, 1, 3, 100)) + TOML[at + to :]
    (folder / "mine.toml").write_bytes(content)


toml_file = partial(write, "mine.toml")
TOML_TEXTS = {
    "deep arrays": b"grid = " + b"[" * 60_000,
    "deep tables": b"grid = " + b"{a=" * 20_000,
    "a long key": b"a" + b".a" * 30_000 + b" = 1",
    "long keys": (b"a" + b".a" * 1000 + b".b%d = 1\n") * 30,
    "long headers": b"".join(b"[a%s.b%d]\n" % (b".a" * 500, i) for i in range(60)),
    "many tables": b"".join(b"[[settings]]\n" for _ in range(5000)),
    "many keys": b"".join(b"a%d = 1\n" % i for i in range(6000)),
    "a long number": b"seeds = " + b"9" * 60_000,
    "a long text": b'grid = "' + b"\\u00e9" * 10_000 + b'"',
    "too long": b"#" * 2**17,
    "longer": b"a = 1\n" * 2**18,
}
TOML_DANGEROUS = (
    *(toml_file(lambda text=text: text, title) for title, text in TOML_TEXTS.items()),
    toml_file(lambda: 2**40, "a terabyte of zeros"),
)

READERS = {
    "idx": Reader(idx_valid, idx_mutated, IDX_DANGEROUS),
    "omniglot": Reader(omniglot_valid, omniglot_mutated, OMNIGLOT_DANGEROUS),
    "cifar100": Reader(cifar_valid, cifar_mutated, CIFAR_DANGEROUS),
    "sealed": Reader(sealed_valid, sealed_mutated, SEALED_DANGEROUS),
    "state": Reader(state_valid, state_mutated, STATE_DANGEROUS),
    "toml": Reader(toml_valid, toml_mutated, TOML_DANGEROUS),
}
