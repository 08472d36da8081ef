"""Theorem 2's study, small: its runs are the runtime's, its gradients the oracle's, its judge can say no."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from studies import divergence as study
from studies.engine.sweep import Store
from studies.shared.pair import outer_step_size
from tests.oracles import unrolled_gradient
from ufom_runtime import FOM, UFOM, hypergradient
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory import diverging_problem

TINY = study.Config(starts=16, steps=3000)
PAIR = diverging_problem(0.06, 10, 0.1)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return study.measure(TINY, Store(tmp_path_factory.mktemp("cells")))


def verdict(table, words):
    return next(v for v in study.judge(table, TINY) if v.subject.startswith(words))


def test_runs_are_outer_sgd_with_the_runtimes_hypergradients():
    problem, start = synthetic(**PAIR.parameters), np.array([-30.0, 3.0, 40.0])
    found = study.simulate(PAIR, start, 0.4, np.arange(1, 7), np.random.default_rng(5))
    rng, theta = np.random.default_rng(5), torch.tensor(np.stack([start, start]))
    for k in range(1, 7):
        task, coin = rng.integers(0, 2, 3), rng.random(3) < 0.4
        for i in range(3):
            one = Tasks.of(problem.tasks).take(torch.tensor([task[i]]))
            theta[0, i] -= outer_step_size(k) * hypergradient(problem, theta[0, i][None], one, FOM)[0]
            coins = torch.tensor([coin[i]])
            theta[1, i] -= (
                outer_step_size(k) * hypergradient(problem, theta[1, i][None], one, UFOM(0.4), coins=coins)[0]
            )
        np.testing.assert_allclose(found[k - 1], theta.numpy(), rtol=1e-11)


@pytest.mark.parametrize("theta", [-30.0, PAIR.b[1] / PAIR.a[1] - PAIR.A, 5.0, PAIR.b[1] / PAIR.a[1] + PAIR.A, 40.0])
def test_hypergradients_against_autodiff_also_where_the_pieces_meet(theta):
    problem = synthetic(**PAIR.parameters)
    at = torch.tensor([theta], dtype=torch.float64)
    for kept, ours in zip((0, None), PAIR.gradients(theta), strict=True):
        np.testing.assert_allclose(unrolled_gradient(problem, at, problem.tasks, kept)[:, 0].numpy(), ours, rtol=1e-12)


def test_the_objective_drawn_has_the_gradient_followed():
    theta, h = np.array([-20.0, -1.0, 4.0, 30.0]), 1e-4
    slope = (study.losses(PAIR, theta + h)[0] - study.losses(PAIR, theta - h)[0]) / (2 * h)
    np.testing.assert_allclose(slope, PAIR.gradients(theta)[1], rtol=1e-5)


def test_same_config_same_table_and_every_start_once(table, tmp_path):
    short = replace(TINY, steps=200)
    once, again = (study.measure(short, Store(tmp_path / name)) for name in "ab")
    pd.testing.assert_frame_equal(once, again)
    assert (table.groupby(["estimator", "step"]).start.apply(sorted).map(tuple) == tuple(range(16))).all()


def test_fom_stalls_at_the_floor_and_ufom_goes_below(table):
    assert verdict(table, "E‖∇M‖² over D at FOM's end: Theorem").agrees == "yes"
    assert verdict(table, "E‖∇M‖² over D at the end of UFOM").agrees == "yes"
    assert study.answer(table, TINY).startswith("Yes: from 16 starts FOM")


@pytest.mark.parametrize(
    ("estimator", "column", "factor", "words"),
    [
        ("FOM", "gradient_norm", 0.1, "E‖∇M‖² over D at FOM's end: Theorem"),
        ("FOM", "gradient_norm", 1.5, "E‖∇M‖² over D at FOM's end: its limit"),
        ("UFOM", "gradient_norm", 20.0, "E‖∇M‖² over D at the end of UFOM"),
        ("FOM", "theta", 1.5, "FOM's end from θ_FO"),
        ("UFOM", "theta", 2.0, "end of UFOM (q = 0.1) from θ_*"),
    ],
)
def test_the_judge_can_say_no(table, estimator, column, factor, words):
    planted = table.copy()
    planted.loc[planted.estimator == estimator, column] *= factor
    assert verdict(planted, words).agrees == "no"
    if column == "gradient_norm" and factor != 1.5:
        assert study.answer(planted, TINY).startswith("No")


def test_the_judge_cannot_tell_from_runs_that_disagree(table):
    planted = table.copy()
    planted.loc[(planted.estimator == "FOM") & (planted.start % 2 == 0), "gradient_norm"] *= 0.1
    assert verdict(planted, "E‖∇M‖² over D at FOM's end: Theorem").agrees == "inconclusive"


def test_figure_has_labelled_axes(table):
    figure = study.draw(table, TINY)
    assert len(figure.axes) == 3
    assert all(a.get_xlabel() and a.get_ylabel() and a.get_legend() for a in figure.axes)
    assert "n = 16 starts evenly over [-30, 40]" in study.caption(table, TINY)


def test_every_size_is_a_problem_that_exists():
    for config in study.SIZES.values():
        assert diverging_problem(config.D, config.r, config.alpha).theta_fo > 0
        assert config.starts % config.cells == 0
