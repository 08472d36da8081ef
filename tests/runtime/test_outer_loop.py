"""Outer SGD against a loop written out, and against the toy's closed form."""

import pytest
import torch

from tests.runtime.conftest import F64
from ufom_runtime import EXACT, FOM, RECOMPUTED, REPTILE, UFOM, AdaptiveUFOM, Estimator, hypergradient, outer_sgd
from ufom_runtime.coins import draw_coins
from ufom_runtime.memory import LiveBytes
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.problems.synthetic import synthetic
from ufom_runtime.training.seeds import generator
from ufom_theory import Sweep, Truncated, UfomError


def gamma(k):
    return 1 / (k + 20)


def test_against_a_loop_written_out():
    problem, theta = quadratic(), quadratic().initial
    run = outer_sgd(problem, theta, UFOM(0.3), gamma, 7, seed=5, batch=3)
    for k in range(1, 8):
        tasks = problem.sample(3, generator(5, k, "tasks"))
        coins = draw_coins(3, 0.3, generator(5, k, "coins"))
        theta = theta - gamma(k) * hypergradient(problem, theta, tasks, UFOM(0.3), coins=coins)
    assert torch.equal(run.theta, theta)
    assert run.log.step.tolist() == list(range(1, 8))
    calls = run.log.exact.sum()
    assert run.log.gradients.iloc[-1] == 7 * 3 * 11 + calls * 36
    assert run.log.hessian_vector_products.iloc[-1] == calls * 10


def test_same_seed_same_bits_and_tasks_paired_between_estimators():
    problem = quadratic()
    runs = [outer_sgd(problem, problem.initial, UFOM(0.5), [0.1] * 5, 5, seed=s).theta for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(
        outer_sgd(problem, problem.initial, UFOM(1.0), gamma, 5).theta,
        outer_sgd(problem, problem.initial, UFOM(1.0), gamma, 5, log_every=5).theta,
    )


def test_a_budget_ends_the_run_and_a_run_that_ended_does_not_go_on(tmp_path):
    problem = quadratic()

    def run(until, **kept):
        return outer_sgd(problem, problem.initial, UFOM(0.5), gamma, 9, log_every=2, until=until, **kept)

    whole = run(None)
    for _ in range(2):
        ended = run(lambda row: row["gradients"] >= 200, checkpoint=tmp_path / "run")
        assert ended.log.gradients.iloc[-2] < 200 <= ended.log.gradients.iloc[-1]
        assert ended.log.step.tolist() == whole.log.step[: len(ended.log)].tolist()
        shorter = outer_sgd(problem, problem.initial, UFOM(0.5), gamma, int(ended.log.step.iloc[-1]), log_every=2)
        assert torch.equal(ended.theta, shorter.theta)
    assert 1 < len(ended.log) < len(whole.log)


def test_exact_reaches_the_stationary_point_and_fom_its_own():
    problem = synthetic(alpha=0.1, r=5)
    start = torch.tensor([0.0], dtype=F64)
    for estimator, end in ((EXACT, problem.pair.theta_star), (FOM, problem.pair.theta_fo)):
        run = outer_sgd(problem, start, estimator, lambda k: 30 / (k + 20), 60, batch=64, log_every=60)
        assert run.theta.item() == pytest.approx(end, abs=0.3)
    assert abs(problem.pair.theta_star - problem.pair.theta_fo) > 0.5


def test_log_and_evaluation():
    problem, shares = quadratic(), []
    run = outer_sgd(
        problem, problem.initial, FOM, gamma, 10, log_every=4, evaluate=lambda t: {"norm": float(t.norm())},
        progress=shares.append,
    )  # fmt: skip
    assert run.log.step.tolist() == [4, 8, 10]
    assert run.log.norm.iloc[-1] == pytest.approx(float(run.theta.norm()))
    assert run.log.seconds.is_monotonic_increasing
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 3, "batch": 0}, "at least 1"),
        ({"steps": 2.5}, "must be an integer"),
        ({"steps": 3, "seed": -1}, "at least 0"),
        ({"steps": 3, "step_sizes": 0.1}, "give one a step"),
        ({"steps": 3, "step_sizes": lambda k: -0.1}, "> 0"),
        ({"steps": 3, "evaluate": lambda theta: 1.0}, "names and numbers"),
        ({"steps": 3, "step_sizes": [0.1]}, "for 3 steps: give one a step"),
        ({"steps": 400, "step_sizes": lambda k: 1e6}, r"inner_loss is inf at φ_0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    problem = quadratic()
    call = {"step_sizes": gamma, **arguments}
    with pytest.raises(UfomError, match=message):
        outer_sgd(problem, problem.initial, EXACT, **call)


@pytest.mark.parametrize(
    "estimator",
    [FOM, EXACT, RECOMPUTED, UFOM(0.5), UFOM(0.5, Sweep.checkpointed(2), Truncated(2)),
     Estimator(1.0, Sweep.unrolled()), AdaptiveUFOM(q_min=0.5), REPTILE],
)  # fmt: skip
def test_live_memory_does_not_grow_over_the_outer_steps(estimator):
    problem = quadratic(dim=30, r=5)
    with LiveBytes() as meter:
        outer_sgd(problem, problem.initial, estimator, gamma, 4)
        first = meter.live, meter.peak
        outer_sgd(problem, problem.initial, estimator, gamma, 12)
    assert (meter.live, meter.peak) == first
