"""Faults planted in hand-written MAML code, and the verdicts that must name them."""

import re
from dataclasses import fields, replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy

from tests.grids import slow_unless
from tests.runtime.conftest import F64, coupled
from ufom_runtime import EXACT, FOM, RECOMPUTED, UFOM, BilevelProblem, FlatModule, audit_gradient, hypergradient
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import UfomError


def maml(problem, kept=None, *, alphas=None, total=False, per_task=False, **changed):
    """What many write: a loop over tasks and steps, with the graph of the last `kept` steps only."""
    p = BilevelProblem(**{f.name: getattr(problem, f.name) for f in fields(BilevelProblem)} | changed)
    alphas = p.alphas if alphas is None else alphas
    first = 0 if kept is None else len(alphas) - kept

    def adapted_loss(theta, task):
        phi = p.start(theta, task)
        for j, alpha in enumerate(alphas):
            state = phi if phi.requires_grad else phi.requires_grad_()
            (slope,) = grad(p.inner_loss(theta, state, task), state, create_graph=j >= first)
            phi = phi - alpha * slope
        return p.outer_loss(theta, phi, task)

    def gradient(theta, tasks):
        n = len(Tasks.of(tasks))
        each = []
        for i in range(n):
            task = tuple(t[i] for t in tasks) if isinstance(tasks, tuple) else tasks[i]
            (g,) = grad(adapted_loss(theta, task), theta, allow_unused=True)
            each.append(torch.zeros_like(theta) if g is None else g)
        return torch.stack(each) if per_task else torch.stack(each).sum(0) / (1 if total else n)

    return gradient


def bilevel():
    problem = coupled(3)
    return problem, problem.initial, problem.sample(4, torch.Generator().manual_seed(0))


def few_shot(dtype, alpha=0.05):
    problem = digits_few_shot(ways=3, shots=2, filters=3, r=3, alpha=alpha, dtype=dtype)
    return problem, problem.initial, problem.sample(2, torch.Generator().manual_seed(0))


def test_every_truncation_of_every_problem_is_told(case):
    problem, theta, tasks = case
    tasks = Tasks.of(tasks).take(slice(2)).stack
    for k in (0, 2, problem.r) if problem.r > 3 else (0, problem.r):
        audit = audit_gradient(maml(problem, k, per_task=k == 2), problem, theta, tasks, repeats=10)
        assert audit.kept == (k,)
        assert audit.verdict == {0: "first-order", problem.r: "exact"}.get(k, "truncated")


def classifier():
    """MAML with two examples of each of three classes."""
    net = FlatModule(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double())
    labels = torch.arange(3).repeat(2)
    theta = torch.sin(torch.arange(27, dtype=F64))
    problem = BilevelProblem(
        lambda theta, phi, task: cross_entropy(net(phi, task[0]), labels),
        lambda theta, phi, task: cross_entropy(net(phi, task[1]), labels[:3]),
        lambda theta, task: theta,
        [0.5, 0.5, 0.5],
        lambda n, g: tuple(torch.randn(n, k, 2, generator=g, dtype=F64) for k in (6, 3)),
        initial=theta,
    )
    return problem, theta, problem.sample(4, torch.Generator().manual_seed(0))


FAULTS = {
    "sum over tasks": (lambda p: maml(p, total=True), "4 × the exact gradient (a sum over the tasks?)"),
    "first-order sum": (lambda p: maml(p, 0, total=True), "4 × the first-order gradient (a sum over the tasks?)"),
    "truncated, halved": (lambda p: lambda t, x: maml(p, 2)(t, x) / 2, "0.5 × the gradient truncated at K = 2"),
    "sign": (lambda p: lambda t, x: -maml(p)(t, x), "minus the exact gradient"),
    "step size": (lambda p: maml(p, alphas=[2 * a for a in p.alphas]), "exact gradient with inner steps 2 × as long"),
    "a step fewer": (lambda p: maml(p, alphas=p.alphas[:-1]), "exact gradient after one inner step too few"),
    "a step more": (
        lambda p: maml(p, 0, alphas=[*p.alphas, p.alphas[-1]]),
        "first-order gradient after one inner step too many",
    ),
    "no step": (lambda p: maml(p, alphas=[]), "is the gradient of the outer loss at the start φ_0"),
    "support set": (
        lambda p: maml(p, outer_loss=p.inner_loss),
        "exact gradient with the inner loss for the outer (on the support set?)",
    ),
    "graph cut": (lambda p: lambda t, x: 0 * t, "it is zero: is the graph cut"),
    "another function": (
        lambda p: lambda t, x: t**2 + 1,
        "not a truncated gradient or a multiple of one, and not a usual slip",
    ),
}


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        *product([bilevel], FAULTS),
        *slow_unless(lambda case: case[1] == "support set", product([classifier], FAULTS)),
    ],
)
def test_the_fault_is_named(setting, fault):
    problem, theta, tasks = setting()
    plant, named = FAULTS[fault]
    audit = audit_gradient(plant(problem), problem, theta, tasks, repeats=10)
    assert audit.verdict == "wrong"
    assert audit.kept == ()
    assert named in audit.why


@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("outer_loss", "without ∂L_out/∂θ"),
        ("inner_loss", "without ∂²L_in/∂θ∂φ"),
        ("start", "without the derivative of the start"),
    ],
)
def test_a_forgotten_part_is_named(function, named):
    problem, theta, tasks = bilevel()
    whole = getattr(problem, function)
    cut = maml(problem, **{function: lambda theta, *rest: whole(theta.detach(), *rest)})
    assert named in audit_gradient(cut, problem, theta, tasks, repeats=10).why


def test_an_inner_sum_for_a_mean_is_named():
    problem, theta, tasks = classifier()
    summed = maml(problem, inner_loss=lambda *args: 6 * problem.inner_loss(*args))
    why = audit_gradient(summed, problem, theta, tasks, repeats=10).why
    assert "exact gradient with inner steps 6 × as long (a sum over the examples for a mean?)" in why


@pytest.mark.parametrize("dim", slow_unless(lambda dim: dim == 1, (1, 3)))
def test_on_a_line_an_unexplained_factor_is_no_explanation(dim):
    problem = coupled(dim=dim)
    tasks = problem.sample(4, torch.Generator().manual_seed(0))
    fn = lambda t, x: 0.37 * maml(problem)(t, x)  # noqa: E731
    why = audit_gradient(fn, problem, problem.initial, tasks, repeats=10).why
    assert why.startswith("it is not a truncated" if dim == 1 else "it is 0.37 × the exact gradient")


def estimator(problem, theta, tasks, q, weight, noise=0.0):
    """A debiased estimator at this θ and these tasks; unbiased with weight 1/q. The noise is relative."""
    proxy, exact = (hypergradient(problem, theta, tasks, e, per_task=True) for e in (FOM, EXACT))
    draw = torch.Generator().manual_seed(0)

    def gradient(theta, tasks):
        coins = torch.rand(len(proxy), 1, generator=draw) < q
        hum = noise * exact.norm() * torch.randn(len(theta), generator=draw, dtype=F64)
        return (proxy + weight * coins * (exact - proxy)).mean(0) + hum

    return gradient


@pytest.mark.parametrize("setting", [bilevel, classifier])
def test_a_stochastic_estimator_is_judged_by_its_mean(setting):
    problem, theta, tasks = setting()
    coins = torch.Generator().manual_seed(0)
    ufom = lambda t, x: hypergradient(problem, t, x, UFOM(0.5), generator=coins)  # noqa: E731
    audit = audit_gradient(ufom, problem, theta, tasks, repeats=40)
    assert (audit.verdict, audit.calls) == ("unbiased", 40)
    assert audit.z < 4
    audit = audit_gradient(estimator(problem, theta, tasks, 0.5, weight=1), problem, theta, tasks)
    assert (audit.verdict, audit.calls) == ("biased", 50)
    assert audit.z > 4
    assert "of the first-order bias" in audit.why


def test_the_bias_that_is_left_is_told_with_its_error():
    problem, theta, tasks = bilevel()
    unweighted = estimator(problem, theta, tasks, 0.3, weight=1)
    audit = audit_gradient(unweighted, problem, theta, tasks, repeats=200)
    share, error = (float(x) for x in re.search(r"keeps (\d+)% ± (\d+)%", audit.why).groups())
    assert abs(share - 70) < 4 * error
    assert error < 5


def test_verdicts_on_right_and_biased_estimators_seldom_err():
    """Runs of 50 calls on two tasks, with rare coins, frequent ones, and with noise besides."""
    problem, theta, tasks = quadratic(dim=3, r=2, alpha=0.3), torch.ones(3, dtype=F64), torch.eye(3, dtype=F64)[:2]

    def verdicts(*kind):
        gradient = estimator(problem, theta, tasks, *kind)
        return [audit_gradient(gradient, problem, theta, tasks).verdict for _ in range(3)]

    for q in (0.1, 0.9):
        for noise in (0.0, 0.1):
            assert verdicts(q, 1 / q, noise).count("biased") == 0
    assert verdicts(0.5, 1.0).count("unbiased") == 0


def test_a_coin_too_rare_to_judge_by_is_said():
    problem, theta, tasks = bilevel()
    rare = estimator(problem, theta, tasks[:1], 0.05, weight=20)
    audit = audit_gradient(rare, problem, theta, tasks[:1])
    assert audit.verdict == "cannot tell"
    assert "rare calls: take more repeats" in audit.why


def test_noise_that_hides_the_first_order_bias_is_said():
    problem, theta, tasks = bilevel()
    audit = audit_gradient(estimator(problem, theta, tasks, 1.0, 1.0, noise=100), problem, theta, tasks)
    assert audit.verdict == "cannot tell"
    assert "may be the first-order one" in audit.why


def test_a_problem_without_curvature_cannot_tell():
    problem, theta, tasks = bilevel()
    linear = replace(problem, inner_loss=lambda theta, phi, task: (phi * task).sum())
    audit = audit_gradient(maml(linear, 0), linear, theta, tasks, repeats=10)
    assert audit.verdict == "cannot tell"
    assert audit.kept == tuple(range(problem.r + 1))
    assert "K = 0 … 3 of 3 are alike here: cannot tell exact from first-order" in audit.why


@pytest.mark.parametrize("kept", slow_unless(lambda kept: kept == 1, (1, 3)))
def test_float32_is_judged_by_its_own_rounding(kept):
    problem, theta, tasks = few_shot(torch.float32)
    audit = audit_gradient(maml(problem, kept), problem, theta, tasks, repeats=10)
    assert audit.kept == (kept,)
    assert audit.oracle == "float64"
    assert 1e-7 < audit.noise < audit.tolerance < 1e-2


def test_a_step_too_small_for_float32_cannot_tell_but_float64_can():
    for dtype, verdict in ((torch.float32, "cannot tell"), (F64, "first-order")):
        problem, theta, tasks = few_shot(dtype, alpha=1e-7)
        assert audit_gradient(maml(problem, 0), problem, theta, tasks, repeats=10).verdict == verdict


def test_float32_that_a_hundred_kinked_steps_have_blurred_is_refused():
    for dtype in (torch.float32, F64):
        problem = digits_hypercleaning(n_train=60, n_validation=60, hidden=8, r=100, seed=1, dtype=dtype)
        judge = partial(audit_gradient, maml(problem), problem, problem.initial, problem.tasks)
        if dtype == F64:
            assert judge().verdict == "exact"
        else:
            with pytest.raises(UfomError, match=r"lost in rounding errors .* float64"):
                judge()


def test_a_problem_bound_to_float32_is_judged_there():
    problem, theta, tasks = few_shot(torch.float32)
    matrix = torch.eye(len(theta))
    bound = replace(problem, outer_loss=lambda theta, phi, task: problem.outer_loss(theta, matrix @ phi, task))
    audit = audit_gradient(maml(bound), bound, theta, tasks)
    assert (audit.verdict, audit.oracle) == ("exact", "float32")
    assert "cannot run in float64" in audit.why


def test_a_gradient_left_in_grad_is_enough_and_theta_stays():
    problem, theta, tasks = bilevel()
    before = theta.clone()

    def left_in_grad(theta, tasks):
        phi = theta.sin() + tasks
        for alpha in problem.alphas:
            losses = torch.func.vmap(problem.inner_loss, (None, 0, 0))(theta, phi, tasks)
            phi = phi - alpha * grad(losses.sum(), phi, create_graph=True)[0]
        torch.func.vmap(problem.outer_loss, (None, 0, 0))(theta, phi, tasks).mean().backward()
        return theta.grad

    with torch.no_grad():
        audit = audit_gradient(left_in_grad, problem, theta, tasks)
    assert (audit.verdict, audit.calls, audit.z) == ("exact", 10, None)
    assert torch.equal(theta, before)


def test_the_numbers_are_those_of_the_definition():
    problem, theta, tasks = bilevel()
    exact, first_order = (hypergradient(problem, theta, tasks, e) for e in (RECOMPUTED, FOM))
    audit = audit_gradient(maml(problem, 0), problem, theta, tasks, repeats=10)
    assert audit.errors[-1] == pytest.approx(float((first_order - exact).norm() / exact.norm()))
    assert audit.errors[0] < 1e-14
    assert audit.cosine == pytest.approx(float(torch.cosine_similarity(first_order, exact, dim=0)))
    assert audit.scale == pytest.approx(float(first_order @ exact / (exact @ exact)))
    said = str(audit)
    assert said.startswith("first-order: ")
    assert "error to the nearest, K = 0 of 3" in said


def test_bad_input_is_named():
    problem, theta, tasks = bilevel()
    shapes = iter([(3,), (4, 3)])
    for fn, message in [
        (lambda t, x: (t,), "returned a tuple: return floats of shape"),
        (lambda t, x: t[:2], r"float64 of shape \(2,\): return floats of shape \(3,\) or \(4, 3\)"),
        (lambda t, x: t.long(), "int64 of shape"),
        (lambda t, x: t / 0, "NaN or ±inf"),
        (lambda t, x: torch.ones(next(shapes)), r"\(4, 3\): return floats of shape \(3,\)"),
    ]:
        with pytest.raises(UfomError, match=message):
            audit_gradient(fn, problem, theta, tasks)
    with pytest.raises(UfomError, match="at least 10"):
        audit_gradient(maml(problem), problem, theta, tasks, repeats=2)
    with pytest.raises(UfomError, match="theta has 2 parameters"):
        audit_gradient(maml(problem), problem, theta[:2], tasks)
    flat, at_rest = quadratic(dim=3), torch.zeros(3, dtype=F64)
    with pytest.raises(UfomError, match=r"is lost in rounding errors.*give another θ"):
        audit_gradient(maml(flat), flat, at_rest, at_rest[None])
