"""The landscape on tiny problems: its gradients against the oracle, exact sums against samples, and its judge."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from studies import landscape as study
from studies import landscape_cell as cell
from studies import landscape_problems as problems
from studies.engine.sweep import Store
from studies.landscape_problems import PLANNED, Setting
from tests.oracles import unrolled_gradient
from tests.runtime.conftest import needs_data
from ufom_runtime import EXACT, FOM, UFOM, hypergradient
from ufom_runtime.measure.moments import moments_by_proxy
from ufom_runtime.methods import METHODS, Telescoping
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.problems.sources import data_folder
from ufom_theory import UfomError
from ufom_theory.two_tasks import second_moment

F64 = torch.float64
MAML = replace(study._MAML, arguments={"dim": 3}, tasks=4, r=4, draws=300)
TUNED = replace(study._TUNED, arguments={"dim": 3}, tasks=4, r=4, draws=300)
CLEANING = replace(study._CLEANING, arguments={"n_train": 8, "n_validation": 8, "hidden": 3}, r=4, draws=20)
SYNTHETIC = replace(study._SYNTHETIC, r=4, draws=50)
OMNIGLOT = replace(study._OMNIGLOT, arguments={"ways": 2, "filters": 2, "alpha": 0.05}, r=2, tasks=2, draws=3)
TINY = study.Config(settings=(SYNTHETIC, MAML, TUNED, replace(TUNED, r=12, limit=60), CLEANING), patience=0.0)
CLOCK = ["seconds", "seconds_sem"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return study.measure(TINY, Store(tmp_path_factory.mktemp("cells")))


def row(table, name, method, r=4):
    found = table[(table.name == name) & (table.method == method) & (table.r == r)]
    assert len(found) == 1
    return found.iloc[0]


def moments(setting):
    problem, theta = setting.make()
    return problem, theta, dict(moments_by_proxy(problem, theta, proxies=problems.proxies(setting.r)))


@pytest.mark.parametrize(
    "setting",
    [SYNTHETIC, MAML, TUNED, CLEANING, pytest.param(OMNIGLOT, marks=[needs_data, pytest.mark.slow])],
    ids=lambda s: s.name,
)
def test_the_means_over_all_outcomes_are_the_oracles_gradients(setting):
    problem, theta, measured = moments(setting)
    oracle, tasks = unrolled_gradient(problem, theta, problem.tasks), Tasks.of(problem.tasks)
    exact = [name for name, entry in METHODS.items() if entry.kind in ("exact", "unbiased") and name != "adaptive-ufom"]
    if len(theta) > 100:
        exact.remove("forward")  # slow, and left out there
    for name in exact:
        method = problems.make_method(name, setting, problem, theta, measured)
        draws = problems.outcomes(method, problem, theta)
        assert sum(d.probability for d in draws) == pytest.approx(1)
        for way in ("run", "quick"):
            mean = sum(d.probability * getattr(d, way)(tasks) for d in draws)
            torch.testing.assert_close(mean, oracle, rtol=1e-8, atol=1e-11)


def test_the_tuned_quadratics_gradient_is_its_closed_form():
    problem, theta = TUNED.make()
    hessian = quadratic(3).hessian
    product = torch.linalg.matrix_power(torch.eye(3, dtype=F64) - 0.3 * hessian, 4)
    map_ = torch.eye(3, dtype=F64) - product
    wanted = map_ @ hessian @ (map_ @ theta - problem.tasks.mean(0))
    torch.testing.assert_close(hypergradient(problem, theta, problem.tasks, EXACT), wanted)


def test_statistics_of_a_coin_are_those_of_many_tosses():
    problem, theta = MAML.make()
    exact = unrolled_gradient(problem, theta, problem.tasks)
    draws = problems.outcomes(UFOM(0.3), problem, theta)
    found = cell.statistics([(d.probability, d.quick(Tasks.of(problem.tasks))) for d in draws], exact, sampled=False)
    many, n = 20_000, len(exact)
    chosen = torch.arange(n).repeat(many)
    tossed = hypergradient(
        problem,
        theta,
        Tasks.of(problem.tasks).take(chosen),
        UFOM(0.3),
        generator=torch.Generator().manual_seed(5),
        per_task=True,
    )
    unit = exact.mean(0).square().sum()
    assert found["second"] == pytest.approx(float(tossed.square().sum(1).mean() / unit), rel=0.05)
    assert found["variance"] == pytest.approx(float((tossed - exact.mean(0)).square().sum(1).mean() / unit), rel=0.05)
    d2 = (exact - unrolled_gradient(problem, theta, problem.tasks, 0)).square().sum(1).mean()
    assert found["own"] == pytest.approx(float((1 / 0.3 - 1) * d2 / unit))
    sampled = cell.statistics([(1 / many, x) for x in tossed.view(many, n, -1)], exact, sampled=True)
    for name in ("bias_sq", "second", "variance", "own"):
        assert abs(sampled[name] - found[name]) < 4 * sampled[f"{name}_sem"]
        assert 0 < sampled[f"{name}_sem"] < 0.1


def test_the_bias_of_a_biased_method_is_the_oracles(table):
    problem, theta = MAML.make()
    exact, first = (unrolled_gradient(problem, theta, problem.tasks, kept).mean(0) for kept in (None, 0))
    wanted = float((first - exact).square().sum() / exact.square().sum())
    assert row(table, MAML.name, "fom").bias_sq == pytest.approx(wanted)
    assert row(table, TUNED.name, "fom").bias_sq == pytest.approx(1.0)  # it is identically zero


def test_every_method_has_a_row_and_a_reason_where_it_is_not_valid(table):
    for _, rows in table[table.part == "method"].groupby(["name", "r"]):
        assert rows.method.tolist() == list(METHODS)
    ran = table[(table.part == "method") & table.refused.isna()]
    assert (ran[["calls", "seconds", "bytes"]] > 0).all(axis=None)
    np.testing.assert_allclose(ran.calls, ran.declared)
    reasons = {
        (MAML.name, "implicit-cg", 4): "free of θ",
        (TUNED.name, "guided-es", 4): "guides nowhere",
        (TUNED.name, "reptile", 4): "must start at θ",
        (TUNED.name, "adaptive-ufom", 4): "along a run",
        (TUNED.name, "recomputed", 12): "left out: 80 calls",
    }
    for (name, method, r), reason in reasons.items():
        assert reason in row(table, name, method, r).refused
    for method in ("reversible", "reptile"):
        assert np.isnan(row(table, MAML.name, method).bias_sq)
    assert "not near a stationary point" in row(table, TUNED.name, "implicit-cg").note


def test_time_is_second_moment_times_calls(table):
    stored, planned = (row(table, TUNED.name, method) for method in ("stored", PLANNED))
    assert stored.time == 1
    assert stored.error == pytest.approx(0.1)
    assert planned.time == pytest.approx(planned.second * planned.calls / (stored.second * stored.calls))
    found = table[(table.part == "family") & (table.name == TUNED.name) & (table.r == 4)]
    exact = row(table, TUNED.name, "recomputed").time, row(table, TUNED.name, "ufom").time
    best = found[found.memory == problems.memory(4)].iloc[0]
    assert best.gain_paper == pytest.approx(exact[1] / planned.time, rel=1e-6)
    assert best.gain_paper > 1
    assert (found.gain_exact >= 1).all()
    assert exact[1] <= exact[0] * (1 + 1e-9)


def test_the_exact_law_is_outer_sgd_on_the_quadratic():
    """E‖∇M(θ_2)‖² by enumerating the tasks and the coins of two steps, against the recursion's own numbers."""
    problem, theta = MAML.make()
    _, basis = torch.linalg.eigh(problem.hessian)
    q, gammas = 0.4, (0.2, 0.1)
    proxy, exact = ((basis.T @ m @ basis).diagonal() for m in _maps(problem))
    points = [(1.0, theta)]
    for gamma in gammas:
        points = [
            (p * chance / len(problem.tasks), at - gamma * (basis * slope) @ basis.T @ (at - c))
            for p, at in points
            for c in problem.tasks
            for chance, slope in ((1 - q, proxy), (q, proxy + (exact - proxy) / q))
        ]
    centre = problem.tasks.mean(0)
    wanted = sum(p * float((exact * (basis.T @ (at - centre))).square().sum()) for p, at in points)
    square = (basis.T @ (theta - centre)).square().numpy()
    spread = (problem.tasks @ basis).var(0, correction=0).numpy()
    second = ((1 - q) * proxy**2 + q * (proxy + (exact - proxy) / q) ** 2).numpy()
    for gamma in gammas:
        square = second_moment(square, gamma, exact.numpy(), second, second * spread)
    assert float(exact.numpy() ** 2 @ square) == pytest.approx(wanted)


def _maps(problem):
    product = torch.linalg.matrix_power(torch.eye(3, dtype=F64) - problem.alphas[0] * problem.hessian, problem.r)
    return problem.hessian @ product, product @ problem.hessian @ product


def test_same_config_same_table(table, tmp_path):
    config = replace(TINY, settings=TINY.settings[1:2])
    again = study.measure(config, Store(tmp_path))
    same = table[table.name.isin([s.name for s in config.settings]) & (table.r == 4)].reset_index(drop=True)
    pd.testing.assert_frame_equal(same.drop(columns=CLOCK), again.drop(columns=CLOCK), check_dtype=False)


def test_missing_data_are_left_out_loudly(table, tmp_path, monkeypatch):
    monkeypatch.delenv("UFOM_DATA", raising=False)
    monkeypatch.setitem(study.LOADERS, "omniglot", data_folder)
    with pytest.warns(UserWarning, match="few-shot, Omniglot, r = 2 is left out: UFOM_DATA is not set"):
        found = study.measure(replace(TINY, settings=(OMNIGLOT, SYNTHETIC)), Store(tmp_path))
    assert "Left out: few-shot, Omniglot, r = 2" in study.answer(found)
    assert "few-shot, Omniglot, r = 2 was left out" in study.caption(found)
    assert not any("Omniglot" in v.subject for v in study.judge(found))


def agrees(table, *words):
    (found,) = (v for v in study.judge(table) if all(word in v.subject for word in words))
    return found.agrees


def planted(table, method, **columns):
    at = (table.name == TUNED.name) & (table.r == 4) & (table.method == method)
    assert at.sum() == 1
    return table.assign(**{name: table[name].mask(at, value) for name, value in columns.items()})


def test_the_judge_on_planted_tables(table):
    where = f"{TUNED.name}, r = 4"
    assert agrees(table, "largest bias", where) == "yes"
    for method in ("roulette", "stored", PLANNED):
        assert agrees(planted(table, method, bias_sq=1e-6), "largest bias", where) == "no"
    assert agrees(planted(table, "recomputed", difference=1e-3), "largest bias", where) == "no"
    assert agrees(planted(table, "fom", bias_sq=0.5), "largest bias", where) == "yes"  # it is biased, and known to be
    assert agrees(planted(table, "implicit-cg", calls=1000.0), "counted calls", where) == "no"
    for value, sem, verdict in ((0.001, 1e-4, "yes"), (0.02, 1e-4, "no"), (0.001, 0.1, "inconclusive")):
        assert agrees(planted(table, "es", bias_sq=value, bias_sq_sem=sem), "squared bias of es", where) == verdict
    for law, verdict in ((2.1, "yes"), (3.0, "no"), (np.inf, "no")):
        assert agrees(planted(table, "roulette", law=law, time=2.0), "exact law", "roulette", where) == verdict
    for bias, verdict in ((1e9, "yes"), (1e-20, "no")):
        assert agrees(planted(table, "implicit-cg", bias_sq=bias), "bias of implicit-cg over", TUNED.name) == verdict
    at = (table.name == TUNED.name) & (table.part == "family")
    for gain, verdict in ((1.5, "yes"), (1.05, "no")):
        poorer = table.assign(gain_exact=table.gain_exact.mask(at, gain))
        assert agrees(poorer, "over exact with checkpoints", where) == verdict
        assert agrees(table.assign(gain_paper=table.gain_paper.mask(at, gain)), "the paper's UFOM", where) == verdict


def test_the_guide_follows_the_table(table):
    def cells(table, name=f"{TUNED.name}, r = 4"):
        (line,) = (line for line in study.guide(table).splitlines() if line.startswith(f"| {name} |"))
        return [cell.strip() for cell in line.split("|")[2:-1]]

    sooner = planted(table, "checkpointed", time=0.01, states=3)
    assert cells(sooner)[0] == "checkpointed, 0.01×"
    assert cells(sooner)[1].startswith("checkpointed, 0.01×")
    assert "checkpointed" not in cells(sooner)[2]  # it holds three states
    assert cells(planted(table, "recomputed", time=0.01))[2] == "recomputed, 0.01×"
    cheap = planted(table, "implicit-neumann", bias_sq=0.0025, calls=2.0)
    assert cells(cheap)[3] == "implicit-neumann: 2 calls, not 9; bias 5 %"
    assert cells(sooner)[0] in study.page(sooner)
    assert study.guide(cheap) in study.caption(cheap)


def test_figure_caption_and_answer(table, tmp_path):
    table.to_csv(tmp_path / "table.csv", index=False)
    read = pd.read_csv(tmp_path / "table.csv")
    assert [v.agrees for v in study.judge(read)] == [v.agrees for v in study.judge(table)]
    figure = study.draw(read)
    shown = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in shown] == [
        "synthetic pair, r = 4", "quadratic, MAML, r = 4", "quadratic, hyperparameters, r = 12",
        "hypercleaning, digits, r = 4",
    ]  # fmt: skip
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.texts for axes in shown)
    assert f"{TUNED.name}, r = 12, 5 states" in study.caption(read)
    assert "as quick as the paper's UFOM" in study.answer(read)
    assert "of 5 cases" in study.answer(read)


def test_a_failed_cell_is_an_error(tmp_path):
    broken = Setting("broken", "quadratic", 4, {"alpha": 2.0}, tasks=2)
    with pytest.raises(UfomError, match="1 cells failed; broken: UfomError: alpha = 2"):
        study.measure(replace(TINY, settings=(broken,)), Store(tmp_path))


def test_nothing_is_debiased_where_the_proxy_is_exact():
    problem, theta, measured = moments(MAML)
    known = {proxy: replace(m, d2=0.0, cross=None, proxy_sq=None) for proxy, m in measured.items()}
    with pytest.raises(UfomError, match="the proxy is exact"):
        problems.make_method("ufom", MAML, problem, theta, known)
    assert problems.outcomes(FOM, problem, theta)[0].probability == 1
    assert isinstance(problems.make_method("roulette", MAML, problem, theta, measured), Telescoping)


def test_sizes_are_consistent():
    for config in study.SIZES.values():
        for setting in config.settings:
            assert setting.problem in problems.MAKERS
            assert not setting.law or setting.problem == "quadratic"
    assert {s.r for s in study.SIZES["standard"].settings} == {10, 100, 1000}
