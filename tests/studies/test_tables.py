"""The paper's two tables at a tiny size: what a run is charged in both accounts, and judges that can say no."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from studies import table_1, table_1_cell, table_2, table_2_cell
from studies.engine.sweep import Store
from studies.shared.accounts import OnZero, Price, budgets
from studies.shared.paying import judge_paying, said_of
from studies.shared.training import interval
from ufom_runtime import UFOM, AdaptiveUFOM, Implicit, outer_sgd
from ufom_runtime.methods.adaptive import AdaptiveState
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_theory import CostModel, Moments, Sweep, Truncated, UfomError, optimal_q

R, K = 5, 2
TUNED = ("exact", "adaptive ×0.1")
ONE = table_1_cell.Config("digits", 20, 20, 3, 0.5, (10.0, 100.0), 1, 3, 2, 2, 2, (1, 2), TUNED, r=R)
TWO = table_2_cell.Config("digits", 3, 2, False, 0.05, 1e-3, 2, 1, 2, 4, 4, 2, 2, r=3, bias=(2, 4))


@pytest.fixture(scope="module")
def problem():
    return digits_hypercleaning(n_train=20, n_validation=20, hidden=3, r=R, alpha=0.5)


def run(problem, rule, steps=6, seed=4):
    return outer_sgd(problem, problem.initial, rule, lambda k: 1.0, steps, seed=seed)


def of_law(sweep):
    cost = CostModel.of(1.0, 1.0)
    return AdaptiveUFOM(law="step", outer="sgd:1.0", sweep=sweep, proxy=Truncated(K), cost=cost)


@pytest.mark.parametrize(
    ("rule", "price", "kept"),
    [
        (lambda sweep: UFOM(0.5, sweep), Price.truncated(R), 0),
        (lambda sweep: UFOM(0.5, sweep, Truncated(K)), Price.truncated(R, K), K),
        (of_law, Price.truncated(R, K), K),
        (lambda sweep: UFOM(0.5, sweep, proxy=Implicit("neumann", 3, warn_above=9)), Price.debiased(R, R + 2, 4), 0),
    ],
    ids=["FOM", "truncated", "step rule", "implicit"],
)
def test_a_run_with_stored_states_is_charged_what_a_recomputing_one_makes(problem, rule, price, kept):
    stored, recomputed = (run(problem, rule(sweep)).log for sweep in (Sweep.stored(), Sweep.recomputed()))
    charged = price.charge(stored)
    corrected = stored.exact.cumsum()
    assert charged["corrected"].tolist() == corrected.tolist()
    assert charged["stored"].tolist() == (stored.gradients + stored.hessian_vector_products).tolist()
    others = 0 if price.more_gradients else (stored.gradients - (R + 1) * stored.step) / (R + 1)
    repeated = (R - kept - 1) * corrected + (R - 1) * others  # the paper repeats them, and one forward pass does not
    made = recomputed.gradients + recomputed.hessian_vector_products + repeated
    assert charged["recomputed"].tolist() == made.tolist()
    assert corrected.iloc[-1] > 0


@pytest.mark.parametrize("options", [{}, {"scale": 0.1}, {"scale": 0.1, "variant": "released"}])
def test_on_a_zero_proxy_a_coin_of_0_needs_no_inner_loop(problem, options):
    whole_rule = AdaptiveUFOM(q_min=0.3, sweep=Sweep.stored(), cost=CostModel(r=R, as_printed=True), **options)
    quick, whole = (run(problem, rule, 8, seed=3) for rule in (OnZero(q_min=0.3, **options), whole_rule))
    assert 0 < whole.log.exact.sum() < 8
    pd.testing.assert_frame_equal(quick.log.drop(columns="seconds"), whole.log.drop(columns="seconds"), rtol=1e-3)
    torch.testing.assert_close(quick.theta, whole.theta, rtol=1e-3, atol=1e-6)


def data_free_q(method, updates):
    """q of a rule before its first update and after each, where G_FO = 0 and V² stays: no data come in."""
    rule = table_1_cell.RULES[method]
    states = [AdaptiveState(rule.q_min)]
    for _ in range(updates):
        states.append(rule.update(states[-1], 1.0, 1.0, 100))
    return [state.q for state in states]


def test_the_rules_choose_q_without_data():
    for method in ("adaptive", "adaptive ×0.1"):
        assert data_free_q(method, 3) == [0.05, *[pytest.approx(table_1.settled_q(method, 100))] * 3]
    assert table_1.settled_q("adaptive", 100) == 1.0
    *_, q = data_free_q("released ×0.1", 1000)  # the last q gives itself: D²/V² = scale·(1/q − 1)²
    moments = Moments(0.1 * (1 / q - 1) ** 2, 1.0)
    assert optimal_q(moments, CostModel(r=100), m=2).q == pytest.approx(q, abs=1e-3)
    assert q < 1


def test_exact_and_reptile_have_the_papers_prices():
    log = {"step": 3, "gradients": 3 * (R + 1), "hessian_vector_products": 3 * R}
    each = CostModel(r=R, as_printed=True)
    assert Price.truncated(R).charge(log)["recomputed"] == 3 * (each.c_det + each.c_rnd)
    assert float(Price.truncated(R).cost.c_rnd) == each.c_rnd
    log = {"step": 3, "gradients": 3 * R, "hessian_vector_products": 0}
    assert Price.reptile(R).charge(log) == {"corrected": 0, "stored": 3 * R, "recomputed": 3 * R}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return table_1.measure(ONE, Store(folder)), folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return table_2.measure(TWO, Store(tmp_path_factory.mktemp("two")))


def test_every_run_spends_both_budgets(one, two):
    for table, limits in ((one[0], budgets(ONE)), (two, budgets(TWO))):
        spent = table[table.method != "printed sum"].groupby(["method", "seed"]).last()
        assert all((spent[account] >= limit).all() for account, limit in limits.items())
        exact = spent.loc["exact"].stored
        assert (exact == limits["stored"]).all()


def test_gamma_is_chosen_on_a_seed_that_does_not_judge(one):
    table = one[0]
    ends = table[table.seed == 0].groupby(["method", "gamma"]).validation.last()
    judged = table[table.seed > 0]
    assert set(judged[~judged.method.isin(["adaptive ×0.1", "printed sum"])].gamma) == {ends["exact"].idxmin()}
    assert set(judged[judged.method == "adaptive ×0.1"].gamma) == {ends["adaptive ×0.1"].idxmin()}
    assert [*ends["adaptive ×0.1"].index] == [gamma * table_1.settled_q("adaptive ×0.1", R) for gamma in ONE.gammas]
    assert set(table[table.seed == 0].method) == {*TUNED}
    assert set(judged.method) == {"FOM", "printed sum", *table_1.METHODS}
    assert judged[judged.method == "FOM"].moved.max() == 0


def test_what_is_not_run_is_left_out_and_named(one):
    table, folder = one
    last = Store(folder).path(next(c for c in _judged(table) if c["method"] == "UFOM, implicit" and c["seed"] == 2))
    content = last.read_bytes()
    last.unlink()
    partial = table_1.measure(ONE, Store(folder, partial=True))
    assert not last.exists()
    assert set(partial[partial.method == "UFOM, implicit"].seed) == {1}
    assert "Not yet run: UFOM, implicit 1 of 2 seeds." in table_1.caption(partial, ONE)
    assert not [v for v in table_1.judge(partial, ONE) if "implicit" in v.subject]
    last.write_bytes(content)


def _judged(table):
    gammas = table[table.seed > 0].groupby("method").gamma.first()
    return [c for m in table_1.METHODS for c in table_1._cells(ONE, m, [gammas[m]], [1, 2])]


@pytest.mark.parametrize("study", ["one", "two"])
def test_the_judges_follow_the_tables(study, one, two):
    table, module, config, score = (one[0], table_1, ONE, "test") if study == "one" else (two, table_2, TWO, "accuracy")
    rivals = table.assign(**{score: table[score].where(~table.method.isin(["exact", "FOM"]), 50.0)})
    for points, agrees in ((52.0, "yes"), (48.0, "no"), (50.0, "no"), (40 * table.seed, "inconclusive")):
        given = rivals.assign(**{score: rivals[score].mask(table.method == "UFOM", points)})
        found = [v for v in module.judge(given, config) if "points), UFOM −" in v.subject]
        assert len(found) == 6
        assert {v.agrees for v in found} == {agrees}
        assert said_of(found).count({"yes": " pays", "no": "not pay", "inconclusive": "undecided"}[agrees]) == 6


def test_the_judge_of_what_the_paper_leaves_out_can_say_no(one):
    table = one[0]

    def agrees(words, method, **columns):
        planted = table.assign(**{c: table[c].mask(table.method == method, v) for c, v in columns.items()})
        (found,) = (v.agrees for v in table_1.judge(planted, ONE) if words in v.subject)
        return found

    assert (table[table.method == "printed sum"].validation > 0).all()
    for loss, expected in ((1.0, "no"), (20.0, "yes"), (torch.finfo(torch.float32).max, "yes")):
        assert agrees("printed sum", "printed sum", validation=loss) == expected
    for q, expected in ((table_1.settled_q("adaptive ×0.1", R), "yes"), (0.7, "no"), (math.nan, "inconclusive")):
        assert agrees("q of adaptive ×0.1", "adaptive ×0.1", q=q, d2=1.0) == expected
    for moved, expected in ((0.0, "yes"), (1.0, "no")):
        assert agrees("no cleaning", "FOM", moved=moved) == expected


def test_the_printed_sum_is_the_mean_at_n_times_the_step_and_may_overflow():
    (cell,) = table_1._cells(ONE, "printed sum", [10.0], [1])
    assert table_1_cell.of_printed_sum({**cell, "alpha": 1e30}) == torch.finfo(torch.float32).max
    longer = table_1_cell.make_problem({**cell, "alpha": 20 * cell["alpha"]})
    expected = table_1_cell.evaluate(longer, longer.initial)["validation"]
    assert table_1_cell.of_printed_sum(cell) == pytest.approx(expected)


def test_without_mnist_the_digits_are_taken_and_it_is_said(monkeypatch):
    def absent():
        raise UfomError("train-images is missing")

    monkeypatch.setattr(table_1, "mnist", absent)
    with pytest.warns(UserWarning, match="train-images is missing; the embedded digits"):
        assert table_1.present("mnist") == "digits"


def test_a_failed_cell_is_an_error(tmp_path):
    with pytest.raises(UfomError, match=r"cells failed; .*, γ = 10: UfomError: .*inner loop"):
        table_1.measure(replace(ONE, alpha=1e30), Store(tmp_path))


def test_the_papers_size_is_the_papers():
    paper = table_2_cell.SIZES["paper"]
    assert (paper.data, paper.ways) in table_2.PAPER_TABLE
    assert (paper.r, paper.filters) == (10, 64)


def test_one_seed_alone_is_not_judged(two):
    assert judge_paying(two[two.seed == 0], ("UFOM",), "accuracy", "accuracy", budgets(TWO), {}) == []


def test_intervals_are_of_t():
    assert interval(pd.Series([1.0, 3.0]), 1) == "2.0 ± 12.7"
    assert interval(pd.Series([2.0]), 1) == "2.0"
    assert interval(pd.Series([2.0, math.nan]), 1) == "–"


def test_convergence_can_fail(two):
    steps = pd.DataFrame(
        [{"method": "exact", "seed": s, "step": k, "recomputed": k} for s in (0, 1) for k in range(13)]
    )
    for slope, agrees in ((0.0, "yes"), (10.0, "no")):
        rising = steps.assign(accuracy=slope * steps.step, stored=steps.step, seconds=steps.step)
        assert [v.agrees for v in table_2.judge(rising, TWO) if "converged" in v.subject] == [agrees]


def test_where_the_bias_costs_nothing_it_is_said(two):
    for points, agrees in ((48.0, "yes"), (52.0, "no")):
        level = two.assign(accuracy=two.accuracy.where(two.method != "exact", 50.0))
        given = level.assign(accuracy=level.accuracy.where(two.method != "FOM", points))
        assert [v.agrees for v in table_2.judge(given, TWO) if "FOM's bias costs" in v.subject] == [agrees]


@pytest.mark.parametrize(("over", "agrees"), [(1.9, "yes"), (0.6, "yes"), (2.1, "no"), (0.4, "no")])
def test_foms_lead_is_compared_with_its_break_even(over, agrees):
    """The exact gradient, rising evenly, overtakes FOM just beyond half of the budget."""
    limit = budgets(TWO)["stored"]
    led = limit / 2 / (TWO.r + 1)
    logs = [
        pd.DataFrame(
            {"method": method, "seed": seed, "stored": [0, limit], "accuracy": points, "n_b_stored": led / over}
        )
        for seed in (0, 1)
        for method, points in (("exact", [0, 99]), ("FOM", [50, 50]))
    ]
    table = pd.concat(logs).assign(recomputed=lambda t: t.stored, n_b_recomputed=math.inf, step=0, bias_sq=0.0)
    assert table_2.leads(table, TWO)["stored"][0].tolist() == pytest.approx([led, led])
    (verdict,) = (
        v for v in table_2.judge(table, TWO) if v.subject.startswith("FOM is ahead") and "stored" in v.subject
    )
    assert (verdict.agrees, verdict.measured) == (agrees, pytest.approx(math.log2(over)))


@pytest.mark.parametrize("study", ["one", "two"])
def test_figures_and_captions(study, one, two):
    table, module, config = (one[0], table_1, ONE) if study == "one" else (two, table_2, TWO)
    panels = module.draw(table, config).axes
    assert len(panels) == 3
    assert all(axes.get_xlabel() and axes.get_title() for axes in panels)
    named = {name for text in panels[1].texts for name in text.get_text().split(", ")}
    assert {"exact", "UFOM", "FOM", "adaptive ×0.1"} <= named
    said = module.caption(table, config)
    assert "| FOM |" in said
    assert "Not yet run" not in said
    assert module.answer(table, config).endswith(".")


def test_a_method_that_lacks_a_seed_is_not_drawn(two):
    (_, axes, _) = table_2.draw(two[(two.method != "UFOM") | (two.seed == 0)], TWO).axes
    named = {name for text in axes.texts for name in text.get_text().split(", ")}
    assert {"exact", "FOM"} <= named
    assert "UFOM" not in named


def test_without_omniglot_the_remedy_is_named(monkeypatch, tmp_path):
    def absent():
        raise UfomError("images_background_small1.zip is missing")

    monkeypatch.setattr(table_2, "omniglot", absent)
    with pytest.raises(UfomError, match=r"is missing; run `ufom data omniglot`"):
        table_2.measure(table_2_cell.SIZES["standard"], Store(tmp_path))
