"""The readers and their malformed inputs: data files, a sealed cell, an outer run's state, TOML."""

from __future__ import annotations

import json
import struct
from dataclasses import fields
from functools import cache, partial

import torch

from studies import regret
from studies.engine.configuration import read_config
from tests.faults.archives import (
    IDX,
    IDX_DANGEROUS,
    MIB,
    OMNIGLOT_DANGEROUS,
    data_files,
    drawings,
    idx_mutated,
    omniglot_mutated,
    write,
    zipped,
)
from tests.faults.fuzz import Reader, mutate, mutate_json
from ufom_runtime import UFOM, outer_sgd
from ufom_runtime.files import digest, read_sealed, write_sealed
from ufom_runtime.problems.quadratic import quadratic

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
grid = [0.1, 0.5]
[[settings]]
name = "a"
problem = "quadratic"
outer = "sgd:0.1"
arguments = {dim = 3, alpha = 0.1}
steps = 5
levels = [1, 0.5]
[[settings]]
name = "b"
problem = "quadratic"
outer = "adam:0.1"
steps = 0x0a
chains = 2
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
        assert all(type(x) is float for x in found.grid)
        assert type(found.seeds) is int
        for setting in found.settings:
            assert type(setting) is regret.Setting
            kinds = {"str": str, "int": int, "dict[str, Any]": dict}
            assert all(type(getattr(setting, f.name)) is kinds.get(f.type, tuple) for f in fields(setting))
            assert all(type(x) is float for x in setting.levels)

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
    "mnist": Reader(data_files("mnist", **{"x.gz": lambda: zipped(IDX)}), idx_mutated, IDX_DANGEROUS),
    "omniglot": Reader(
        data_files("omniglot", **{"images_background_small1.zip": lambda: drawings(1)}),
        omniglot_mutated,
        OMNIGLOT_DANGEROUS,
    ),
    "sealed": Reader(sealed_valid, sealed_mutated, SEALED_DANGEROUS),
    "state": Reader(state_valid, state_mutated, STATE_DANGEROUS),
    "toml": Reader(toml_valid, toml_mutated, TOML_DANGEROUS),
}
