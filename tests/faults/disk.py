"""Faults of the disk and its files: full, read-only, failing, cut, altered, exchanged, dated tomorrow."""

import errno
import os
import random
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from studies.engine.sweep import Store
from tests.faults.common import CELLS, recovers, refused, rows, warned


@contextmanager
def disk(folder: Path, options: str) -> Iterator[bool]:
    """A small separate disk, where root may mount one; and whether it is one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def full_disk(folder: Path) -> str:
    """a tmpfs of 28 KiB; without mount, RLIMIT_FSIZE"""
    with disk(folder / "disk", "size=28k") as mounted:
        store, limits = Store(folder / "disk"), resource.getrlimit(resource.RLIMIT_FSIZE)
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            said = refused(lambda: store.run(CELLS, rows), "cannot be written: ", str(store.folder), "make room in")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "damaged" not in store.states().values()
        assert "failed" not in store.states().values()
        if mounted:
            kept = list(store.states().values()).count("done")
            subprocess.run(["mount", "-o", "remount,size=4m", store.folder], check=True)
            recovers(store, ran=4 - kept)
        else:
            recovers(store)
    return said + os.strerror(errno.ENOSPC if mounted else errno.EFBIG)


def read_only_folder(folder: Path) -> str:
    """a tmpfs mounted again, read-only; without mount, mode 0555, or for root os.open's EROFS"""
    with disk(folder / "disk", "size=4m") as mounted:
        store = Store(folder / "disk")
        store.run(CELLS[:2], rows)
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", store.folder], check=True)
            said = refused(
                lambda: store.run(CELLS, rows), "cannot be written: Read-only file system", "make it writable"
            )
            subprocess.run(["mount", "-o", "remount,rw", store.folder], check=True)
        elif os.geteuid():
            store.folder.chmod(0o555)
            said = refused(lambda: store.run(CELLS, rows), "cannot be written: Permission denied", "make it writable")
            store.folder.chmod(0o755)
        else:
            with mock.patch("builtins.open", side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS))):
                said = refused(lambda: store.run(CELLS, rows), "cannot be written: Read-only", "make it writable")
        recovers(store, ran=2)
    return said


def error_in_writing(folder: Path) -> str:
    """os.fsync raises EIO at each of the first 8 calls in turn"""
    real = os.fsync
    for nth in range(8):
        calls = iter(range(100))

        def failing(stream: int, nth: int = nth, calls: Iterator[int] = calls) -> None:
            if next(calls) == nth:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(stream)

        store = Store(folder / str(nth))
        with mock.patch("os.fsync", failing):
            said = refused(lambda store=store: store.run(CELLS, rows), "cannot be written: Input/output error")
        assert not list(store.folder.glob("*.tmp"))
        assert set(store.states().values()) <= {"done", "missing"}
        recovers(store)
    return said


def error_in_reading(folder: Path) -> str:
    """os.open raises EIO"""
    store = Store(folder)
    store.run(CELLS, rows)
    with mock.patch("os.open", side_effect=OSError(errno.EIO, os.strerror(errno.EIO))):
        said = refused(lambda: store.load(CELLS[0]), "cannot be read: Input/output error", store.path(CELLS[0]).name)
    recovers(store, ran=0)  # nothing was moved aside
    return said


def truncated_file(folder: Path) -> str:
    """a cell's file is cut at each of 40 places, 0 and all but one byte among them"""
    store, places = Store(folder), random.Random(0)
    store.run(CELLS, rows)
    whole = store.path(CELLS[0]).read_bytes()
    for place in [0, len(whole) - 2, *(places.randrange(len(whole) - 2) for _ in range(38))]:
        store.path(CELLS[0]).write_bytes(whole[:place])
        assert warned(store), place
        recovers(store, ran=1)
    return "warned of by name, moved aside, run again"


def flipped_bit(folder: Path) -> str:
    """each of 200 bits of a cell's file in turn"""
    store, places, silent = Store(folder), random.Random(0), 0
    store.run(CELLS, rows)
    whole = store.path(CELLS[0]).read_bytes()
    for _ in range(200):
        place, flipped = places.randrange(len(whole)), bytearray(whole)
        flipped[place] ^= 1 << places.randrange(8)
        store.path(CELLS[0]).write_bytes(flipped)
        if not warned(store):
            silent += 1
            assert store.load(CELLS[0]) == rows(CELLS[0]), place
    store.path(CELLS[0]).write_bytes(whole)
    recovers(store, ran=0)
    return f"{200 - silent} warned of by name and moved aside, {silent} without effect on the rows"


def another_cells_file(folder: Path) -> str:
    """a whole cell's file is renamed to another's"""
    store = Store(folder)
    store.run(CELLS, rows)
    os.replace(store.path(CELLS[1]), store.path(CELLS[0]))
    assert warned(store)
    recovers(store, ran=2)
    return "warned of by name, moved aside, run again"


def clock_set_back(folder: Path) -> str:
    """time.time goes back an hour a call; half of the cells are dated tomorrow, a damaged one twice"""
    store, hours = Store(folder), iter(range(10**6))
    store.run(CELLS[:2], rows)
    for path in folder.iterdir():
        os.utime(path, (time.time() + 86400,) * 2)
    start = time.time()
    back = mock.patch.multiple(
        "time",
        time=lambda: start - 3600 * next(hours),
        time_ns=lambda: int(1e9 * (start - 3600 * next(hours))),
    )
    with back:
        for _ in range(2):
            store.path(CELLS[0]).write_text("{")
            assert warned(store)
        recovers(store, ran=3)
    assert len(list(folder.glob("*.damaged-*"))) == 2
    return "the same table; both damaged files kept aside"
