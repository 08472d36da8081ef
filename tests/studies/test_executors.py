"""Cells run the same wherever they run; other processes are given their names alone; the commands about stores."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from typer.testing import CliRunner

from studies import __main__ as main
from studies.engine import commands
from studies.engine.cell import Cell, name_of
from studies.engine.executors import DAY, Local, Slurm, executor
from studies.engine.study import Study
from studies.engine.sweep import Store
from tests.studies.cells import devices, fails_once, squared
from ufom_theory import UfomError

ROOT = Path(__file__).parents[2]
CELLS = [{"study": "test", "x": x, "seed": 0, "nested": {"a": [1, 2]}} for x in range(4)]


def test_other_processes_are_given_names_and_skip_what_is_done(tmp_path):
    store = Store(tmp_path)
    store.run(CELLS[:1], squared)
    for config in CELLS[:3]:
        store.cell(config).want(config)
    before = store.path(CELLS[0]).read_bytes()
    ids = [store.cell(config).id for config in CELLS]
    assert sorted(Local(2).each(tmp_path, name_of(squared), ids)) == sorted(ids)
    assert store.path(CELLS[0]).read_bytes() == before
    assert store.load(CELLS[1]) == [{"value": 1}]
    assert store.load(CELLS[3]) is None  # nobody asked for it
    assert set(store.states().values()) == {"done"}


def test_a_wanted_cell_that_was_lost_is_named(tmp_path):
    class Forgetful:
        def each(self, folder, function, ids):
            for id in ids:
                Cell(folder, id).wanted.write_text("{")
            yield from Local(1).each(folder, function, ids)

    with pytest.raises(UfomError, match=r"was not run: .*wanted\.json was lost; run again"):
        Store(tmp_path, Forgetful()).run(CELLS[:1], squared)
    assert Store(tmp_path).run(CELLS[:1], squared).ran == 1


@pytest.mark.parametrize(
    ("visible", "pairs"), [(None, {"0,1", "2,3"}), ("7,GPU-a,1,4,6", {"7,GPU-a", "1,4"})], ids=["unset", "set"]
)
def test_an_executor_decides_where_cells_run_and_which_devices_they_see(tmp_path, monkeypatch, visible, pairs):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    store = Store(tmp_path, Local(2, gpus=2))
    store.run(CELLS * 2, devices)
    table = store.table(CELLS)
    assert set(table.devices) <= pairs
    assert (table.groupby("pid").devices.nunique() == 1).all()
    assert os.getpid() not in set(table.pid)


@pytest.mark.parametrize("visible", ["", "7,8,9"])
def test_devices_that_are_not_visible_are_not_handed_out(tmp_path, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UfomError, match=f"4 GPUs are needed and CUDA_VISIBLE_DEVICES={visible}: take fewer"):
        Store(tmp_path, Local(2, gpus=2)).run(CELLS, devices)


def test_states_tell_cells_apart_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("REPAIRED", raising=False)
    store = Store(tmp_path)
    store.run(CELLS[:3], fails_once)
    store.cell(CELLS[3]).want(CELLS[3])
    store.path(CELLS[0]).write_text("{")
    names = sorted(tmp_path.iterdir())
    expected = dict(zip([store.cell(c).id for c in CELLS], ["damaged", "done", "failed", "missing"], strict=True))
    assert store.states() == expected
    assert sorted(tmp_path.iterdir()) == names
    with pytest.warns(UserWarning, match="moved to"):
        assert store.load(CELLS[0]) is None
    assert store.states() == expected  # what was moved aside still counts
    monkeypatch.setenv("REPAIRED", "1")
    assert Store(tmp_path, retry=True).run(CELLS, fails_once).ran == 3
    assert set(store.states().values()) == {"done"}


def test_a_copy_is_no_cell(tmp_path):
    store = Store(tmp_path)
    store.run(CELLS[:1], squared)
    for kind in ("copy.json", "failed.copy.json", "json.json"):
        (tmp_path / f"{store.cell(CELLS[0]).id}.{kind}").write_bytes(store.path(CELLS[0]).read_bytes())
    assert list(store.states().values()) == ["done"]
    store.path(CELLS[0]).unlink()
    assert store.states() == {}
    assert store.everything().empty


def test_everything_is_a_table_of_what_is_done(tmp_path):
    store = Store(tmp_path)
    store.run(CELLS, squared)
    table = store.everything()
    assert list(table.cell) == sorted(store.cell(c).id for c in CELLS)
    assert sorted(table.value) == [0, 1, 4, 9]
    assert json.loads(table.nested[0]) == {"a": [1, 2]}
    assert Store(tmp_path / "none").everything().empty


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((None, None, None, None, None), None),
        (("local", None, None, None, None), Local(2, seconds=DAY)),
        (("local", 3, None, None, 1, 1.5), Local(3, 1, 90.0)),
        (("slurm", 8, "gpu", 30, 1), Slurm(8, "gpu", 30, 1)),
        (("slurm", None, None, None, None), Slurm(2, None, 60, 0)),
    ],
)
def test_options_choose_the_executor(options, expected):
    assert executor(*options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("condor", None, None, None, None), "executor 'condor' is unknown: use local or slurm"),
        ((None, 2, None, None, None), "--jobs goes with --executor local or slurm"),
        (("local", 2, "gpu", None, None), "--partition goes with --executor slurm"),
        (("local", 2, None, 5, None), "--time goes with --executor slurm"),
        (("local", 0, None, None, None), "--jobs = 0 must be at least 1"),
        (("slurm", 2, None, None, None, 3), "--cell-minutes goes with --executor local"),
        (("local", 2, None, None, None, -1), "--cell-minutes = -1 must be a finite number > 0"),
        (("slurm", 2, None, 4, None), "--time = 4 must be at least 5"),
        (("slurm", 2, None, None, -1), "--gpus-per-job = -1 must be at least 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UfomError, match=message):
        executor(*options)


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UfomError, match="sbatch is missing: run this where SLURM is"):
        Store(tmp_path / "cells", Slurm(2)).run(CELLS, squared)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UfomError, match="SLURM needs submitit: pip install"):
        Store(tmp_path / "cells", Slurm(2)).run(CELLS, squared)
    assert not list((tmp_path / "cells").glob("jobs-*"))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM that forgets its jobs; its answers may be replaced."""

    def answer(**answers):
        for name, said in answers.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{said}\n")
            (tmp_path / "bin" / name).chmod(0o755)

    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    answer(
        sbatch=f"cp $1 {tmp_path}/script; echo Submitted batch job 7",
        squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        scancel=f"echo $* >> {tmp_path}/cancelled",
        srun="",
    )
    return answer


def test_slurm_is_asked_for_what_the_options_say_and_jobs_are_given_names_alone(tmp_path, slurm):
    cells = [{**cell, "secret": "of the configuration"} for cell in CELLS[1:]]
    store = Store(tmp_path / "cells", Slurm(2, "gpu", 30, 1))
    with pytest.raises(UfomError, match=r"3 cells were not run: their jobs ended early.*run again"):
        store.run(cells, squared)
    script = (tmp_path / "script").read_text().splitlines()
    for asked in ("partition=gpu", "time=30", "gpus-per-node=1", "array=0-1%2", "signal=USR2@90", "requeue"):
        assert f"#SBATCH --{asked}" in script
    assert "export OMP_NUM_THREADS=1" in script
    given = [path.read_bytes() for path in store.folder.glob("jobs-*/*.pkl")]
    assert len(given) == 2
    assert all(b"secret" not in pickled for pickled in given)
    assert all(sum(store.cell(cell).id.encode() in pickled for pickled in given) == 1 for cell in cells)
    assert list(store.states().values()) == ["missing"] * 3


def cancelled_by_name(tmp_path):
    (name,) = (line.partition("=")[2] for line in (tmp_path / "script").read_text().splitlines() if "job-name" in line)
    return (tmp_path / "cancelled").read_text().split() == [f"--name={name}"]


def test_jobs_end_with_a_sweep_that_is_stopped_while_they_are_submitted(tmp_path, slurm):
    slurm(sbatch=f"cp $1 {tmp_path}/script; kill -TERM $PPID; echo Submitted batch job 7")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as studies does
    try:
        with pytest.raises(SystemExit):
            Store(tmp_path / "cells", Slurm(2)).run(CELLS, squared)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cancelled_by_name(tmp_path)


def test_jobs_end_with_a_sweep_whose_folder_can_no_longer_be_read(tmp_path, slurm, monkeypatch):
    def failing(folder):
        raise OSError(errno.EIO, "Input/output error")

    slurm(sbatch=f"cp $1 {tmp_path}/script; echo Submitted batch job 7")
    monkeypatch.setattr("studies.engine.slurm.os.listdir", failing)
    with pytest.raises(UfomError, match=r"cells cannot be read: Input/output error; the jobs are cancelled"):
        Store(tmp_path / "cells", Slurm(2)).run(CELLS, squared)
    assert cancelled_by_name(tmp_path)


@pytest.mark.parametrize("squeue", ["echo 'Unable to contact slurm controller' >&2; exit 1", "exec sleep 30"])
def test_a_slurm_that_no_longer_answers_is_not_waited_for_without_end(tmp_path, slurm, monkeypatch, squeue):
    monkeypatch.setattr("studies.engine.slurm._SECONDS", 1)
    monkeypatch.setattr("studies.engine.slurm._PATIENCE", 0)
    slurm(squeue=squeue)
    with pytest.raises(UfomError, match=r"squeue has not answered for .*: scancel 7, which may still run.*run again"):
        Store(tmp_path / "cells", Slurm(2)).run(CELLS, squared)
    assert cancelled_by_name(tmp_path)


@dataclass(frozen=True)
class Config:
    x: int = 2


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of three cells, of which one fails until REPAIRED is set; its folders are temporary."""
    module = ModuleType("studies.fake")

    def measure(config, store, progress):
        store.run(CELLS[: config.x + 1], fails_once, progress=progress)
        return store.table(CELLS[: config.x + 1])

    module.study = Study("?", {"quick": Config()}, measure, *[None] * 4, jobs=1)
    monkeypatch.setitem(sys.modules, "studies.fake", module)
    monkeypatch.setitem(main.STUDIES, "fake", "")
    monkeypatch.setattr(main, "HERE", tmp_path)
    monkeypatch.setattr(commands, "CELLS", tmp_path / "cells")
    monkeypatch.delenv("REPAIRED", raising=False)


def call(*arguments):
    result = CliRunner().invoke(main.app, arguments)
    if isinstance(result.exception, UfomError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_run_and_retry_fill_a_store_that_status_and_export_show(study, tmp_path, monkeypatch):
    with pytest.raises(UfomError, match=r"ValueError: not repaired; run it with .*studies retry"):
        call("run", "fake")
    assert call("status").splitlines()[1].split() == ["fake-quick", "2", "1", "0", "0"]
    monkeypatch.setenv("REPAIRED", "1")
    with pytest.raises(UfomError, match="not repaired"):
        call("run", "fake")
    call("retry", "fake", "--executor", "local", "--jobs", "1")
    assert call("status").splitlines()[1].split() == ["fake-quick", "3", "0", "0", "0"]
    assert sorted(pd.read_csv(StringIO(call("export", "fake"))).value) == [0, 1, 4]
    assert sorted(pd.read_csv(tmp_path / "results" / "quick" / "fake-quick.csv").value) == [0, 1, 4]


def test_the_commands_name_what_they_do_not_know(study):
    with pytest.raises(UfomError, match=r"nix-quick is missing: stores are none"):
        call("export", "nix")
    with pytest.raises(UfomError, match="study 'nix' is unknown: use divergence"):
        call("run", "nix")
    with pytest.raises(UfomError, match="size 'huge' is unknown: use quick"):
        call("run", "fake", "--size", "huge")
    with pytest.raises(UfomError, match="performance keeps no cells"):
        call("retry", "performance")


def test_status_and_export_do_without_torch(tmp_path):
    Store(tmp_path / "cells" / "fake-quick").run(CELLS, squared)
    code = (
        "import sys; from pathlib import Path; from studies.engine import commands; from studies.__main__ import app\n"
        f"commands.CELLS = Path({str(tmp_path / 'cells')!r})\n"
        "app(['status'], standalone_mode=False); app(['export', 'fake'], standalone_mode=False)\n"
        "print('loaded', [m for m in ('torch', 'sympy', 'submitit') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[1].split() == ["fake-quick", "4", "0", "0", "0"]
    assert out.splitlines()[2].startswith("cell,study,x,seed,nested,value")
    assert len(out.splitlines()) == 2 + 5 + 1
    assert out.splitlines()[-1] == "loaded []"
