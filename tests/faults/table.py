"""Faults: each a function of an empty folder that injects one and asserts the right answer or one typed error.

A function returns what came of the fault; its docstring says how it was injected. `FAULTS` lists them: append yours.
"""

import errno
import functools
import http.server
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

from studies.engine.cell import name_of
from studies.engine.executors import Local, Share
from studies.engine.sweep import Store
from ufom_runtime.problems.downloads import SOURCES, Source, fetch
from ufom_theory import UfomError

ROOT = Path(__file__).parents[2]
CELLS = [{"study": "faults", "x": x} for x in range(4)]
Fault = Callable[[Path], str]


def rows(config):
    return [{"value": config["x"] ** 2, "part": part, "text": "x" * 400} for part in range(20)]


def dies(config):
    if config["x"] == 1:
        os._exit(3)
    return rows(config)


def waits(config):
    if config["x"] == 3:
        time.sleep(60)
    return rows(config)


def table(store: Store) -> str:
    return store.table(CELLS).to_csv()


@functools.cache
def expected() -> str:
    """The table of a sweep that nothing disturbed."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Store(folder).run(CELLS, rows)
        return table(Store(folder))


def recovers(store: Store, ran: int | None = None) -> None:
    """Run the sweep again, now undisturbed: its table is the one of a sweep that never was disturbed."""
    outcome = Store(store.folder).run(CELLS, rows, retry=True)
    assert ran is None or outcome.ran == ran, outcome
    assert table(store) == expected()


def refused(call: Callable[[], object], *words: str) -> str:
    """The one line of the `UfomError` that the call must raise, without the names of temporary folders."""
    try:
        call()
    except UfomError as error:
        said = str(error)
        assert all(word in said for word in words), said
        return f"UfomError: {words[0]}"
    raise AssertionError(f"no error that says {words}")


@contextmanager
def disk(folder: Path, options: str) -> Iterator[bool]:
    """A small disk of its own, where root may mount one; whether it is one."""
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


def warned(store: Store) -> bool:
    """Whether reading the first cell warns that its file is damaged, and moves it aside."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = store.load(CELLS[0])
    if not said:
        return False
    assert found is None
    assert f"{store.path(CELLS[0])} is damaged" in str(said[0].message)
    assert not store.path(CELLS[0]).exists()
    return True


def another_cells_file(folder: Path) -> str:
    """a whole cell's file is renamed to another's"""
    store = Store(folder)
    store.run(CELLS, rows)
    os.replace(store.path(CELLS[1]), store.path(CELLS[0]))
    assert warned(store)
    recovers(store, ran=2)
    return "warned of by name, moved aside, run again"


TERMINATED = """
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from studies import __main__ as main
    from studies.engine import commands
from tests.faults import table

@dataclass(frozen=True)
class Config:
    pass

if __name__ == "__main__":
    study = sys.modules["studies.faults"] = ModuleType("studies.faults")
    study.SIZES = {"quick": Config()}
    study.measure = lambda config, store, progress: store.run(table.CELLS, table.waits)
    main.STUDIES["faults"] = ""
    main.HERE = Path(sys.argv.pop(1))
    commands.CELLS = main.HERE / "cells"
    main.main()
"""


def terminated(folder: Path) -> str:
    """SIGTERM to python -m studies run --executor local, once three of four cells are done"""
    (folder / "sweep.py").write_text(TERMINATED)
    command = [sys.executable, folder / "sweep.py", folder, "run", "faults", "--executor", "local", "--jobs", "2"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE) as process:
        store = Store(folder / "cells" / "faults-quick")
        until(lambda: list(store.states().values()).count("done") == 3)
        workers = children(process.pid)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 143
    until(lambda: not any(alive(pid) for pid in workers))
    recovers(store, ran=1)
    return "ends with status 143 and all its processes; done cells kept"


def dead_process(folder: Path) -> str:
    """a process of a local sweep calls os._exit(3)"""
    store = Store(folder, Local(2))
    said = refused(lambda: store.run(CELLS, dies), "a process of the sweep died", "run again, with fewer jobs")
    assert "failed" not in store.states().values()
    recovers(store)
    return said


def dead_rank(folder: Path) -> str:
    """SIGKILL of rank 1 within torchrun --max-restarts 1 -m ufom_runtime.measure"""
    from tests.runtime.test_distributed import CPU, MOMENTS, torchrun

    done = torchrun(folder, "--max-restarts", "1", KILL_AT="10")
    assert done.returncode == 0, done.stderr
    assert "another process died" in done.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "ufom_runtime.measure", "mine:problem", "--tasks", "20", "--json"],
        cwd=folder, env=os.environ | CPU, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shared, undisturbed = json.loads(done.stdout), json.loads(alone.stdout)  # one process printed
    assert json.dumps([shared[name] for name in MOMENTS]) == json.dumps([undisturbed[name] for name in MOMENTS])
    return "started anew, the same bits as one process"


def requeued(folder: Path) -> str:
    """SystemExit in a job's third cell, as submitit raises it, then what its checkpoint hook gives back"""
    store, begun = Store(folder), []
    for config in CELLS:
        store.cell(config).want(config)

    def interrupted(config):
        begun.append(config["x"])
        if len(begun) == 3:
            raise SystemExit(-1)
        return rows(config)

    names = (str(folder), name_of(rows), " ".join(store.cell(config).id for config in CELLS))
    with mock.patch("studies.engine.cell._find", return_value=interrupted):
        with suppress(SystemExit):
            Share()(*names)
            raise AssertionError("not interrupted")
        Share().checkpoint(*names).result()
    assert begun == [0, 1, 2, 2, 3]
    assert table(store) == expected()
    return "goes on with the third cell, the same table"


def two_writers(folder: Path) -> str:
    """two processes run the same four cells at once"""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_sweep, args=(str(folder),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    store = Store(folder)
    assert list(store.states().values()) == ["done"] * 4
    assert len(list(folder.iterdir())) == 4
    recovers(store, ran=0)
    return "both succeed, the same table"


def _sweep(folder: str) -> None:
    outcome = Store(folder).run(CELLS, rows)
    assert outcome.found + outcome.ran == 4
    assert table(Store(folder)) == expected()


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


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def mirror(folder: Path, name: str, content: bytes, pin: str) -> Iterator[Path]:
    """MNIST is one file, on a server of our own; the folder where `fetch` would put it."""
    (folder / "web").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "web" / name).write_bytes(content)
    handler = functools.partial(_Quiet, directory=folder / "web")
    clear = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = Source((f"http://127.0.0.1:{server.server_port}/",), {name: pin})
        environment = mock.patch.dict(os.environ, {**clear, "UFOM_DATA": str(folder / "data")})
        with mock.patch.dict(SOURCES, {"mnist": source}), environment:
            yield folder / "data" / "mnist"
        server.shutdown()


def corrupt_archive(folder: Path) -> str:
    """a .gz and a .zip from a server, cut short and with a byte altered"""
    import gzip

    with zipfile.ZipFile(folder / "made.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1", bytes(range(256)) * 64)
    made = {"x.gz": gzip.compress(bytes(range(256)) * 64), "x.zip": (folder / "made.zip").read_bytes()}
    for name, content in made.items():
        for altered in (content[:-9], content[:60] + bytes([content[60] ^ 255]) + content[61:]):
            at = folder / f"{name}-{len(altered)}"
            with mirror(at, name, altered, "sha256:" + "0" * 64) as place:
                said = refused(lambda: fetch("mnist"), "could not be fetched", "cannot be read")
                assert list(place.iterdir()) == []
    return said + ": cannot be read"


def wrong_checksum(folder: Path) -> str:
    """a whole .gz from a server, of other content"""
    import gzip

    with mirror(folder / "x", "x.gz", gzip.compress(b"other"), "sha256:" + "0" * 64) as place:
        said = refused(lambda: fetch("mnist"), "could not be fetched", "instead of 000")
        assert list(place.iterdir()) == []
    return said + ": sha256 … instead of …"


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Of a process's main thread and the others."""
    found = ""
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += " " + (task / "children").read_text()
    return [int(child) for child in found.split()]


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


FAULTS: list[Fault] = [
    full_disk,
    read_only_folder,
    error_in_writing,
    error_in_reading,
    truncated_file,
    flipped_bit,
    another_cells_file,
    terminated,
    dead_process,
    dead_rank,
    requeued,
    two_writers,
    clock_set_back,
    corrupt_archive,
    wrong_checksum,
]
