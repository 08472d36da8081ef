"""The study at a tiny size: its gradients against the oracle, and a judge that can say no."""

import math
import warnings

import pandas as pd
import pytest
import torch

from studies import few_shot as study
from studies import few_shot_cell
from studies.engine.sweep import Store
from tests.oracles import unrolled_gradient
from ufom_runtime import EXACT, FOM, hypergradient
from ufom_theory import UfomError

TINY = few_shot_cell.Config((("digits", 2),), 2, 0.05, 1e-3, 2, 2, 4, 4, 2, 1, r=2)
CELLS = list(study._cells(TINY, [("digits", 2)]))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return study.measure(TINY, Store(tmp_path_factory.mktemp("cells")))


def verdict(table, *words):
    return next(v for v in study.judge(table, TINY) if all(word in v.subject for word in words))


def planted(table, method, **columns):
    return table.assign(**{c: table[c].mask(table.method == method, value) for c, value in columns.items()})


@pytest.fixture(scope="module")
def gradients():
    """The problem, θ, tasks, and by the oracle the mean exact and first-order gradients and the tasks' differences."""
    problem = few_shot_cell.make_problem(CELLS[0])
    tasks = problem.sample(4, torch.Generator().manual_seed(0))
    exact, first = (unrolled_gradient(problem, problem.initial, tasks, kept) for kept in (None, 0))
    return problem, problem.initial, tasks, exact, first


def test_hypergradients_are_the_oracles(gradients):
    problem, theta, tasks, exact, first = gradients
    for estimator, expected in ((EXACT, exact), (FOM, first)):
        found = hypergradient(problem, theta, tasks, estimator, per_task=True)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_agreement_is_the_oracles(gradients):
    problem, theta, tasks, exact, first = gradients
    truth = exact.mean(0)
    found = few_shot_cell.agreement(problem, theta, tasks, "FOM", 0.0, 0)
    assert found["error"] == pytest.approx(float((first.mean(0) - truth).norm() / truth.norm()), rel=1e-3)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(first.mean(0), truth, dim=0)), rel=1e-3)
    assert found["end_d2"] == pytest.approx(float((exact - first).square().sum(1).mean()), rel=1e-3)
    for method in ("exact", "adaptive"):
        assert few_shot_cell.agreement(problem, theta, tasks, method, 1.0, 0)["error"] < 1e-5
    ufom = few_shot_cell.agreement(problem, theta, tasks, "UFOM", 0.2, 0)
    assert 0 < ufom["expected_error"] == pytest.approx(ufom["error"], rel=0.3)


@pytest.mark.parametrize("method", ["adaptive ×0.1", "UFOM"])
def test_same_cell_same_rows(table, method):
    (cell,) = (cell for cell in CELLS if (cell["method"], cell["seed"]) == (method, 0))
    rows = table[(table.method == method) & (table.seed == 0)]
    again = pd.DataFrame(few_shot_cell.run_cell(cell))
    pd.testing.assert_frame_equal(rows[again.columns].reset_index(drop=True), again, check_dtype=False)


def test_every_run_spends_the_budget(table):
    assert study._limit(TINY) == 2 * 2 * 6  # r = 2: 3 gradients, 1 again, 2 products
    spent = table.groupby(["method", "seed"]).calls.last()
    assert (spent >= study._limit(TINY)).all()
    assert (spent.loc["exact"] == study._limit(TINY)).all()


def test_the_judge_follows_the_table(table):
    words, halves = "adaptive ×0.1 − exact", planted(table, "exact", accuracy=50.0)
    for accuracy, agrees in ((52.0, "yes"), (48.0, "no")):
        assert verdict(planted(halves, "adaptive ×0.1", accuracy=accuracy), words).agrees == agrees
    either = planted(halves, "adaptive ×0.1", accuracy=50.0 * table.seed)
    assert verdict(either, words).agrees == "inconclusive"
    for error, agrees in ((1.0, "yes"), (2.0, "no")):
        assert verdict(table.assign(error=error, expected_error=1.0), "variance").agrees == agrees
    assert verdict(table.assign(expected_error=0.0), "variance").agrees == "inconclusive"
    for error, agrees in ((0.5, "yes"), (0.01, "no")):
        assert verdict(table.assign(error=error), "relative error of FOM's mean gradient").agrees == agrees
    for q, agrees in ((0.5, "yes"), (0.9, "no"), (0.25 + 0.25 * table.seed, "inconclusive")):
        assert verdict(planted(table.assign(end_q=0.5), "released", q=q), "local q*, released").agrees == agrees


def test_absent_data_are_skipped_loudly(monkeypatch, tmp_path):
    def absent():
        raise UfomError("cifar-100-python.tar.gz is missing")

    monkeypatch.setattr(study, "cifar100", absent)
    with pytest.warns(UserWarning, match="cifar100 is skipped: cifar-100-python.tar.gz is missing"):
        assert not study._is_there("cifar100")
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(UfomError, match="none of the data"):
        study.measure(few_shot_cell.Config((("cifar100", 20),), 2, 0.05, 1e-3, 2, 2, 4, 4, 3, 2, r=3), Store(tmp_path))


def test_figure_caption_and_answer(table, tmp_path):
    table.to_csv(tmp_path / "table.csv", index=False)
    read = pd.read_csv(tmp_path / "table.csv")
    assert [v.agrees for v in study.judge(read, TINY)] == [v.agrees for v in study.judge(table, TINY)]
    two = pd.concat([read, read.assign(ways=4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = study.draw(two, TINY)
    assert len(figure.axes) == 2
    assert all(a.get_xlabel() and a.get_ylabel() and a.get_title() for a in figure.axes)
    assert "2 seeds" in study.caption(read, TINY)
    assert "| FOM, digits, 2 ways |" in study.caption(read, TINY)
    assert "at equal calls" in study.answer(read, TINY)
    assert math.isfinite(read.cosine.min())


def test_papers_size_is_the_papers():
    paper = few_shot_cell.SIZES["paper"]
    assert set(paper.settings) == set(study.PAPER_TABLE)
    assert (paper.r, paper.filters) == (10, 64)
    assert len(list(study._cells(paper, [*paper.settings]))) == 4 * paper.seeds * len(few_shot_cell.METHODS)
