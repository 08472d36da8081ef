"""Adaptive UFOM against (21)–(24) written out, with gradients by autodiff through the unrolled loop."""

import math

import numpy as np
import pytest
import torch

from tests.oracles import unrolled_gradient
from tests.runtime.conftest import F64, coupled
from ufom_runtime import UFOM, AdaptiveUFOM, hypergradient, outer_sgd
from ufom_runtime.coins import draw_coins
from ufom_runtime.methods.adaptive import AdaptiveState
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.synthetic import synthetic
from ufom_runtime.training.seeds import generator
from ufom_theory import Sweep, Truncated, UfomError


def root_of_21(d2, v2, r):
    """q* at ε = 0 by numpy's polynomial roots, 1 where (20) fails; counts of Proposition 1."""
    c_det, c_rnd = r + 1, r * (r - 1) / 2 + r
    if 2 * d2 * (c_det + c_rnd) >= c_rnd * v2:
        return 1.0
    roots = np.roots([c_rnd * (v2 - d2), -d2 * c_rnd, -2 * d2 * c_det])
    return float(roots[(roots > 0) & (roots < 1)].item())


@pytest.mark.parametrize("variant", ["printed", "released"])
def test_against_the_rule_written_out(variant):
    problem, r = coupled(), 5
    theta = problem.initial
    rule = AdaptiveUFOM(q_min=0.3, beta=0.8, scale=0.1, variant=variant)
    run = outer_sgd(problem, theta, rule, lambda k: 0.1, 12, seed=7, batch=3)
    q, d_sm, v_sm, k_upd, log = 0.3, 0.0, 0.0, 0, []
    for k in range(1, 13):
        known = (0.1 * d_sm / (1 - 0.8**k_upd), v_sm / (1 - 0.8**k_upd)) if k_upd else (math.nan, math.nan)
        log.append((q, *known))
        tasks = problem.sample(3, generator(7, k, "tasks"))
        coins = draw_coins(3, q, generator(7, k, "coins"))
        exact, first = unrolled_gradient(problem, theta, tasks), unrolled_gradient(problem, theta, tasks, kept=0)
        estimate = torch.where(coins[:, None], first + (exact - first) / q, first)
        theta = theta - 0.1 * estimate.mean(0)
        if coins.any():
            overwritten = estimate if variant == "released" else first
            d_sm = 0.8 * d_sm + 0.2 * float(((overwritten - exact)[coins] ** 2).sum(1).mean())
            v_sm = 0.8 * v_sm + 0.2 * float((exact[coins] ** 2).sum(1).mean())
            k_upd += 1
            weight = 1 - 0.8**k_upd
            q = max(root_of_21(0.1 * d_sm / weight, v_sm / weight, r), 0.3)
    torch.testing.assert_close(run.theta, theta, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(run.log[["q", "d2", "v2"]], log, rtol=1e-8)
    assert 4 <= k_upd < 12  # batches without a single ξ = 1 were among them
    assert len({round(x, 6) for x, *_ in log}) > 2


@pytest.mark.parametrize(
    ("q", "sweep", "proxy"),
    [(0.05, Sweep.recomputed(), 0), (0.6, Sweep.checkpointed(1), 2), (1.0, Sweep.stored(), 0)],
)
def test_a_step_is_that_of_ufom_and_costs_no_more(q, sweep, proxy):
    problem = coupled()
    tasks = problem.sample(6, torch.Generator().manual_seed(0))
    rule = AdaptiveUFOM(q_min=q, sweep=sweep, proxy=Truncated(proxy))
    theta = problem.initial
    found = rule.direction(problem, theta, tasks, rule.begin(), torch.Generator().manual_seed(1))
    fixed = UFOM(q, sweep, Truncated(proxy))
    assert torch.equal(
        found.value, hypergradient(problem, theta, tasks, fixed, generator=torch.Generator().manual_seed(1))
    )
    assert found.corrected == int(draw_coins(6, q, torch.Generator().manual_seed(1)).sum())
    assert found.state.updates == (found.corrected > 0)
    fixed_log, adaptive_log = (outer_sgd(problem, theta, e, [0.1], 1, batch=6).log for e in (fixed, rule))
    columns = ["gradients", "hessian_vector_products", "exact"]
    assert fixed_log[columns].equals(adaptive_log[columns])


def test_printed_and_released_estimates_differ_by_the_square_of_1_over_q_minus_1():
    for q, factor in ((0.05, 361.0), (0.5, 1.0), (1.0, 0.0)):
        printed, released = (AdaptiveUFOM(q_min=q, variant=v) for v in ("printed", "released"))
        after = [rule.update(rule.begin(), 2.0, 3.0, r=10) for rule in (printed, released)]
        assert after[1].d2_sm == pytest.approx(factor * after[0].d2_sm, rel=1e-12)
        assert after[0].v2_sm == after[1].v2_sm
        assert printed.estimates(after[0]) == pytest.approx((2.0, 3.0), rel=1e-12)  # (22) undoes the start at 0


def test_at_a_fixed_theta_the_estimates_are_those_of_the_tasks():
    problem, theta, beta = synthetic(), torch.tensor([-50.0], dtype=F64), 0.9
    exact = unrolled_gradient(problem, theta, problem.tasks)
    bias = exact - unrolled_gradient(problem, theta, problem.tasks, kept=0)
    rule = AdaptiveUFOM(q_min=0.1, beta=beta)
    log = outer_sgd(problem, theta, rule, lambda k: 1e-300, 40, batch=4, log_every=40).log
    for name, squares in (("d2", bias.square().sum(1)), ("v2", exact.square().sum(1))):
        error = float(squares.std(unbiased=False)) * math.sqrt(
            (1 - beta) / (1 + beta)
        )  # of one task an update: at most
        assert log[name].item() == pytest.approx(float(squares.mean()), abs=5 * error)
    assert log.q.item() == pytest.approx(max(0.1, root_of_21(log.d2.item(), log.v2.item(), 10)), rel=1e-9)
    assert 0.1 < log.q.item() < 0.3  # theory: q* = 0.1119 here


def test_without_a_coin_nothing_is_learnt_and_at_zero_nothing_is_chosen():
    problem = coupled()
    rule = AdaptiveUFOM(q_min=1e-9)
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    before = AdaptiveState(0.001, 0.1, 0.5, 3)
    found = rule.direction(problem, problem.initial, tasks, before, torch.Generator().manual_seed(1))
    assert (found.corrected, found.state) == (0, before)
    assert found.columns["q"] == 0.001
    zero = rule.update(AdaptiveState(0.2), 0.0, 0.0, r=5)
    assert zero == AdaptiveState(0.2, 0.0, 0.0, 1)
    assert rule.update(zero, 0.0, 1.0, r=5).q == 1e-9  # D² = 0 < V²: the floor


def test_one_task_makes_one_update_with_the_mean_of_those_corrected():
    problem = coupled()
    tasks, rule = problem.sample(5, torch.Generator().manual_seed(2)), AdaptiveUFOM(q_min=0.5)
    coins = draw_coins(5, 0.5, torch.Generator().manual_seed(8))
    assert 1 < int(coins.sum()) < 5
    seen = Tasks.of(tasks).take(torch.nonzero(coins)[:, 0])
    exact = unrolled_gradient(problem, problem.initial, seen)
    bias = exact - unrolled_gradient(problem, problem.initial, seen, kept=0)
    state = rule.direction(problem, problem.initial, tasks, rule.begin(), torch.Generator().manual_seed(8)).state
    assert state.updates == 1
    found = torch.tensor(rule.estimates(state), dtype=F64)
    torch.testing.assert_close(found, torch.stack([x.square().sum(1).mean() for x in (bias, exact)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_min": 0.0}, "q_min = 0 must be a finite number > 0"),
        ({"q_min": 1.5}, "0 < q_min ≤ 1"),
        ({"beta": 1.0}, "0 < beta < 1"),
        ({"beta": math.nan}, "beta = nan"),
        ({"scale": -1}, "scale = -1"),
        ({"m": 0}, "m = 0"),
        ({"c1": 0.0}, "c1 = 0"),
        ({"variant": "corrected"}, "use printed or released"),
        ({"sweep": "stored"}, "must be of type Sweep"),
        ({"proxy": 2}, "must be of type Truncated"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(UfomError, match=message):
        AdaptiveUFOM(**options)
