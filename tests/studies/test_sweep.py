"""The cell store: what is done is never run again, what failed is never done, what is damaged is named."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from studies.engine.local import Local
from studies.engine.sweep import Store
from tests.studies.cells import bad, odd_only, square, threads
from ufom_runtime.files import write_sealed
from ufom_theory import UfomError

CELLS = [{"study": "test", "x": x, "seed": seed} for x in (3, 1) for seed in (0, 1)]


BAD = {
    "segmentation fault": "its process was ended by SIGSEGV",
    "_exit": "its process ended with status 0",
    "exit": "SystemExit: 0",
    "long": "ValueError: éééé",
    "wordless": "Wordless: (its text raises a ValueError)",
    "hangs": "it took longer than 5 s, and was ended",
}


class Counting:
    def __init__(self, function=square):
        self.seen, self.function = [], function

    def __call__(self, config):
        self.seen.append(dict(config))
        return self.function(config)


def test_a_finished_cell_is_never_run_again(tmp_path):
    count, shares = Counting(), []
    first = Store(tmp_path).run([*CELLS, CELLS[0]], count, progress=shares.append)
    assert (first.found, first.ran, first.failed) == (0, 4, ())
    assert shares == [0.25, 0.5, 0.75, 1.0]
    again = Store(tmp_path).run([*CELLS, {"study": "test", "x": 5, "seed": 0}], count)
    assert (again.found, again.ran) == (4, 1)
    assert len(count.seen) == 5
    assert Store(tmp_path).load({"seed": 1, "x": 3, "study": "test"}) == square(CELLS[1])  # whatever the order of names


def test_the_table_follows_the_cells_however_they_were_run(tmp_path):
    a, b = Store(tmp_path / "a"), Store(tmp_path / "b", Local(2))
    a.run(CELLS, square)
    b.run(CELLS[::-1], square)
    pd.testing.assert_frame_equal(a.table(CELLS), b.table(CELLS))
    expected = [{**cell, **row} for cell in CELLS for row in square(cell)]
    pd.testing.assert_frame_equal(a.table(CELLS), pd.DataFrame(expected))
    assert sorted(p.name for p in a.folder.iterdir()) == sorted(p.name for p in b.folder.iterdir())


def test_the_record_says_how_it_came_about(tmp_path):
    store = Store(tmp_path)
    store.run(CELLS[:1], square)
    record = json.loads(store.path(CELLS[0]).read_text())
    assert record["config"] == CELLS[0]
    assert record["seed"] == 0
    assert record["rows"] == square(CELLS[0])
    assert record["versions"]["numpy"] == np.__version__
    assert record["device"].startswith("cpu, ")
    assert len(record["commit"].rstrip("+")) in (40, 7)
    assert record["seconds"] == store.seconds() > 0
    assert str(tmp_path) not in store.path(CELLS[0]).read_text()


def test_rows_keep_their_bits(tmp_path):
    store = Store(tmp_path)
    rows = [{"x": 0.1 + 0.2, "y": math.inf, "z": np.float64(1) / 3, "n": np.int64(7), "s": "α", "none": None}]
    store.run(CELLS[:1], lambda config: pd.DataFrame(rows))
    (row,) = store.load(CELLS[0])
    assert row == {"x": 0.1 + 0.2, "y": math.inf, "z": 1 / 3, "n": 7, "s": "α", "none": None}
    store.run(CELLS[1:2], lambda config: [{"x": np.float32(0.1), "y": math.nan}])
    (row,) = store.load(CELLS[1])
    assert row["x"] == float(np.float32(0.1))
    assert math.isnan(row["y"])


@pytest.mark.parametrize("executor", [None, Local(2)])
def test_a_failure_is_recorded_and_retried_only_on_request(tmp_path, executor):
    store = Store(tmp_path, executor)
    outcome = store.run(CELLS, odd_only)
    assert outcome.ran == 2
    assert outcome.failed == tuple((c, "ValueError: no even seed") for c in CELLS if c["seed"] == 0)
    assert store.load(CELLS[0]) is None
    with pytest.raises(UfomError, match=r"2 cells are not done.*ValueError: no even seed; run it with retry=True"):
        store.table(CELLS)
    record = json.loads(next(tmp_path.glob("*.failed.json")).read_text())
    assert record["where"][-1].startswith("cells.py:")
    count = Counting()
    store = Store(tmp_path)
    assert store.run(CELLS, count).failed == outcome.failed
    assert count.seen == []
    assert store.run(CELLS, count, retry=True).ran == 2
    assert not list(tmp_path.glob("*.failed.json"))
    assert len(store.table(CELLS)) == 8


def test_a_name_that_is_no_utf_8_fails_the_cell_alone(tmp_path):
    def undecodable(config):
        if config["x"] == 3:
            raise ValueError(os.fsdecode(b"no /\xff"))
        return [{"name": os.fsdecode(b"\xff")}] if config["seed"] else square(config)

    (_, first), (_, second), (_, third) = Store(tmp_path).run(CELLS, undecodable).failed
    assert first == second == r"ValueError: no /\udcff"
    assert third.endswith("surrogates not allowed; give plain numbers and strings")


def test_rows_that_are_none_fail_the_cell(tmp_path):
    outcome = Store(tmp_path).run(CELLS[:1], lambda config: [{"x": object()}])
    assert "cannot be stored as JSON" in outcome.failed[0][1]


@pytest.mark.parametrize("damage", ["cut", "altered", "renamed"])
def test_a_damaged_file_is_named_and_moved_aside(tmp_path, damage):
    store = Store(tmp_path)
    store.run(CELLS[:2], square)
    path = store.path(CELLS[0])
    text = path.read_text()
    path.write_text(
        {"cut": text[:50], "altered": text.replace('"value": 9', '"value": 8')}.get(damage)
        or store.path(CELLS[1]).read_text()
    )
    with pytest.warns(UserWarning, match=f"{path.name} is damaged.*moved to"):
        assert store.load(CELLS[0]) is None
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1
    assert store.run(CELLS[:2], square).ran == 1
    assert store.load(CELLS[0]) == square(CELLS[0])


@pytest.mark.parametrize("call", ["open", "rename"])
def test_a_file_that_can_be_neither_read_nor_moved_is_named(tmp_path, call):
    store = Store(tmp_path)
    store.run(CELLS[:1], square)
    path = store.path(CELLS[0])
    path.write_text("{")
    with mock.patch.object(
        os if call == "open" else Path, call, side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS))
    ):
        if call == "open":
            with pytest.raises(UfomError, match=f"{path.name} cannot be read: Read-only file system"):
                store.load(CELLS[0])
            assert list(store.states().values()) == ["damaged"]
        else:
            with pytest.warns(UserWarning, match=f"{path.name} is damaged.*cannot be moved aside: Read-only"):
                assert store.load(CELLS[0]) is None
    assert list(tmp_path.iterdir()) == [path]
    with pytest.warns(UserWarning, match="was moved to"):
        assert store.run(CELLS[:1], square).ran == 1


def test_an_interrupt_is_no_failure_and_keeps_what_is_done(tmp_path):
    def interrupted(config):
        if config == CELLS[2]:
            raise KeyboardInterrupt
        return square(config)

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.run(CELLS, interrupted)
    assert [store.load(c) is not None for c in CELLS] == [True, True, False, False]
    assert store.failure(CELLS[2]) is None
    assert store.run(CELLS, square).ran == 2


SLOW = """
import sys, time
from studies.engine.local import Local
from studies.engine.sweep import Store
from ufom_runtime.files import write_sealed

def slow(config):
    if config["x"]:
        time.sleep(60)
    return [{"y": 1}]

if __name__ == "__main__":
    cells = [{"x": x} for x in (0, 1, 2, 3)]
    Store(sys.argv[1], Local(2)).run(cells, slow, progress=lambda share: print(share, flush=True))
"""


def test_ctrl_c_ends_the_processes_and_keeps_what_is_done(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, tmp_path / "slow.py", tmp_path / "cells"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore it
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as process:
        assert process.stdout.readline() == "0.25\n"
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=20)[1]
        assert time.monotonic() - begin < 20
    assert process.returncode not in (0, None)
    assert errors.count("Traceback") == 1  # the parent's alone
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert list(Store(tmp_path / "cells").states().values()).count("missing") == 3
    assert Store(tmp_path / "cells").load({"x": 0}) == [{"y": 1}]


def test_two_writers_of_one_cell_are_harmless(tmp_path):
    def slow(config):
        time.sleep(0.02)
        return square(config)

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda _: Store(tmp_path).run(CELLS, slow), range(4)))
    assert all(o.found + o.ran == 4 and not o.failed for o in outcomes)
    assert len(list(tmp_path.iterdir())) == 4
    assert len(Store(tmp_path).table(CELLS)) == 8


def test_processes_have_one_thread_each(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    store = Store(tmp_path, Local(1))
    store.run(CELLS, threads)
    table = store.table(CELLS)
    assert set(table.omp) == {"1"}  # before any library asks for it
    assert os.getpid() not in set(table.pid)
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_a_bad_cell_fails_alone_and_by_name(tmp_path):
    cells = [{"study": "test", "x": x} for x in (*BAD, "good", "fine")]
    store = Store(tmp_path, Local(2, seconds=5))
    outcome = store.run(cells, bad)
    assert (outcome.found, outcome.ran) == (0, 2)
    said = {config["x"]: error for config, error in outcome.failed}
    assert said.keys() == BAD.keys()
    assert all(said[x].startswith(words) for x, words in BAD.items()), said
    assert len(said["long"]) == 10_000
    again = store.run(cells, bad)
    assert (again.found, again.ran, again.failed) == (2, 0, outcome.failed)
    with pytest.raises(UfomError, match=r"6 cells are not done; the first, .*: its process was ended by SIGSEGV"):
        store.table(cells)


def test_a_cell_that_leaves_runs_here_fails_too(tmp_path):
    (failed,) = Store(tmp_path).run([{"study": "test", "x": "exit"}], bad).failed
    assert failed[1] == "SystemExit: 0"


@pytest.mark.parametrize("forged", [{}, {"rows": 3}, {"rows": [3]}, {"rows": {"x": 1}}, {"rows": [[]], "error": "x"}])
def test_a_sealed_file_that_is_not_of_a_cell_s_form_counts_as_damaged(tmp_path, forged):
    store = Store(tmp_path)
    cell = store.cell(CELLS[0])
    for path in (cell.done, cell.failed):
        content = {"config": CELLS[0], **({k: [v] for k, v in forged.items()} if path == cell.failed else forged)}
        write_sealed(path, content)
    assert set(store.states().values()) == {"damaged"}
    with pytest.warns(UserWarning, match="is damaged: it holds no list of rows"):
        assert store.load(CELLS[0]) is None
    with pytest.warns(UserWarning, match="is damaged: it holds no error"):
        assert store.failure(CELLS[0]) is None
    assert store.run(CELLS[:1], square).ran == 1


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_in_a_cell_s_place_is_moved_aside(tmp_path, kind):
    store = Store(tmp_path)
    path = store.path(CELLS[0])
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    assert list(store.states().values()) == ["damaged"]
    with pytest.warns(UserWarning, match="is damaged: it is not a regular file; remove it; it was moved to"):
        assert store.run(CELLS[:1], square).ran == 1


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([{"x": math.nan}], "cannot be stored as JSON"),
        ([{"x": object()}], "cannot be stored as JSON"),
        ([{"x": os.fsdecode(b"\xff")}], "cannot be stored as JSON: .*surrogates not allowed"),
        ([3], "is not a mapping"),
        ([{3: 1}], "is not a mapping"),
    ],
)
def test_bad_input_is_named(tmp_path, cells, message):
    with pytest.raises(UfomError, match=message):
        Store(tmp_path).run(cells, square)


def test_a_function_that_cannot_travel_is_named(tmp_path):
    with pytest.raises(UfomError, match="define it at the top of a module"):
        Store(tmp_path, Local(2)).run(CELLS, lambda config: [])
    with pytest.raises(UfomError, match=r"4 cells are not done; the first, .* was not run"):
        Store(tmp_path).table(CELLS)


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(UfomError, match="a size of 0 or an empty list leaves nothing to measure"):
        Store(tmp_path).table([])
    with pytest.raises(UfomError, match="no cell is done yet"):
        Store(tmp_path, partial=True).table(CELLS)


def test_a_cell_that_could_not_be_read_again_fails_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("ufom_runtime.files._MOST_VALUES", 1000)
    store, cell = Store(tmp_path), {"n": 1}
    outcome = store.run([cell], lambda cell: [{"x": i} for i in range(1000)])
    assert outcome.ran == 0
    assert "keep fewer rows" in outcome.failed[0][1]
    assert not list(tmp_path.glob("*damaged*"))
