"""Randomised rivals: unbiased by enumeration, or by z-tests at 1e5 draws; evolution strategies by quadrature."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm

from tests.oracles import unrolled_gradient
from tests.runtime.conftest import MAKERS, coupled
from ufom_runtime import UFOM, hypergradient
from ufom_runtime.methods import ES, METHODS, GuidedES, Telescoping, TruncatedBackprop, powers_of_two
from ufom_runtime.methods.evolution import antithetic
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory import Sweep, UfomError

F64 = torch.float64
DRAWS = 100_000


def horizons_of(r, kind):
    """Every horizon, few of them, and unequal chances; and a horizon that roulette passes over."""
    yield Telescoping(powers_of_two(r), kind=kind)
    if r > 2:
        yield Telescoping((1, r - 1, r), (0.5, 0.3, 0.2), kind)
        if kind == "roulette":
            yield Telescoping((1, 2, r), (0.7, 0.0, 0.3), kind)
    yield Telescoping((r,), kind=kind)


@pytest.mark.parametrize("kind", ["roulette", "single"])
@pytest.mark.parametrize("name", ["coupled", "synthetic", "quadratic", "digits-hypercleaning", "digits-few-shot"])
def test_telescopes_are_unbiased_by_enumeration(name, kind):
    problem = MAKERS[name]()
    theta = torch.tensor([4.5], dtype=F64) if name == "synthetic" else problem.initial
    tasks = problem.tasks if problem.tasks is not None else problem.sample(3, torch.Generator().manual_seed(1))
    exact = unrolled_gradient(problem, theta, tasks)
    rows, stack = theta.expand(len(exact), -1), Tasks.of(tasks)
    for method in horizons_of(problem.r, kind):
        found = [method.at(problem, rows, stack, i).detach() for i in range(len(method.horizons))]
        mean = sum(p * g for p, g in zip(method.probabilities, found, strict=True))
        assert (mean - exact).norm() <= 1e-12 * exact.norm()
        if len(found) > 1:
            assert max((g - exact).norm() for g in found) > 0.01 * exact.norm()  # it is not an exact method


@pytest.mark.parametrize("kind", ["roulette", "single"])
def test_a_telescope_is_the_sum_of_weighted_differences(kind):
    """One backward loop, against gradients of every horizon by themselves."""
    problem = coupled(r=6)
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    method = Telescoping((1, 2, 4, 6), (0.4, 0.3, 0.1, 0.2), kind)
    g = [torch.zeros(2, 3, dtype=F64)]
    g += [
        unrolled_gradient(replace(problem, step_sizes=problem.alphas[:h]), problem.initial, tasks) for h in (1, 2, 4, 6)
    ]
    for drawn in range(4):
        found = method.at(problem, problem.initial.expand(2, -1), Tasks.of(tasks), drawn)
        if kind == "single":
            expected = (g[drawn + 1] - g[drawn]) / method.probabilities[drawn]
        else:
            tails = [sum(method.probabilities[i:]) for i in range(4)]
            expected = sum((g[i + 1] - g[i]) / tails[i] for i in range(drawn + 1))
        assert (found - expected).norm() <= 1e-12 * expected.norm()


def product(method, problem, theta, tasks):
    """E‖G‖²·E[h_N], by enumeration."""
    squares = [
        float(method.at(problem, theta.expand(len(tasks), -1), Tasks.of(tasks), i).detach().square().sum(1).mean())
        for i in range(len(method.horizons))
    ]
    return np.dot(method.probabilities, squares) * np.dot(method.probabilities, method.horizons)


@pytest.mark.parametrize("kind", ["roulette", "single"])
@pytest.mark.parametrize(
    "make", [lambda: coupled(r=9), lambda: quadratic(dim=3, r=16, alpha=0.4)], ids=["coupled", "quadratic"]
)
def test_the_measured_weights_are_the_best(make, kind):
    """Against a numerical minimiser of E‖G‖²·E[h_N] over all probabilities, and against random ones."""
    problem = make()
    theta, tasks = problem.initial, problem.sample(20, torch.Generator().manual_seed(3))
    tuned = Telescoping.tuned(problem, theta, tasks, kind)
    found = product(tuned, problem, theta, tasks)
    m = len(tuned.horizons)
    g = [torch.zeros(20, 3, dtype=F64)]
    g += [unrolled_gradient(replace(problem, step_sizes=problem.alphas[:h]), theta, tasks) for h in tuned.horizons]
    differences = torch.stack([y - x for x, y in itertools.pairwise(g)])

    def objective(x):
        p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        weights = 1 / p if kind == "single" else 1 / p[::-1].cumsum()[::-1]
        scaled = torch.tensor(weights)[:, None, None] * differences
        outcomes = scaled if kind == "single" else scaled.cumsum(0)
        return np.dot(p, outcomes.square().sum(2).mean(1).numpy()) * np.dot(p, tuned.horizons)

    assert found == pytest.approx(objective(np.log(np.maximum(tuned.probabilities, 1e-12))), rel=1e-6)
    rng = np.random.default_rng(0)
    best = min(
        minimize(objective, rng.normal(size=m), method="Nelder-Mead", options={"maxiter": 4000}).fun for _ in range(3)
    )
    assert found <= best * (1 + 1e-6)
    assert found < 0.999 * min(objective(rng.normal(size=m)) for _ in range(20))


def z_scores(found, expected):
    return (found.mean(0) - expected) / (found.std(0) / len(found) ** 0.5)


def unbiased_cases():
    four = quadratic(dim=4, r=5, alpha=0.2)
    toy = synthetic(alpha=0.3, r=7, A=2.0)
    at = torch.tensor([4.5], dtype=F64)
    for name, problem, theta in (("quadratic", four, four.initial), ("toy", toy, at)):
        yield f"roulette-{name}", problem, theta, Telescoping(powers_of_two(problem.r), None, "roulette")
        yield f"single-{name}", problem, theta, Telescoping(powers_of_two(problem.r), None, "single")
    yield "ufom-quadratic", four, four.initial, UFOM(0.3, Sweep.stored())
    yield "es-quadratic", four, four.initial, ES(0.5)  # M is quadratic: smoothing adds a constant
    yield "es-pairs-quadratic", four, four.initial, ES(0.5, pairs=2)
    yield "guided-quadratic", four, four.initial, GuidedES(0.5)


CASES = list(unbiased_cases())
COORDINATES = sum(len(theta) for _, _, theta, _ in CASES)
LIMIT = norm.isf(0.01 / (2 * COORDINATES))  # Bonferroni, over every coordinate tested here


@pytest.mark.parametrize(("name", "problem", "theta", "method"), CASES, ids=[case[0] for case in CASES])
def test_the_mean_of_draws_is_what_is_declared(name, problem, theta, method):
    one = problem.tasks[1:] if problem.tasks is not None else problem.sample(1, torch.Generator().manual_seed(1))
    many, generator = Tasks.of(one).repeat(DRAWS), torch.Generator().manual_seed(5)
    found = hypergradient(problem, theta, many, method, generator=generator, per_task=True)
    (expected,) = unrolled_gradient(problem, theta, one)
    if isinstance(method, GuidedES):  # β·Σ·∇M, and so biased
        (u,) = unrolled_gradient(problem, theta, one, 0)
        sigma = torch.eye(4, dtype=F64) / 8 + torch.outer(u, u) / (2 * u @ u)
        assert (2 * sigma @ expected - expected).norm() > 0.1 * expected.norm()
        expected = 2 * sigma @ expected
    z = z_scores(found, expected)
    print(f"{name}: z = {[round(x, 2) for x in z.tolist()]}, limit {LIMIT:.2f}")
    assert z.abs().max() < LIMIT


def test_the_z_test_finds_a_biased_method():
    problem = quadratic(dim=4, r=5, alpha=0.2)
    one = problem.sample(1, torch.Generator().manual_seed(1))
    biased = replace(problem, step_sizes=[0.2] * 4)  # one step too few
    many, generator = Tasks.of(one).repeat(DRAWS), torch.Generator().manual_seed(5)
    found = hypergradient(biased, problem.initial, many, ES(0.5), generator=generator, per_task=True)
    assert z_scores(found, unrolled_gradient(problem, problem.initial, one)[0]).abs().max() > 2 * LIMIT


def hermite(sigma, count=20):
    """Nodes d ~ N(0, σ²I) in two dimensions, and weights."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    nodes = torch.tensor(list(itertools.product(x, x)), dtype=F64)
    weights = torch.tensor([a * b for a, b in itertools.product(w, w)], dtype=F64)
    return sigma * nodes, weights / weights.sum()


def smooth():
    problem = coupled(r=4, dim=2)
    return problem, torch.tensor([0.7, -0.4], dtype=F64), problem.sample(1, torch.Generator().manual_seed(2))


def expected_es(sigma, factor=None):
    problem, theta, task = smooth()
    moves, weights = hermite(sigma)
    if factor is not None:
        moves = moves @ factor.T
    rows = theta.expand(len(moves), -1)
    return weights @ antithetic(problem, rows, Tasks.of(task).repeat(len(moves)), moves) / sigma**2


def test_es_has_a_bias_of_second_order_by_quadrature():
    problem, theta, task = smooth()
    (exact,) = unrolled_gradient(problem, theta, task)
    bias = [float((expected_es(sigma) - exact).norm()) for sigma in (0.05, 0.025)]
    print(f"bias {bias}, ratio {bias[0] / bias[1]:.4f}, ‖∇M‖ {exact.norm():.4f}")
    assert 3.8 <= bias[0] / bias[1] <= 4.2
    assert bias[0] > 1e-4 * exact.norm()


def test_es_is_unbiased_for_the_smoothed_objective_by_quadrature():
    """Stein: E ε·M(θ + σε)/σ = E ∇M(θ + σε), the right side by autodiff at the nodes."""
    problem, theta, task = smooth()
    moves, weights = hermite(0.3, 10)
    smoothed = sum(w * unrolled_gradient(problem, theta + d, task)[0] for d, w in zip(moves, weights, strict=True))
    torch.testing.assert_close(expected_es(0.3), smoothed, rtol=1e-7, atol=1e-9)


def test_guided_es_stays_biased_as_sigma_falls():
    problem, theta, task = smooth()
    (exact,), (fom,) = unrolled_gradient(problem, theta, task), unrolled_gradient(problem, theta, task, 0)
    covariance = torch.eye(2, dtype=F64) / 4 + torch.outer(fom, fom) / (2 * fom @ fom)
    factor = torch.linalg.cholesky(covariance)
    for sigma in (1e-2, 1e-3):
        mean = 2 * expected_es(sigma, factor)
        assert (mean - 2 * covariance @ exact).norm() < 10 * sigma**2 * exact.norm()
        assert (mean - exact).norm() > 0.1 * exact.norm()
    assert METHODS["guided-es"].kind == "biased"


def hypercleaning():
    problem = digits_hypercleaning(n_train=12, n_validation=10, hidden=3, r=4, dtype=F64)
    return problem, problem.initial, problem.tasks


def with_generator(call):
    return lambda: call(torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ES(0.0), "> 0"),
        (lambda: ES(pairs=0), "at least 1"),
        (lambda: GuidedES(isotropic=1.5), r"in \(0, 1\]"),
        (lambda: GuidedES(scale=-1.0), "> 0"),
        (lambda: hypergradient(*smooth(), ES()), "must be a CPU one"),
        (lambda: hypergradient(*smooth(), Telescoping((1, 4))), "must be a CPU one"),
        (with_generator(lambda g: hypergradient(*hypercleaning(), GuidedES(), generator=g)), "guides nowhere"),
        (with_generator(lambda g: hypergradient(*smooth(), Telescoping((1, 3)), generator=g)), "must end at r = 4"),
        (lambda: Telescoping((1, 4), kind="both"), "use roulette or single"),
        (lambda: Telescoping((4, 1)), "must increase"),
        (lambda: Telescoping((0, 1)), "at least 1"),
        (lambda: Telescoping((1, 4), (0.5, 0.6)), "sum to 1"),
        (lambda: Telescoping((1, 4), (1.0,)), "give 2 numbers"),
        (lambda: Telescoping((1, 4), (1.0, 0.0)), "roulette alone may pass over"),
        (lambda: Telescoping((1, 2, 4), (0.5, 0.0, 0.5), "single"), "roulette alone may pass over"),
        (lambda: Telescoping.tuned(*smooth(), horizons=(1, 3)), "must end at r = 4"),
        (lambda: Telescoping.tuned(*still(), "single"), "leave one of them out"),
        (lambda: TruncatedBackprop(1.5), "must be an integer"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()


def still():
    """An inner loop that is at rest from the start."""
    problem = quadratic(dim=2, r=3)
    frozen = replace(problem, inner_loss=lambda t, p, x: (p - t).square().sum() / 2)
    return frozen, problem.initial, problem.sample(2, torch.Generator().manual_seed(0))
