"""`run_seeds` against single runs of `train`, and its intervals against scipy's."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from ufom_runtime import EXACT, FOM, UFOM, AdaptiveUFOM, run_seeds, train
from ufom_runtime.methods import Forward
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import UfomError

PROBLEM = quadratic(dim=3, r=3)
STEPS = {"optimizer": "sgd:0.1", "steps": 6, "batch": 2, "log_every": 2}


def norm(theta):
    return {"norm": float(theta.norm())}


@pytest.fixture(scope="module")
def runs():
    return run_seeds(PROBLEM, {"FOM": FOM, "UFOM(.5)": UFOM(0.5)}, seeds=3, evaluate=norm, **STEPS)


def test_the_table_is_that_of_the_single_runs(runs):
    assert list(runs.table.columns[:3]) == ["method", "seed", "calls"]
    assert runs.table.groupby("method").seed.unique().map(list).to_dict() == {"FOM": [0, 1, 2], "UFOM(.5)": [0, 1, 2]}
    log = train(PROBLEM, PROBLEM.initial, UFOM(0.5), seed=1, evaluate=norm, **STEPS).log
    ours = runs.table.query("method == 'UFOM(.5)' and seed == 1").reset_index(drop=True)
    pd.testing.assert_frame_equal(ours[log.columns].drop(columns="seconds"), log.drop(columns="seconds"))
    assert ours.calls.tolist() == (log.gradients + log.hessian_vector_products).tolist()
    assert repr(runs) == "SeedRuns(FOM: 3 seeds, UFOM(.5): 3 seeds; .table, .summary, .plot)"


def test_the_summary_has_students_interval(runs):
    for at in (None, 45.0):
        found = runs.summary("norm", at, level=0.9)
        for name, logs in runs.table.groupby("method"):
            runs_of = [log for _, log in logs.groupby("seed")]
            values = [x.norm.iloc[-1] if at is None else np.interp(at, x.calls, x.norm) for x in runs_of]
            low, high = ttest_1samp(values, 0).confidence_interval(0.9)
            assert found.loc[name].tolist() == pytest.approx([np.mean(values), low, high, 3])
    assert np.isnan(runs.summary("norm", 1e9)["mean"]).all()  # no run reaches it
    one = run_seeds(PROBLEM, {"FOM": FOM}, seeds=np.array([5]), evaluate=norm, **STEPS).summary("norm")
    assert (one.n.item(), one.high.item()) == (1, np.inf)


def test_latex_and_plot(runs):
    row = runs.summary("norm").loc["FOM"]
    expected = f"FOM & ${row['mean']:.2f} \\pm {row.high - row['mean']:.2f}$ & 3 \\\\"
    assert expected in runs.latex("norm", digits=2)
    axes = runs.plot("norm", x="step")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["FOM", "UFOM(.5)"]
    mean = runs.table.query("method == 'FOM' and step == 6").norm.mean()
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(mean)
    assert len(axes.collections) == 2  # the bands
    axes.figure.clear()


def test_bytes_are_those_of_a_step_with_every_coin_one():
    methods = {
        "FOM": FOM,
        "exact": EXACT,
        "rare": UFOM(0.01, EXACT.sweep),
        "rule": AdaptiveUFOM(),
        "step rule": AdaptiveUFOM(law="step"),  # told by `optimizer` who takes the outer steps
        "forward": Forward(),
    }
    problem = quadratic(dim=3, r=3)  # no call was checked yet
    table = run_seeds(problem, methods, seeds=1, memory=True, **STEPS).table.groupby("method").bytes.first()
    assert 0 < table["FOM"] < table["exact"]
    assert table["exact"] <= table["rare"]
    assert (table > 0).all()
    again = run_seeds(problem, methods, seeds=1, memory=True, **STEPS).table.groupby("method").bytes.first()
    pd.testing.assert_series_equal(again, table)  # the checks of a first call are not weighed


def test_a_checkpoint_folder_for_each_run(tmp_path):
    methods = {"FOM": FOM, "exact": EXACT}
    first = run_seeds(PROBLEM, methods, seeds=2, checkpoint=tmp_path, **STEPS)
    assert sorted(str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("state.json")) == [
        "FOM/0", "FOM/1", "exact/0", "exact/1",
    ]  # fmt: skip
    again = run_seeds(PROBLEM, methods, seeds=2, checkpoint=tmp_path, **STEPS)
    pd.testing.assert_frame_equal(first.table, again.table)  # nothing was left to do


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda runs: run_seeds(PROBLEM, {}, **STEPS), "give at least one of each, by name"),
        (lambda runs: run_seeds(PROBLEM, {"FOM": FOM}, seeds=[], **STEPS), "give at least one of each"),
        (lambda runs: run_seeds(PROBLEM, {"FOM": FOM}, seeds=0, **STEPS), "seeds = 0 must be at least 1"),
        (lambda runs: run_seeds(PROBLEM, {"FOM": FOM}, seeds=np.array([5, 2, 5]), **STEPS), "holds one twice"),
        (lambda runs: run_seeds(PROBLEM, FOM, **STEPS), "by name"),
        (lambda runs: run_seeds([1], {"FOM": FOM}, **STEPS), "must be of type BilevelProblem"),
        (lambda runs: run_seeds(PROBLEM, {"x": 0.3}, **STEPS), "0.3 is a number"),
        (lambda runs: run_seeds(PROBLEM, {"..": FOM}, checkpoint="runs", **STEPS), "kept outside of checkpoint = runs"),
        (lambda runs: run_seeds(PROBLEM, {"/x": FOM}, checkpoint="runs", **STEPS), "kept outside of checkpoint = runs"),
        (lambda runs: runs.summary("loss"), "'loss' is not a column of numbers of the table: it has"),
        (lambda runs: runs.plot("norm", x="method"), "'method' is not a column of numbers"),
        (lambda runs: runs.summary("norm", level=1.0), r"level = 1 must lie in \(0, 1\)"),
    ],
)
def test_bad_input_is_named(call, message, runs):
    with pytest.raises(UfomError, match=message):
        call(runs)
