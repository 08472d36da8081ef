"""The study at a tiny size: its gradients against the oracle, what it charges, and a judge that can say no."""

import math
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch

from studies import hypercleaning as study
from studies import hypercleaning_cell
from studies.engine.sweep import Store
from studies.shared.training import ADAPTIVE, charged
from tests.oracles import unrolled_gradient
from ufom_runtime import EXACT, FOM, UFOM, hypergradient, outer_sgd
from ufom_runtime.coins import draw_coins
from ufom_runtime.methods.adaptive import AdaptiveState
from ufom_runtime.training.seeds import generator
from ufom_theory import CostModel, Moments, Sweep, Truncated, UfomError, optimal_q

TINY = hypercleaning_cell.Config("digits", 20, 20, 4, 0.5, (10.0, 100.0), 2, 2, 4, log_every=2, r=5)
CELL = next(iter(study._cells(TINY)))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return study.measure(TINY, Store(tmp_path_factory.mktemp("cells")))


def verdict(table, *words):
    return next(v for v in study.judge(table, TINY) if all(word in v.subject for word in words))


def planted(table, method, **columns):
    return table.assign(**{c: table[c].mask(table.method == method, value) for c, value in columns.items()})


def test_same_cell_same_rows(table):
    (cell,) = (c for c in study._cells(TINY) if (c["method"], c["gamma"], c["seed"]) == ("adaptive", 10.0, 0))
    again = pd.DataFrame(hypercleaning_cell.run_cell(cell)).drop(columns=["gradients", "hessian_vector_products"])
    rows = table[(table.method == "adaptive") & (table.gamma == 10.0) & (table.seed == 0)]
    pd.testing.assert_frame_equal(rows[again.columns].reset_index(drop=True), again, check_dtype=False)


def test_hypergradients_are_the_oracles_and_fom_is_zero():
    problem = hypercleaning_cell.make_problem(CELL)
    theta = torch.linspace(-1, 1, 20)
    coin, truncated = torch.tensor([False]), UFOM(0.5, Sweep.stored(), Truncated(2))
    exact = hypergradient(problem, theta, problem.tasks, EXACT)
    proxy = hypergradient(problem, theta, problem.tasks, truncated, coins=coin)
    for found, kept in ((exact, None), (proxy, 2)):
        expected = unrolled_gradient(problem, theta, problem.tasks, kept)[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert not hypergradient(problem, theta, problem.tasks, FOM).any()


def test_ufom_on_fom_is_the_exact_gradient_with_longer_steps_now_and_then():
    problem, q, gamma = hypercleaning_cell.make_problem(CELL), 0.25, 8.0
    run = outer_sgd(problem, problem.initial, UFOM(q, Sweep.stored()), lambda k: gamma, 20, seed=3)
    theta = problem.initial
    for k in range(1, 21):
        if draw_coins(1, q, generator(3, k, "coins")).item():
            theta = theta - gamma / q * hypergradient(problem, theta, problem.tasks, EXACT)
    torch.testing.assert_close(run.theta, theta, rtol=1e-4, atol=1e-6)
    assert (theta != problem.initial).any()


@pytest.mark.parametrize("proxy", [0, 2])
def test_what_is_charged_is_what_the_recomputed_sweep_costs(proxy):
    problem = hypercleaning_cell.make_problem(CELL)
    stored, recomputed = (
        outer_sgd(problem, problem.initial, UFOM(0.5, sweep, Truncated(proxy)), lambda k: 1.0, 6).log
        for sweep in (Sweep.stored(), Sweep.recomputed())
    )
    again = (4 - proxy) * recomputed.exact.cumsum()  # steps that the paper repeats, and one forward pass does not
    expected = recomputed.gradients + recomputed.hessian_vector_products + again
    assert charged(stored, 5, proxy=proxy).tolist() == expected.tolist()
    assert 0 < stored.exact.sum() < 6


def data_free_q(method, updates):
    """q of a rule before its first update and after each, where G_FO = 0 and V² stays: no data come in."""
    rule = ADAPTIVE[method]
    states = [AdaptiveState(rule.q_min)]
    for _ in range(updates):
        states.append(rule.update(states[-1], 1.0, 1.0, 100))
    return [state.q for state in states]


def test_the_rules_choose_q_without_data():
    for method in ("adaptive", "adaptive ×0.1"):
        assert data_free_q(method, 3) == [0.05, *[pytest.approx(study.settled_q(method, 100))] * 3]
    assert study.settled_q("adaptive", 100) == 1.0
    for method in ("released", "released ×0.1"):  # the last q gives itself: D²/V² = scale·(1/q − 1)²
        *_, q = data_free_q(method, 1000)
        moments = Moments(ADAPTIVE[method].scale * (1 / q - 1) ** 2, 1.0)
        assert optimal_q(moments, CostModel(r=100), m=2).q == pytest.approx(q, abs=1e-3)
        assert q < 1


def test_fom_is_the_start(table):
    fom, exact = (table[table.method == m].groupby("seed") for m in ("FOM", "exact"))
    assert fom.test_cce.nunique().eq(1).all()
    assert (fom.test_cce.first() == exact.test_cce.first()).all()
    assert verdict(table, "FOM", "no cleaning").agrees == "yes"
    assert verdict(table.assign(moved=1.0), "FOM", "no cleaning").agrees == "no"


def test_the_judge_follows_the_table(table):
    words, halves = ("adaptive ×0.1 − exact", "its own γ"), planted(table, "exact", test=50.0)
    for points, agrees in ((52.0, "yes"), (48.0, "no")):
        assert verdict(planted(halves, "adaptive ×0.1", test=points), *words).agrees == agrees
    either = planted(halves, "adaptive ×0.1", test=20.0 * table.seed + 10.0)  # 30 and 70 on the odd seeds
    assert verdict(either, *words).agrees == "inconclusive"
    assert verdict(table.assign(printed_sum=1.0), "printed sum").agrees == "no"
    assert verdict(table.assign(printed_sum=20.0), "printed sum").agrees == "yes"
    for q, agrees in ((study.settled_q("adaptive ×0.1", 5), "yes"), (0.7, "no"), (math.nan, "inconclusive")):
        known = planted(table, "adaptive ×0.1", q=q, d2=1.0)
        assert verdict(known, "q of adaptive ×0.1").agrees == agrees


def times(table, stretch):
    """The table with three γ, and logs where UFOM comes to each validation CE `stretch` times as late as predicted."""
    limit = hypercleaning_cell.budget(5, 2)
    falling = table.assign(validation=1 - table.calls / (3 * limit), d2=0.1, v2=1.0)
    predicted = math.exp(study.log_time_over_exact(falling, "UFOM", TINY)[1])
    falling = planted(falling, "UFOM", validation=1 - table.calls / (3 * limit * stretch * predicted))
    ladder = {9.0: 1.0, 10.0: 0.0, 100.0: 1.0}  # the best γ, 10, is no end
    return pd.concat(
        falling[falling.gamma == 10.0].assign(gamma=gamma, validation=lambda t, up=up: t.validation + up)
        for gamma, up in ladder.items()
    )


def test_the_judge_compares_times(table):
    words = "log time of UFOM"
    assert verdict(times(table, 1.0), words).agrees == "yes"
    assert verdict(times(table, 1.5), words).agrees == "no"
    assert verdict(table, words).agrees == "inconclusive"  # γ is at an end of a grid of two
    late = times(table, 1.0)
    late.loc[late.method == "UFOM", "validation"] = 9.0
    assert verdict(late, words).agrees == "inconclusive"


def test_without_mnist_the_digits_are_taken_and_it_is_said(monkeypatch):
    def absent():
        raise UfomError("train-images is missing")

    monkeypatch.setattr(study, "mnist", absent)
    with pytest.warns(UserWarning, match="train-images is missing; the embedded digits"):
        assert study.present("mnist") == "digits"


def test_a_failed_cell_is_an_error(tmp_path):
    with pytest.raises(UfomError, match=r"cells failed; .*, γ = 1: UfomError: .*inner loop"):
        study.measure(replace(TINY, alpha=1e30, gammas=(1.0,), seeds=2), Store(tmp_path))


def test_figure_caption_and_answer(table, tmp_path):
    table.to_csv(tmp_path / "table.csv", index=False)
    read = pd.read_csv(tmp_path / "table.csv")
    assert [v.agrees for v in study.judge(read, TINY)] == [v.agrees for v in study.judge(table, TINY)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = study.draw(read, TINY)
    (axes,) = figure.axes
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    named = {name for text in axes.texts for name in text.get_text().split(", ")}
    assert named == {"FOM", *hypercleaning_cell.METHODS}
    assert "20 training images" in study.caption(read, TINY)
    assert "| FOM |" in study.caption(read, TINY)
    assert "points of test accuracy at one γ" in study.answer(read, TINY)
