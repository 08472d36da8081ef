"""Sinusoid regression on tiny nets: the stacked runs against the library, and a judge that can say no."""

import numpy as np
import pytest
import torch

from studies import sinusoid as study
from studies import sinusoid_cell as cell
from studies.engine.sweep import Store
from ufom_runtime import EXACT, FOM, AdaptiveUFOM, hypergradient
from ufom_runtime.problems.sinusoid import sinusoid
from ufom_theory import CostModel

TINY = study.Config(settings=((3, 2),), grid=(0.3,), seeds=4, steps=12, width=4, test=6, records=4)


@pytest.fixture(scope="module")
def problem():
    made = sinusoid(shots=3, r=3, alpha=0.05, width=4, seed=2)
    return made, made.sample(4, torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return study.measure(TINY, Store(tmp_path_factory.mktemp("cells")))


def test_stacked_gradients_are_the_librarys(problem):
    made, tasks = problem
    states = cell.inner_loop(made.initial.expand(4, -1), tasks, 3, 0.05, 4)
    proxy = cell.gradient(states[-1], tasks[2], tasks[3], 4)
    exact = cell.backward(states, proxy, tasks, 0.05, 4)
    for found, estimator in ((proxy, FOM), (exact, EXACT)):
        wanted = hypergradient(made, made.initial, tasks, estimator, per_task=True)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", study.RULES)
def test_stacked_rules_are_the_librarys(problem, method):
    made, _ = problem
    cost = CostModel(r=3, as_printed=True)
    rule = AdaptiveUFOM(cost=cost) if method == "adaptive" else AdaptiveUFOM(law="step", outer="adam:0.01", cost=cost)
    ours, theta, state = cell.rule_of(method, 1, 3, 0.01), made.initial.clone(), rule.begin()
    generator = torch.Generator().manual_seed(1)
    ours.q, ours.c = ours.q.double(), ours.c.double()
    for _ in range(9):
        tasks = made.sample(4, generator)
        coins = torch.rand(4, generator=generator) < float(ours.q)
        estimate = cell._step(
            theta[None], tasks, coins[None], {"alpha": 0.05, "width": 4, "r": 3, "seeds": [0]}, [ours]
        )
        wanted = rule.direction(made, theta, tasks, state, coins)
        torch.testing.assert_close(estimate[0], wanted.value, rtol=1e-5, atol=1e-7)  # q may be kept in float32
        theta, state = theta - 0.02 * estimate[0], wanted.state
        assert float(ours.q) == pytest.approx(state[0], rel=1e-6)


def test_every_run_is_in_the_table_and_charged_what_it_took(table):
    last = table[table.step == TINY.steps]
    assert last.groupby("method").size().to_dict() == dict.fromkeys(["FOM", "UFOM 0.3", "exact", *study.RULES], 4)
    calls = study.charged(last, 2, "recomputed", TINY.batch)
    assert set(calls[last.method == "FOM"]) == {12 * 4 * 3}
    assert set(calls[last.method == "exact"]) == {12 * 4 * 6}
    assert last[["gradient_sq", "d2", "v2"]].notna().all(axis=None)


def test_the_judge_says_no_and_yes_to_planted_losses(table):
    planted = table.assign(
        loss=table.method.map({"FOM": 1.0, "exact": 2.0, "UFOM 0.3": 4.0}).fillna(1.5) + 0.01 / table.step
    )
    found = {v.subject: v.agrees for v in study.judge(planted, TINY)}
    assert found["log loss of FOM over exact after equal steps, K = 3, r = 2"] == "no"
    at = "at equal calls, stored, K = 3, r = 2"
    assert found[f"log loss of UFOM at the grid's best q over exact {at}"] == "no"
    assert found[f"log loss of adaptive over exact {at}"] == "yes"
    assert found[f"log loss of adaptive over FOM {at}"] == "no"
    equal = study.at_equal_calls(planted, 2, "stored", TINY)
    np.testing.assert_allclose(equal["UFOM 0.3"], np.log(4.0), atol=0.01)


def test_figure_and_caption_say_their_sizes(table):
    figure = study.draw(table, TINY)
    assert all(axes.get_xlabel() and axes.get_title() for axes in figure.axes)
    assert "± 95 % t-intervals over the 4 seeds" in study.caption(table, TINY)
    assert study.answer(table, TINY).startswith("After 12 equal steps")
