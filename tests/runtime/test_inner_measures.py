"""What measures, audits and trains, on problems with an inner update: against autograd through the unrolled loop."""

import re
from dataclasses import replace

import pytest
import torch

from tests.grids import slow_unless
from tests.runtime.test_inner_sweeps import UPDATES, draw, loop, oracle, problem_of, setting
from ufom_runtime import (
    ES,
    EXACT,
    HELD,
    UFOM,
    BilevelProblem,
    Estimator,
    Telescoping,
    audit_gradient,
    choose_chunk,
    forecast,
    hypergradient,
    measure_cost,
    measure_curvature,
    measure_moments,
    peak_bytes,
    train,
)
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import Sweep

FEW = draw(8, torch.Generator().manual_seed(5))


def written_by_hand(problem, held=False, slip=None):
    """The mean gradient of the unrolled loop, with a slip."""
    changed = slip(problem) if slip else problem
    return lambda theta, tasks: oracle(changed, theta.detach(), tasks, held)[0].mean(0)


SLIPS = ("lslr", "clipped adamw")  # the others are variants of these, or of the faults in test_audit


@pytest.mark.parametrize(
    ("name", "written", "verdict", "said"),
    slow_unless(lambda case: case[0] in SLIPS, [
        ("lslr", {}, "exact", "all 6 backward steps"),
        ("adam", {"held": True}, "first-order", "no second derivative"),
        (
            "clipped adamw",
            {"held": True},
            "wrong",
            r"the exact gradient with the inner gradients held constant \(HELD\)",
        ),
        ("adam", {"slip": lambda p: p.cut(5)}, "wrong", "after one inner step too few"),
        ("learnt", {"slip": lambda p: p.cut(7)}, "wrong", "after one inner step too many"),
        ("meta-sgd", {"slip": lambda p: replace(p, outer_loss=p.inner_loss)}, "wrong", "the inner loss for the outer"),
    ]),
)  # fmt: skip
def test_the_audit_tells_what_code_through_an_update_computes(name, written, verdict, said):
    problem, (theta, tasks) = problem_of(name), setting()
    found = audit_gradient(written_by_hand(problem, **written), problem, theta, tasks)
    assert found.verdict == verdict
    assert re.search(said, found.why)


@pytest.mark.parametrize("name", ["adam", "clipped adamw"])
def test_moments_of_held_gradients(name):
    problem, (theta, _) = problem_of(name), setting()
    exact, held = (oracle(problem, theta, FEW, h)[0] for h in (False, True))
    found = measure_moments(problem, theta, FEW, proxy=HELD)
    assert found.d2 == pytest.approx(float((held - exact).square().sum(1).mean()), rel=1e-9)
    assert found.v2 == pytest.approx(float(exact.square().sum(1).mean()), rel=1e-9)


def test_curvature_of_held_gradients():
    problem, (theta, tasks) = replace(problem_of("adam"), tasks=setting()[1], sample_tasks=None), setting()
    exact, held = (oracle(problem, theta, tasks, h)[0] for h in (False, True))

    def value(t):
        each = zip(*tasks, strict=True)
        return sum(problem.outer_loss(t, loop(problem, t, task), task) for task in each) / len(exact)

    hessian = torch.autograd.functional.hessian(value, theta)
    d = exact - held
    expected = float((d @ hessian * d).sum() / d.square().sum())
    assert measure_curvature(problem, theta, proxy=HELD).curvature_correction == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("estimator", [EXACT, HELD, UFOM(0.5, Sweep.checkpointed(2), proxy=HELD)])
@pytest.mark.parametrize("name", slow_unless(lambda name: name == "adam", ["adam", "learnt"]))
def test_bytes_are_foreseen_within_a_fifth(name, estimator):
    plain = quadratic(dim=200, alpha=0.01)
    parts = plain.inner_loss, plain.outer_loss, plain.start
    problem = BilevelProblem(*parts, update=UPDATES[name], steps=8, sample_tasks=plain.sample_tasks)
    theta, tasks = plain.initial, plain.sample(2, torch.Generator().manual_seed(0))
    coins = torch.full((2,), estimator.q > 0)
    hypergradient(problem, theta, tasks, estimator, coins=coins)  # checks and layouts are kept
    peak = peak_bytes(lambda: hypergradient(problem, theta, tasks, estimator, coins=coins, chunk=2), (theta, tasks))
    found = forecast(problem, theta, tasks, estimator, chunk=2)
    assert found.bytes == pytest.approx(peak, rel=0.2)
    assert found.seconds > 0


def test_the_clock_times_a_step_of_an_update():
    problem, (theta, tasks) = problem_of("adam"), setting()
    cost = measure_cost(problem, theta, tasks, seconds=0.05, repeats=5)
    assert cost.r == problem.r
    assert cost.c1 > 0
    assert cost.c2 > 0
    assert choose_chunk(problem, theta, tasks, EXACT) in (1, None)


def test_evolution_strategies_are_differences_of_the_outer_loss():
    problem, (theta, tasks), sigma = problem_of("adam"), setting(), 0.01
    found = hypergradient(problem, theta, tasks, ES(sigma), generator=torch.Generator().manual_seed(7), per_task=True)
    noise = torch.randn(2, len(theta), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for row, e, task in zip(found, noise, zip(*tasks, strict=True), strict=True):
        ahead, behind = (
            problem.outer_loss(t, loop(problem, t.requires_grad_(), task), task).detach()
            for t in (theta + sigma * e, theta - sigma * e)
        )
        torch.testing.assert_close(row, e * (ahead - behind) / (2 * sigma))


def test_telescoping_is_tuned_to_the_differences():
    problem, theta = problem_of("adam"), setting()[0]
    method = Telescoping.tuned(problem, theta, FEW, horizons=(2, 6))
    p = method.probabilities[0]
    short = oracle(problem.cut(2), theta, FEW)[0]
    exact = oracle(problem, theta, FEW)[0]
    left, right = exact.square().sum(1).mean(), (exact - short).square().sum(1).mean()
    survival = (right / 4 / ((left - right) / 2)) ** 0.5
    assert 1 - p == pytest.approx(min(1.0, float(survival)), rel=1e-9)


@pytest.mark.parametrize("warm", [False, True])
def test_a_stopped_run_through_an_update_goes_on_to_the_same_bits(tmp_path, warm):
    problem = replace(problem_of("lslr" if not warm else "adam"), tasks=setting()[1], sample_tasks=None)
    theta, options = setting()[0], {"optimizer": "adam:0.01", "seed": 3, "warm_start": warm}
    estimator = UFOM(0.5, proxy=HELD)
    whole = train(problem, theta, estimator, steps=4, **options)
    for steps in (2, 4):
        found = train(problem, theta, estimator, steps=steps, checkpoint=tmp_path / "run", **options)
    assert torch.equal(found.theta, whole.theta)
    assert (found.theta - theta).norm() > 0.01


def test_one_step_of_training_is_an_exact_step():
    problem, (theta, tasks) = problem_of("clipped adamw"), setting()
    one = replace(problem, tasks=tuple(t[:1] for t in tasks), sample_tasks=None)
    found = train(one, theta, Estimator(1.0), [0.1], steps=1).theta
    torch.testing.assert_close(found, theta - 0.1 * oracle(problem, theta, tuple(t[:1] for t in tasks))[0][0])
