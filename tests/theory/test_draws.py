"""Drawn inputs, mostly admissible, now and then spoiled: only `UfomError`s are raised, and answers are consistent."""

import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ufom_theory import (
    AssumptionConstants,
    CostModel,
    Moments,
    Sweep,
    Truncated,
    UfomError,
    bias_bound,
    bias_bound_printed,
    counted_candidates,
    diverging_problem,
    exponent,
    gradient_bound,
    optimal_q,
    plan,
    rate_bound,
    smoothness_bound,
    time_bound,
)

DRAWS = int(os.environ.get("UFOM_DRAWS", "120"))
NOT_A_NUMBER = [None, "x", [], [[1.0], [1.0, 2.0]], [0.1, 0.2, 0.3, 0.4, 0.5], -1, -0.5, float("nan"), float("inf")]
TINY_OR_HUGE = [0, 0.0, 1e-320, 1e-200, 1e200, 1e308, 10**12, 10**30, True]
SWEEPS = [Sweep.stored(), Sweep.recomputed(), Sweep.unrolled(), Sweep.checkpointed(3)]


def decades(low: float, high: float) -> st.SearchStrategy[float]:
    """A number whose logarithm is uniform."""
    return st.floats(low, high).map(lambda x: 10.0**x)


def arrays(values: st.SearchStrategy) -> st.SearchStrategy:
    """One value, a row of two or a column of three: these broadcast."""
    column = st.lists(values, min_size=3, max_size=3).map(lambda x: [[value] for value in x])
    return st.one_of(values, values, st.lists(values, min_size=2, max_size=2), column)


@st.composite
def spoiled(draw, admissible: st.SearchStrategy[dict]) -> dict:
    """Arguments of which one in five has a value that is probably bad."""
    arguments = draw(admissible)
    name = draw(st.sampled_from([None] * 4 * len(arguments) + list(arguments)))
    if name is not None:
        arguments[name] = draw(st.sampled_from(NOT_A_NUMBER + TINY_OR_HUGE))
    return arguments


def run(judge, admissible: st.SearchStrategy[dict], **more) -> None:
    """Judge drawn arguments; most of them must get past the checks, and some must not."""
    counts: Counter[str] = Counter()

    @settings(deadline=None, max_examples=DRAWS // 2)
    @given(arguments=spoiled(admissible))
    def draw(arguments):
        counts["drawn"] += 1
        try:
            judge(**arguments)
        except UfomError:
            counts["refused"] += 1

    draw()
    assert 0 < counts["refused"] < 0.4 * counts["drawn"], counts


@st.composite
def problems(draw) -> dict:
    v2 = draw(arrays(decades(-3, 3)))
    a, b, rho = draw(st.tuples(decades(-6, 0), decades(-6, 0), st.floats(-1, 1)))
    cov = [[a * a, rho * a * b], [rho * a * b, b * b]]
    return {
        "d2": draw(st.one_of(arrays(decades(-9, 3)), st.just(0.0))),
        "v2": v2,
        "cov": draw(st.sampled_from([None, cov])),
        "mean_gradient_sq": (draw(st.floats(0, 1)) * np.asarray(v2)).tolist(),
        "r": draw(arrays(st.integers(1, 10**6))),
        "c1": draw(decades(-3, 3)),
        "c2": draw(arrays(decades(-3, 3))),
        "c1_sem": draw(st.sampled_from([0.0, 1e-4])),
        "sweep": draw(st.sampled_from(SWEEPS)),
        "proxy": Truncated(draw(st.integers(0, 1))),
        "m": draw(arrays(st.floats(0.3, 4))),
        "batch": draw(st.integers(1, 9)),
    }


def judge_prediction(d2, v2, cov, mean_gradient_sq, m, batch, **cost):
    model = CostModel(**cost)
    p = optimal_q(Moments(d2, v2, cov, mean_gradient_sq=mean_gradient_sq), model, m, batch=batch)
    q, (low, high) = np.asarray(p.q), (np.asarray(end) for end in p.interval)
    assert q.shape == low.shape == np.broadcast_shapes(*map(np.shape, (p.moments.d2, p.moments.v2, p.m)), model.shape)
    assert np.all((low >= 0) & (low <= high * (1 + 1e-9)) & (high <= 1) & (q >= 0) & (q <= 1))
    given = np.concatenate([np.ravel(x) for x in (model.c1, model.c2, p.moments.v2, p.m)])
    if given.min() < 1e-15 or given.max() > 1e15:  # there (19) itself loses its digits
        return
    assert np.all((low <= q * (1 + 1e-9)) & (q <= high * (1 + 1e-9)))
    certain = (low == q) & (high == q)
    pays = np.asarray(p.pays)
    assert np.all(pays[certain & (q < 1)] == "yes")
    assert np.all(pays[certain & (q == 1)] == "no")
    assert np.all(q[pays == "yes"] < 1)
    assert np.all(q[pays == "no"] == 1)
    assert cov is not None or np.any(np.asarray(model.c1_sem) > 0) or certain.all()
    assert np.all(np.asarray(p.speedup_over_exact) >= 1 - 1e-12)
    assert np.all(np.asarray(p.cost_over_fom) >= 1 - 1e-12)
    assert np.all(np.asarray(p.why, dtype=object) != "")
    assert not np.isnan(p.dq_dd2).any()
    assert not np.isnan(p.dq_dv2).any()
    assert not np.isnan(p.kappa).any()
    if q.min() > 1e-9:  # 0.0 where D² = 0
        best = np.asarray(model.time(p.q, p.moments, p.m))
        for other in (1.0, q / 2, np.minimum(2 * q, 1.0)):
            assert np.all(best <= np.asarray(model.time(other, p.moments, p.m)) * (1 + 1e-9))


def test_predictions():
    run(judge_prediction, problems())


@st.composite
def choices(draw) -> dict:
    longer = draw(st.lists(st.integers(1, 8), unique=True, max_size=2))
    return {
        **{f"d2_{k}": draw(decades(-6, 1)) for k in (0, *longer)},
        "v2": draw(decades(-3, 3)),
        "r": draw(st.integers(8, 60)),
        "c1": draw(decades(-2, 2)),
        "c2": draw(decades(-2, 2)),
        "memory_slots": draw(st.integers(1, 70)),
        "m": draw(st.floats(0.3, 4)),
    }


def judge_plan(v2, r, c1, c2, memory_slots, m, **biases):
    moments = {Truncated(int(name[3:])): Moments(d2, v2) for name, d2 in biases.items()}
    found = plan(counted_candidates(moments, r, c1, c2, memory_slots), memory_slots, m)
    assert found[0].slower == 1
    assert [c.slower for c in found] == sorted(c.slower for c in found)
    for c in found:
        assert c.bytes <= memory_slots
        if c.label.proxy:
            alone = optimal_q(moments[c.label.proxy], c.candidate.cost, m).q
            assert c.q == pytest.approx(alone, rel=1e-9)
        else:
            assert c.q == 1


def test_plans():
    run(judge_plan, choices())


@st.composite
def assumptions(draw) -> dict:
    r = draw(st.integers(1, 10))
    return {
        **{name: draw(decades(-3, 0.3)) for name in ("M1", "M2", "L1", "L2", "L3")},
        "alphas": draw(st.lists(decades(-3, -0.5), min_size=r, max_size=r)),
        "kept": draw(st.integers(0, r)),
        "own": draw(st.booleans()),
        "epsilon": draw(st.floats(0.01, 0.3)),
        "gap": draw(decades(-2, 2)),
        "delta": draw(decades(-4, 0)),
    }


def judge_bounds(alphas, kept, own, epsilon, gap, delta, **five):
    constants, proxy = AssumptionConstants(**five), Truncated(kept)
    own = bool(own)
    d = bias_bound(constants, alphas, proxy, own)
    v, s = gradient_bound(constants, alphas, own), smoothness_bound(constants, alphas, own)
    assert 0 <= d <= bias_bound(constants, alphas, None, own) * (1 + 1e-12) <= v * (1 + 1e-11)
    assert d <= bias_bound_printed(constants, alphas) * (1 + 1e-12)
    assert (d == 0) == (kept == len(alphas)) or min(constants.L1, constants.L2) == 0 or constants.M1 + own < 1e-9
    moments, cost = Moments(d * d, v * v), CostModel(r=len(alphas), proxy=proxy)
    p = optimal_q(moments, cost, exponent(epsilon))
    assert rate_bound(gap, s, v * v, alphas) >= gap / sum(alphas) * (1 - 1e-12)
    soonest = time_bound(moments, cost, p.q or 1e-6, gap, s, delta, epsilon)
    assert soonest <= time_bound(moments, cost, 1.0, gap, s, delta, epsilon) * (1 + 1e-9)


def test_bounds():
    run(judge_bounds, assumptions())


@st.composite
def two_tasks(draw) -> dict:
    alpha, shares = draw(decades(-3, 1)), draw(st.tuples(st.floats(0.05, 0.3), st.floats(0.4, 0.6)))
    return {
        "D": draw(decades(-3, 3)),
        "r": draw(st.integers(1, 10)),
        "alpha": alpha,
        "a": draw(st.permutations([share / alpha for share in shares])),
    }


def judge_two_tasks(D, r, alpha, a):
    problem = diverging_problem(D, r, alpha, a)
    first_order, exact = problem.gradients(problem.theta_fo)
    assert abs(first_order.mean()) <= 1e-6 * np.abs(first_order).max()
    assert exact.mean() ** 2 == pytest.approx(2 * D, rel=1e-5)


def test_diverging_problems():
    run(judge_two_tasks, two_tasks())
