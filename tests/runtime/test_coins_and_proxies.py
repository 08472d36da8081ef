"""Stratified coins, scaled proxies, proxies of other kinds and the backward roulette, by enumerating every outcome."""

import itertools
import math

import pytest
import torch

from tests.oracles import unrolled_gradient
from tests.runtime.conftest import F64, coupled
from ufom_runtime import RECOMPUTED, UFOM, BilevelProblem, Implicit, Roulette, count_calls, hypergradient
from ufom_runtime.coins import draw_coins
from ufom_runtime.problem import Tasks
from ufom_theory import Sweep, Truncated, UfomError
from ufom_theory.coins import stratified_second_moment
from ufom_theory.laws import Progress
from ufom_theory.roulette import roulette_moments

R = 5
SWEEPS = [Sweep.stored(), Sweep.recomputed(), Sweep.checkpointed(1), Sweep.unrolled()]


def sq(x):
    return x.square().sum(-1).mean().item()


@pytest.fixture(scope="module")
def case():
    """A problem, two tasks, and their gradients that keep K = 0 … r backward steps, from autodiff."""
    problem = coupled(R)
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    return problem, tasks, [unrolled_gradient(problem, problem.initial, tasks, k) for k in range(R + 1)]


@pytest.mark.parametrize(("q", "weight"), [(0.5, "B/k"), (2 / 3, "B/k"), (0.2, "1/q")])
def test_stratified_coins_and_a_scaled_proxy_by_enumeration(case, q, weight):
    problem, tasks, gradients = case
    exact, proxy, b = gradients[R], 0.7 * gradients[0], 3
    g, f = exact.mean(0), proxy.mean(0)
    progress = Progress(
        sq(g), sq(exact) - sq(g), sq(exact - proxy), (g @ f).item(), sq(f), sq(proxy) - sq(f)
    )  # fmt: skip
    least, share = math.floor(q * b + 1e-9), q * b - math.floor(q * b + 1e-9)
    mean, second = torch.zeros_like(g), 0.0
    for chosen in itertools.product(range(2), repeat=b):  # every batch of three from the two tasks
        for coins in itertools.product((False, True), repeat=b):
            k = sum(coins)
            chance = {least: 1 - share, least + 1: share}.get(k, 0.0) / (2**b * math.comb(b, k))
            if chance < 1e-12:
                continue
            estimator = UFOM(q, scale=0.7, coin="stratified")
            found = hypergradient(problem, problem.initial, tasks[list(chosen)], estimator, coins=torch.tensor(coins))
            mean, second = mean + chance * found, second + chance * sq(found)
    assert (mean - g).norm() <= 1e-12 * g.norm()
    assert second == pytest.approx(stratified_second_moment(progress, q, b, weight), rel=1e-12)


def test_stratified_coins_as_they_are_drawn(case):
    problem, tasks, _ = case
    draws = torch.stack([draw_coins(10, 0.25, torch.Generator().manual_seed(i), "stratified") for i in range(2000)])
    counts = draws.sum(1)
    assert set(counts.tolist()) == {2, 3}
    assert counts.double().mean().item() == pytest.approx(2.5, abs=4 * 0.5 / 2000**0.5)
    assert draws.double().mean(0).tolist() == pytest.approx([0.25] * 10, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    coins = torch.tensor([True, True])
    with pytest.raises(UfomError, match="corrects 1 of 2 tasks, but the coins correct 2"):
        hypergradient(problem, problem.initial, tasks, UFOM(0.5, coin="stratified"), coins=coins)
    with pytest.raises(UfomError, match="scale"):
        UFOM(0.5, scale=float("nan"))


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_the_roulette_by_enumeration(case, sweep):
    problem, tasks, gradients = case
    levels, survival = (0, 2, 3, R), (0.8, 0.5, 0.2)
    roulette = Roulette(levels, survival, sweep)
    rows, stack = problem.initial.expand(2, -1), Tasks.of(tasks)
    chances = [p - q for p, q in itertools.pairwise((1.0, *survival, 0.0))]
    found = [roulette.at(problem, rows, stack, torch.full((2,), i)) for i in range(4)]
    mean = sum(p * x for p, x in zip(chances, found, strict=True))
    second = sum(p * sq(x) for p, x in zip(chances, found, strict=True))
    assert (mean - gradients[R]).norm() <= 1e-12 * gradients[R].norm()
    d2 = [sq(gradients[R] - gradients[k]) for k in levels[:-1]]
    expected = roulette_moments(survival, d2, sq(gradients[R]), roulette.costs())
    assert second == pytest.approx(expected[0], rel=1e-12)
    calls = roulette.calls(R)
    assert calls.gradients + calls.hessian_vector_products == pytest.approx(expected[1])
    for reached in itertools.product(range(4), repeat=2):
        with count_calls() as made:
            mixed = roulette.at(problem, rows, stack, torch.tensor(reached))
        assert (mixed - torch.stack([found[i][row] for row, i in enumerate(reached)])).norm() <= 1e-13
        price = sum(roulette.costs()[: i + 1].sum() for i in reached)
        assert made.gradients + made.hessian_vector_products == price


def test_one_level_of_the_roulette_is_ufom(case):
    problem, tasks, _ = case
    u = torch.rand(2, generator=torch.Generator().manual_seed(3), dtype=F64)
    q = float(u.mean())
    a, b = (
        hypergradient(problem, problem.initial, tasks, e, generator=torch.Generator().manual_seed(3), per_task=True)
        for e in (Roulette((0, R), (q,)), UFOM(q))
    )
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_the_tuned_roulette_runs_in_few_states(case):
    problem, tasks, _ = case
    roulette = Roulette.tuned(problem, problem.initial, tasks, (0, 2, R))
    assert 1 >= roulette.survival[0] >= roulette.survival[1] > 0
    assert roulette.states(R) == 1


def test_any_proxy_is_debiased():
    problem = BilevelProblem(
        lambda theta, phi, task: 0.5 * (phi - theta * task).square().sum(), lambda theta, phi, task: phi.cos().sum(),
        lambda theta, task: torch.zeros_like(theta), torch.full((4,), 0.2, dtype=F64), initial=torch.ones(3, dtype=F64),
        tasks=torch.arange(1.0, 7.0, dtype=F64).reshape(2, 3),
    )  # fmt: skip
    theta, implicit = problem.initial, Implicit("neumann", steps=3, warn_above=1e9)
    proxy = hypergradient(problem, theta, problem.tasks, implicit, per_task=True)
    exact = unrolled_gradient(problem, theta, problem.tasks)
    estimator, q, c = UFOM(0.3, proxy=implicit, scale=0.8), 0.3, 0.8
    with count_calls() as calls:
        found = [
            hypergradient(problem, theta, problem.tasks, estimator, coins=torch.tensor(coins), per_task=True)
            for coins in ([False, False], [True, False], [False, True], [True, True])
        ]
    chances = [(1 - q) ** 2, q * (1 - q), q * (1 - q), q * q]
    mean = sum(p * x for p, x in zip(chances, found, strict=True))
    assert (mean - exact).norm() <= 1e-12 * exact.norm()
    second = sum(p * sq(x) for p, x in zip(chances, found, strict=True))
    assert second == pytest.approx(sq(exact) + (1 / q - 1) * sq(exact - c * proxy), rel=1e-12)
    own, exact_own = (sum(vars(method.calls(4)).values()) for method in (implicit, RECOMPUTED))
    assert calls.gradients + calls.hessian_vector_products == 8 * own + 4 * exact_own
    expected = estimator.calls(4)
    assert expected.gradients + expected.hessian_vector_products == pytest.approx(own + q * exact_own)
    assert estimator.states(4) == 1
    with count_calls() as calls:  # at q = 1 no proxy is needed
        hypergradient(problem, theta, problem.tasks, UFOM(1, proxy=implicit))
    expected = UFOM(1, proxy=implicit).calls(4)
    assert (calls.gradients, calls.hessian_vector_products) == (
        2 * expected.gradients,
        2 * expected.hessian_vector_products,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Roulette((1, 5), (0.5,)), "must rise from 0 to r"),
        (lambda: Roulette((0, 3, 3), (0.5, 0.5)), "must rise"),
        (lambda: Roulette((0, 3, 5), (0.5, 0.6)), "1 ≥ q_1 ≥ … ≥ q_n > 0"),
        (lambda: Roulette((0, 3, 5), (0.5,)), "one for each of the levels"),
        (
            lambda: hypergradient(coupled(4), torch.ones(3, dtype=F64), torch.ones(2, 3, dtype=F64),
                                  Roulette((0, 5), (0.5,)), generator=torch.Generator()),
            "must end at r = 4",
        ),
        (lambda: UFOM(0.5, proxy=UFOM(0.5)), "give FOM, HELD"),
        (lambda: UFOM(0.5, proxy=3), "give FOM, HELD"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()


def test_truncated_proxies_share_the_backward_steps(case):
    problem, tasks, gradients = case
    with count_calls() as calls:
        coins = torch.tensor([True, False])
        found = hypergradient(
            problem, problem.initial, tasks, UFOM(0.5, Sweep.stored(), Truncated(2)), coins=coins, per_task=True
        )
    expected = torch.stack([2 * gradients[R][0] - gradients[2][0], gradients[2][1]])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert calls.hessian_vector_products == R + 2
