"""The runtime on a GPU against the CPU."""

import warnings

import pytest
import torch

from tests.runtime.conftest import F64
from ufom_runtime import (
    EXACT,
    FOM,
    REPTILE,
    UFOM,
    AdaptiveUFOM,
    Estimator,
    compare_bounds,
    hypergradient,
    measure_cost,
    measure_moments,
    outer_sgd,
)
from ufom_runtime.command.report import measure
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory import Sweep, Truncated, UfomError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU is not tested")
SWEEPS = [Sweep.stored(), Sweep.recomputed(), Sweep.checkpointed(2), Sweep.unrolled()]


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_hypergradients_agree_with_the_cpu(sweep):
    problem, on_gpu = quadratic(dim=20), quadratic(dim=20, device="cuda")
    tasks = problem.sample(16, torch.Generator().manual_seed(0))
    for estimator in (Estimator(1.0, sweep), UFOM(0.3, sweep, Truncated(2))):
        cpu, gpu = (
            hypergradient(p, p.initial, t, estimator, generator=torch.Generator().manual_seed(1))
            for p, t in ((problem, tasks), (on_gpu, tasks.cuda()))
        )
        assert gpu.is_cuda
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("factory", [digits_few_shot, digits_hypercleaning])
def test_real_images_agree_with_the_cpu(factory):
    cpu, gpu = (factory(r=3, dtype=F64, device=device) for device in ("cpu", "cuda"))
    found = []
    for p in (cpu, gpu):
        tasks = p.tasks if p.tasks is not None else p.sample(4, torch.Generator().manual_seed(0))
        assert all(t.device == p.initial.device for t in Tasks.of(tasks).parts)
        found.append(hypergradient(p, p.initial, tasks, EXACT).cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "estimator",
    [FOM, EXACT, Estimator(1.0, Sweep.unrolled()), UFOM(0.5, Sweep.checkpointed(1), Truncated(1))],
)
def test_cuda_graphs_agree_with_the_plain_path(estimator):
    problem = digits_few_shot(filters=4, r=4, dtype=F64, device="cuda")
    tasks = problem.sample(5, torch.Generator().manual_seed(0))
    plain, compiled = (
        hypergradient(
            problem,
            problem.initial,
            tasks,
            estimator,
            generator=torch.Generator().manual_seed(1),
            per_task=True,
            compile=c,
        )
        for c in (False, True)
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_convolutions_in_tf32_run_together(compile):
    problem = digits_few_shot(r=2, device="cuda")
    tasks = problem.sample(5, torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the tasks of this problem run|the plain path is used|no residuals are kept")
        found = hypergradient(problem, problem.initial, tasks, EXACT, compile=compile)
    on_cpu = digits_few_shot(r=2, dtype=F64)
    exact = hypergradient(on_cpu, on_cpu.initial, Tasks.of(tuple(t.cpu() for t in tasks)).to(F64), EXACT)
    assert (found.cpu() - exact).norm() < 0.05 * exact.norm()


def test_moments_bounds_and_training_agree_with_the_cpu():
    problem, on_gpu = quadratic(dim=6), quadratic(dim=6, device="cuda")
    tasks = problem.sample(32, torch.Generator().manual_seed(0))
    cpu, gpu = (measure_moments(p, p.initial, t) for p, t in ((problem, tasks), (on_gpu, tasks.cuda())))
    assert (gpu.d2, gpu.v2) == pytest.approx((cpu.d2, cpu.v2), rel=1e-11)
    observed = [compare_bounds(p, p.initial, t)[0]["observed"] for p, t in ((problem, tasks), (on_gpu, tasks.cuda()))]
    assert observed[1] == pytest.approx(observed[0], rel=1e-11)
    runs = [outer_sgd(p, p.initial, UFOM(0.5), lambda k: 0.05, 20, batch=3).theta.cpu() for p in (problem, on_gpu)]
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-10, atol=1e-12)


def test_costs_and_the_whole_report_on_the_gpu():
    problem = synthetic(device="cuda")
    cost = measure_cost(problem, problem.initial[0], problem.tasks, seconds=0.1)
    assert 0 < cost.c1 < cost.c2 < 1
    assert measure(problem, m=2)["device"].startswith("cuda")


def test_mixed_devices_are_refused():
    problem = quadratic(dim=3, device="cuda")
    with pytest.raises(UfomError, match="move both to one device"):
        hypergradient(problem, problem.initial, problem.sample(2, torch.Generator()).cpu(), EXACT)
    with pytest.raises(UfomError, match="must be a CPU one"):
        hypergradient(problem, problem.initial, problem.sample(2, torch.Generator()), UFOM(0.5),
                      generator=torch.Generator("cuda"))  # fmt: skip


@pytest.mark.parametrize("rule", [AdaptiveUFOM(q_min=0.4, beta=0.8), REPTILE], ids=["adaptive", "reptile"])
def test_rules_agree_with_the_cpu(rule):
    runs = []
    for device in ("cpu", "cuda"):
        problem = quadratic(dim=3, r=3, device=device)
        runs.append(outer_sgd(problem, problem.initial, rule, lambda k: 0.1, 8, batch=4, seed=1))
    torch.testing.assert_close(runs[1].theta.cpu(), runs[0].theta, rtol=1e-9, atol=1e-12)
    assert runs[0].log.exact.equals(runs[1].log.exact)


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    pytest.importorskip("safetensors")
    problem = quadratic(dim=3, r=3, device="cuda")

    def run(**options):
        adam = {"optimiser": lambda p: torch.optim.Adam(p, lr=1e-3)}
        return outer_sgd(
            problem, problem.initial, AdaptiveUFOM(q_min=0.5), steps=6, batch=4, chunk=2, **adam, **options
        )

    def stop(share):
        if share == 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path, progress=stop)
    assert torch.equal(run(checkpoint=tmp_path).theta, run().theta)
