"""Sinusoid regression on tiny nets: runs side by side against the library's own calls, and a judge that can say no."""

import numpy as np
import pytest
import torch

from studies import sinusoid as study
from studies import sinusoid_cell as cell
from studies.engine.sweep import Store
from ufom_runtime import AdaptiveUFOM, Estimator
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.sinusoid import sinusoid
from ufom_theory import Sweep

TINY = study.Config(settings=((3, 2),), grid=(0.3,), seeds=4, steps=12, width=4, test=6, records=4)


@pytest.fixture(scope="module")
def made():
    return sinusoid(shots=3, r=3, alpha=0.05, width=4, seed=2)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return study.measure(TINY, Store(tmp_path_factory.mktemp("cells")))


@pytest.mark.parametrize("method", ["exact", "FOM", "UFOM 0.4", *study.RULES])
def test_runs_side_by_side_are_the_librarys(made, method):
    given = cell.rule_of(method, 3, 0.01)
    rule = given if isinstance(given, AdaptiveUFOM) else Estimator(given, Sweep.stored())
    theta = torch.stack([made.initial, made.initial + 0.1])
    runs = cell.Runs(made, theta.clone(), [given, given], torch.tensor([1, 0]), 0.02)  # the streams are swapped
    theirs, states = theta.clone().requires_grad_(), [rule.begin(), rule.begin()]
    adam = torch.optim.Adam([theirs], lr=0.02)
    generator = torch.Generator().manual_seed(1)
    for _ in range(9):
        tasks, uniform = Tasks.of(made.sample(8, generator)), torch.rand(2, 4, generator=generator)
        q, directions = runs.q, []
        for i, stream in enumerate((1, 0)):
            own, coins = tasks.take(slice(4 * stream, 4 * stream + 4)), uniform[stream] < q[i]
            found = rule.direction(made, theirs[i].detach(), own, states[i], coins)
            states[i] = found.state
            directions.append(found.value)
        runs.step(tasks, uniform)
        theirs.grad = torch.stack(directions)
        adam.step()
        torch.testing.assert_close(runs.theta, theirs.detach(), rtol=1e-9, atol=1e-12)
    if isinstance(given, AdaptiveUFOM):
        assert runs.q.tolist() == pytest.approx([state[0] for state in states], rel=1e-9)


def test_a_run_whose_gradients_overflow_is_lost_and_the_others_go_on(made):
    theta, tasks = (
        torch.stack([made.initial, 1e300 * made.initial]),
        Tasks.of(made.sample(4, torch.Generator().manual_seed(1))),
    )
    uniform, stream = torch.full((1, 4), 0.5), torch.tensor([0, 0])
    both = cell.Runs(made, theta, [1.0, 1.0], stream, 0.02)
    alone = cell.Runs(made, theta[:1], [1.0], stream[:1], 0.02)
    both.start = torch.stack([made.initial, made.initial])
    for _ in range(3):
        both.step(tasks, uniform)
        alone.step(tasks, uniform)
    assert both.lost.tolist() == [False, True]
    torch.testing.assert_close(both.theta, torch.stack([alone.theta[0], made.initial]))


def test_a_method_that_lost_a_run_is_not_the_best_and_is_named(table):
    lost = table.assign(loss=table.loss.mask((table.method == "UFOM 0.3") & (table.seed == 2)))
    logs = study.after_equal_steps(lost)
    assert study.best_q(logs.assign(**{"UFOM 0.5": 9.0})) == "UFOM 0.5"
    assert "stands below: 1 of UFOM 0.3 at K = 3, r = 2." in study.caption(lost, TINY)


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
