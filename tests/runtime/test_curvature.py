"""The curvatures of M against quadratics, where they are known, and against the Hessian of the unrolled loss."""

import pytest
import torch

from tests.oracles import unrolled_gradient
from tests.runtime.conftest import F64, coupled
from ufom_runtime import EXACT, HELD, BilevelProblem, hypergradient
from ufom_runtime.inner import momentum
from ufom_runtime.measure.curvature import curvatures, measure_curvature
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import Truncated, UfomError


def rng(seed):
    return torch.Generator().manual_seed(seed)


def trace_form(x, hessian):
    """Σ xᵀHx/Σ‖x‖² over the rows."""
    return float((x @ hessian * x).sum() / x.square().sum())


def test_quadratics_have_the_known_curvatures():
    problem = quadratic(dim=4, r=5)
    tasks = problem.sample(12, rng(0))
    difference, hessian = problem._maps()  # of F − G and of G, and so ∇²M, whatever the task
    exact, d = ((problem.initial - tasks) @ m.T for m in (hessian, difference))
    proxy, found = exact + d, measure_curvature(problem, problem.initial, tasks)
    assert found.curvature_noise == pytest.approx(trace_form(exact - exact.mean(0), hessian), rel=1e-7)
    assert found.curvature_correction == pytest.approx(trace_form(d, hessian), rel=1e-7)
    assert found.curvature_proxy_noise == pytest.approx(trace_form(proxy - proxy.mean(0), hessian), rel=1e-7)
    for name, x in (("curvature_gradient", exact), ("curvature_proxy", proxy)):
        pairs = x.sum(0)
        form = float(pairs @ hessian @ pairs - (x @ hessian * x).sum())  # over i ≠ j
        assert getattr(found, name) == pytest.approx(form / float(pairs @ pairs - x.square().sum()), rel=1e-7)
    assert found.error < 1e-8
    assert all(found.sems[name] > 0 for name in found.values())


def test_errors_of_the_curvatures_are_calibrated():
    problem, seeds = quadratic(dim=3, r=1, noise=0.3), range(1000, 1050)
    found = [
        measure_curvature(problem, problem.initial, problem.sample(40, rng(seed)), rate=0.1, chunk=1000)
        for seed in seeds
    ]
    for name in found[0].values():
        spread = torch.tensor([getattr(f, name) for f in found]).std()
        assert float(torch.tensor([f.sems[name] for f in found]).mean() / spread) == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize("k", [0, 2])
def test_a_finite_set_of_tasks_against_the_hessian_by_autodiff(k):
    sampled = coupled()
    tasks = sampled.sample(3, rng(1))
    problem = BilevelProblem(
        sampled.inner_loss, sampled.outer_loss, sampled.start, sampled.step_sizes, tasks=tasks, initial=sampled.initial
    )
    theta = problem.initial
    hessian = torch.func.jacrev(lambda t: differentiable_gradient(problem, t, tasks))(theta)
    exact = unrolled_gradient(problem, theta, tasks)
    proxy, found = unrolled_gradient(problem, theta, tasks, k), measure_curvature(problem, theta, proxy=Truncated(k))
    g, f = exact.mean(0), proxy.mean(0)
    expected = {
        "curvature_gradient": trace_form(g[None], hessian),
        "curvature_noise": trace_form(exact - g, hessian),
        "curvature_correction": trace_form(exact - proxy, hessian),
        "curvature_proxy": trace_form(f[None], hessian),
        "curvature_proxy_noise": trace_form(proxy - f, hessian),
    }
    assert found.values() == pytest.approx(expected, rel=1e-5)
    assert set(found.sems.values()) == {0.0}


def test_several_proxies_together_have_the_curvatures_of_each():
    problem, proxies = coupled(), [Truncated(), Truncated(2)]
    tasks = problem.sample(4, rng(1))
    found = curvatures(problem, problem.initial, tasks, proxies, 0.1, settled=False)
    for proxy in proxies:
        alone = measure_curvature(problem, problem.initial, tasks, proxy, rate=0.1)
        assert found[proxy].values() == pytest.approx(alone.values(), rel=1e-9)
        assert found[proxy].sems == pytest.approx(alone.sems, rel=1e-9)


def test_gradients_held_constant_have_a_curvature_of_their_own():
    made = quadratic(dim=3)
    tasks = made.sample(5, rng(0))
    problem = BilevelProblem(
        made.inner_loss, made.outer_loss, made.start, update=momentum(0.1), steps=4, tasks=tasks, initial=made.initial
    )
    exact, held = (hypergradient(problem, made.initial, tasks, e, per_task=True) for e in (EXACT, HELD))
    ahead = [hypergradient(problem, made.initial + e, tasks, EXACT) for e in torch.eye(3, dtype=F64)]
    hessian = torch.stack(ahead) - exact.mean(0)  # M is a quadratic
    found = measure_curvature(problem, made.initial, proxy=HELD.proxy)
    assert found.curvature_correction == pytest.approx(trace_form(exact - held, hessian), rel=1e-6)


def differentiable_gradient(problem, theta, tasks):
    """∇M by the graph of the unrolled loop, itself differentiable."""

    def mean_loss(t):
        def loss(task):
            phi = problem.start(t, task)
            for alpha in problem.alphas:
                phi = phi - alpha * torch.func.grad(lambda p: problem.inner_loss(t, p, task))(phi)
            return problem.outer_loss(t, phi, task)

        return torch.func.vmap(loss)(tasks).mean()

    return torch.func.grad(mean_loss)(theta)


def absolute(smooth):
    """An outer loss with a kink at each task, or none."""
    return BilevelProblem(
        lambda t, p, x: (p - x).square().sum() / 2,
        lambda t, p, x: (p - x).square().sum() if smooth else (p - x).abs().sum(),
        lambda t, x: t, [0.1] * 2, lambda n, g: 0.01 * torch.randn(n, 3, generator=g, dtype=F64),
    )  # fmt: skip


def test_kinks_are_refused():
    theta, tasks = torch.zeros(3, dtype=F64), absolute(True).sample(8, rng(0))
    assert measure_curvature(absolute(True), theta, tasks).curvature_noise == pytest.approx(2 * 0.9**4, rel=1e-7)
    with pytest.raises(UfomError, match=r"does not settle.*kinks.*smooth activation"):
        measure_curvature(absolute(False), theta, tasks)


def test_between_two_kinks_the_curvature_is_not_that_of_the_objective():
    """M″ is 2 and twice the density of the kinks; differences between two kinks see 2."""
    problem = BilevelProblem(
        lambda t, p, x: (p * 0).sum(), lambda t, p, x: (p.square() + (p - x).abs()).sum(), lambda t, x: t, [0.1],
        lambda n, g: torch.rand(n, 2, generator=g, dtype=F64) * 2 - 1,
    )  # fmt: skip
    theta, tasks = torch.tensor([0.1, -0.2], dtype=F64), problem.sample(300, rng(0))
    with pytest.raises(UfomError, match=r"settles within steps of .* alone.*kinks.*give rate="):
        measure_curvature(problem, theta, tasks)
    found = measure_curvature(problem, theta, tasks, rate=0.1)
    assert found.curvature_noise == pytest.approx(3, abs=3 * found.sems["curvature_noise"])
    assert found.sems["curvature_noise"] < 0.3


def test_a_linear_objective_has_no_curvature():
    problem = BilevelProblem(
        lambda t, p, x: (p * x).sum(), lambda t, p, x: (p * x).sum(), lambda t, x: t, [0.1] * 2,
        lambda n, g: torch.randn(n, 3, generator=g, dtype=F64),
    )  # fmt: skip
    found = measure_curvature(problem, torch.ones(3, dtype=F64), problem.sample(6, rng(0)))
    assert found.values() == pytest.approx(dict.fromkeys(found.sems, 0.0), abs=1e-12)


@pytest.mark.parametrize(
    ("tasks", "rate", "message"),
    [
        (None, None, "no finite set of tasks"),
        (torch.zeros(1, 5, dtype=F64), None, "draw at least 2"),
        (torch.zeros(3, 5, dtype=F64), 0.0, "rate.*must be a finite number > 0"),
    ],
)
def test_bad_input_is_named(tasks, rate, message):
    problem = quadratic()
    with pytest.raises(UfomError, match=message):
        measure_curvature(problem, problem.initial, tasks, rate=rate)
