"""The study on a small configuration: the simulation against the runtime's estimators, and a judge that can say no."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from studies import optimal_q as study
from studies.engine.sweep import Store
from studies.shared.pair import RANGE, outer_step_size, simulate
from ufom_runtime import FOM, UFOM, hypergradient
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory import UfomError

TINY = study.Config(alphas=(0.02, 0.05), delta=4e-3, seeds=6, chains=100)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return study.measure(TINY, Store(tmp_path_factory.mktemp("cells")))


def test_simulation_is_outer_sgd_with_the_runtimes_hypergradients():
    problem, grid = synthetic(alpha=0.02), np.array([0.0, 0.3, 1.0])
    _, found = simulate(problem.pair, grid, 1e-9, 5, np.random.default_rng([20260101, 7]), (2, 3))
    rng = np.random.default_rng([20260101, 7])
    start = rng.uniform(*RANGE, (2, 3))
    theta = {q: torch.tensor(start) for q in grid}
    for k in range(1, 6):
        task, coin = rng.integers(0, 2, (2, 3)), rng.random((2, 3))
        for q in grid:
            for i in np.ndindex(2, 3):
                one = Tasks.of(problem.tasks).take(torch.tensor([task[i]]))
                estimator, coins = (UFOM(q), torch.tensor([coin[i] < q])) if q else (FOM, None)
                g = hypergradient(problem, theta[q][i][None], one, estimator, coins=coins)
                theta[q][i] -= outer_step_size(k) * g[0]
    for row, q in enumerate(grid):
        mean = problem.pair.gradients(theta[q].numpy())[1].mean(0)
        np.testing.assert_allclose(found[row], (mean**2).mean(1), rtol=1e-10)


def test_same_config_same_table(table, tmp_path):
    again = study.measure(TINY, Store(tmp_path))
    pd.testing.assert_frame_equal(table, again)


def test_grid_holds_the_predicted_q_and_1(table):
    for _, runs in table.groupby("alpha"):
        assert {0.0, 1.0, runs.q_star.iloc[0]} <= set(runs.q)
    assert table[table.q == 0].steps.isna().all()  # FOM never reaches δ
    assert set(table.seed) == set(range(6))


def verdict(table, words):
    return next(v for v in study.judge(table, TINY) if v.subject.startswith(words))


def test_the_judge_says_no_to_a_predicted_q_that_is_slow(table):
    slow = table.copy()
    slow.loc[slow.q == slow.q_star, "log_time"] += 1.0
    assert verdict(slow, "log-time regret").agrees == "no"
    assert verdict(slow, "log speed-up").agrees == "no"


def test_the_judge_says_no_to_a_fom_that_converges(table):
    converging = table.copy()
    converging.loc[converging.q == 0, "final"] = 1e-6
    assert verdict(converging, "E‖∇M‖² of FOM").agrees == "no"


def test_the_judge_says_no_to_a_simulation_that_is_off(table):
    off = table.assign(final=table.final * 3)
    assert verdict(off, "E‖∇M‖², simulated").agrees == "no"


def test_the_judge_cannot_tell_where_a_run_was_given_up_or_the_best_is_at_the_edge(table):
    assert (
        verdict(table.assign(log_time=math.nan).fillna({"log_time": math.inf}), "log speed-up").agrees == "inconclusive"
    )
    edge = table.copy()
    smallest = edge[edge.q > 0].groupby("alpha").q.transform("min")
    edge.loc[smallest.index[smallest == edge.loc[smallest.index, "q"]], "log_time"] = 0.0
    assert verdict(edge, "log-time regret").agrees == "inconclusive"


def test_delta_above_foms_floor_is_refused():
    with pytest.raises(UfomError, match="above FOM's floor"):
        study.run_cell({"alpha": 0.001, "r": 10, "delta": 1e-3, "seeds": 2, "chains": 2, "number": 0})


def test_figure_has_labelled_axes(table):
    figure = study.draw(table, TINY)
    assert len(figure.axes) == 3
    assert all(a.get_xlabel() and a.get_ylabel() for a in figure.axes)
    moments, optima, times = figure.axes
    assert moments.get_legend()
    assert optima.get_legend()
    assert [text.get_text() for text in times.texts] == [f"$\\alpha$ = {alpha:g}" for alpha in np.unique(table.alpha)]
    assert "δ = 0.004, 6 seeds of 100 chains" in study.caption(table, TINY)


def test_command_line_refuses_an_unknown_size():
    done = subprocess.run(
        [sys.executable, "-m", "studies", "optimal_q", "--size", "huge"], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "studies: size 'huge' is unknown: use quick or standard or paper\n"
