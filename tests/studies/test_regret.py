"""The study on a tiny configuration: its gradients against the oracle, its exact law against the runtime, its judge."""

import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch

from studies import regret as study
from studies import regret_cell
from studies.engine.sweep import Store
from tests.oracles import unrolled_gradient
from tests.runtime.conftest import needs_data
from ufom_runtime import UFOM, Estimator, hypergradient
from ufom_runtime.problems.sources import data_folder
from ufom_theory import CostModel, Sweep, Truncated, UfomError

F64 = torch.float64
QUADRATIC = replace(study._quadratic(0.02, 30), arguments={"dim": 4, "alpha": 0.05, "r": 4})
CLEANING = replace(
    study._CLEANING, arguments={"n_train": 12, "n_validation": 12, "hidden": 3, "r": 4}, proxy=2, steps=4, every=2
)
OMNIGLOT = replace(study._OMNIGLOT, arguments={"ways": 2, "filters": 2, "r": 2, "alpha": 0.05}, steps=4, tasks=4)
TINY = study.Config(settings=(QUADRATIC, CLEANING), grid=(0.3,), seeds=4, budget=2.0)
CLOCK = ["c1", "c2", "seconds"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return study.measure(TINY, Store(tmp_path_factory.mktemp("cells")))


@pytest.mark.parametrize(
    "setting", [QUADRATIC, CLEANING, pytest.param(OMNIGLOT, marks=needs_data)], ids=lambda s: s.name
)
def test_the_gradients_that_are_run_agree_with_the_oracle(setting):
    in_double = {} if setting.problem == "quadratic" else {"dtype": F64}
    problem = regret_cell.MAKERS[setting.problem](**setting.arguments, **in_double)
    tasks = problem.sample(3, torch.Generator().manual_seed(0))
    theta = problem.initial
    exact, kept = unrolled_gradient(problem, theta, tasks), unrolled_gradient(problem, theta, tasks, setting.proxy)
    coins = torch.tensor([True, False, True])
    estimator = UFOM(0.3, Sweep.stored(), Truncated(setting.proxy))
    found = hypergradient(problem, theta, tasks, estimator, coins=coins, per_task=True)
    torch.testing.assert_close(found, kept + coins[:, None].double() / 0.3 * (exact - kept), rtol=1e-8, atol=1e-10)
    if setting.problem != "quadratic":
        loss = regret_cell.evaluate(problem, theta, tasks if problem.tasks is None else problem.tasks)
        mean = exact.mean(0)
        assert loss == pytest.approx(float(mean @ mean) if problem.tasks is not None else _outer_loss(problem, tasks))


def _outer_loss(problem, tasks):
    """M by autograd's loop, one task at a time."""
    losses = []
    for i in range(len(tasks[0])):
        task, phi = tuple(t[i] for t in tasks), problem.initial.clone().requires_grad_()
        for alpha in problem.alphas:
            (slope,) = torch.autograd.grad(problem.inner_loss(problem.initial, phi, task), phi)
            phi = (phi - alpha * slope).detach().requires_grad_()
        losses.append(problem.outer_loss(problem.initial, phi.detach(), task).item())
    return np.mean(losses)


@pytest.mark.parametrize(("q", "proxy"), [(0.0, 0), (0.0, 2), (0.4, 0), (0.4, 2), (1.0, 0)])
def test_the_exact_law_of_a_quadratic_is_what_the_runtimes_gradients_do(q, proxy):
    setting = replace(QUADRATIC, gamma=0.5, proxy=proxy)
    problem = setting.make()
    n = 4000
    theta, generator = problem.initial, torch.Generator().manual_seed(1)
    _, basis = torch.linalg.eigh(problem.hessian)
    (_, _), (expected, _) = regret_cell.quadratic_run(setting, problem, q, ((basis.T @ theta) ** 2).numpy(), 1)
    g = hypergradient(
        problem, theta, problem.sample(n, generator), Estimator(q, proxy=Truncated(proxy)), generator=generator,
        per_task=True,
    )  # fmt: skip
    after = theta - setting.outer_step_size(1) * g
    found = (after @ problem._maps()[1]).square().sum(1)
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / math.sqrt(n)
    assert float(found.std()) / math.sqrt(n) < 0.03 * expected


def test_the_moments_of_a_quadratics_pilot_are_the_closed_form():
    problem = QUADRATIC.make()
    proxy, exact = regret_cell.slopes(QUADRATIC, problem)
    _, (first, *_) = regret_cell.quadratic_pilot(QUADRATIC, problem)
    _, basis = torch.linalg.eigh(problem.hessian)
    known = problem.moments(basis.sum(1))  # every coordinate of the eigenbasis is 1, as E θ_0² is
    assert (first.d2, first.v2) == pytest.approx((known.d2, known.v2))
    assert first.mean_gradient_sq == pytest.approx(known.mean_gradient_sq)
    assert (proxy > exact).all()


def test_steps_are_interpolated_in_the_logarithm():
    assert regret_cell.steps_to(1e-2, np.array([1.0, 1e-1, 1e-3]), every=4) == pytest.approx(6.0)
    assert regret_cell.steps_to(2.0, np.array([1.0, 0.1]), every=4) == 0
    assert regret_cell.steps_to(1e-2, np.array([1.0, 0.1]), every=4) is None


def test_same_config_same_table(table, tmp_path):
    again = study.measure(TINY, Store(tmp_path))
    pd.testing.assert_frame_equal(table.drop(columns=CLOCK), again.drop(columns=CLOCK))


def test_the_grid_holds_every_readings_q_and_time_is_charged_by_the_recomputed_sweep(table):
    for _, runs in table.groupby("name"):
        predicted = [runs[f"q: {r}"].iloc[0] for r in regret_cell.READINGS]
        assert {0.0, 0.3, 1.0, *predicted, min(predicted) / 2} == set(runs.q)
    row = table[(table.name == CLEANING.name) & (table.q == 0.3)].iloc[0]
    cost = CostModel(r=4, proxy=Truncated(2))
    assert row.calls == pytest.approx(row.steps * (cost.c_det + 0.3 * cost.c_rnd))
    assert (table.steps > 0).all()


def test_missing_data_are_left_out_loudly(table, tmp_path, monkeypatch):
    monkeypatch.delenv("UFOM_DATA", raising=False)
    monkeypatch.setitem(study.LOADERS, "omniglot", data_folder)  # what is loaded already stays loaded
    with pytest.warns(UserWarning, match="few-shot, Omniglot is left out: UFOM_DATA is not set"):
        found = study.measure(replace(TINY, settings=(OMNIGLOT, CLEANING)), Store(tmp_path))
    assert "Left out: few-shot, Omniglot" in study.answer(found)
    assert "few-shot, Omniglot was left out: UFOM_DATA is not set" in study.caption(found)
    assert {v.subject.rpartition(", hyper")[1] for v in study.judge(found)} == {", hyper"}


@needs_data
def test_few_shot_runs_to_its_budget_or_to_delta():
    problem, cell = OMNIGLOT.make(), {"setting": asdict(OMNIGLOT), "q": 1.0, "seeds": 1, "budget": 2.0}
    precision, moments = regret_cell.sampled_pilot(OMNIGLOT, problem)
    assert len(precision) == 1 + OMNIGLOT.steps // OMNIGLOT.every
    assert all(m.v2 > m.d2 > 0 for m in moments)
    (found,) = regret_cell.run({**cell, "delta": 1e-9})
    assert (found["steps"], found["reached"]) == (8, False)
    (found,) = regret_cell.run({**cell, "delta": 1e9})
    assert (found["steps"], found["reached"]) == (0, True)


def test_a_pilot_that_comes_no_closer_is_refused():
    with pytest.raises(UfomError, match="above its start: take another γ"):
        regret_cell.pilot({"setting": asdict(replace(QUADRATIC, gamma=3.9, delay=10_000))})


def test_a_run_that_diverges_is_charged_its_budget_and_says_why():
    wild = asdict(replace(CLEANING, gamma=1e42))
    (found, *_) = regret_cell.run({"setting": wild, "q": 0.01, "delta": 1e-30, "seeds": 1, "budget": 2.0})
    assert not found["reached"]
    assert "not finite" in found["ended"]


def planted(times, unreached=()):
    """A table of one problem: log-times by q, with a little noise common to the seeds' halves."""
    noise = np.random.default_rng(0).normal(0, 0.01, (16, len(times)))
    rows = [
        {"name": "planted", "q": q, "seed": seed, "reached": q not in unreached, "r": 10, "proxy": 0, "batch": 1,
         "delta": 0.1, "device": "cpu", "calls": math.exp(t + noise[seed, i]), "seconds": math.exp(t + noise[seed, i])}
        for i, (q, t) in enumerate(times.items()) for seed in range(16)
    ]  # fmt: skip
    readings = dict(zip(regret_cell.READINGS, (0.2, 0.4, 0.1, 1.0), strict=True))
    return pd.DataFrame(rows).assign(skipped=np.nan, **{f"q: {r}": q for r, q in readings.items()})


def agrees(table):
    return [v.agrees for v in study.judge(table)[:4]]


def test_the_judge_on_planted_times():
    times = {0.0: 3.0, 0.1: 1.0, 0.2: 0.0, 0.4: 0.02, 1.0: 0.5}
    assert agrees(planted(times)) == ["yes", "yes", "no", "no"]
    found = study.regrets(planted(times)).query("unit == 'calls' and strategy == 'q = 1'").iloc[0]
    assert found.best == 0.2
    assert found.regret == pytest.approx(math.exp(0.5), rel=0.02)
    edge = {0.0: 3.0, 0.1: 0.0, 0.2: 0.01, 0.4: 1.0, 1.0: 1.0}
    assert agrees(planted(edge)) == ["inconclusive", "no", "inconclusive", "no"]  # the best is the grid's smallest
    assert agrees(planted(times, unreached=(0.2,))) == ["inconclusive"] * 4
    wide = planted(times)
    wide["calls"] *= np.exp(np.random.default_rng(1).normal(0, 1, len(wide)))
    assert set(agrees(wide)[1:3]) == {"inconclusive"}


def test_the_figure_has_labelled_axes(table):
    figure = study.draw(table)
    top, *below = figure.axes
    assert len(below) == 2
    assert top.get_ylabel()
    assert figure.legends
    assert [axes.get_xlabel() for axes in below] == ["probability $q$"] * 2
    assert "4 seeds" in study.caption(table)
    assert "Greatest regret" in study.answer(table)


def test_sizes_are_consistent():
    for config in study.SIZES.values():
        for setting in config.settings:
            assert setting.problem in regret_cell.MAKERS
            assert setting.steps % setting.every == 0
            assert (setting.tasks > 0) == (setting.problem == "omniglot")
    assert study.SIZES["standard"].seeds >= 8
