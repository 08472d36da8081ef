"""The forecast of bytes against the meter, of seconds as a mean over the coins; loop or vmap by the clock."""

import itertools
from functools import partial

import pytest
import torch

from tests.grids import slow_unless
from ufom_runtime import (
    EXACT,
    FOM,
    RECOMPUTED,
    UFOM,
    Estimator,
    Roulette,
    choose_chunk,
    count_calls,
    forecast,
    hypergradient,
    measure_cost,
    peak_bytes,
)
from ufom_runtime.measure import calls, clock
from ufom_runtime.measure.calls import CallCost
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import CostModel, Sweep, Truncated, UfomError

MAKERS = {
    "quadratic": partial(quadratic, dim=200, r=16, alpha=0.01),
    "digits": partial(digits_few_shot, filters=3, r=6),
}
ESTIMATORS = {
    "fom": FOM,
    "stored": EXACT,
    "recomputed": RECOMPUTED,
    "checkpointed": UFOM(0.5, Sweep.checkpointed(4), Truncated(5)),
    "unrolled": Estimator(1.0, Sweep.unrolled()),
}


@pytest.mark.parametrize(
    ("make", "chunk", "name"),
    slow_unless(
        lambda case: case[:2] == ("quadratic", 2),
        itertools.product(MAKERS, (1, 2), ESTIMATORS),
    ),
)
def test_bytes_are_foreseen_within_a_tenth(make, chunk, name):
    problem, estimator = MAKERS[make](), ESTIMATORS[name]
    theta, tasks = problem.initial, problem.sample(2, torch.Generator().manual_seed(0))
    coins = torch.full((2,), estimator.q > 0)
    known = (theta, *Tasks.of(tasks).parts)
    peak = peak_bytes(lambda: hypergradient(problem, theta, tasks, estimator, coins=coins, chunk=chunk), known)
    assert forecast(problem, theta, tasks, estimator, chunk=chunk).bytes == pytest.approx(peak, rel=0.1)


def test_one_coin_a_batch_never_holds_a_mixed_one():
    problem = quadratic(dim=20, r=4)
    theta, tasks = problem.initial, problem.sample(8, torch.Generator().manual_seed(0))
    for coin, corrected in (("batch", (0, 8)), ("stratified", (2,)), ("task", range(9))):
        estimator = UFOM(0.25, Sweep.stored(), Truncated(1), coin=coin)
        known = (theta, *Tasks.of(tasks).parts)
        peak = max(
            peak_bytes(partial(hypergradient, problem, theta, tasks, estimator, coins=torch.arange(8) < k), known)
            for k in corrected
        )
        assert forecast(problem, theta, tasks, estimator).bytes == peak


@pytest.mark.parametrize(("coin", "expected"), [("task", None), ("batch", 0.7 * 2 + 0.3 * 9), ("stratified", 4.8)])
def test_seconds_are_the_mean_over_the_coins(coin, expected):
    cost = CallCost(4, {0: 2.0, 1: 4.5, 4: 9.0}, {0: 0.0, 1: 0.0, 4: 0.0}, 0)
    by_count = {0: 2.0, 1: 4.5, 2: 6.0, 3: 7.5, 4: 9.0}
    if expected is None:
        every = itertools.product((False, True), repeat=4)
        expected = sum(0.3 ** sum(x) * 0.7 ** (4 - sum(x)) * by_count[sum(x)] for x in every)
    assert cost.expected(0.3, coin) == pytest.approx(expected, rel=1e-12)  # stratified: 1 or, with chance .2, 2 of 4


def test_the_coins_of_thousands_of_tasks():
    """Binomial coefficients are beyond floating point there; the mean number of corrections decides the seconds."""
    n, q = 3000, 0.3
    cost = CallCost(n, {0: 2.0, 1: 2.5, n: 2.0 + 0.5 * n}, {}, 0)
    assert cost.expected(q) == pytest.approx(2.0 + 0.5 * n * q, rel=1e-9)


def test_the_very_call_is_made(monkeypatch):
    """Its coins, chunk and tasks are those that `hypergradient` will get, and its time is what it took."""
    problem, made = quadratic(dim=2, r=3), []
    tasks = problem.sample(4, torch.Generator().manual_seed(0))

    def call(problem, theta, tasks, estimator, *, coins, **options):
        made.append((len(tasks), int(coins.sum()), options))
        return 0.004 * (1 + int(coins.sum()))

    monkeypatch.setattr(calls, "hypergradient", call)
    monkeypatch.setattr(clock, "took", lambda function, _: function())
    found = forecast(problem, problem.initial, tasks, UFOM(0.5, coin="batch"), chunk=3)
    assert {count for _, count, _ in made} == {0, 1, 4}
    assert all((n, options) == (4, {"chunk": 3, "compile": False}) for n, _, options in made)
    assert found.seconds == pytest.approx(0.012)
    cost = measure_cost(problem, problem.initial, tasks, UFOM(0.1), seconds=0.05, repeats=5)
    assert 4 * cost.c_det == pytest.approx(0.004)
    assert 4 * cost.c_rnd == pytest.approx(0.016)
    with pytest.raises(UfomError, match="has no coins"):
        measure_cost(problem, problem.initial, tasks, Roulette((0, 3), (0.5,)))


def test_an_unsure_cost_is_refused(monkeypatch):
    problem = quadratic(dim=2, r=3)
    tasks, rounds = problem.sample(2, torch.Generator().manual_seed(0)), []
    monkeypatch.setattr(clock, "took", lambda *_: rounds.append(0) or 0.0023 + 0.02 * (len(rounds) // 2 % 2))
    with pytest.raises(UfomError, match=r"an inner step takes .* larger than a fifth of it: the machine is too busy"):
        measure_cost(problem, problem.initial, tasks, seconds=0.0, repeats=5)
    assert len(rounds) == 2 * 50


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


def test_a_draw_of_another_method_is_averaged(monkeypatch):
    """A roulette's calls, with a clock that counts calls: their mean is what it declares, within four errors."""
    problem, roulette = quadratic(dim=2, r=6), Roulette((0, 2, 6), (0.6, 0.2))
    tasks = problem.sample(8, torch.Generator().manual_seed(0))

    def seconds(function, device):
        with count_calls() as made:
            function()
        return made.price() / 8

    monkeypatch.setattr(clock, "took", seconds)
    found = forecast(problem, problem.initial, tasks, roulette)
    spread = sum(q * c**2 for q, c in zip(roulette.survival, roulette.costs()[1:], strict=True)) / 8 / 16
    assert abs(found.seconds - roulette.calls(6).price()) < 4 * spread**0.5
    assert found.bytes > 0


@pytest.mark.parametrize("sweep", [Sweep.stored(), Sweep.unrolled()], ids=str)
def test_the_steps_of_a_sweep_add_up_to_its_call(sweep):
    """By the operations that are run: C1·(r + 1) + C2·r against the exact gradient's; unrolled products cost less."""
    problem = digits_few_shot(filters=2, r=6)
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    cost = measure_cost(problem, problem.initial, tasks, sweep=sweep, seconds=0.0, repeats=5)
    exact = Estimator(1.0, sweep)
    hypergradient(problem, problem.initial, tasks, exact)
    made = clock.took(lambda: hypergradient(problem, problem.initial, tasks, exact), problem.initial.device)
    assert 2 * (cost.c_det + cost.c_rnd) == pytest.approx(made, rel=0.15)
    other = measure_cost(problem, problem.initial, tasks, seconds=0.0, repeats=5)
    assert (cost.c2 < 0.9 * other.c2) == (sweep == Sweep.unrolled())
