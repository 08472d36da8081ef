"""The study on a small configuration: the simulation against the runtime's estimators, and a judge that can say no."""

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from studies import optimal_q as study
from studies.engine.sweep import Store
from studies.shared.pair import RANGE, exact_blocks, exact_norms, outer_step_size, simulate
from ufom_runtime import FOM, UFOM, hypergradient
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory import CostModel, UfomError

TINY = study.Config((0.02, 0.05), points=13, delta=5e-3, simulated=(0.02,), simulated_delta=2e-2, seeds=6, chains=100)
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


def test_blocks_are_the_recursion_of_single_steps():
    pair, _ = study.predict(0.02, 10)
    q = np.array([0.0, 0.01, 0.3, 1.0])
    for rule in study.RULES:
        gamma = study.step_size(rule, pair, 1e-3)
        single = [norms for _, norms in zip(range(70), exact_norms(pair, q, map(gamma, count(1))), strict=False)]
        blocks = exact_blocks(pair, q, gamma, size=32)
        found = np.vstack([norms for (_, norms), _ in zip(blocks, range(3), strict=False)])[:70]
        np.testing.assert_allclose(found, single, rtol=1e-10)


def test_same_config_same_table(table, tmp_path):
    again = study.measure(TINY, Store(tmp_path))
    pd.testing.assert_frame_equal(table, again)


def test_the_grid_does_not_know_the_prediction(table):
    fixed = np.geomspace(1e-3, 1, TINY.points)
    for _, runs in table[table.part == "exact"].groupby(["rule", "alpha"]):
        others = {0.0, runs.q_star.iloc[0], runs.q_star_paper.iloc[0]}
        np.testing.assert_allclose(sorted(set(runs.q) - others | {1.0}), fixed)
        assert others <= set(runs.q)
        assert runs[runs.q == 0].steps.isna().all()  # FOM never reaches δ
    assert set(table[table.part == "simulated"].seed) == set(range(6))


def verdict(table, words):
    return next(v for v in study.judge(table, TINY) if v.subject.startswith(words))


def test_basin_of_a_law_is_found_in_times_that_follow_it(table):
    cost = CostModel(r=TINY.r, as_printed=True)
    law = (1 / table.q.where(table.q > 0) - 1) * table.d2 + table.v2
    times = table.rule.map(study.RULES) * np.log(law) + np.log(cost.c_det + cost.c_rnd * table.q)
    found = study.basins(table.assign(log_time=times.where(table.part == "exact", table.log_time)), TINY.r)
    np.testing.assert_allclose(found.low, found.low_predicted, rtol=0.2)
    np.testing.assert_allclose(found.high, found.high_predicted, rtol=0.2)
    assert (found.regret <= 1e-12).all()  # no q of the grid is faster


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("log-time regret", lambda t: t.log_time + (t.q == t.q_star)),
        ("log speed-up", lambda t: t.log_time + (t.q == 1)),
        ("log width", lambda t: t.log_time / 9),
    ],
)
def test_the_judge_says_no_to_times_that_are_off(table, words, change):
    assert verdict(table.assign(log_time=change(table)), words).agrees == "no"


@pytest.mark.parametrize(("words", "factor"), [("E‖∇M‖² of FOM", 1e-6), ("simulated E‖∇M‖²", 3.0)])
def test_the_judge_says_no_to_a_fom_that_converges_and_a_simulation_that_is_off(table, words, factor):
    assert verdict(table.assign(final=table.final * factor), words).agrees == "no"


def test_delta_above_foms_floor_is_refused():
    with pytest.raises(UfomError, match="above FOM's floor"):
        study.run_cell({"alpha": 0.001, "r": 10, "delta": 1e-3, "rule": "k^-1"})


def test_figure_says_what_it_shows(table):
    figure = study.draw(table, TINY)
    assert [axes.get_xlabel() for axes in figure.axes] == ["inner step size $\\alpha$"] * 2
    assert len(figure.legends[0].get_texts()) == 3
    assert "6 seeds of 100 chains" in study.caption(table, TINY)
    assert study.answer(table, TINY).startswith("Yes, within 5 % for")


def test_command_line_refuses_an_unknown_size():
    done = subprocess.run(
        [sys.executable, "-m", "studies", "optimal_q", "--size", "huge"], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "studies: size 'huge' is unknown: use quick or standard or paper\n"
