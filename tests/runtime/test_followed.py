"""A scale that follows the run: unbiased given the past, by enumeration at every step; and nothing that grows."""

import gc
import itertools
import math
from dataclasses import replace

import pytest
import torch

from tests.oracles import unrolled_gradient
from tests.runtime.conftest import coupled
from ufom_runtime import UFOM, Implicit, Roulette, train
from ufom_runtime.methods.followed import FollowedScale
from ufom_theory import Sweep, Truncated, UfomError

R, N = 3, 3
PATTERNS = list(itertools.product((False, True), repeat=N))


def chances(q, coin):
    """The probability of each pattern of N coins."""
    if coin == "batch":
        return {(False,) * N: 1 - q, (True,) * N: q}
    if coin == "stratified":  # q = 2/3: two of three
        return {x: 1 / 3 for x in PATTERNS if sum(x) == 2}
    return {x: math.prod(q if c else 1 - q for c in x) for x in PATTERNS}


@pytest.mark.parametrize("coin", ["task", "batch", "stratified"])
def test_unbiased_at_every_step_given_the_past(coin):
    problem, q = coupled(R), 2 / 3
    tasks = problem.sample(N, torch.Generator().manual_seed(0))
    method, theta = UFOM(q, Sweep.stored(), Truncated(1), scale="followed", coin=coin), problem.initial
    state, past, generator = method.begin(), [], torch.Generator().manual_seed(1)
    for _ in range(4):
        g, f = unrolled_gradient(problem, theta, tasks), unrolled_gradient(problem, theta, tasks, 1)
        c = _expected(past, coin)
        assert method.scale(state) == pytest.approx(c, rel=1e-12)
        mean, second, exact = 0.0, 0.0, g.mean(0)
        for coins, p in chances(q, coin).items():
            found = method.direction(problem, theta, tasks, state, torch.tensor(coins))
            assert found.columns["c"] == pytest.approx(c, rel=1e-12)
            mean, second = mean + p * found.value, second + p * float((found.value - exact).square().sum())
        d = g - c * f
        spread = {
            "task": d.square().sum(1).mean() / N, "batch": d.mean(0).square().sum(),
            "stratified": (d - d.mean(0)).square().sum(1).sum() / (N - 1) / N,
        }[coin]  # fmt: skip
        assert (mean - exact).norm() <= 1e-12 * exact.norm()
        assert second == pytest.approx(float((1 / q - 1) * spread), rel=1e-12)
        step = method.direction(problem, theta, tasks, state, generator, per_task=True)
        torch.testing.assert_close(step.per_task.mean(0), step.value, rtol=1e-14, atol=0)
        corrected = (step.per_task - c * f).norm(dim=1) > 1e-9 * g.norm()
        past.append((g[corrected], f[corrected]))
        state, theta = step.state, theta - 0.05 * step.value


def _expected(past, coin, beta=0.95):
    cross = square = 0.0
    for g, f in past:
        if coin == "batch" and len(g):
            g, f = g.mean(0, keepdim=True) * len(g) ** 0.5, f.mean(0, keepdim=True) * len(f) ** 0.5
        elif coin == "stratified":
            g, f = g - g.mean(0), f - f.mean(0)
        if len(g):
            cross, square = beta * cross + float((g * f).sum()), beta * square + float((f * f).sum())
    return cross / square if square else 1.0


IMPLICIT = Implicit("neumann", steps=2, damping=20.0, step=0.01, warn_above=1e9)


@pytest.mark.parametrize(
    "method",
    [
        UFOM(0.4, scale="followed"),
        pytest.param(UFOM(0.4, proxy=IMPLICIT, scale="followed"), marks=pytest.mark.slow),
        pytest.param(UFOM(0.4, Sweep.unrolled(), coin="stratified"), marks=pytest.mark.slow),
        pytest.param(Roulette((0, 1, R), (0.6, 0.3)), marks=pytest.mark.slow),
    ],
    ids=["followed", "implicit", "stratified", "roulette"],
)
def test_many_steps_do_not_grow(method):
    problem, counts = coupled(R), []

    def count(theta):
        gc.collect()
        counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
        return {}

    train(
        problem, problem.initial, method, optimizer="sgd:1e-4", steps=32, batch=2, seed=0, log_every=8, evaluate=count
    )
    assert counts[-1] <= counts[1]


@pytest.mark.parametrize(("q", "batch", "finite"), [(0.3, 1, False), (0.3, 3, False), (0.7, 4, True)])
def test_what_has_no_spread_does_not_move_the_scale(q, batch, finite):
    """One corrected task, or tasks that are equal: the covariances within the batch are zero but for rounding."""
    problem = coupled(R)
    one = problem.sample(1, torch.Generator().manual_seed(0))
    problem = replace(problem, sample_tasks=None, tasks=one) if finite else problem
    method = UFOM(q, scale="followed", coin="stratified")
    run = train(problem, problem.initial, method, optimizer="sgd:0.01", steps=40, batch=batch)
    assert run.log.exact.max() == (1 if not finite else 3)
    assert (run.log.c == 1).all()


def test_bad_input_is_named():
    problem = coupled(R)
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    with pytest.raises(UfomError, match="is not a state of this method"):
        UFOM(0.5, scale="followed").direction(problem, problem.initial, tasks, (1.0, -1.0))
    with pytest.raises(UfomError, match="give UFOM"):
        FollowedScale(Roulette((0, 3), (0.5,)))
    with pytest.raises(UfomError, match="beta"):
        FollowedScale(UFOM(0.5), beta=1.0)
    with pytest.raises(UfomError, match="scale"):
        UFOM(0.5, scale="follow")
