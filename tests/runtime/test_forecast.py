"""The forecast of bytes against the meter, of seconds against its own counts; loop or vmap by the clock."""

from functools import partial

import pytest
import torch

from ufom_runtime import (
    EXACT,
    FOM,
    RECOMPUTED,
    UFOM,
    Estimator,
    choose_chunk,
    forecast,
    hypergradient,
    peak_bytes,
)
from ufom_runtime.measure import clock
from ufom_runtime.measure import forecast as forecasting
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import CostModel, Sweep, Truncated


@pytest.mark.parametrize(
    "make",
    [partial(quadratic, dim=200, r=60, alpha=0.01), partial(digits_few_shot, filters=4, r=12)],
    ids=["quadratic", "digits"],
)
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(
    "estimator",
    [FOM, EXACT, RECOMPUTED, UFOM(0.5, Sweep.checkpointed(4), Truncated(7)), Estimator(1.0, Sweep.unrolled())],
    ids=["fom", "stored", "recomputed", "checkpointed", "unrolled"],
)
def test_bytes_are_foreseen_within_a_fifth(make, chunk, estimator):
    problem = make()
    theta, tasks = problem.initial, problem.sample(2, torch.Generator().manual_seed(0))
    coins = torch.full((2,), estimator.q > 0)
    known = (theta, *Tasks.of(tasks).parts)
    peak = peak_bytes(lambda: hypergradient(problem, theta, tasks, estimator, coins=coins, chunk=chunk), known)
    assert forecast(problem, theta, tasks, estimator, chunk=chunk).bytes == pytest.approx(peak, rel=0.2)


def test_seconds_are_the_counts_times_a_steps(monkeypatch):
    problem = quadratic(dim=2, r=9)
    tasks = problem.sample(4, torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        forecasting, "measure_cost", lambda *_, sweep, **__: CostModel(r=9, c1=2.0, c2=5.0, sweep=sweep)
    )
    monkeypatch.setattr(forecasting, "median_seconds", lambda function, device: (function(), 6.0)[1])
    estimator = UFOM(0.25, Sweep.checkpointed(2), Truncated(3))
    # 4 tasks: 9 gradients, 3 products, what stands outside the loop (6 s for the 2 tasks run together), and the coin's
    coin = Sweep.checkpointed(2).extra_steps(6) * 2 + 6 * 5
    assert forecast(problem, problem.initial, tasks, estimator, chunk=2).seconds == 4 * (18 + 15 + 3 + 0.25 * coin)


@pytest.mark.parametrize(("together", "chunk"), [(0.9, None), (1.1, 1)])
def test_loop_or_vmap_by_the_clock(monkeypatch, together, chunk):
    problem = quadratic(dim=2)
    tasks = problem.sample(3, torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        clock,
        "measure_cost",
        lambda p, t, tasks, sweep, **_: CostModel(r=10, sweep=sweep, c1=1.0, c2=together if len(tasks) == 3 else 1.0),
    )
    assert choose_chunk(problem, problem.initial, tasks, EXACT) == chunk
    assert choose_chunk(problem, problem.initial, tasks, EXACT, compile=True) == (chunk or 3)


def test_the_clock_itself_is_asked():
    problem = quadratic(dim=2)
    assert choose_chunk(problem, problem.initial, problem.sample(3, torch.Generator().manual_seed(0)), FOM) in (None, 1)
