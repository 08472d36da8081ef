"""The decision against a direct simulation of expected progress on quadratics, what it runs, and what it refuses."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.oracles import unrolled_gradient
from tests.runtime.conftest import F64, coupled
from ufom_runtime import (
    EXACT,
    FOM,
    UFOM,
    BilevelProblem,
    Estimator,
    Implicit,
    Switch,
    compare,
    hypergradient,
    inner,
    measure_moments,
    moments_by_proxy,
    peak_bytes,
    train,
)
from ufom_runtime.command.cli import app, main
from ufom_runtime.command.compare import _affordable
from ufom_runtime.measure import compare as module
from ufom_runtime.measure.as_run import AsRun
from ufom_runtime.measure.calls import corrected_tasks
from ufom_runtime.measure.candidates import Search, Time
from ufom_runtime.measure.parts import Parts, measure_parts, script_gradient
from ufom_runtime.measure.path import Measuring, pilot_points, usable, weights_of
from ufom_runtime.methods import REPTILE
from ufom_runtime.methods.debiased import Debiased
from ufom_runtime.methods.roulette import Roulette
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import Sweep, Truncated, UfomError
from ufom_theory.laws import parse_outer
from ufom_theory.roulette import roulette_moments

BATCH = 4
# a gradient takes 1 s whatever the number of tasks, a backward step 2 s
PARTS = Parts(5, BATCH, (6.0, 6.0), (2.0, 2.0), (2.5, 2.5), (0.0, 0.0), 7.0, 60.0, 500, 1000, 1100, 100, 1000, 3000)


@pytest.fixture
def fixed_costs(monkeypatch):
    """The costs are those of PARTS, and whatever is timed takes what they say."""

    def seconds(self, ways, budget):
        return {way.method: Time(way.seconds, 0.01, "timed") for way in ways}

    monkeypatch.setattr(module, "measure_parts", lambda *_, **__: PARTS)
    monkeypatch.setattr(AsRun, "time", seconds)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def finite(noise, **changes):
    """A quadratic with six tasks whose mean is 0: every expectation is an exact sum."""
    made = quadratic(dim=4, r=5, noise=noise, **changes)
    half = made.sample(3, rng())
    return replace(made, tasks=torch.cat([half, -half]), sample_tasks=None)


def simulated_progress(problem, theta, e, rate, n=40_000):
    """E[M(θ) − M(θ − γ·G)] over batches and coins, by the closed form of M, and its standard error."""
    d, hessian = problem._maps()  # of F − G, and of G
    tasks = problem.tasks[torch.randint(len(problem.tasks), (n, BATCH), generator=rng(5))]
    exact = (theta - tasks) @ hessian.T
    proxy = e.scale * (exact + (theta - tasks) @ d.T)
    u = torch.rand(n, 1 if e.coin == "batch" else BATCH, generator=rng(6), dtype=F64)
    coins, inverse = u < e.q, 1 / e.q if e.q else 0.0
    if e.coin == "stratified":  # the tasks are drawn again for each batch: the first k of them are as good as any
        least = math.floor(e.q * BATCH)
        k = least + (u[:, :1] < e.q * BATCH - least)
        coins, inverse = torch.arange(BATCH) < k, BATCH / k[..., None] if least else inverse
    step = rate * (proxy + coins[..., None] * inverse * (exact - proxy)).mean(1)
    after = theta - step
    gains = (theta @ hessian @ theta - (after @ hessian * after).sum(1)) / 2
    return float(gains.mean()), float(gains.std() / math.sqrt(n))


def test_steps_over_exact_are_those_of_a_simulation(fixed_costs):
    problem, rate = finite(noise=0.5), 0.2
    table = compare(problem, problem.initial, None, f"sgd:{rate}", BATCH, budget=1).table
    exact, error = simulated_progress(problem, problem.initial, EXACT, rate)
    assert error < 0.01 * exact
    seen = set()
    for row in table[table.proxy.str.endswith("FOM") | (table.proxy == "")].itertuples():
        key = row.q, row.coin, row.proxy
        if row.method in ("FOM", "UFOM") and key not in seen:
            scale = float(row.proxy.removesuffix("·FOM") or 1)
            e = Estimator(row.q, coin=row.coin or "task", scale=scale)
            progress, error = simulated_progress(problem, problem.initial, e, rate)
            assert row.steps_over_exact == pytest.approx(exact / progress, rel=0.04)
            seen.add(key)
    assert {coin for _, coin, _ in seen} == {"", "task", "batch", "stratified"}
    assert any("·" in proxy for *_, proxy in seen)


def test_a_roulette_is_judged_by_its_second_moment():
    """Where each method has its own best step, steps over exact's are those of the second moments."""
    problem = finite(noise=0.5)
    parts = replace(PARTS, back=(20.0, 20.0))
    search = Search(parse_outer("tuned"), BATCH, None, parts)
    path = Measuring(problem, problem.tasks, search.outer, BATCH).path(
        problem.initial[None], (0,), 1, search.proxies, search.shortlist
    )
    found = moments_by_proxy(problem, problem.initial, None, [Truncated(), Truncated(1)])
    v2 = found[Truncated()].v2 + (BATCH - 1) * found[Truncated()].mean_gradient_sq
    rows = list(search._roulettes(path, 0))
    assert {way.sweep for way, _ in rows} == {"recomputed", "checkpointed:2", "stored"}
    for way, ratios in rows:
        costs = parts.level_costs(way.method.levels, way.method.sweep)
        assert costs == pytest.approx(Roulette.costs(way.method, 1.0, 20 / BATCH) * [0.25, 1, 1], rel=0.2, abs=1.0)
        moment, _ = roulette_moments(way.method.survival, [found[p].d2 for p in found], v2, costs)
        assert ratios[0, 0] == pytest.approx(moment / v2, rel=1e-9)
        if way.sweep == "stored":  # a backward step takes 20 s for one task or for all
            reached = [1 - (1 - q) ** BATCH for q in way.method.survival]
            assert way.seconds == pytest.approx(parts.mixed + 20 * (reached[0] + 4 * reached[1]))


def test_other_methods_are_debiased_too(fixed_costs, monkeypatch):
    """Where FOM is zero, implicit differentiation is a proxy; what is recommended runs."""
    problem = BilevelProblem(
        lambda t, p, x: ((p - x).square() * t.exp()).sum(), lambda t, p, x: (p - 1.0 - x).square().sum(),
        lambda t, x: torch.zeros(2, dtype=F64), [0.2] * 5, tasks=torch.tensor([[0.1, 0.3], [0.2, -0.1]], dtype=F64),
    )  # fmt: skip
    theta, methods = torch.zeros(2, dtype=F64), [Implicit(x, 2, warn_above=1e300) for x in ("cg", "neumann")]
    assert usable(problem, theta[None], Tasks.of(problem.tasks)) == methods
    steep = BilevelProblem(
        problem.inner_loss, problem.outer_loss, problem.start, [0.9] * 5, tasks=problem.tasks
    )  # H = 2·e^θ, and a Neumann series converges for steps below 1/e^θ
    assert usable(steep, torch.ones(1, 2, dtype=F64) * 0.3, Tasks.of(problem.tasks)) == methods[:1]
    assert usable(quadratic(dim=3), torch.ones(1, 3, dtype=F64), Tasks.of(quadratic(dim=3).sample(2, rng()))) == []
    others = replace(PARTS, others=dict.fromkeys(methods, (6.5, 1050)))
    monkeypatch.setattr(module, "measure_parts", lambda *_, **__: others)
    c = compare(problem, theta, None, "tuned", BATCH, budget=1)
    assert {"cg:2", "neumann:2"} <= {proxy.split("·")[-1] for proxy in c.table.proxy}
    assert isinstance(c.best, Debiased)
    assert "cg:2" in c.why or "neumann:2" in c.why
    moments = measure_moments(problem, theta, None, methods[0])
    rows = [hypergradient(problem, theta, problem.tasks, e, per_task=True) for e in (EXACT, methods[0])]
    assert moments.d2 == pytest.approx(float((rows[0] - rows[1]).square().sum(1).mean()), rel=1e-12)
    assert torch.isfinite(train(problem, theta, c.best, optimizer="sgd:0.01", steps=2, batch=BATCH).theta).all()


def test_the_regret_on_a_grid_is_small(fixed_costs):
    """Time for the same progress at what is recommended, over that of the best of FOM, exact and ten q."""
    regrets, names = [], []
    for noise, rate, alpha in ((0.5, 0.3, 0.05), (0.05, 1.0, 0.3), (0.5, 4.0, 0.3)):
        problem = finite(noise, alpha=alpha)
        c = compare(problem, problem.initial, None, f"sgd:{rate}", BATCH, budget=1)

        def speed(e, problem=problem, rate=rate):
            spent = PARTS.expected(e.q, e.proxy, e.sweep, e.coin)
            return simulated_progress(problem, problem.initial, e, rate)[0] / spent

        grid = [FOM, EXACT, *(UFOM(q, Sweep.stored()) for q in np.geomspace(0.02, 0.9, 10))]
        assert c.best.proxy.steps == 0
        regrets.append(max(map(speed, grid)) / speed(c.best) - 1)
        names.append(c.table.method[0])
    assert np.median(regrets) <= 0.05
    assert max(regrets) <= 0.25
    assert len(set(names)) > 1


def test_what_is_recommended_runs_and_was_timed():
    problem = quadratic(dim=3, r=4, noise=0.2)
    c = compare(problem, problem.initial, problem.sample(32, rng()), "sgd:0.2", BATCH, "1MB", budget=0.5)
    run = train(problem, problem.initial, c.best, optimizer="sgd:0.2", steps=2, batch=BATCH)
    assert torch.isfinite(run.theta).all()
    assert list(c.table) == [
        "method", "q", "sweep", "proxy", "coin", "ms", "clock", "bytes", "steps_over_exact", "time_over_plain", "low",
        "high",
    ]  # fmt: skip
    timed = set(c.table[c.table.clock == "timed"].method)
    assert {"script", "FOM", "exact"} <= timed
    assert (c.table.low <= c.table.time_over_plain).all()
    assert repr(c) == c.why
    assert "script" in c.why
    moments = measure_moments(problem, problem.initial, problem.sample(32, rng()))
    (row,) = c.along.to_dict("records")
    expected = {"step": 0, "d2": moments.d2, "v2": moments.v2, "rho": moments.rho, "cosine": row["cosine"]}
    assert row == pytest.approx(
        {**expected, "mean_gradient_sq": moments.mean_gradient_sq, "scale": moments.scaled().c}, rel=1e-6
    )
    assert 0 < row["cosine"] <= 1.1  # of unbiased squares


def test_on_a_single_task_the_law_about_noise_says_so(fixed_costs):
    problem = finite(noise=0.5)
    one, theta = replace(problem, tasks=problem.tasks[:1]), problem.initial
    path = Measuring(one, one.tasks, parse_outer("decay:0.5"), 1).path(
        theta[None], (0,), 1, [Truncated()], lambda path: [Truncated()]
    )
    assert path.noiseless
    c = compare(one, theta, None, "decay:0.5", 1, budget=1)
    assert isinstance(c.best, Estimator)
    assert ("the exact gradient has no noise here" in c.why) == (0 < c.best.q < 1)
    assert 0 < c.best.q < 1
    assert "no noise" not in compare(problem, theta, None, "decay:0.5", 1, budget=1).why


def test_a_quicker_script_is_kept(fixed_costs, monkeypatch):
    problem = finite(noise=0.5)
    monkeypatch.setattr(
        AsRun,
        "time",
        lambda self, ways, _: {w.method: Time(1.0 if w.method is None else 9.0, 0.01, "timed") for w in ways},
    )
    c = compare(problem, problem.initial, None, "tuned", BATCH, budget=1)
    assert c.why.startswith("keep your script")
    assert c.best.q == 1


def test_a_horizon_along_given_points_switches_from_fom(fixed_costs):
    problem = quadratic(dim=3, r=5, noise=0.01)
    # far away FOM is as good as exact; at its fixed point, θ = 0 but for a shift, it goes nowhere
    thetas = torch.stack([problem.initial, 0.02 * problem.initial])
    shifted = BilevelProblem(
        problem.inner_loss,
        lambda t, p, x: problem.outer_loss(t, p, x) + 0.05 * p.sum(),
        problem.start,
        problem.step_sizes,
        tasks=0.01 * torch.eye(3, dtype=F64),
    )
    c = compare(shifted, thetas, None, "sgd:0.1", BATCH, steps=100, budget=1)
    assert "next 100 steps" in c.why
    assert c.along.step.tolist() == [0, 100]
    assert c.table.method.str.startswith("FOM until").sum() == 1


def test_memory_leaves_out_what_does_not_fit(fixed_costs):
    problem = quadratic(dim=3, r=5)
    tasks = problem.sample(16, rng())
    table = compare(problem, problem.initial, tasks, "tuned", BATCH, 1400, budget=1).table
    assert set(table.sweep) == {"", "recomputed", "checkpointed:2"}
    with pytest.raises(UfomError, match=r"memory = '900B': a step of FOM holds 1000 bytes"):
        compare(problem, problem.initial, tasks, "tuned", BATCH, "900B", budget=1)


def test_a_gradient_within_its_noise_cannot_be_judged(fixed_costs):
    problem = quadratic(dim=3, r=5, noise=5.0)
    c = compare(problem, 0.01 * problem.initial, problem.sample(8, rng()), "tuned", BATCH, budget=1)
    assert c.why.startswith("cannot tell: ‖∇M‖² = ")
    assert "tasks or more" in c.why
    assert c.best.q == 1
    assert c.table[c.table.method == "FOM"].steps_over_exact.isna().all()


def test_steps_that_are_too_long_are_named(fixed_costs):
    problem = finite(noise=0.5)
    c = compare(problem, problem.initial, None, "sgd:50", BATCH, budget=1)
    assert "the exact gradient itself makes no expected progress" in c.why


def test_a_vanishing_proxy_is_named(fixed_costs):
    problem = BilevelProblem(
        lambda t, p, x: ((p - x).square() * t.exp()).sum(), lambda t, p, x: (p - 1.0 - x).square().sum(),
        lambda t, x: torch.zeros(2, dtype=F64), [0.05] * 10, tasks=torch.tensor([[0.1, 0.3], [0.2, -0.1]], dtype=F64),
    )  # fmt: skip
    c = compare(problem, torch.zeros(2, dtype=F64), None, "tuned", BATCH, budget=1)
    assert "than exact (for the next step; 'tuned', a theorem); FOM is identically zero" in c.why
    assert np.isinf(c.table[c.table.method == "FOM"].steps_over_exact).all()


def test_the_script_is_the_gradient_of_the_unrolled_loop():
    momentum = BilevelProblem(
        quadratic(dim=3).inner_loss, quadratic(dim=3).outer_loss, lambda t, x: t, update=inner.momentum(0.1), steps=4,
        sample_tasks=quadratic(dim=3).sample_tasks, initial=quadratic(dim=3).initial,
    )  # fmt: skip
    found = script_gradient(momentum, momentum.initial, Tasks.of(momentum.sample(3, rng())))
    expected = hypergradient(momentum, momentum.initial, momentum.sample(3, rng()), EXACT)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for problem in (coupled(), quadratic(dim=3)):
        tasks = problem.sample(3, rng())
        expected = unrolled_gradient(problem, problem.initial, tasks).mean(0)
        found = script_gradient(problem, problem.initial, Tasks.of(tasks))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def measured():
    """A problem, three tasks, and the parts of their outer step."""
    problem = quadratic(dim=100, r=12, alpha=0.01)
    tasks = Tasks.of(problem.sample(3, rng()))
    return problem, tasks, measure_parts(problem, problem.initial, tasks, seconds=0.01)


@pytest.mark.parametrize(
    "estimator",
    [FOM, Estimator(1.0, Sweep.stored()), Estimator(1.0, Sweep.unrolled()), UFOM(0.5, proxy=Truncated(3)),
     Estimator(1.0, Sweep.recomputed()), UFOM(0.5, Sweep.checkpointed(4))],
    ids=["fom", "stored", "unrolled", "truncated", "recomputed", "checkpointed"],
)  # fmt: skip
def test_bytes_are_the_sum_of_the_parts(measured, estimator):
    problem, tasks, parts = measured
    coins = torch.full((3,), estimator.q > 0)
    known = (problem.initial, *tasks.parts)
    peak = peak_bytes(lambda: hypergradient(problem, problem.initial, tasks, estimator, coins=coins), known)
    assert parts.bytes(estimator.q, estimator.proxy, estimator.sweep) == pytest.approx(peak, rel=0.2)


def test_expected_seconds_are_the_mean_over_the_coins():
    assert corrected_tasks(3, 0.25, "task").tolist() == pytest.approx([27 / 64, 27 / 64, 9 / 64, 1 / 64])
    stored = Sweep.stored()
    assert PARTS.expected(0.0, Truncated(), stored, "task") == 6
    assert PARTS.expected(1.0, Truncated(), stored, "task") == 16
    none, every = 0.75**4, 0.25**4
    expected = none * 6 + (1 - none - every) * 17 + every * 16
    assert PARTS.expected(0.25, Truncated(), stored, "task") == pytest.approx(expected)
    assert PARTS.expected(0.25, Truncated(), stored, "batch") == pytest.approx(0.75 * 6 + 0.25 * 16)
    # 2 backward steps of the proxies, 5 of the corrected task, and 3 repeated steps less 2 in one pass
    recomputed = Sweep.recomputed()
    assert PARTS.seconds(1, Truncated(2), recomputed) == 7 + 2 * 2 + 5 * 2 + (3 - 2)


def test_a_switch_goes_on_to_the_same_bits(tmp_path):
    problem = quadratic(dim=3, r=4)
    switch, options = Switch(FOM, until=3, then=UFOM(0.5)), {"optimizer": "sgd:0.1", "batch": 2}
    whole = train(problem, problem.initial, switch, steps=6, **options)
    for steps in (2, 4, 6):  # before and after the switch
        run = train(problem, problem.initial, switch, steps=steps, checkpoint=tmp_path, checkpoint_every=1, **options)
    assert torch.equal(run.theta, whole.theta)
    early = train(problem, problem.initial, FOM, steps=3, **options)
    assert torch.equal(train(problem, problem.initial, switch, steps=3, **options).theta, early.theta)
    assert whole.log.exact.tolist()[:3] == [0, 0, 0]


def test_a_pilot_run_is_that_of_train():
    problem, options = quadratic(dim=3, r=3), {"batch": 2, "seed": 4}
    thetas, steps = pilot_points(problem, problem.initial, FOM, parse_outer("sgd:0.1"), steps=5, **options)
    assert steps == (0, 2, 4)
    for theta, n in zip(thetas[1:], steps[1:], strict=True):
        assert torch.equal(theta, train(problem, problem.initial, FOM, optimizer="sgd:0.1", steps=n, **options).theta)
    assert weights_of(steps, 10) == pytest.approx((0.1, 0.2, 0.7))  # the last stands for all that follows it
    assert weights_of((0,), 1) == (1.0,)


def test_the_digits_net_is_compared_as_it_runs():
    problem = digits_few_shot(filters=3, r=2, dtype=F64)
    c = compare(problem, problem.initial, problem.sample(6, rng()), "adam:1e-3", 2, "50MB", budget=0.2)
    assert c.why.startswith(("run ", "keep your script", "cannot tell"))
    exact = c.table[c.table.method == "exact"]
    assert (exact.steps_over_exact == 1).all()
    script = c.table[c.table.method == "script"].ms.item()
    assert exact.time_over_plain.to_numpy() == pytest.approx((exact.ms / script).to_numpy())
    run = train(problem, problem.initial, c.best, optimizer="adam:1e-3", steps=1, batch=2)
    assert torch.isfinite(run.theta).all()


def ufom_compare(capsys, monkeypatch, problem, *options):
    monkeypatch.setattr("ufom_runtime.problems.load_problem", lambda name, device: problem)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "mine:problem", "--outer", "tuned", *options])
    found = capsys.readouterr()
    return stop.value.code, found.out, found.err


def test_the_command_prints_a_table_of_80_columns_and_the_sentence(fixed_costs, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    problem = finite(noise=0.1)
    code, out, _ = ufom_compare(capsys, monkeypatch, problem, "--memory", "50MB")
    table, _, said = out.partition("ms: of an outer step")
    assert code == 0
    assert max(map(len, table.splitlines())) <= 80
    assert {"script", "FOM", "exact", "UFOM"} <= {line.split()[0] for line in table.splitlines()}
    expected = compare(problem, problem.initial, None, "tuned", BATCH, "50MB")
    assert expected.why in said
    page = ("--html", str(tmp_path / "decision.html"))
    found = json.loads(ufom_compare(capsys, monkeypatch, problem, "--memory", "50MB", "--json", *page)[1])
    assert (found["why"], len(found["rows"])) == (expected.why, len(expected.table))
    assert f"{len(expected.table) - len(table.splitlines()) + 2} more rows" in out
    shown = (tmp_path / "decision.html").read_text(encoding="utf-8").split("const measured = ")[1].split(";\n")[0]
    shown = json.loads(shown)
    assert shown["decision"] == {"why": expected.why, "rows": found["rows"]}
    assert (shown["point"]["law"], shown["point"]["batch"]) == ("tuned", BATCH)
    assert shown["stateBytes"] == PARTS.bytes_state // BATCH


def test_the_command_reads_theta_from_a_file(fixed_costs, capsys, monkeypatch, tmp_path):
    problem, file = finite(noise=0.1), tmp_path / "theta.npy"
    np.save(file, 2 * problem.initial.numpy())
    found = json.loads(ufom_compare(capsys, monkeypatch, problem, "--theta", str(file), "--json")[1])
    assert found["why"] == compare(problem, 2 * problem.initial, None, "tuned", BATCH).why
    file.write_bytes(b"theta")
    code, _, err = ufom_compare(capsys, monkeypatch, problem, "--theta", str(file))
    assert (code, "theta.npy holds no array of numbers: write it by numpy.save" in err) == (2, True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Switch(FOM, 0, EXACT), "until.*= 0 must be at least 1"),
        (lambda: Switch("FOM", 1, EXACT), "'FOM' is a name"),
        (lambda: Switch(FOM, 1, REPTILE), "not a gradient: run it by itself"),
    ],
)
def test_bad_switches_are_named(make, message):
    with pytest.raises(UfomError, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outer": None}, "give outer, how the outer steps are taken"),
        ({"outer": "sgd"}, "does not name an outer optimizer"),
        ({"batch": 0}, "batch = 0 must be at least 1"),
        ({"memory": "50 parsecs"}, "memory = '50 parsecs': give bytes as a number and one of B, kB"),
        ({"memory": 0}, "memory = 0 must be at least one byte"),
        ({"budget": 0}, "budget.*= 0 must be a finite number > 0"),
        ({"steps": 3, "seconds": 2.0}, "steps and seconds each give the horizon"),
        ({"steps": 3}, "'tuned' has no rate that a pilot run could follow"),
        ({"theta": torch.ones(2, 3, dtype=F64)}, "give steps=, at which the last of them was"),
        ({"tasks": None}, "no finite set of tasks"),
    ],
)
def test_bad_input_is_named(fixed_costs, changes, message):
    problem = quadratic(dim=3, r=5)
    right = {"theta": problem.initial, "tasks": problem.sample(8, rng()), "outer": "tuned", "batch": BATCH, "budget": 1}
    with pytest.raises(UfomError, match=message):
        compare(problem, **{**right, **changes})


@pytest.mark.parametrize(
    ("option", "message"), [(("--budget", "-1"), "budget.* = -1 must be"), (("--tasks", "0"), "n = 0 tasks")]
)
def test_the_command_names_bad_input(option, message):
    shown = CliRunner().invoke(app, ["compare", "quadratic", "--outer", "sgd:0.1", *option])
    with pytest.raises(UfomError, match=message):
        raise shown.exception


def test_as_many_tasks_are_drawn_as_are_paid_for(monkeypatch):
    times = itertools.count(0.0, 0.5)  # each measurement takes half a second
    monkeypatch.setattr("ufom_runtime.command.compare.time.process_time", lambda: next(times))
    problem = quadratic(dim=3, r=2)
    for seconds, expected in ((0.1, 64), (0.6, 64), (2.1, 256), (1e9, 1024)):
        assert _affordable(problem, problem.initial, 0, seconds, None, False) == expected


def test_curvatures_take_no_more_tasks_than_are_paid_for():
    problem = quadratic(dim=3, r=2)
    measuring = Measuring(problem, problem.sample(100, rng()), parse_outer("sgd:0.1"), BATCH)
    for most, n in ((None, 100), (1700.0, 100), (680.0, 40), (1.0, 8)):
        assert len(Tasks.of(replace(measuring, most=most)._few(17))) == n
    whole = finite(noise=0.1)
    assert replace(measuring, problem=whole, tasks=whole.tasks, most=1.0)._few(17) is whole.tasks
