"""The landscape on tiny problems: its gradients against the oracle, exact sums against samples, and its judge."""

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from studies import landscape as study
from studies import landscape_cell as cell
from studies import landscape_problems as problems
from studies.engine.sweep import Store
from studies.landscape_problems import BACKWARD, IMPLICIT, KINDS, PLANNED, Known, Setting
from tests.grids import slow_unless
from tests.oracles import unrolled_gradient
from tests.runtime.conftest import needs_data
from ufom_runtime import EXACT, FOM, UFOM, hypergradient
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.problems.sources import data_folder
from ufom_theory import Moments, Truncated, UfomError
from ufom_theory.two_tasks import second_moment

F64 = torch.float64
MAML = replace(study._MAML, arguments={"dim": 3}, tasks=4, r=4, draws=300)
TUNED = replace(study._TUNED, arguments={"dim": 3}, tasks=4, r=4, draws=300)
CLEANING = replace(study._CLEANING, arguments={"n_train": 8, "n_validation": 8, "hidden": 3}, r=4, draws=20)
SYNTHETIC = replace(study._SYNTHETIC, r=4, draws=50)
OMNIGLOT = replace(study._OMNIGLOT, arguments={"ways": 2, "filters": 2, "alpha": 0.05}, r=2, tasks=2, draws=3)
TINY = study.Config(settings=(SYNTHETIC, MAML, TUNED, replace(TUNED, r=12, limit=60), CLEANING), patience=0.0)
CLOCK = ["seconds", "seconds_sem", "effort_seconds"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return study.measure(TINY, Store(tmp_path_factory.mktemp("cells")))


def row(table, name, method, r=4):
    found = table[(table.name == name) & (table.method == method) & (table.r == r)]
    assert len(found) == 1
    return found.iloc[0]


MEASURED = {}


def known(setting):
    """What is known of a setting, measured once."""
    at = repr(setting)
    return MEASURED.get(at) or MEASURED.setdefault(at, Known.of(setting, *setting.make()))


@pytest.mark.parametrize(
    "setting",
    [SYNTHETIC, MAML, TUNED, CLEANING, pytest.param(OMNIGLOT, marks=[needs_data, pytest.mark.slow])],
    ids=lambda s: s.name,
)
def test_the_means_over_all_outcomes_are_the_oracles_gradients(setting):
    measured = known(setting)
    problem, theta = measured.problem, measured.theta
    oracle, tasks = unrolled_gradient(problem, theta, problem.tasks), Tasks.of(problem.tasks)
    exact = [name for name, kind in KINDS.items() if kind in ("exact", "unbiased") and name != "adaptive-ufom"]
    if len(theta) > 100:
        exact.remove("forward")  # slow, and left out there
    if setting not in (TUNED, CLEANING):
        exact.remove(IMPLICIT)  # θ is not in the inner loss
    for name in exact:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "φ_r is not near")
            method = problems.make_method(name, measured)
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
    assert found["variance"] == pytest.approx(float((tossed - exact.mean(0)).square().sum(1).mean() / unit), rel=0.05)
    d2 = (exact - unrolled_gradient(problem, theta, problem.tasks, 0)).square().sum(1).mean()
    assert found["own"] == pytest.approx(float((1 / 0.3 - 1) * d2 / unit))
    sampled = cell.statistics([(1 / many, x) for x in tossed.view(many, n, -1)], exact, sampled=True)
    for name in ("bias_sq", "variance", "own"):
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
        assert rows.method.tolist() == list(KINDS)
    ran = table[(table.part == "method") & table.refused.isna()]
    assert (ran[["calls", "seconds", "bytes"]] > 0).all(axis=None)
    np.testing.assert_allclose(ran.calls, ran.declared)
    reasons = {
        (MAML.name, "implicit-cg", 4): "free of θ",
        (TUNED.name, "guided-es", 4): "guides nowhere",
        (TUNED.name, "reptile", 4): "must start at θ",
        (TUNED.name, "adaptive-ufom", 4): "along a run",
        (TUNED.name, "recomputed", 12): "left out: ",
        (MAML.name, IMPLICIT, 4): "free of θ",
    }
    for (name, method, r), reason in reasons.items():
        assert reason in row(table, name, method, r).refused
    for method in ("reversible", "reptile"):
        assert np.isnan(row(table, MAML.name, method).bias_sq)
    assert "not near a stationary point" in row(table, TUNED.name, "implicit-cg").note


def test_the_effort_is_what_a_mean_of_n_estimates_costs(table):
    """The mean of N estimates is off by bias² + variance/N: the least such N, by trying."""
    for name in (MAML.name, SYNTHETIC.name, TUNED.name):
        rows = table[(table.name == name) & (table.r == 4) & table.effort.notna()]
        for method in rows.itertuples():
            if method.effort == np.inf or method.draws == method.draws:  # sampled biases are estimates
                continue
            n = method.effort * row(table, name, "stored").calls / method.calls * _n(row(table, name, "stored"))
            assert method.bias_sq + method.variance / n == pytest.approx(0.01) or n == pytest.approx(1)
    assert row(table, MAML.name, "fom").effort == np.inf
    assert row(table, TUNED.name, "fom").effort_seconds == np.inf
    assert row(table, CLEANING.name, "stored").effort == 1


def _n(stored):
    return max(1, stored.variance / 0.01)


def test_a_mean_of_n_estimates_is_as_near_as_it_is_said_to_be():
    """The squared error of means of N tossed estimates on random tasks, measured."""
    problem, theta = MAML.make()
    exact = unrolled_gradient(problem, theta, problem.tasks)
    draws = problems.outcomes(UFOM(0.5), problem, theta)
    found = cell.statistics([(d.probability, d.quick(Tasks.of(problem.tasks))) for d in draws], exact, sampled=False)
    n = math.ceil(cell.averaged(found, eta=0.2)[0])
    generator = torch.Generator().manual_seed(3)
    chosen = torch.randint(len(exact), (4000 * n,), generator=generator)
    tasks = Tasks.of(problem.tasks).take(chosen)
    tossed = hypergradient(problem, theta, tasks, UFOM(0.5), generator=generator, per_task=True)
    off = (tossed.view(4000, n, -1).mean(1) - exact.mean(0)).square().sum(1).mean() / exact.mean(0).square().sum()
    assert n > 5
    assert float(off) == pytest.approx(0.2, rel=0.1)


def test_the_error_of_an_effort_is_that_of_its_variance_and_bias():
    made = {"bias_sq": 0.004, "bias_sq_sem": 0.0, "variance": 3.0, "variance_sem": 0.3}
    assert cell.averaged(made, 0.01) == pytest.approx((500, 50))
    n = [cell.averaged(made | {"bias_sq": 0.004 + x}, 0.01)[0] for x in (-1e-7, 1e-7)]
    slope = (n[1] - n[0]) / 2e-7
    assert cell.averaged(made | {"variance_sem": 0.0, "bias_sq_sem": 1e-4}, 0.01)[1] == pytest.approx(1e-4 * slope)
    assert cell.averaged(made | {"bias_sq": 0.01}, 0.01) == (math.inf, 0.0)
    assert cell.averaged(made | {"bias_sq": -1.0, "variance": 0.002}, 0.01) == (1.0, 0.0)


def test_on_one_task_every_step_is_taken_and_the_row_says_so(table):
    for method in ("ufom", PLANNED, IMPLICIT, "roulette", BACKWARD):
        found = row(table, CLEANING.name, method)
        assert "on one task the exact gradient has no noise" in found.note, method
        assert found.effort >= 1
    assert row(table, CLEANING.name, "ufom").q == 1
    assert "no noise" not in row(table, MAML.name, "ufom").note


def test_the_minimisers_are_stationary_by_the_oracle_and_the_tail_is_their_variance(table):
    for setting in (MAML, TUNED, SYNTHETIC):
        problem, _ = setting.make()
        theta = problems.minimiser(problem)
        rows = unrolled_gradient(problem, theta, problem.tasks)
        assert rows.mean(0).norm() < 1e-12 * rows.norm()
        fom = setting is not TUNED  # there it is zero
        proxy = unrolled_gradient(problem, theta, problem.tasks, 0) if fom else torch.zeros_like(rows)
        found = row(table, setting.name, "ufom")
        second = rows.square().sum(1).mean() + (1 / found.q - 1) * (rows - proxy).square().sum(1).mean()
        assert found["tail"] == pytest.approx(float(second / rows.square().sum(1).mean()) * found.calls / 9)
        assert row(table, setting.name, "stored")["tail"] == 1
    assert problems.minimiser(CLEANING.make()[0]) is None


def test_a_theta_that_is_no_minimiser_is_refused(monkeypatch):
    problem, theta = MAML.make()
    monkeypatch.setattr(cell, "minimiser", lambda problem: theta)
    with pytest.raises(UfomError, match="θ\\* is not the minimiser"):
        cell.tail(problem, {"stored": EXACT})


@pytest.mark.parametrize(
    "setting",
    slow_unless(lambda s: "quadratic" in s.problem, (MAML, TUNED, SYNTHETIC, replace(SYNTHETIC, r=9))),
    ids=lambda s: f"{s.name} {s.r}",
)
def test_probabilities_and_q_are_the_best_of_many(setting):
    """No other q of UFOM, and no other probabilities of the single sample, have a smaller variance times calls."""
    measured = known(setting)
    problem, theta, exact = measured.problem, measured.theta, measured.exact

    def time(method):
        draws = problems.outcomes(method, problem, theta)
        rows = [(d.probability, d.quick(Tasks.of(problem.tasks))) for d in draws]
        calls = method.calls(setting.r)
        variance = cell.statistics(rows, exact, sampled=False)["variance"]
        return variance * (calls.gradients + calls.hessian_vector_products)

    ufom, single = (problems.make_method(name, measured) for name in ("ufom", "single-sample"))
    assert all(time(ufom) <= time(UFOM(q)) * (1 + 1e-9) for q in np.linspace(0.02, 1, 20))
    steps, cuts = np.array(single.horizons), [torch.zeros_like(exact), *measured.cuts]
    squares = np.array([(y - x).square().sum(1).mean().item() for x, y in pairwise(cuts)])
    noise = exact.mean(0).square().sum().item()

    def steps_time(p):
        return ((squares / p).sum(-1) - noise) * (p @ steps)

    others = np.random.default_rng(0).dirichlet(np.ones(len(steps)), 300)
    assert (steps_time(np.array(single.probabilities)) <= steps_time(others) * (1 + 1e-3)).all()


def test_the_planned_members_gains_are_of_efforts(table):
    planned, ufom = (row(table, TUNED.name, method) for method in (PLANNED, "ufom"))
    found = table[(table.part == "family") & (table.name == TUNED.name) & (table.r == 4)]
    best = found[found.memory == problems.memory(4)].iloc[0]
    assert best.gain_paper == pytest.approx(ufom.effort / planned.effort, rel=1e-6)
    assert best.gain_paper > 1
    assert (found.gain_exact >= 1).all()


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
        assert agrees(planted(table, "roulette", law=law, tail=2.0), "exact law", "roulette", where) == verdict
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

    sooner = planted(table, "checkpointed", effort=0.01, states=3)
    assert cells(sooner)[0] == "checkpointed, 0.01×"
    assert cells(sooner)[1] == "checkpointed, 0.01×"
    assert "checkpointed" not in cells(sooner)[2]  # it holds three states
    assert cells(planted(table, "recomputed", effort=0.01))[2] == "recomputed, 0.01×"
    cheap = planted(table, "implicit-neumann", effort=0.25)
    assert cells(cheap)[3] == "implicit-neumann, 0.25× (FOM is off by 100 %)"
    at = (table.name == TUNED.name) & (table.r == 4) & (table.kind == "biased")
    assert cells(table.assign(effort=table.effort.mask(at, np.inf)))[3] == "never (FOM is off by 100 %)"
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
    assert all(axes.get_xlabel() for axes in shown)
    rows = [label.get_text() for label in shown[1].get_yticklabels()]
    efforts = [row(table, MAML.name, name).effort for name in ("stored", "recomputed")]
    assert efforts[0] < efforts[1]
    assert rows.index("stored, 4") < rows.index("recomputed, 1")
    off = 100 * row(table, MAML.name, "fom").bias_sq ** 0.5
    assert f"never: off by {off:.0f} %" in [text.get_text() for text in shown[1].texts]
    assert f"{TUNED.name}, r = 12, 5 states" in study.caption(read)
    assert "FOM never gets there on" in study.answer(read)
    assert "of 5 cases" in study.answer(read)


def test_a_failed_cell_is_an_error(tmp_path):
    broken = Setting("broken", "quadratic", 4, {"alpha": 2.0}, tasks=2)
    with pytest.raises(UfomError, match="1 cells failed; broken: UfomError: alpha = 2"):
        study.measure(replace(TINY, settings=(broken,)), Store(tmp_path))


def test_nothing_is_debiased_where_the_proxy_is_exact():
    measured = known(MAML)
    perfect = replace(measured, moments={proxy: Moments(0.0, m.v2) for proxy, m in measured.moments.items()})
    for name in ("ufom", BACKWARD):
        with pytest.raises(UfomError, match="there is nothing to debias"):
            problems.make_method(name, perfect)
    assert problems.outcomes(FOM, measured.problem, measured.theta)[0].probability == 1
    assert Truncated(0) in measured.moments


def test_sizes_are_consistent():
    for config in study.SIZES.values():
        for setting in config.settings:
            assert setting.problem in problems.MAKERS
            assert not setting.law or setting.problem == "quadratic"
    assert {s.r for s in study.SIZES["standard"].settings} == {10, 100}
