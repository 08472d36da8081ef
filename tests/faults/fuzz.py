"""Malformed inputs for each reader: `python -m tests.faults.fuzz --inputs 5000` prints the table.

An input is a valid file that was mutated (bits flipped, cut, spliced, fields at their extremes), also beneath its
compression or its seal, or one of a few made to be dangerous: bombs, sizes that are claimed, paths that lead elsewhere.
A reader must read it, or raise a `UfomError`; within 1 s of CPU time, and 256 MiB above what the process held before.
The exit status is 1 where one did not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ufom_theory import UfomError

SECONDS, BYTES = 1.0, 256 * 2**20
EXTREMES = [n.to_bytes(size, order) for size in (1, 2, 4, 8) for order in ("big", "little")
            for n in (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)]  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """How a reader is tested.

    Attributes:
        valid: writes a whole file into a folder and gives the function that reads it, and fails where what was read is
            not of the form that it promises.
        mutated: writes one malformed input, from a source of chance.
        dangerous: each writes one input.
    """

    valid: Callable[[Path], Callable[[], None]]
    mutated: Callable[[Path, random.Random], None]
    dangerous: tuple[Callable[[Path], None], ...]


@dataclass
class Found:
    """What came of a reader's inputs."""

    inputs: int = 0
    refused: int = 0
    read: int = 0
    seconds: float = 0.0
    bytes: int = 0
    failures: list[str] = field(default_factory=list)


def mutate(content: bytes, chance: random.Random, times: int = 3) -> bytes:
    """`content` with one to `times` mutations."""
    for _ in range(chance.randint(1, times)):
        at, to = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        near = min(to, at + chance.randint(1, 16))
        kind = chance.randrange(7)
        if kind == 0 and at < len(content):  # a bit
            content = content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content = content[:at] + content[near:]
        elif kind == 3:  # a piece again, elsewhere
            content = content[:to] + content[at:near] + content[to:]
        elif kind == 4:
            content = content[:at] + chance.randbytes(near - at) + content[near:]
        elif kind == 5:  # a field, by preference of the header
            at = at if chance.random() < 0.5 else chance.randrange(min(64, len(content) + 1))
            extreme = chance.choice(EXTREMES)
            content = content[:at] + extreme + content[at + len(extreme) :]
        else:
            content = content[:at] + content[to:] + content[at:to]
    return content


JUNK = (None, True, -1, 0, 2**70, 1e308, float("nan"), "", "é" * 99, "../../x", [], {}, [[[]]], {"tensor": "x"}, "a\0b")


def mutate_json(value: Any, chance: random.Random) -> Any:
    """`value` with one of its parts replaced, removed or moved."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key, other = chance.choice(list(value)), chance.choice(list(value))
        changed = dict(value)
        kind = chance.random()
        if kind < 0.15:
            del changed[key]
        elif kind < 0.25:
            changed[key] = value[other]
        else:
            changed[key] = mutate_json(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(len(value))
        part = [] if chance.random() < 0.15 else [mutate_json(value[at], chance)]
        return value[:at] + part + value[at + 1 :]
    return chance.choice(JUNK)


def inputs(reader: Reader, folder: Path, number: int, seed: int) -> Iterator[str]:
    """Writes each input, and names it."""
    for write in reader.dangerous:
        apart(lambda write=write: write(folder))  # what it takes to make a bomb is not the reader's
        yield write.__name__
    for i in range(number - len(reader.dangerous)):
        reader.mutated(folder, random.Random(f"{seed} {i}"))
        yield f"mutated {i}, seed {seed}"


def try_out(reader: Reader, number: int, seed: int, most_seconds: float = SECONDS) -> Found:
    """Give `number` inputs to a reader."""
    found = Found()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        read = reader.valid(folder)
        read()
        written = before = peak()
        for what in inputs(reader, folder, number, seed):
            found.inputs += 1
            written, begin, said = peak(), time.process_time(), ""
            try:
                read()
                found.read += 1
            except UfomError:
                found.refused += 1
            except BaseException as error:
                said = "".join(traceback.format_exception(error)[-4:])
            seconds = time.process_time() - begin
            found.seconds = max(found.seconds, seconds)
            more = peak() - before if peak() > written else 0  # writing the input may have taken more than reading it
            found.bytes = max(found.bytes, more)
            if not said and seconds > most_seconds:
                said = f"{seconds:.2f} s"
            if not said and more > BYTES:
                said = f"{more / 2**20:.0f} MiB"
            if said:
                found.failures.append(f"{what}: {said}")
    return found


def peak() -> int:
    """Most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def apart(function: Callable[[], object]) -> Any:
    """What `function` gives, as JSON, in a forked process: its memory is its own."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(source)
            with os.fdopen(sink, "w") as stream:
                json.dump(function(), stream)
            code = 0
        finally:
            os._exit(code)
    os.close(sink)
    with os.fdopen(source) as stream:
        content = stream.read()
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the process died, status {status}"
    return json.loads(content)


def fuzz(reader: Reader, number: int, seed: int = 0, most_seconds: float = SECONDS) -> Found:
    """`try_out` in a separate process."""
    return Found(**apart(lambda: asdict(try_out(reader, number, seed, most_seconds))))


def main() -> None:
    """Prints a row a reader."""
    from tests.faults.readers import READERS

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--inputs", type=int, default=5000, help="for each reader")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--reader", choices=list(READERS), action="append")
    asked = options.parse_args()
    print(f"python -m tests.faults.fuzz --inputs {asked.inputs} --seed {asked.seed}")
    print(f"{'reader':<12}{'inputs':>8}{'refused':>9}{'read':>7}{'failed':>8}{'slowest, s':>12}{'peak, MiB':>11}")
    failures = []
    for name in asked.reader or READERS:
        found = fuzz(READERS[name], asked.inputs, asked.seed)
        failures += [f"{name}, {failure}" for failure in found.failures]
        row = f"{name:<12}{found.inputs:>8}{found.refused:>9}{found.read:>7}{len(found.failures):>8}"
        print(f"{row}{found.seconds:>12.2f}{found.bytes / 2**20:>11.0f}", flush=True)
    print("\n".join(failures[:20]), file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
