"""The plan by what is measured, with a clock that counts calls: deterministic, and held to the measured moments."""

import itertools
import json
import math
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from tests.runtime.conftest import F64
from ufom_runtime import (
    EXACT,
    BilevelProblem,
    Estimator,
    Implicit,
    count_calls,
    hypergradient,
    measure_moments,
    peak_bytes,
    plan_estimators,
)
from ufom_runtime.command.cli import app
from ufom_runtime.measure import clock
from ufom_runtime.measure.parts import measure_parts
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import Sweep, Truncated, UfomError
from ufom_theory.checks import bytes_text


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """A gradient or a product takes a second."""

    def seconds(function, device):
        with count_calls() as calls:
            function()
        return calls.price()

    monkeypatch.setattr(clock, "took", seconds)


def hyper():
    """θ in the inner loss alone: FOM is zero, and implicit proxies are valid."""
    return BilevelProblem(
        lambda theta, phi, task: (theta.exp() * ((phi - task).square() + 1).sqrt()).sum(),
        lambda theta, phi, task: (phi + 0.1 * task).cos().sum(),
        lambda theta, task: torch.zeros_like(theta), torch.full((4,), 0.4, dtype=F64),
        initial=torch.tensor([-1.0, 0.0, 0.3], dtype=F64), tasks=torch.arange(1.0, 7.0, dtype=F64).reshape(2, 3),
    )  # fmt: skip


def test_the_winner_is_what_it_says():
    """Its A·C against the exact gradient's, from its own gradients and counted calls; all that is named fits."""
    problem, b = hyper(), 2
    rows = plan_estimators(problem, problem.initial, memory="2kB", outer="tuned", batch=b)
    best, exact = rows[0], next(row for row in rows if row.label.startswith("exact"))
    assert exact.q == 1.0
    assert all(row.bytes <= 2000 for row in rows)
    found = [row.slower for row in rows]
    assert found == sorted(found)
    q, coin, times = best.q, best.estimator.coin, []
    least, share = math.floor(b * q), b * q - math.floor(b * q)
    chances = {
        "task": [(1 - q) ** 2, q * (1 - q), q * q], "batch": [1 - q, 0.0, q],
        "stratified": [{least: 1 - share, least + 1: share}.get(k, 0.0) / math.comb(b, k) for k in range(b + 1)],
    }[coin]  # fmt: skip
    for estimator, chance in ((best.estimator, chances), (EXACT, [0.0, 0.0, 1.0])):
        second = cost = 0.0
        for batch in itertools.product(range(2), repeat=b):
            for coins in itertools.product((False, True), repeat=b):
                if p := chance[sum(coins)] / 4:
                    with count_calls() as calls:
                        tasks = problem.tasks[list(batch)]
                        g = hypergradient(problem, problem.initial, tasks, estimator, coins=torch.tensor(coins))
                    second, cost = second + p * float(g @ g), cost + p * calls.price()
        times.append(second * cost)
        row = best if estimator is best.estimator else exact
        assert row.seconds == pytest.approx(cost, rel=1e-9)
    assert exact.slower == pytest.approx(times[1] / times[0], rel=1e-9)


def test_less_memory_takes_another_way():
    problem = quadratic(dim=8, r=4)
    tasks = problem.sample(8, torch.Generator().manual_seed(0))

    def rows(memory):
        return plan_estimators(problem, problem.initial, tasks, memory, m=1.0, batch=2)

    most = max(row.bytes for row in rows("1MB"))
    fewer = rows(most - 1)
    assert all(row.bytes < most for row in fewer)
    assert f"of {bytes_text(most - 1)}" in fewer[0].why
    with pytest.raises(UfomError, match="nothing fits in memory = 100"):
        rows(100)


def test_moments_of_a_method():
    problem, implicit = hyper(), Implicit("neumann", steps=3, warn_above=1e9)
    found = measure_moments(problem, problem.initial, None, implicit)
    f, g = (hypergradient(problem, problem.initial, problem.tasks, e, per_task=True) for e in (implicit, EXACT))
    assert found.d2 == pytest.approx((f - g).square().sum(1).mean().item(), rel=1e-12)
    assert found.v2 == pytest.approx(g.square().sum(1).mean().item(), rel=1e-12)
    assert found.proxy == implicit


def test_command():
    shown = CliRunner().invoke(app, ["plan", f"{__name__}:hyper", "--outer", "tuned", "--batch", "1", "--json"])
    best = json.loads(shown.stdout)[0]
    assert {"label", "q", "ms", "bytes", "slower", "why"} == set(best)
    assert "of 1 GB" in best["why"]
    wrong = CliRunner().invoke(app, ["plan", "synthetic", "--memory", "many", "--outer", "tuned"])
    with pytest.raises(UfomError, match="give bytes as a number"):
        raise wrong.exception


def test_the_parts_of_a_long_loop_are_those_of_its_first_steps():
    """With a clock that counts calls: r + 1 gradients to the end, a product a backward step."""
    problem, batch = quadratic(dim=4, r=30, alpha=0.02), 3
    tasks = Tasks.of(problem.sample(batch, torch.Generator().manual_seed(0)))
    parts = measure_parts(problem, problem.initial, tasks, seconds=1.0)
    assert parts.forward == (31, 31 * batch)
    assert parts.back == (1, batch)
    assert parts.seconds(batch, Truncated(), Sweep.stored()) == batch * (31 + 30)
    known = (problem.initial, *tasks.parts)
    for sweep in (Sweep.stored(), Sweep.unrolled()):
        call = partial(hypergradient, problem, problem.initial, tasks, Estimator(1.0, sweep))
        call()
        assert parts.bytes(1.0, Truncated(), sweep) == pytest.approx(peak_bytes(call, known), rel=0.2)
