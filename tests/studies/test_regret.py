"""The study on tiny cells: its runs against `train`, its closed forms against the runtime, and what it judges."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from studies import regret as study
from studies import regret_decision, regret_problems
from studies.engine.sweep import Store
from studies.regret_cell import PAPER_RULE, STEP_RULE, Setting, smooth, steps_to
from studies.regret_lanes import Candidate, Charge, exact_run, mean_losses, run_lanes
from studies.regret_settings import QUICK, STANDARD
from ufom_runtime import EXACT, FOM, UFOM, AdaptiveUFOM, Switch, hypergradient, train
from ufom_runtime.measure.candidates import QS
from ufom_runtime.measure.path import pilot_points
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.sources import data_folder
from ufom_theory import Sweep, Truncated
from ufom_theory.laws import parse_outer

STORED = Sweep.stored()
TINY = Setting("tiny", "quadratic", "sgd:0.2", 12, (1.0, 0.5), (2, 4), {"alpha": 0.1, "r": 3, "spread": 0.5, "dim": 3})


def setting(problem, outer, **options):
    return Setting(problem, problem, outer, 6, batch=3, **options)


NETS = [
    setting("quadratic", "adam:0.1", arguments={"r": 3, "spread": 0.5, "dim": 3}),
    setting("digits-maml", "sgd:0.3", arguments={"hidden": 2, "r": 2}),
    setting("rates", "decay:0.5:0.1", arguments={"hidden": 2, "r": 4}, proxy=2),
]


@pytest.mark.parametrize("cell", NETS, ids=lambda s: s.name)
def test_the_runs_side_by_side_are_those_of_train(cell):
    made, k = cell.make(), Truncated(cell.proxy)
    kinds = [Candidate(0.0), Candidate(0.5), Candidate(1.0, until=2), AdaptiveUFOM(sweep=STORED, proxy=k)]
    kinds.append(AdaptiveUFOM(law="step", outer=cell.outer, sweep=STORED, proxy=k))
    fom = replace(FOM, proxy=k)
    methods = [fom, UFOM(0.5, STORED, k), Switch(fom, 2, EXACT), *kinds[3:]]
    budget = 4 * Charge.of(made, cell.batch).exact
    curves = run_lanes(made, kinds, parse_outer(cell.outer), cell.batch, (5, 6), 1, budget, 1)
    for i, method in enumerate(methods):
        steps = int((~np.isnan(curves.loss[i, 1])).sum()) - 1
        log = []

        def evaluate(theta, log=log):
            log.append(float(mean_losses(made, theta[None])[0]))
            return {}

        run = train(
            made.problem, made.problem.initial, method, optimizer=cell.outer, steps=steps, batch=cell.batch, seed=6,
            evaluate=evaluate,
        )  # fmt: skip
        assert steps >= 3
        assert curves.loss[i, 1, 1 : steps + 1] == pytest.approx(log, rel=1e-4)
        if i >= 3:  # rules are charged what they call; candidates, what they call on average
            calls = run.log.gradients + run.log.hessian_vector_products
            assert curves.calls[i, 1, 1 : steps + 1] == pytest.approx(calls.to_numpy(), rel=1e-9)


@pytest.mark.parametrize(("name", "arguments"), [("quadratic", {"spread": 0.7}), ("pair", {"r": 4})])
def test_closed_forms_agree_with_the_runtime(name, arguments):
    made = regret_problems.make(name, arguments)
    tasks, theta = made.held.take(slice(0, 2)), made.problem.initial + 0.3
    first, exact, _ = made.closed(theta.expand(2, -1), tasks.stack)
    for found, method in ((first, FOM), (exact, EXACT)):
        torch.testing.assert_close(found, hypergradient(made.problem, theta, tasks.stack, method, per_task=True))
    assert mean_losses(made, theta[None]) == pytest.approx(mean_losses(replace(made, closed=None), theta[None]))
    best = made.problem.initial.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([best], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = made.closed(best.expand(len(made.held), -1), made.held.stack)[2].mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure().detach()) == pytest.approx(made.floor, rel=1e-9)


def test_the_pilot_is_compare_s():
    made, outer = TINY.make(), parse_outer("adam:0.1")
    thetas, at = pilot_points(made.problem, made.problem.initial, EXACT, outer, 3, 5, seed=7)
    torch.testing.assert_close(exact_run(made, outer, 3, at, 7), thetas)


def test_calls_and_precisions():
    charge = Charge(batch=2, first=11.0, more=10.0)
    assert Candidate(0.2, until=3).calls(5.0, charge) == 2 * (5 * 11 + 2 * 0.2 * 10)
    assert [Candidate(0.0).name, Candidate(1.0, 4).name] == ["FOM", "FOM until 4, then exact"]
    assert steps_to(1e-2, np.array([1.0, 1e-1, 1e-3]), every=4) == pytest.approx(6.0)
    assert steps_to(2.0, np.array([1.0, 0.1]), every=4) == 0
    assert math.isnan(steps_to(1e-2, np.array([1.0, 0.1]), every=4))
    assert smooth(np.array([1.0, 2.0, 6.0])).tolist() == [1.5, 3.0, 4.0]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    config = study.Config((TINY,), (0.05, 0.3), 4)
    return study.measure(config, Store(tmp_path_factory.mktemp("cells")))


def test_a_cell_is_decided_and_run(table):
    assert table.skipped.isna().all()
    assert table.seed.nunique() == 4
    for level in ("coarse", "fine"):
        said = table[table[f"said_{level}"].astype(bool)]
        assert said.candidate.nunique() == 1
        assert table[f"said_seconds_{level}"].astype(bool).any()
        exact = table[table.candidate == "exact"]
        assert (exact[f"predicted_{level}"] == 1).all()
        assert exact[f"calls_{level}"].to_numpy() == pytest.approx(exact[f"steps_{level}"] * 4 * 7, rel=1e-5)
    assert {STEP_RULE, PAPER_RULE} < set(table.candidate)
    figure = study.draw(table, None)
    assert all(axes.get_xlabel() for axes in figure.axes)
    assert "Cannot tell" in study.caption(table, study.SIZES["quick"])


def test_same_config_same_table(table, tmp_path):
    again = study.measure(study.Config((TINY,), (0.05, 0.3), 4), Store(tmp_path))

    def free(found):
        """Without the clock, and what it says."""
        said = found.said_coarse | found.said_fine | found.candidate.isin(["FOM", "exact", "UFOM(0.05)", "UFOM(0.3)"])
        return found[said | found.rule].filter(regex="^(?!.*seconds)").reset_index(drop=True)

    pd.testing.assert_frame_equal(free(table), free(again))


def test_a_run_that_diverges_is_given_up_alone():
    wild = TINY.make()
    curves = run_lanes(wild, [Candidate(0.0), Candidate(1.0)], parse_outer("sgd:1e9"), 4, (0,), 1, 1000.0, 1)
    assert np.isinf(curves.loss[0, 0][-1])
    net = setting("digits-maml", "sgd:1", arguments={"hidden": 2, "r": 2, "alpha": 3e38}).make()
    curves = run_lanes(net, [Candidate(0.0), Candidate(1.0)], parse_outer("sgd:1"), 2, (0,), 1, 30.0, 1)
    assert not np.isfinite(curves.loss).any()


def test_missing_data_are_left_out_loudly(tmp_path, monkeypatch):
    monkeypatch.delenv("UFOM_DATA", raising=False)
    monkeypatch.setitem(study.LOADERS, "omniglot-maml", data_folder)  # what is loaded already stays loaded
    cell = Setting("MAML, Omniglot", "omniglot-maml", "sgd:0.1", 2)
    with pytest.warns(UserWarning, match="MAML, Omniglot is left out: UFOM_DATA is not set"):
        found = study.measure(study.Config((cell,), (0.3,), 2), Store(tmp_path))
    assert found.skipped.str.contains("UFOM_DATA").all()


def test_no_decision_where_nothing_can_be_told():
    cell = {"setting": vars(replace(TINY, outer="sgd:1e4")), "grid": [0.3]}
    rows = [row for row in regret_decision.decide(cell) if row["level"] == "coarse"]
    assert [row["q"] for row in rows if row["said"] and row["said_seconds"]] == [1.0]
    assert [row["q"] for row in rows if math.isnan(row["predicted"])] == [0.0, 0.3]
    assert "no expected progress" in rows[0]["doubt"]


def test_a_decision_is_that_of_the_law_at_counted_calls():
    """Of FOM, the exact gradient and every q that is tried, what is said takes the fewest calls to the precision."""
    made, horizon = TINY.make(), TINY.horizons[0]
    path, _ = regret_decision._path(TINY, made, horizon)
    charge = Charge.of(made, TINY.batch)
    weights = np.asarray(path.weights)

    def calls(q):
        steps = path.ufom(path.progress[Truncated()], q, "task") if q else path.fom()
        return float(weights @ steps[:, 0]) * TINY.batch * (charge.first + q * charge.more)

    (q, until), steps = regret_decision._said(TINY, regret_decision.counted(made, TINY.batch), path, "")
    least = min(map(calls, (0.0, *QS, 1.0)))
    switched = float(weights @ steps[:1]) if until else calls(q)
    assert until or switched == pytest.approx(least)
    longer = replace(made, proxy=2)
    parts = regret_decision.counted(longer, TINY.batch)
    assert parts.expected(0.25, Truncated(), STORED) == pytest.approx(TINY.batch * (4 + 2 + 0.25 * 1))


def planted(times, said="UFOM(0.2)", predicted=None, loss=None):
    """A table of one cell: log-calls by candidate, nan where the precision is not reached, and what was said."""
    names = {"FOM": 0.0, "UFOM(0.2)": 0.2, "UFOM(0.5)": 0.5, "exact": 1.0}
    noise, rows = np.random.default_rng(0).normal(0, 0.01, (8, 6)), []
    for i, name in enumerate([*names, STEP_RULE, PAPER_RULE]):
        for seed in range(8):
            calls = math.exp(times.get(name, math.nan) + noise[seed, i])
            row = {
                "setting": "planted", "candidate": name, "rule": name not in names, "q": names.get(name, math.nan),
                "until": 0, "seed": seed, "budget": 1000.0, "steps_most": 100.0, "skipped": math.nan,
                "seconds_most": 500.0,
                "loss": (loss or {}).get(name, 1.0) * math.exp(noise[seed, i]),
            }  # fmt: skip
            for level in ("coarse", "fine"):
                row |= {
                    f"calls_{level}": calls, f"steps_{level}": calls / 10, f"said_{level}": name == said,
                    f"said_seconds_{level}": name == said, f"seconds_{level}": calls / 2, f"doubt_{level}": "",
                    f"predicted_{level}": (predicted or {}).get(name, math.nan),
                }  # fmt: skip
            rows.append(row)
    return pd.DataFrame(rows)


def test_regret_on_planted_times():
    times = {"FOM": 6.0, "UFOM(0.2)": 5.2, "UFOM(0.5)": 5.0, "exact": 5.5}
    found = study.regrets(planted(times)).iloc[0]
    assert (found.said, found.best, found.told, found.least) == ("UFOM(0.2)", "UFOM(0.5)", True, False)
    assert found.regret == pytest.approx(math.exp(0.2), rel=0.02)
    assert found.low < found.regret < found.high
    assert [found.FOM, found.exact] == pytest.approx([math.exp(1.0), math.exp(0.5)], rel=0.02)
    never = study.regrets(planted({"UFOM(0.5)": 5.0, "exact": 5.5})).iloc[0]
    assert never.least
    assert never.regret == pytest.approx(1000 / math.exp(5.0), rel=0.02)  # charged the budget
    assert math.isinf(never.FOM)
    assert study.regrets(planted({})).empty
    in_seconds = study.regrets(planted(times), "seconds")
    assert in_seconds.regret.to_numpy() == pytest.approx(study.regrets(planted(times)).regret.to_numpy())
    assert study.regrets(
        planted(times).assign(seconds_coarse=math.nan, seconds_most=math.nan), "seconds"
    ).level.tolist() == ["fine"]


def test_predicted_steps_are_off_by_their_median():
    times = {"FOM": 5.5, "UFOM(0.2)": 5.2, "UFOM(0.5)": 5.1, "exact": 5.0}
    right = {"FOM": math.exp(0.5), "UFOM(0.2)": math.exp(0.2), "UFOM(0.5)": math.exp(0.1), "exact": 1.0}
    assert study.predictions(planted(times, predicted=right)).off.max() < 0.02
    wrong = {name: x * 1.3 if name != "exact" else x for name, x in right.items()}
    assert study.predictions(planted(times, predicted=wrong)).off.min() == pytest.approx(math.log(1.3), abs=0.02)
    never = right | {"FOM": math.inf}
    assert study.predictions(planted({**times, "FOM": math.nan}, predicted=never)).off.max() < 0.02


def test_the_judge_on_planted_cells():
    times = {"FOM": 6.0, "UFOM(0.2)": 5.0, "UFOM(0.5)": 5.1, "exact": 5.5}
    loss = {"FOM": 1.2, "exact": 1.1, "UFOM(0.5)": 1.05, STEP_RULE: 0.99}
    predicted = {"FOM": math.e, "UFOM(0.2)": 1.0, "UFOM(0.5)": 1.0, "exact": 1.0}
    agrees = [v.agrees for v in study.judge(planted(times, predicted=predicted, loss=loss), None)]
    assert agrees == ["yes", "yes", "yes", "yes", "no", "yes", "yes"]
    agrees = [v.agrees for v in study.judge(planted(times, said="FOM", loss={STEP_RULE: 1.5}), None)]
    assert agrees[:4] == ["no"] * 4
    assert agrees[5:] == ["no", "no"]


def test_sizes_are_consistent():
    names = [cell.name for cell in STANDARD]
    assert len(set(names)) == len(names)
    for cell in (*STANDARD, *QUICK):
        assert cell.problem in regret_problems.MAKERS
        assert 0 < cell.levels[1] < cell.levels[0]
        assert all(1 <= horizon <= cell.steps for horizon in cell.horizons)
    assert study.SIZES["standard"].seeds >= 8
    assert len(study.GRID) >= 10
    assert isinstance(regret_problems.make("pair", {}).held, Tasks)
