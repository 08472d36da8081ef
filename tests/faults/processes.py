"""Faults of processes: ended, dead, hanging, requeued, or two at once."""

import ctypes
import faulthandler
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from studies.engine import local
from studies.engine.cell import name_of
from studies.engine.local import Local
from studies.engine.slurm import Share
from studies.engine.sweep import Rows, Store
from tests.faults.common import CELLS, ROOT, alive, children, expected, recovers, rows, table, until

TERMINATED = """
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from studies import __main__ as main
from studies.engine import commands
from studies.engine.study import Study
from tests.faults.common import CELLS
from tests.faults.processes import waits

@dataclass(frozen=True)
class Config:
    pass

if __name__ == "__main__":
    study = sys.modules["studies.faults"] = ModuleType("studies.faults")
    study.study = Study("?", {"quick": Config()}, lambda config, store, progress: store.run(CELLS, waits), *[None] * 4)
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


def bad_cell(folder: Path, function: Callable[[Mapping[str, Any]], Rows], words: str) -> str:
    """The second of four cells is recorded as failed, the others are done, and the next sweep does not run it."""
    store = Store(folder, Local(2, seconds=10))
    outcome = store.run(CELLS, function)
    assert (outcome.ran, outcome.failed) == (3, ((CELLS[1], words),)), outcome
    assert Store(folder).run(CELLS, rows).failed == outcome.failed
    recovers(store, ran=1)
    return f"recorded as failed: {words}; the others are done"


def segmentation_fault(folder: Path) -> str:
    """a cell of a local sweep reads address 0"""
    return bad_cell(folder, reads_address_0, "its process was ended by SIGSEGV")


def exiting_process(folder: Path) -> str:
    """a cell of a local sweep calls os._exit(3)"""
    return bad_cell(folder, exits, "its process ended with status 3")


def leaving_cell(folder: Path) -> str:
    """a cell of a local sweep calls sys.exit(0)"""
    return bad_cell(folder, leaves, "SystemExit: 0")


def hanging_cell(folder: Path) -> str:
    """a cell of a local sweep sleeps an hour; it may take 10 s"""
    return bad_cell(folder, hangs, "it took longer than 10 s, and was ended")


def second(act: Callable[[], object]) -> Callable[[Mapping[str, Any]], Rows]:
    """`rows`, after `act` in the second cell."""

    def run(config: Mapping[str, Any]) -> Rows:
        if config["x"] == 1:
            act()
        return rows(config)

    return run


def reads_address_0(config: Mapping[str, Any]) -> Rows:
    return second(lambda: (faulthandler.disable(), ctypes.string_at(0)))(config)


def exits(config: Mapping[str, Any]) -> Rows:
    return second(lambda: os._exit(3))(config)


def leaves(config: Mapping[str, Any]) -> Rows:
    return second(lambda: sys.exit(0))(config)


def hangs(config: Mapping[str, Any]) -> Rows:
    return second(lambda: time.sleep(3600))(config)


def waits(config: Mapping[str, Any]) -> Rows:
    if config["x"] == 3:
        time.sleep(60)
    return rows(config)


def dead_rank(folder: Path) -> str:
    """SIGKILL of rank 1 within torchrun --max-restarts 1 -m ufom_runtime.measure"""
    from tests.runtime.test_distributed import CPU, MOMENTS, torchrun

    done = torchrun(folder, "--max-restarts", "1", KILL_AT="10")
    assert done.returncode == 0, done.stderr
    assert "another process died" in done.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "ufom_runtime.measure", "mine:problem", "--tasks", "20", "--json", "--outer", "tuned"],
        cwd=folder, env=os.environ | CPU, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shared, undisturbed = json.loads(done.stdout), json.loads(alone.stdout)  # one process printed
    assert json.dumps([shared[name] for name in MOMENTS]) == json.dumps([undisturbed[name] for name in MOMENTS])
    return "started anew, the same bits as one process"


def requeued(folder: Path) -> str:
    """SystemExit in a job that waits for its third cell, as submitit raises it, then what its hook gives back"""
    store, wait = Store(folder), local.wait
    for config in CELLS:
        store.cell(config).want(config)

    def interrupted(*arguments: Any) -> Any:
        if list(store.states().values()).count("done") == 2:
            raise SystemExit(-1)
        return wait(*arguments)

    names = (str(folder), name_of(rows), " ".join(store.cell(config).id for config in CELLS))
    with mock.patch.object(local, "wait", interrupted), suppress(SystemExit):
        Share(60)(*names)
        raise AssertionError("not interrupted")
    before = list(store.states().values()).count("done")
    assert before in (2, 3)  # the third may have been done while it was ended
    Share(60).checkpoint(*names).result()
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
