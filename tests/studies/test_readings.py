"""The readings on a small configuration: exact times against simulation and formulas, and a judge that can say no."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from studies import readings as study
from studies import readings_cell
from studies.engine.sweep import Store
from studies.shared.pair import simulate
from tests.oracles import unrolled_gradient
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory import UfomError, optimal_q

TINY = study.Config((0.01, 0.03), points=7, largest_delta=5e-2, seeds=3, chains=60)


def measure(config, folder):
    """The study with its simulation at α = 0.03, where runs are a tenth as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "PAPERS_ALPHA", 0.03)
        return study.measure(config, Store(folder))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return measure(TINY, tmp_path_factory.mktemp("cells"))


def verdict(table, subject):
    return next(v for v in study.judge(table) if v.subject == subject)


def planted(table, m, where="θ*"):
    """The table of a world in which every rule's steps grow as A(q)^m."""
    a = (1 / table.q.where(table.q > 0) - 1) * table[f"D² {where}"] + table[f"V² {where}"]
    return table.assign(steps=np.where(table.part == "curve", table.steps, 1e4 * a**m))


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.05])
def test_hypergradients_against_autodiff(alpha):
    pair, _ = readings_cell.describe(alpha)
    problem = synthetic(**pair.parameters)
    for theta in (-50.0, pair.theta_star, 403.0):
        at = torch.tensor([theta], dtype=torch.float64)
        for kept, ours in zip((0, None), pair.gradients(theta), strict=True):
            oracle = unrolled_gradient(problem, at, problem.tasks, kept)[:, 0]
            np.testing.assert_allclose(oracle.numpy(), ours, rtol=1e-12)


def test_moments_of_each_kind_at_the_papers_alpha():
    _, row = readings_cell.describe(0.01)
    assert row["D² [−50, 50]"] == pytest.approx(53.21197334, rel=1e-9)
    assert row["D² ℝ"] == pytest.approx(2659.539581, rel=1e-4)
    assert row["V² ℝ"] == pytest.approx(200500.3125, rel=1e-12)
    found = {reading.name: float(reading.predict(row).q) for reading in readings_cell.READINGS[:3]}
    assert found == pytest.approx({"printed": 0.111879, "printed, over ℝ": 0.080358, "released": 0.110}, rel=1e-3)


def test_first_passages_are_those_of_simulated_runs():
    pair, row = readings_cell.describe(0.03)
    grid = readings_cell._grid(row, 5)
    steps = readings_cell._decaying(pair, grid, 0.02)
    for i, rule in enumerate(readings_cell.DECAYING):
        exact = steps[(steps.rule == rule) & (steps.part == "exact")].steps.to_numpy()
        length = int(1.3 * exact[-1])
        rng, gamma = np.random.default_rng([20260101, i]), readings_cell.step_size(rule, pair, 0.02)
        found, _ = simulate(pair, grid[-1:], 0.02, length, rng, (1, 20_000), gamma)
        assert found[0, 0] == pytest.approx(exact[-1], rel=0.1)


def test_same_config_same_table(table, tmp_path):
    again = measure(replace(TINY, alphas=(0.03,)), tmp_path)
    kept = table[table.alpha == 0.03]
    pd.testing.assert_frame_equal(kept.reset_index(drop=True), again)


def test_every_predicted_q_and_fom_are_run(table):
    exact = table[table.part == "exact"]
    for (_, _), runs in exact.groupby(["alpha", "rule"]):
        predicted = {float(reading.predict(runs.iloc[0]).q) for reading in readings_cell.READINGS}
        assert {0.0, 1.0} | predicted <= set(runs.q)
        assert runs[runs.q > 0].steps.notna().all()
        assert runs[runs.q == 0].steps.isna().all()  # FOM never reaches δ


@pytest.mark.parametrize("m", [0.5, 1.0, 2.0])
def test_the_fit_finds_a_planted_exponent(table, m):
    local, world = readings_cell.READINGS[-1], planted(table, m)
    for rule in readings_cell.DECAYING:
        assert study.exponents(world, rule, local).to_numpy() == pytest.approx(m, rel=1e-9)
    assert verdict(world, "exponent m with moments at θ*, k^-1: the printed 2").agrees == ("yes" if m == 2 else "no")
    assert verdict(world, "exponent m, local, k^-1").agrees == ("yes" if m == 1 else "no")
    assert verdict(world, "exponent m with moments at θ*, k^-1, simulated").agrees == ("yes" if m == 1 else "no")


def test_a_world_as_printed_supports_the_printed_reading(table):
    world = planted(table, 2.0, "[−50, 50]")
    for subject in ("exponent m", "worst log-time regret at q*", "worst error of the log speed-up over q = 1"):
        assert verdict(world, f"{subject}, printed").agrees == "yes"
    assert verdict(world, "exponent m, printed, over ℝ").agrees != "yes"
    assert verdict(world, "worst error of the log speed-up over q = 1, local, k^-0.5").agrees == "no"


def test_a_slow_prediction_is_called_slow(table):
    local = readings_cell.READINGS[3]
    q = float(local.predict(table[table.alpha == 0.01].iloc[0]).q)
    slow = table.copy()
    slow.loc[np.isclose(slow.q, q) & (slow.rule == local.rule) & (slow.part == "exact"), "steps"] *= 2
    assert verdict(slow, f"worst log-time regret at q*, {local.name}").agrees == "no"


def test_fits_that_disagree_are_inconclusive(table):
    world = planted(table, 1.0)
    world.loc[world.alpha == 0.03, "steps"] **= 1.3
    assert verdict(world, "exponent m, local, k^-1").agrees == "inconclusive"


def test_fom_that_converges_and_a_simulation_that_is_off_are_refused(table):
    off = table.copy()
    off.loc[(off.part == "exact") & (off.q == 0), "final"] = 1e-9
    off.loc[off.part == "simulated", "final"] *= 5
    assert verdict(off, "least E‖∇M‖² of FOM over δ").agrees == "no"
    assert verdict(off, "E‖∇M‖², simulated over exact, k^-1").agrees == "no"


def test_the_papers_q_comes_out_over_the_reals_alone_of_the_suprema(table):
    agrees = {
        name: verdict(table, f"q* at α = 0.01, {name}").agrees for name in ("printed", "printed, over ℝ", "released")
    }
    assert agrees == {"printed": "no", "printed, over ℝ": "yes", "released": "no"}


def test_a_delta_below_every_noise_floor_is_refused():
    pair, row = readings_cell.describe(0.03)
    norms = (np.ones((1, 6)) for _ in range(10**6))
    with pytest.raises(UfomError, match="take a smaller δ"):
        readings_cell._passages(norms, ["k^-1"], pair, readings_cell._grid(row, 5), 0.5)


def test_figure_has_a_mark_for_each_exponent_and_the_caption_a_row_for_each_reading(table):
    (axes,) = study.draw(table).axes
    marks = np.concatenate([c.get_offsets() for c in axes.collections])
    local = readings_cell.READINGS[-1]
    for place, rule in enumerate([*readings_cell.DECAYING, readings_cell.TUNED, readings_cell.SAME]):
        np.testing.assert_allclose(marks[marks[:, 0] == place][:, 1], study.exponents(table, rule, local))
    said = study.caption(table, TINY)
    assert "3 seeds of 60 chains" in said
    assert all(f"\n| {reading.name} | " in said for reading in readings_cell.READINGS)
    assert study.answer(table).startswith("The local one")


def test_every_size_holds_the_papers_alpha_and_each_reading_predicts():
    for config in study.SIZES.values():
        assert readings_cell.PAPERS_ALPHA in config.alphas
        assert len(set(config.alphas)) == len(config.alphas)
    _, row = readings_cell.describe(0.02)
    for reading in readings_cell.READINGS:
        assert reading.predict(row).q == optimal_q(reading.moments(row), reading.cost, reading.m).q
