"""The local executor: worker processes that run cells by their names, one cell at a time.

A worker that dies, by a signal or by `os._exit`, or takes too long over a cell costs that cell alone: it is recorded as
failed, and another worker takes the next. Over the pipes go ids and words, as bytes; nothing is unpickled that a worker
wrote.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from studies.engine.cell import Cell, find
from ufom_theory import UfomError

_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Local:
    """New processes of one thread each; a process that is free takes the next cell.

    Attributes:
        jobs: processes.
        gpus: of each process, which sees no others, taken in turn from CUDA_VISIBLE_DEVICES or numbered from 0; 0:
            every process sees them all.
        seconds: a cell that takes longer is ended and recorded as failed; None: no limit.
    """

    jobs: int
    gpus: int = 0
    seconds: float | None = None

    def each(self, folder: Path, function: str, ids: list[str]) -> Generator[str, None, None]:
        """See `Executor`."""
        devices, left, busy = self._devices(), iter(ids), list[_Worker]()
        try:
            for device, id in zip(devices, left, strict=False):
                busy.append(_Worker(folder, function, device))
                busy[-1].hand(id)
            while busy:
                wait([x for w in busy for x in (w.pipe, w.process.sentinel)], self._patience(busy))
                for worker in [w for w in busy if w.ended(self.seconds)]:
                    settled = worker.id
                    if (after := next(left, None)) is None:
                        busy.remove(worker)
                        worker.stop()
                    else:
                        worker.hand(after)
                    yield settled
        finally:
            for worker in busy:
                worker.kill()  # only a whole cell has a file

    def _patience(self, busy: list[_Worker]) -> float | None:
        """Seconds until the first of the cells is out of time."""
        begun = [worker.begun for worker in busy if worker.begun is not None]
        if self.seconds is None or not begun:
            return None
        return max(0.0, min(begun) + self.seconds - time.monotonic())

    def _devices(self) -> list[str | None]:
        """What each process is to see as CUDA_VISIBLE_DEVICES; None: what this one sees."""
        if not self.gpus:
            return [None] * self.jobs
        needed = self.jobs * self.gpus
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(needed))))
        names = [name for name in visible.split(",") if name]
        if len(names) < needed:
            raise UfomError(f"{needed} GPUs are needed and CUDA_VISIBLE_DEVICES={visible}: take fewer jobs or GPUs")
        return [",".join(names[first : first + self.gpus]) for first in range(0, needed, self.gpus)]


class _Worker:
    """A process and the cell that it runs; the process is begun anew where it has ended.

    Attributes:
        id: of the cell.
        begun: when it was begun; None while its process still imports what it needs.
    """

    process: BaseProcess
    pipe: Connection[Any, Any]
    id: str
    begun: float | None

    def __init__(self, folder: Path, function: str, devices: str | None) -> None:
        self.folder, self.names = folder, (str(folder), function, devices)
        self._start()

    def _start(self) -> None:
        self.pipe, there = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_work, args=(there, *self.names))
        with _one_thread():  # the process inherits it
            self.process.start()
        there.close()
        self.ready = False

    def hand(self, id: str) -> None:
        """Give it a cell to run."""
        if not self.process.is_alive():
            self.pipe.close()
            self._start()
        self.id, self.begun = id, None
        if self.ready:
            self._begin()

    def _begin(self) -> None:
        self.ready, self.begun = True, time.monotonic()
        with suppress(OSError):  # the process ended just now, which `ended` sees
            self.pipe.send_bytes(self.id.encode())

    def ended(self, seconds: float | None) -> bool:
        """Whether the cell is done or failed; one whose process ended or is out of time is recorded as failed.

        Raises:
            UfomError: what the store said to the process.
        """
        try:
            if self.pipe.poll():
                if said := self.pipe.recv_bytes().decode():
                    raise UfomError(said)
                if self.begun is not None:
                    return True
                self._begin()
                return False
        except (EOFError, OSError):
            self.process.join()
        if not self.process.is_alive():
            self._give_up(_why(self.process.exitcode))
            return True
        if seconds is not None and self.begun is not None and time.monotonic() - self.begun >= seconds:
            self.kill()
            self._give_up(f"it took longer than {seconds:g} s, and was ended")
            return True
        return False

    def _give_up(self, why: str) -> None:
        Cell(self.folder, self.id).give_up(why)

    def stop(self) -> None:
        """Let it end."""
        self.pipe.close()
        self.process.join(5)
        self.kill()

    def kill(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.join()


def _why(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended with status {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return f"its process was ended by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def _work(pipe: Connection[Any, Any], folder: str, function: str, devices: str | None) -> None:
    """A worker: it says that it is ready, then runs cells by name until the pipe is closed.

    What it says after a cell is empty, or what is wrong with the store.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR2", signal.SIGINT)):
        signal.signal(ignored, signal.SIG_IGN)  # they are for the parent, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    run = find(function)
    pipe.send_bytes(b"")
    while True:
        try:
            id = pipe.recv_bytes().decode()
        except (EOFError, OSError):
            return
        said = ""
        try:
            Cell(Path(folder), id).run(run)
        except UfomError as error:
            said = str(error)
        pipe.send_bytes(said.encode())


def _end_with_parent() -> None:
    """A worker in the middle of a cell would go on without a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
