"""The study that `make gpu` runs, on the CPU at toy size: as on a machine without the parts that it can do without."""

import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest

from studies import gpu
from studies.engine.sweep import Store

LEAN = """
import sys
for name in ("dacite", "pooch", "submitit", "higher", "torchopt", "learn2learn", "jax"):
    sys.modules[name] = None
import studies.__main__, studies.gpu, studies.gpu_cell, tests.runtime.test_cuda
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("UFOM_DATA", raising=False)
        yield gpu.measure(gpu.SIZES["quick"], Store(tmp_path_factory.mktemp("cells")))


def test_every_method_has_a_row_that_is_measured_or_says_why_not(table):
    assert tuple(table.columns) == gpu.COLUMNS
    for workload, rows in table.groupby("workload"):
        assert workload.split(":")[0] in ("W1", "W2")
        assert set(rows.library) == {"ufom", "torch", "higher", "torchopt", "learn2learn", "jax"}
        assert (rows.seconds.notna() ^ rows.note.notna()).all()
    ours = table[table.library.isin(["ufom", "torch"])]
    assert (ours[["seconds", "bytes"]] > 0).all(axis=None)
    assert ours[~ours.method.str.startswith("UFOM")].difference.max() < 1e-12


def test_it_is_judged_drawn_and_answered(table):
    verdicts = {v.subject: v.agrees for v in gpu.judge(table)}
    assert sum(subject.startswith("largest difference") for subject in verdicts) == 2
    assert sum(subject.startswith("time of our quickest") for subject in verdicts) == 2
    assert {verdicts[subject] for subject in verdicts if subject.startswith("largest")} == {"yes"}
    figure = gpu.draw(table)
    assert len(figure.axes) == table.workload.nunique() == 2
    assert "jax" in gpu.caption(table)
    assert gpu.answer(table).count(" ms by ufom") == 2
    wrong = table.assign(difference=1.0)
    assert {v.agrees for v in gpu.judge(wrong) if v.subject.startswith("largest")} == {"no"}


def test_groups_for_which_no_time_is_left_say_so(tmp_path):
    config = replace(gpu.SIZES["quick"], minutes=0.0, groups=("stored, compiled", "first-order, compiled"))
    rows = gpu.measure(config, Store(tmp_path))
    assert set(rows.note) == {"no time was left"}
    assert rows.method.tolist() == ["stored, compiled", "stored, compiled", "first-order, compiled"]
    assert gpu.judge(rows) == []
    assert gpu.answer(rows) == "Nothing was measured."


def test_a_group_that_fails_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("studies.gpu_cell._problem", lambda cell, double: 1 / 0)
    config = replace(gpu.SIZES["quick"], groups=("ours",))
    rows = gpu.measure(config, Store(tmp_path))
    assert len(rows) == 2
    assert rows.note.str.contains("ZeroDivisionError").all()


def test_it_is_imported_without_what_a_gpu_machine_may_lack():
    subprocess.run([sys.executable, "-c", LEAN], check=True)


def test_the_standard_size_is_a_gpus():
    config = gpu.SIZES["standard"]
    assert (config.device, config.tasks, config.images.images, config.images.ways) == ("cuda", 32, 5000, 20)
    cells = pd.DataFrame(gpu._cells(config))
    assert cells.groupby("workload").size().to_dict() == {"few-shot": 5, "hypercleaning": 4}
