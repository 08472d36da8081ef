"""The study's harness on tiny problems: that it compares before it times, and never leaves out a row."""

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from studies import peers, performance, promises
from studies.methods import METHODS, Method
from studies.shared import timing
from tests import ticks
from tests.conftest import compile_by
from tests.oracles import unrolled_gradient
from ufom_runtime.measure.clock import UnsureTime
from ufom_runtime.problem import Tasks

TINY = replace(
    performance.SIZES["quick"], ways=2, filters=1, images=4, hidden=2, steps=2, lengths=(3,), rounds=1,
    outer_steps=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def table():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("UFOM_DATA", raising=False)
        patch.setattr(performance, "_in_process", performance.work)
        patch.setattr(performance, "theory_calls", lambda rounds: [])
        patch.setattr(performance, "resident_bytes", lambda call: 1e6 + sum(call().shape))
        patch.setattr(promises, "STREAM", promises.STREAM[:3])
        for module in (timing, promises):
            patch.setattr(module, "seconds", ticks.seconds)
        return performance.measure(TINY)


@pytest.fixture
def random_images(monkeypatch):
    monkeypatch.delenv("UFOM_DATA", raising=False)


def job(method, workload="hypercleaning", r=3):
    return {"workload": workload, "r": r, "method": method}


def test_every_method_has_a_row_in_every_workload(table):
    assert tuple(table.columns) == performance.COLUMNS
    rows = table[table.group == "hypergradients"]
    for (workload, _), found in rows.groupby(["workload", "r"]):
        wanted = [m for m in METHODS.values() if workload.split(",")[0] in m.workloads and not m.compiled]
        assert found.method.tolist() == [m.name for m in wanted]
        assert found.library.tolist() == [m.library for m in wanted]
    assert rows.workload.nunique() == 2
    assert (rows.ratio.notna() ^ rows.note.notna()).all()  # measured, or a row that says why not


def test_our_methods_compute_what_they_are_compared_to_and_are_measured(table):
    ours = table[(table.library == "ufom") & (table.group == "hypergradients")]
    assert len(ours) == 18
    assert ours.difference.max() < 1e-12
    assert (ours[["seconds", "ratio", "live_bytes"]] > 0).all(axis=None)
    assert ((ours.low <= ours.ratio) & (ours.ratio <= ours.high)).all()


@pytest.mark.parametrize("workload", ["few-shot", "hypercleaning"])
def test_the_gradient_to_compare_with_is_the_oracles(workload, random_images):
    problem, theta, tasks = performance.build(TINY, workload, 3, double=True)
    one = Tasks.of(tasks).take(slice(1))
    for kept, second_order in ((None, True), (0, False)):
        wanted = unrolled_gradient(problem, theta, one, kept)[0]
        torch.testing.assert_close(peers.by_hand(problem, theta, one.one(), second_order), wanted)


def test_what_computes_another_gradient_is_not_timed(monkeypatch, random_images):
    def doubled(problem, theta, task):
        return lambda: 2 * peers.by_hand(problem, theta, task)

    monkeypatch.setitem(METHODS, "torch: doubled", Method("doubled", "torch", doubled, 1.0))
    (row,) = performance.work(TINY, job("torch: doubled"))
    assert row["difference"] == pytest.approx(1.0)
    assert row["note"] == "computes another gradient: not timed"
    assert "ratio" not in row
    rows = pd.DataFrame([row], columns=performance.COLUMNS)
    assert [v.agrees for v in performance.judge(rows)] == ["no"]


def test_a_missing_peer_is_a_row_that_says_so(monkeypatch, random_images):
    monkeypatch.setitem(sys.modules, "higher", None)
    (row,) = performance.work(TINY, job("higher: exact, unrolled"))
    assert row["method"] == "exact, unrolled"
    assert row["note"].startswith("ModuleNotFoundError: ")


def test_a_process_that_hangs_or_fails_is_a_row_that_says_so(random_images):
    (row,) = performance._in_process(replace(TINY, limit=0.01), job("torch: floor"))
    assert row["note"] == "given up after 0.01 s"
    (row,) = performance._in_process(replace(TINY, threads=0), job("torch: floor"))
    assert row["note"].startswith("exit code 1: ")


def test_a_row_measured_in_a_process_of_its_own_where_both_meters_agree(random_images):
    config = replace(TINY, images=100, hidden=64)  # a state is 204 kB
    (row,) = performance._in_process(config, job("ufom: exact, stored", r=20))
    assert row["difference"] < 1e-12
    assert row["ratio"] > 1
    assert row["live_bytes"] > 20 * 4 * 50_000
    if not np.isnan(row["resident_bytes"]):  # Linux; a kernel's own buffers come on top
        assert row["live_bytes"] - 2**19 < row["resident_bytes"] < row["live_bytes"] + 2**22


def test_a_compiled_path_is_measured(monkeypatch, random_images):
    compile_by(monkeypatch)
    (row,) = performance.work(TINY, job("ufom: first-order, compiled"))
    assert row["ratio"] > 0
    assert "live_bytes" not in row  # its tensors are not all this interpreter's


def test_methods_of_one_gradient_take_turns_over_plain_autograd_by_hand(table):
    turns = table[table.group == "in turns"]
    assert set(turns.workload.str.partition(",")[0] + turns.method.str.partition(",")[0]) == {
        "few-shotexact", "few-shotfirst-order", "hypercleaningexact"}  # fmt: skip
    for (_, exact), rows in turns.groupby(["workload", turns.method.str.startswith("exact")]):
        by_hand = rows[rows.method.str.endswith("by hand")]
        assert by_hand[["low", "ratio", "high"]].to_numpy().tolist() == [[1, 1, 1]]
        assert (rows.ratio.notna() == (rows.note == f"{TINY.rounds} turns")).all()
        assert (rows.library == "ufom").sum() == (2 if exact else 1)  # stored and unrolled; first-order


def test_turns_are_judged_among_right_gradients_of_one_kind(table):
    few = table[table.workload.str.startswith("few-shot", na=False) & table.group.isin(["hypergradients", "in turns"])]
    ours = few.library == "ufom"
    wrong = few.assign(difference=few.difference.where(ours, 1.0))
    assert not [v for v in performance.judge(wrong) if v.subject.startswith("time of ours")]
    # a first-order gradient takes less time than an exact one, and is not its rival
    few = few.assign(low=np.where(few.method.str.startswith("first"), 0.1, 1.0))
    for factor, agrees in ((1.2, "no"), (0.9, "yes")):
        ratio = few.low * np.where(ours, factor, 1.0)
        found = performance.judge(few.assign(low=ratio, ratio=ratio, high=ratio))
        found = {v.subject.partition(", over")[0]: v.agrees for v in found if v.subject.startswith("time of ours")}
        assert found == {"time of ours, first-order": agrees, "time of ours, exact, unrolled": agrees}


def test_what_fails_in_its_turn_is_a_row_that_says_so(monkeypatch, random_images):
    monkeypatch.setitem(sys.modules, "higher", None)
    job = {"workload": "hypercleaning", "r": 2, "turns": "exact"}
    rows = pd.DataFrame(performance.work(TINY, job), columns=performance.COLUMNS)
    (note,) = rows[rows.library == "higher"].note
    assert note.startswith("ModuleNotFoundError: ")
    assert rows[rows.library != "ufom"].ratio.isna().sum() == (rows.note.str.contains("Error")).sum()
    (row,) = performance._failed(job, "given up after 0.01 s")
    assert (row["group"], row["method"], row["note"]) == ("in turns", "exact, by hand", "given up after 0.01 s")


def test_long_calls_are_repeated_less_often():
    assert len(performance.alternate([list, list], rounds=9, patience=0.0)) == 5
    assert len(performance.alternate([list, list], rounds=9, patience=60.0)) == 9


def test_promises_are_judged_and_can_be_broken(table):
    rows = table[table.group == "promises"]
    agrees = {v.subject: v.agrees for v in performance.judge(rows)}
    assert len(agrees) == len(rows) == 24
    kept = [a for subject, a in agrees.items() if subject.startswith(("growth", "memory", "bytes"))]
    assert kept == ["yes"] * 15  # those of time want a quiet machine
    broken = rows.assign(live_bytes=8.0, ratio=2.0, low=1.95, high=2.05)
    assert {v.agrees for v in performance.judge(broken)} == {"no"}
    noisy = rows[rows.method.str.startswith("time")].assign(ratio=2.0, low=1.0, high=3.0)
    assert {v.agrees for v in performance.judge(noisy)} == {"inconclusive"}


def test_a_time_that_stays_unsure_leaves_its_promise_open_and_says_why(monkeypatch, random_images):
    def unsure(*_, **__):
        raise UnsureTime("the machine is too busy")

    monkeypatch.setattr(promises, "_cost", unsure)
    monkeypatch.setattr(promises, "forecast", unsure)
    found = [row for name in ("time of UFOM", "forecast") for row in performance.work(TINY, {"promise": name})]
    rows = pd.DataFrame(found, columns=performance.COLUMNS)
    assert len(rows) == 14
    assert [v.agrees for v in performance.judge(rows)] == ["inconclusive"] * 14
    assert (rows.note[rows.method.str.startswith("time")] == "the machine is too busy").all()


def test_figure_has_a_bar_for_each_library_and_the_caption_a_row_for_each_method(table):
    figure, said = performance.draw(table), performance.caption(table)
    assert len(figure.axes) == 2
    for axes, (_, rows) in zip(figure.axes, table[table.group == "hypergradients"].groupby("workload"), strict=True):
        exact = rows[rows.ratio.notna() & rows.method.str.startswith("exact")]
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert {name.split()[0] for name in names} == set(exact.library)
        assert len(axes.texts) == len(names) == len(set(names))
        assert axes.get_xlabel()
        assert all(f"| {row.library}: {row.method} |" in said for row in exact.itertuples())
    missing = table[table.ratio.isna() & (table.group == "hypergradients")]
    assert all(library in performance.caption(table) for library in missing.library)
