"""AdaptiveUFOM(law="step"): unbiased given the past, q from the past alone, and of the most progress per cost."""

from itertools import product

import numpy as np
import pytest
import torch

from tests.oracles import unrolled_gradient
from tests.runtime.conftest import F64, coupled
from ufom_runtime import AdaptiveUFOM, count_calls, train
from ufom_runtime.coins import draw_coins
from ufom_runtime.methods.step_rule import StepState, choose
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.training.seeds import generator
from ufom_theory import CostModel, Sweep, UfomError

SUMS = {
    "means": torch.tensor([10.0, 6.0, 5.0, 30.0], dtype=F64),
    "norms": torch.tensor([20.0, 8.0, -3.0, 60.0], dtype=F64),
    "curved": torch.tensor([3.0, 4.0, 5.0, 10.0], dtype=F64),
}


def state_with(**changes):
    return StepState(**{"q": 0.3, "c": 0.7, "steps": 9, **SUMS, "mean": torch.linspace(1, 2, 3, dtype=F64), **changes})


def rule_of(outer="sgd:0.1", **options):
    return AdaptiveUFOM(law="step", outer=outer, sweep=Sweep.stored(), **options)


def tasks_of(problem, seed=0, n=3):
    return problem.sample(n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("q", "owed"), [(0.3, 0.0), (0.3, -1.0), (1.0, 0.0)])
def test_unbiased_given_the_past_by_enumeration(q, owed):
    problem, rule = coupled(), rule_of()
    tasks, mean = tasks_of(problem), torch.zeros(3, dtype=F64)
    for coins in product([True, False], repeat=3) if q < 1 else [(True,) * 3]:
        chance = np.prod([q if xi else 1 - q for xi in coins]) if q < 1 else 1.0
        given = torch.tensor(coins)
        found = rule.direction(problem, problem.initial, tasks, state_with(q=q, owed=owed), given)
        mean += chance * found.value
        assert found.corrected == sum(coins)
    exact = unrolled_gradient(problem, problem.initial, tasks).mean(0)
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-13)


def test_the_proxy_goes_alone_and_coins_correct_for_the_estimates_only():
    problem, rule = coupled(), rule_of(q_min=0.5, allow_biased=True)
    tasks, first = tasks_of(problem), unrolled_gradient(problem, problem.initial, tasks_of(problem), kept=0)
    mean = torch.zeros(3, dtype=F64)
    for coins in product([True, False], repeat=3):
        before = state_with(q=0.0, steps=1, owed=-1.0)
        found = rule.direction(problem, problem.initial, tasks, before, torch.tensor(coins), per_task=True)
        torch.testing.assert_close(found.per_task, first, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found.value, first.mean(0), rtol=1e-12, atol=1e-13)
        assert torch.equal(found.state.norms, before.norms) == (not any(coins))
        mean += found.state.mean / 8
    weight = 0.05 / (1 - 0.95**2)  # ḡ stays a mean of unbiased estimates
    exact = unrolled_gradient(problem, problem.initial, tasks).mean(0)
    torch.testing.assert_close(mean, (1 - weight) * before.mean + weight * exact, rtol=1e-12, atol=1e-13)


def test_q_is_a_function_of_the_past():
    problem, rule = quadratic(dim=3, r=5), rule_of("tuned")
    before = state_with()
    one, other = (
        rule.direction(problem, problem.initial, tasks_of(problem, seed), before, torch.tensor(coins))
        for seed, coins in ((0, [True, False, True]), (1, [False, False, False]))
    )
    assert (one.columns["q"], one.columns["c"]) == (other.columns["q"], other.columns["c"]) == (0.3, 0.7)
    assert one.state.q != other.state.q  # the next q knows both steps
    one, other = (train(problem, problem.initial, rule, [0.1] * 9, 9, seed=s, batch=3) for s in (1, 2))
    assert one.log.q[:4].tolist() == other.log.q[:4].tolist() == [1.0] * 4
    assert (one.log.q[5:] != other.log.q[5:]).all()


def law(outer, q, s, cost, batch):
    """Progress per cost of UFOM at q and of the proxy, written out from the sums of a state."""
    (w, g2, cross, f2), (n, dd, df, ff), (sd, hd, sg, hg) = (x.tolist() for x in (s.means, s.norms, s.curved))
    g2, cross, f2, c, v2 = g2 / w, cross / w, f2 / w, 1 + df / ff, (dd + 2 * df + ff) / n
    g2 = min(g2, v2)
    d2 = (dd + 2 * (1 - c) * df + (1 - c) ** 2 * ff) / n
    extra = (1 / q - 1) * d2 / batch
    second, price = g2 + (v2 - g2) / batch + extra, cost.c_det + q * cost.c_rnd
    kind, *numbers = outer.split(":")
    if kind == "tuned":
        return g2**2 / second / price, cross**2 / f2 / cost.c_det
    if kind == "adam":
        return g2 / second**0.5 / price, cross / f2**0.5 / cost.c_det
    rate = float(numbers[0]) if kind == "sgd" else float(numbers[1]) * (s.steps + 1) ** -float(numbers[0])
    curved = hg / sg * (second - extra) + hd / sd * extra
    return rate * (g2 - rate / 2 * curved) / price, rate * (cross - rate / 2 * hg / sg * f2) / cost.c_det


@pytest.mark.parametrize("outer", ["sgd:0.2", "sgd:0.05", "decay:0.5:0.7", "tuned", "adam:0.1"])
def test_the_q_chosen_has_the_most_progress_per_cost(outer):
    grid, cost, rng, chosen = np.linspace(0.05, 1, 4001), CostModel.of(11.0, 10.0), np.random.default_rng(0), []
    for _ in range(40):
        x = rng.standard_normal((2, 4)) @ rng.standard_normal((4, 50)) + rng.standard_normal((2, 1))  # d and F
        norms = torch.tensor([50.0, x[0] @ x[0], x[0] @ x[1], x[1] @ x[1]], dtype=F64)
        g2, f2 = rng.uniform(0.02, 1.2) * float(norms[1:] @ norms.new_tensor([1, 2, 1])) / 50, float(norms[3]) / 50
        means = torch.tensor([1.0, g2, rng.uniform(0, 1) * (g2 * f2) ** 0.5, f2], dtype=F64) * 7
        curved = torch.tensor([1.0, rng.uniform(0.1, 5), 1.0, rng.uniform(0.1, 5)], dtype=F64)
        before = state_with(means=means, norms=norms, curved=curved)
        found = choose(rule_of(outer, allow_biased=True), before, cost, 4)
        ours, alone = law(outer, grid, before, cost, 4)
        if max(ours.max(), alone) <= 0:
            continue  # no step makes progress: the rule takes what is least noisy, below
        chosen.append(found.q)
        if alone > ours.max():
            assert found.q == 0
        else:
            assert law(outer, found.q, before, cost, 4)[0] >= ours.max() * (1 - 1e-12)
        unbiased = choose(rule_of(outer), before, cost, 4)
        assert law(outer, unbiased.q, before, cost, 4)[0] >= ours.max() - 1e-12 * abs(ours.max()) or ours.max() <= 0
        assert unbiased.c == pytest.approx(1 + float(norms[2] / norms[3]))
    assert 0 in chosen
    assert len(set(chosen)) > 5


def test_where_no_q_makes_progress_the_exact_gradient_is_taken():
    noisy = state_with(means=torch.tensor([10.0, -1.0, -1.0, 30.0], dtype=F64))
    assert choose(rule_of("sgd:1"), noisy, CostModel(r=5), 3).q == 1
    assert choose(rule_of("tuned"), noisy, CostModel(r=5), 3).q <= 1


@pytest.mark.parametrize("batch", [1, 3])
def test_the_averages_against_the_rule_written_out(batch):
    problem, beta = quadratic(dim=3, r=5), 0.8
    rule, theta = rule_of("tuned", beta=beta, cost=CostModel.of(30.0, 5.0)), problem.initial
    run = train(problem, theta, rule, [0.1] * 12, 12, seed=7, batch=batch)
    means, norms, grads, log, now = torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64), [], [], StepState()
    for k in range(1, 13):
        log.append((now.q, now.c))
        tasks = problem.sample(batch, generator(7, k, "tasks"))
        coins = draw_coins(batch, now.q, generator(7, k, "coins"))
        exact, first = unrolled_gradient(problem, theta, tasks), unrolled_gradient(problem, theta, tasks, kept=0)
        g = (now.c * first + coins[:, None].double() / now.q * (exact - now.c * first)).mean(0)
        f = first.mean(0)
        if grads:
            weights = torch.tensor([beta**i for i in range(len(grads))][::-1], dtype=F64)
            mean = (weights[:, None] * torch.stack(grads)).sum(0) / weights.sum()
            means = beta * means + torch.stack([torch.ones((), dtype=F64), mean @ g, mean @ f, f @ f])
        if coins.any():
            d, p = (exact - first)[coins], first[coins]
            norms = beta * norms + torch.stack([coins.sum().double(), (d * d).sum(), (d * p).sum(), (p * p).sum()])
        grads.append(g)
        theta = theta - 0.1 * g
        now = choose(rule, StepState(now.q, now.c, k, means=means, norms=norms), CostModel.of(30.0, 5.0), batch)
    torch.testing.assert_close(run.theta, theta, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(run.log[["q", "c"]], log, rtol=1e-8)
    assert len({round(q, 6) for q, _ in log}) > 3


def test_the_curvatures_are_those_of_the_next_task_and_are_paid_for():
    problem = quadratic(dim=4, r=6)
    tasks, rule, r = tasks_of(problem), rule_of("sgd:0.1"), 6
    with count_calls() as calls:
        after = rule.direction(problem, problem.initial, tasks, rule.begin()).state
    assert calls.gradients == (3 + 3) * (r + 1)  # exact gradients of the batch, and three more
    assert calls.hessian_vector_products == (3 + 3) * r
    exact = unrolled_gradient(problem, problem.initial, tasks)[0]
    d = exact - unrolled_gradient(problem, problem.initial, tasks, kept=0)[0]
    hessian = problem._maps()[1]
    expected = torch.stack([d @ d, d @ hessian @ d, exact @ exact, exact @ hessian @ exact])
    torch.testing.assert_close(after.curved, expected, rtol=1e-9, atol=0)
    assert after.owed < 0
    with count_calls() as calls:
        rule.direction(problem, problem.initial, tasks, after)
    assert calls.gradients == 3 * (r + 1)
    assert torch.equal(rule_of("tuned").direction(problem, problem.initial, tasks).state.curved, after.curved * 0)


def test_curvatures_take_three_percent_of_the_calls():
    problem = quadratic(dim=3, r=4)
    log = train(problem, problem.initial, rule_of("sgd:0.1"), optimizer="sgd:0.1", steps=80, batch=4).log
    without = 4 * 80 * 5 + int(log.exact.sum()) * 4
    assert 0.02 < (log.gradients + log.hessian_vector_products).iloc[-1] / without - 1 < 0.05


@pytest.mark.parametrize("optimizer", ["sgd:0.1", 0.1])
def test_the_rule_is_told_the_optimizer_of_train(optimizer):
    problem = quadratic(dim=3, r=4)
    rules = rule_of("sgd:0.1"), AdaptiveUFOM(law="step", sweep=rule_of("sgd:0.1").sweep)
    told, asked = (train(problem, problem.initial, rule, optimizer=optimizer, steps=9, batch=3).theta for rule in rules)
    assert torch.equal(told, asked)
    with pytest.raises(UfomError, match=r"who takes the outer steps: give outer='sgd:0.05' to the rule, or optimizer"):
        train(problem, problem.initial, rules[1], [0.1] * 9, 9, batch=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "steps"}, "law 'steps' is unknown: use paper or step"),
        ({"law": "step", "outer": "sgd"}, "'sgd' does not name an outer optimizer"),
        ({"law": "step", "outer": "tuned", "m": 1.0}, r"\['m'\] are read by law='paper' alone"),
        ({"law": "step", "outer": "tuned", "scale": 0.1, "variant": "released"}, r"\['scale', 'variant'\] are read by"),
        ({"outer": "tuned"}, "are read by law='step' alone"),
        ({"allow_biased": True}, "are read by law='step' alone"),
        ({"law": "step", "outer": "tuned", "allow_biased": 1}, "allow_biased = 1 must be of type bool"),
        ({"cost": 3.0}, "cost = 3.0 must be of type CostModel"),
        ({"cost": CostModel(r=[3, 4])}, r"cost has shape \(2,\): give one cost"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(UfomError, match=message):
        AdaptiveUFOM(**options)


@pytest.mark.parametrize(
    "changes",
    [{"q": 0.01}, {"q": 1.5}, {"steps": 0}, {"owed": np.nan}, {"mean": torch.zeros(2)}, {"norms": SUMS["means"][:3]}],
)
def test_a_state_that_the_rule_never_has_is_refused(changes):
    problem = coupled()
    with pytest.raises(UfomError, match="is not a state of this rule"):
        rule_of().direction(problem, problem.initial, Tasks.of(tasks_of(problem)), state_with(**changes))
