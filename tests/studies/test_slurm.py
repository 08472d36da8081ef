"""A sweep on a real SLURM of one node, which this test installs and starts: jobs out of time, preempted and killed."""

import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from studies.engine.executors import Slurm
from studies.engine.sweep import Store
from ufom_theory import UfomError

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "slurm.sh"
CELLS = [{"study": "test", "x": x} for x in range(6)]  # by their ids, jobs run 5, 3, 0 and 4, 2, 1


def noted(config):
    """Notes that it began; an odd cell then waits for the test's word."""
    folder = Path(os.environ["NOTES"])
    with (folder / "begun").open("a") as stream:
        stream.write(f"{config['x']} {os.getppid()}\n")  # of the job, which runs its cells beside it
    end = time.monotonic() + 30
    while config["x"] % 2 and not (folder / "go").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    return [{"value": config["x"] ** 2}]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: SLURM's daemons are started by root alone")
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        pytest.skip("NOT TESTED: SLURM is not installed, and there is no apt-get to install it with")
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    try:
        started = subprocess.run(["bash", SCRIPT, "start", folder], capture_output=True, text=True, timeout=1300)
        if started.returncode == 77:
            pytest.skip(f"NOT TESTED: SLURM is not installed and cannot be fetched: {started.stderr[-300:]}")
        assert started.returncode == 0, started.stdout + started.stderr
        yield
        said("scancel", "--user=root")
    finally:
        subprocess.run(["bash", SCRIPT, "stop", folder], check=True)


def said(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def begun(folder):
    """The processes that began each cell."""
    found = {}
    for line in (folder / "begun").read_text().splitlines() if (folder / "begun").exists() else []:
        x, pid = map(int, line.split())
        found.setdefault(x, []).append(pid)
    return found


def sweep(folder, monkeypatch, pool):
    """A sweep in two jobs, once both have come to an odd cell."""
    folder.mkdir()
    monkeypatch.setenv("NOTES", str(folder))
    store = Store(folder / "cells", Slurm(jobs=2, partition="test", minutes=5))
    running = pool.submit(store.run, CELLS, noted)
    until(lambda: len([x for x in begun(folder) if x % 2]) == 2 or running.done())
    return store, running


def test_jobs_out_of_time_preempted_or_killed_lose_nothing_and_repeat_nothing(tmp_path, slurm, monkeypatch):
    expected = pd.DataFrame([{**cell, "value": cell["x"] ** 2} for cell in CELLS])
    with ThreadPoolExecutor(1) as pool:
        folder = tmp_path / "requeued"
        store, running = sweep(folder, monkeypatch, pool)
        interrupted = [x for x in begun(folder) if x % 2]
        first, second = said("squeue", "--noheader", "--array", "--format=%i")
        said("scancel", "--signal=USR2", first)  # what SLURM sends a job whose time is nearly over
        said("scontrol", "requeue", second)  # what SLURM does to a job that another preempts
        until(lambda: [x for x, pids in begun(folder).items() if len(pids) == 2] == interrupted)
        (folder / "go").touch()
        outcome = running.result(60)
        assert (outcome.ran, outcome.failed) == (6, ())
        pd.testing.assert_frame_equal(store.table(CELLS), expected)
        assert {x: len(pids) for x, pids in begun(folder).items()} == {x: 1 + (x in interrupted) for x in range(6)}
        assert all(path.suffix == ".json" for path in store.folder.iterdir())  # the jobs' own files are gone

        folder = tmp_path / "killed"
        store, running = sweep(folder, monkeypatch, pool)
        for x, (pid,) in begun(folder).items():
            if x % 2:
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(UfomError, match=r"cells were not run: their jobs ended early.*Killed.*logs are in .*jobs-"):
            running.result(60)
        before = begun(folder)
        done = {cell["x"] for cell in CELLS if store.load(cell) is not None}
        assert done == {x for x in before if x % 2 == 0}
        (folder / "go").touch()
        outcome = store.run(CELLS, noted)
        assert (outcome.found, outcome.ran) == (len(done), 6 - len(done))
        pd.testing.assert_frame_equal(store.table(CELLS), expected)
        assert {x for x, pids in begun(folder).items() if len(pids) > 1} == before.keys() - done

        def interrupt(share):
            raise KeyboardInterrupt

        (folder / "go").unlink()
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path / "interrupted", store.executor).run(CELLS, noted, progress=interrupt)
        until(lambda: not said("squeue", "--noheader"))
        with pytest.raises(UfomError, match=r"SLURM refuses the jobs: .*invalid partition"):
            Store(tmp_path / "refused", Slurm(2, "none")).run(CELLS, noted)
