"""Every sweep through every inner update, against autograd through the plain unrolled loop of single tasks."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.grids import slow_unless
from ufom_runtime import (
    EXACT,
    FOM,
    HELD,
    UFOM,
    BilevelProblem,
    Estimator,
    Forward,
    Implicit,
    Reversible,
    Telescoping,
    adapt,
    count_calls,
    estimate_constants,
    hypergradient,
    peak_bytes,
)
from ufom_runtime import losses as losses_of
from ufom_runtime.inner import adam, adamw, chain, clip_by_global_norm, momentum, sgd
from ufom_runtime.problem import Tasks
from ufom_theory import Sweep, Truncated, UfomError

R, P, N = 6, 4, 2  # inner steps, inner parameters, tasks


class LearntOptimizer:
    """A small network of g, φ and a memory takes the step; its weights are a part of θ."""

    def init(self, theta, phi, task):
        return torch.zeros_like(phi)

    def update(self, theta, phi, state, grad, task, j):
        w = theta[-6:]
        memory = torch.tanh(w[0] * grad + w[1] * state + w[2] * phi)
        return phi - 0.1 * (w[3] * memory + w[4] * grad) / (1 + w[5] ** 2 * j), memory


class ProjectedAscent:
    """Projected signed-free gradient ascent, as of an attack within a ball; stateless."""

    def init(self, theta, phi, task):
        return ()

    def update(self, theta, phi, state, grad, task, j):
        moved = phi + 0.3 * grad
        return moved * torch.clamp(1.5 / moved.norm(), max=1), state


UPDATES = {
    "sgd": sgd(0.1),
    "heavy ball": momentum(0.05, 0.8),
    "nesterov": momentum(0.05, 0.8, nesterov=True),
    "adam": adam(0.1, (0.8, 0.9)),
    "clipped adamw": chain(clip_by_global_norm(0.5), adamw(0.1, weight_decay=0.2)),
    "meta-sgd": sgd(lambda theta: theta[P : 2 * P].exp() / 20),
    "lslr": sgd(lambda theta: theta[P : P + R].exp() / 20),
    "learnt": LearntOptimizer(),
    "projected": ProjectedAscent(),
}
SWEEPS = [Sweep.stored(), Sweep.recomputed(), Sweep.checkpointed(2), Sweep.unrolled()]


def inner_loss(theta, phi, task):
    x, y = task
    return (torch.tanh(x @ phi) - y).square().mean() + 0.1 * (phi * theta[:P]).square().sum()


def outer_loss(theta, phi, task):
    x, y = task
    return (x @ phi - y).square().mean() + 0.01 * theta.square().sum()


def batch(task, j):
    """Two rows of the task's six, others at every step."""
    x, y = task
    start = 2 * (j % 3)
    return x[start : start + 2], y[start : start + 2]


def problem_of(name):
    return BilevelProblem(
        inner_loss,
        outer_loss,
        lambda theta, task: theta[:P],
        update=UPDATES[name],
        steps=R,
        inner_batch=batch if name == "lslr" else None,
        sample_tasks=draw,
    )


def draw(n, generator):
    options = {"generator": generator, "dtype": torch.float64}
    return torch.randn(n, 6, P, **options), torch.randn(n, 6, **options)


def setting():
    generator = torch.Generator().manual_seed(3)
    return 0.5 + 0.3 * torch.randn(16, generator=generator, dtype=torch.float64), draw(N, generator)


def loop(problem, theta, task, held=False):
    """φ_r, differentiable by θ; with `held`, as if the inner gradients were constants."""
    phi = problem.start(theta, task)
    state = problem.update.init(theta, phi, task)
    for j in range(1, problem.r + 1):
        seen = problem.inner_batch(task, j) if problem.inner_batch else task
        (g,) = torch.autograd.grad(problem.inner_loss(theta, phi, seen), phi, create_graph=True)
        phi, state = problem.update.update(theta, phi, state, g.detach() if held else g, seen, j)
    return phi


def oracle(problem, theta, tasks, held=False):
    """Each task's hypergradient, and φ_r."""
    rows = []
    for task in zip(*tasks, strict=True):
        leaf = theta.clone().requires_grad_()
        phi = loop(problem, leaf, task, held)
        rows.append((torch.autograd.grad(problem.outer_loss(leaf, phi, task), leaf)[0], phi.detach()))
    return [torch.stack(x) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", UPDATES)
def test_every_sweep_is_the_unrolled_loops_gradient(name):
    problem, (theta, tasks) = problem_of(name), setting()
    expected, phi = oracle(problem, theta, tasks)
    for sweep, chunk in (*((sweep, None) for sweep in SWEEPS), (SWEEPS[0], 1), (SWEEPS[-1], 1)):
        found = hypergradient(problem, theta, tasks, Estimator(1.0, sweep), per_task=True, chunk=chunk)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(adapt(problem, theta, tasks), phi, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "proxy"),
    slow_unless(
        lambda case: case[0] == "learnt" or case[1] is HELD,
        product(["nesterov", "adam", "lslr", "learnt"], [Truncated(0), Truncated(2), HELD]),
    ),
)
def test_the_mean_over_coins_is_exact(name, proxy):
    problem, (theta, tasks) = problem_of(name), setting()
    expected, _ = oracle(problem, theta, tasks)
    q, mean = 0.3, 0.0
    for coins in product((False, True), repeat=N):
        weight = math.prod(q if c else 1 - q for c in coins)
        estimator = UFOM(q, Sweep.checkpointed(1), proxy=proxy)
        mean = mean + weight * hypergradient(problem, theta, tasks, estimator, coins=torch.tensor(coins))
    torch.testing.assert_close(mean, expected.mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["clipped adamw", "meta-sgd", "learnt"])
def test_held_is_autograd_with_detached_inner_gradients(name):
    problem, (theta, tasks) = problem_of(name), setting()
    expected, _ = oracle(problem, theta, tasks, held=True)
    found = hypergradient(problem, theta, tasks, HELD, per_task=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert (found - hypergradient(problem, theta, tasks, FOM, per_task=True)).norm() > 1e-3


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
def test_held_is_fom_where_the_update_adds_a_function_of_the_gradients_alone(name):
    problem, (theta, tasks) = problem_of(name), setting()
    expected, _ = oracle(problem, theta, tasks, held=True)
    assert problem.update.held_identity
    for proxy in (HELD, FOM):
        found = hypergradient(problem, theta, tasks, proxy, per_task=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_step_and_a_product_of_a_step_are_counted_as_for_gradient_descent(sweep):
    problem, (theta, tasks) = problem_of("adam"), setting()
    estimator = Estimator(1.0, sweep)
    with count_calls() as calls:
        hypergradient(problem, theta, tasks, estimator)
    expected = estimator.calls(R)
    assert (calls.gradients, calls.hessian_vector_products) == (
        N * expected.gradients,
        N * expected.hessian_vector_products,
    )


def test_held_gradients_are_counted_and_their_states_are_said():
    problem, (theta, tasks) = problem_of("clipped adamw"), setting()
    with count_calls() as calls:
        hypergradient(problem, theta, tasks, HELD)
    assert (calls.gradients, calls.hessian_vector_products) == (N * (R + 1), 0)
    assert HELD.states(R) == R
    assert UFOM(0.5, Sweep.checkpointed(1), proxy=HELD).states(R) == R


def test_live_memory_is_flat_in_r_for_adam():
    theta, tasks = setting()
    for sweep in (Sweep.recomputed(), Sweep.checkpointed(2)):
        peaks = []
        for r in (5, 10):
            problem = replace(problem_of("adam"), steps=r)
            hypergradient(problem, theta, tasks, Estimator(1.0, sweep))  # checks and layouts are kept
            peaks.append(peak_bytes(lambda p=problem, s=sweep: hypergradient(p, theta, tasks, Estimator(1.0, s))))
        assert peaks[1] <= 1.02 * peaks[0]


def test_both_losses_are_those_at_the_end_of_the_inner_loop():
    problem, (theta, tasks) = problem_of("nesterov"), setting()
    phi = adapt(problem, theta, tasks)
    inner, outer = losses_of(problem, theta, tasks)
    for i, task in enumerate(zip(*tasks, strict=True)):
        torch.testing.assert_close(inner[i], inner_loss(theta, phi[i], task))
        torch.testing.assert_close(outer[i], outer_loss(theta, phi[i], task))
    same, state = adapt(problem, theta, tasks, with_state=True)
    assert torch.equal(same, phi)
    assert state.shape == (N, P)  # the velocity
    with pytest.raises(UfomError, match=r"φ_r is not finite\. In task 0 of the batch"):
        adapt(problem, 1e300 * theta, tasks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step_sizes": [0.1]}, "both step_sizes and an update"),
        ({"steps": None}, "give steps="),
        ({"steps": 0}, "at least 1"),
        ({"update": object()}, "has no function init"),
        ({"update": None}, "steps is for an inner update"),
    ],
)
def test_an_update_and_step_sizes_are_told_apart(change, said):
    with pytest.raises(UfomError, match=said):
        replace(problem_of("adam"), **change)


class Grows:
    def init(self, theta, phi, task):
        return ()

    def update(self, theta, phi, state, grad, task, j):
        return phi - grad, (phi,)


class Counts(Grows):
    def init(self, theta, phi, task):
        return 0


@pytest.mark.parametrize(("update", "said"), [(Grows(), "keep the form that init gives"), (Counts(), "holds a int")])
def test_bad_states_are_named(update, said):
    theta, tasks = setting()
    with pytest.raises(UfomError, match=said):
        hypergradient(replace(problem_of("sgd"), update=update), theta, tasks, EXACT)


def test_what_is_about_gradient_descent_refuses_other_steps():
    problem, (theta, tasks) = problem_of("adam"), setting()
    for call in (
        lambda: hypergradient(problem, theta, tasks, Implicit("cg")),
        lambda: hypergradient(problem, theta, tasks, Reversible()),
        lambda: estimate_constants(problem, theta, tasks),
    ):
        with pytest.raises(UfomError, match="cannot be used with an inner update"):
            call()


@pytest.mark.parametrize("make", [lambda: Forward(), lambda: Telescoping((2, R), kind="roulette")])
def test_other_exact_methods_follow_an_update(make):
    problem, (theta, tasks) = problem_of("adam"), setting()
    method = make()
    expected, _ = oracle(problem, theta, tasks)
    if isinstance(method, Forward):
        found = hypergradient(problem, theta, tasks, method, per_task=True)
    else:  # the mean over its horizons
        rows, stack = theta.expand(N, -1), Tasks.of(tasks)
        found = sum(p * method.at(problem, rows, stack, i) for i, p in enumerate(method.probabilities))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
