"""Malformed inputs for each reader, 30 of them; docs/faults-fuzz.txt is the table of 5,000."""

import os
import random

import pytest

from tests.faults.fuzz import Reader, fuzz, mutate
from tests.faults.readers import READERS
from ufom_theory import UfomError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize("name", READERS)
def test_a_reader_reads_or_refuses(name):
    found = fuzz(READERS[name], 30, most_seconds=10.0)  # on a busy machine
    assert found.failures == []
    assert found.inputs == found.refused + found.read == 30
    assert found.refused > 15


@pytest.mark.parametrize(
    ("read", "most_seconds", "said"),
    [
        (lambda: int("x"), 60.0, "invalid literal"),
        (lambda: sum(range(10**7)), 0.01, " s"),
        (lambda: bytearray(b"\1" * (300 * 2**20)), 60.0, " MiB"),
        (lambda: (_ for _ in ()).throw(SystemExit(1)), 60.0, "SystemExit"),
    ],
)
def test_a_reader_that_does_otherwise_is_found(read, most_seconds, said):
    """A harness that finds nothing could be blind: it must see each of these."""
    first = []

    def valid(folder):
        def once_whole():
            if first:
                read()
            first.append(1)

        return once_whole

    found = fuzz(Reader(valid, lambda folder, chance: None, ()), 1, most_seconds=most_seconds)
    assert len(found.failures) == 1
    assert said in found.failures[0]


def test_refusals_are_no_failures_and_mutations_differ():
    def valid(folder):
        state = []

        def read():
            state.append(1)
            if len(state) % 2 == 0:
                raise UfomError("no")

        return read

    found = fuzz(Reader(valid, lambda folder, chance: None, (lambda folder: None,)), 10)
    assert (found.inputs, found.refused, found.read, found.failures) == (10, 5, 5, [])
    assert len({mutate(bytes(100), random.Random(i)) for i in range(100)}) > 80
