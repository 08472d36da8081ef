"""Warm starts against a loop written out with autograd, and resumed."""

from dataclasses import replace

import pytest
import torch

from tests.runtime.conftest import F64, coupled
from ufom_runtime import EXACT, FOM, REPTILE, UFOM, Stopped, train
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.training.seeds import generator
from ufom_theory import UfomError

STEPS = 9


def finite(parts=1):
    """Four tasks, each a tensor or a tuple of `parts` tensors."""
    sampled = coupled(r=3)
    tasks = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    if parts == 1:
        return replace(sampled, sample_tasks=None, tasks=tasks)
    inner, outer, start = sampled.inner_loss, sampled.outer_loss, sampled.start
    return replace(
        sampled,
        sample_tasks=None,
        tasks=(tasks, torch.ones(4, 3, dtype=F64)),
        inner_loss=lambda theta, phi, task: inner(theta, phi, task[0] * task[1]),
        outer_loss=lambda theta, phi, task: outer(theta, phi, task[0] * task[1]),
        start=lambda theta, task: start(theta, task[0] * task[1]),
    )


def written_out(first_order):
    """θ after STEPS, and how often a task was met again."""
    problem, theta, last, again = finite(), finite().initial, {}, 0
    for k in range(1, STEPS + 1):
        drawn = torch.randint(4, (2,), generator=generator(3, k, "tasks")).tolist()
        total, ends = torch.zeros_like(theta), {}
        for i in drawn:
            task, leaf = problem.tasks[i], theta.clone().requires_grad_()
            again += i in last
            phi = (last[i] if i in last else problem.start(leaf, task)).clone()
            phi = phi if phi.requires_grad else phi.requires_grad_()
            for alpha in problem.alphas:
                slope = torch.autograd.grad(problem.inner_loss(leaf, phi, task), phi, create_graph=True)[0]
                phi = phi - alpha * (slope.detach() if first_order else slope)
            total += torch.autograd.grad(problem.outer_loss(leaf, phi, task), leaf)[0] / 2
            ends[i] = phi.detach()
        last |= ends
        theta = theta - 0.1 * total
    return theta, again


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("estimator", [EXACT, FOM], ids=["exact", "fom"])
def test_against_a_loop_written_out(estimator, parts):
    expected, again = written_out(estimator is FOM)
    problem = finite(parts)
    run = train(problem, problem.initial, estimator, optimizer=0.1, steps=STEPS, batch=2, seed=3, warm_start=True)
    torch.testing.assert_close(run.theta, expected, rtol=1e-11, atol=1e-12)
    assert STEPS < again < 2 * STEPS - 2  # first visits were among them
    each = 2 * (3 + 1) + 2 * 3  # of two tasks, and their inner loops once more
    assert run.log.gradients.tolist() == [each * k for k in range(1, STEPS + 1)]
    cold = train(problem, problem.initial, estimator, optimizer=0.1, steps=STEPS, batch=2, seed=3)
    assert (cold.theta - expected).norm() > 1e-3


def test_resumed_and_extended_to_the_same_bits(tmp_path):
    def go(steps=STEPS, **options):
        problem = finite()
        return train(
            problem, problem.initial, UFOM(0.5), optimizer="adam:0.05", steps=steps, batch=2, warm_start=True, **options
        ).theta

    def stop(share):
        if share >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        go(checkpoint=tmp_path, progress=stop)
    assert torch.equal(go(checkpoint=tmp_path), go())
    assert torch.equal(go(steps=12, checkpoint=tmp_path), go(steps=12))
    with pytest.raises(UfomError, match="its warm start is True, not False"):
        train(finite(), finite().initial, UFOM(0.5), optimizer="adam:0.05", steps=12, batch=2, checkpoint=tmp_path)


def test_what_has_no_warm_start_is_refused():
    sampled = quadratic(dim=3, r=2)
    with pytest.raises(UfomError, match="for each task of a finite Ω"):
        train(sampled, sampled.initial, FOM, optimizer=0.1, steps=2, warm_start=True)
    own = replace(finite(), start=lambda theta, task: theta)
    with pytest.raises(UfomError, match="must start at θ"):
        train(own, own.initial, REPTILE, optimizer=0.1, steps=20, warm_start=True)
