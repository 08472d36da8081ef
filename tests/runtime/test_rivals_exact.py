"""The exact rivals against autodiff through the loop that they differentiate."""

from fractions import Fraction

import pytest
import torch

from tests.oracles import unrolled_gradient
from tests.runtime.conftest import MAKERS, coupled
from ufom_runtime import EXACT, METHODS, BilevelProblem, Estimator, hypergradient
from ufom_runtime.methods import Checkpointing, Forward, Reversible, RootCheckpointing, TruncatedBackprop
from ufom_runtime.methods.reversible import Loop
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import Sweep, UfomError

F64 = torch.float64


def assert_agree(found, expected, tolerance):
    assert (found - expected).norm() <= tolerance * expected.norm()


def drawn(name):
    problem = MAKERS[name]()
    theta, tasks = problem.initial, problem.tasks
    if tasks is None:
        tasks = problem.sample(3, torch.Generator().manual_seed(1))
    else:
        theta = torch.linspace(-1, 1, problem.initial.shape[-1], dtype=F64)
    return problem, theta, tasks


@pytest.fixture(params=["coupled", "synthetic", "quadratic", "digits-hypercleaning", "digits-few-shot"], scope="module")
def solved(request):
    """(problem, θ, tasks, the exact gradients of the tasks)."""
    problem, theta, tasks = drawn(request.param)
    return problem, theta, tasks, unrolled_gradient(problem, theta, tasks)


EXACT_NAMES = [name for name, entry in METHODS.items() if entry.kind == "exact"]


@pytest.mark.parametrize("name", [name for name in EXACT_NAMES if name != "forward"])
def test_exact_methods_agree_with_the_unrolled_loop(solved, name):
    problem, theta, tasks, expected = solved
    found = hypergradient(problem, theta, tasks, METHODS[name].make(problem.r), per_task=True)
    assert_agree(found, expected, 1e-9)


@pytest.mark.parametrize(
    "name", ["coupled", "synthetic", "digits-hypercleaning", pytest.param("digits-few-shot", marks=pytest.mark.slow)]
)
def test_forward_agrees_with_the_unrolled_loop(name):
    problem, theta, tasks = drawn(name)
    found = hypergradient(problem, theta, tasks, METHODS["forward"].make(problem.r), per_task=True)
    assert_agree(found, unrolled_gradient(problem, theta, tasks), 1e-9)


def test_the_exact_methods_are_all_there():
    assert {"forward", "stored", "unrolled", "recomputed", "checkpointed", "checkpointed-root"} == set(EXACT_NAMES)


@pytest.mark.parametrize("tangents", [1, 2, 3, None])
@pytest.mark.parametrize("chunk", [1, None])
def test_forward_is_reverse(tangents, chunk):
    problem, theta, tasks = drawn("coupled")
    found = hypergradient(problem, theta, tasks, Forward(tangents), per_task=True, chunk=chunk)
    assert_agree(found, hypergradient(problem, theta, tasks, EXACT, per_task=True), 1e-13)


def test_forward_needs_no_forward_mode():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    problem = BilevelProblem(
        lambda t, p, x: Square.apply(p).sum(), lambda t, p, x: p.sum(), lambda t, x: t, [0.1], tasks=torch.ones(1, 2)
    )
    found = hypergradient(problem, torch.ones(2, dtype=F64), problem.tasks, Forward())
    assert_agree(found, torch.full((2,), 0.8, dtype=F64), 1e-15)


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_truncated_keeps_the_last_steps(steps):
    problem, theta, tasks = drawn("coupled")
    found = hypergradient(problem, theta, tasks, TruncatedBackprop(steps), per_task=True)
    assert_agree(found, unrolled_gradient(problem, theta, tasks, steps), 1e-12)


def test_root_checkpoints():
    for r in (1, 2, 4, 5, 99, 100, 101):
        slots = RootCheckpointing(r).sweep.slots
        assert (slots - 1) ** 2 < r <= slots**2
    assert Checkpointing(2) == Estimator(1.0, Sweep.checkpointed(2))


def momentum_gradient(problem, theta, tasks, gamma):
    """d/dθ of the outer loss after the momentum loop, by one backward pass through its graph."""
    found = []
    for i in range(len(Tasks.of(tasks))):
        task = tuple(t[i] for t in tasks) if isinstance(tasks, tuple) else tasks[i]
        leaf = theta.clone().requires_grad_()
        phi = problem.start(leaf, task)
        v = torch.zeros_like(phi)
        for alpha in problem.step_sizes:
            state = phi if phi.requires_grad else phi.requires_grad_()
            (slope,) = torch.autograd.grad(problem.inner_loss(leaf, state, task), state, create_graph=True)
            v = gamma * v - (1 - gamma) * slope
            phi = state + alpha * v
        found.append(torch.autograd.grad(problem.outer_loss(leaf, phi, task), leaf)[0])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["coupled", "quadratic", "digits-hypercleaning", "digits-few-shot"])
@pytest.mark.parametrize("method", [Reversible(), Reversible("1/3", bits=44)], ids=str)
def test_reversible_agrees_with_the_unrolled_momentum_loop(name, method):
    problem, theta, tasks = drawn(name)
    found = hypergradient(problem, theta, tasks, method, per_task=True)
    assert_agree(found, momentum_gradient(problem, theta, tasks, float(method.momentum)), 1e-9)


def test_reversible_is_of_another_objective():
    problem, theta, tasks = drawn("coupled")
    found = hypergradient(problem, theta, tasks, Reversible(), per_task=True)
    exact = unrolled_gradient(problem, theta, tasks)
    assert (found - exact).norm() > 0.1 * exact.norm()
    assert METHODS["reversible"].kind == "other objective"


@pytest.mark.parametrize("momentum", ["9/10", "1/2", "3/7", "99/100", "1/65536", "65535/65536"])
def test_the_loop_runs_back_to_the_same_bits(momentum):
    method = Reversible(momentum)
    problem = coupled(r=70)
    tasks = problem.sample(3, torch.Generator().manual_seed(0))
    loop = Loop(method, problem, problem.initial.expand(3, -1), Tasks.of(tasks))
    visited = []
    for j in range(70):
        visited.append((loop.phi, loop.v))
        loop.forwards(j)
    assert all((word >= 0).all() for word in loop.lost)
    assert len(loop.lost) + 1 == method.words(70)
    assert len({tuple(phi.flatten().tolist()) for phi, _ in visited}) == 70
    for j in range(69, -1, -1):
        loop.backwards(j)
        assert torch.equal(loop.phi, visited[j][0])
        assert torch.equal(loop.v, visited[j][1])
    assert not loop.lost
    assert torch.equal(loop.state(), (visited[0][0].double() * 2.0**-40))


@pytest.mark.parametrize("momentum", ["9/10", "1/2", "3/7", "99/100", "999/1000", "1/65536"])
def test_a_word_is_filled_and_never_overflows(momentum):
    """In integers without end, with v mod d at its largest each time: the declared steps fit, 5 % more do not."""
    method = Reversible(momentum)
    n, d = method.momentum.as_integer_ratio()
    lost = steps = 0
    while lost * d + d - 1 < 2**63:
        lost, steps = (lost * d + d - 1) // n, steps + 1
    assert 0.95 * steps <= method.steps_a_word <= steps


def test_bits_are_reported_and_far_fewer_than_the_states():
    problem = quadratic(dim=3, r=200, alpha=0.01)
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    columns = Reversible().direction(problem, problem.initial, tasks).columns
    assert columns["bits_stored"] == 2 * 64 * 3  # v and one word: 200·log₂(10/9) = 30 bits
    assert columns["bits_naive"] == 200 * 64 * 3
    assert columns["bits_naive"] / columns["bits_stored"] == 200 / Reversible().words(200)


def test_float32_stays_float32():
    problem = BilevelProblem(
        lambda t, p, x: ((p - x) ** 2).sum(), lambda t, p, x: (p**2).sum(), lambda t, x: t, [0.1] * 3,
        tasks=torch.ones(2, 3),
    )  # fmt: skip
    for method in (Reversible(), Forward(2)):
        found = hypergradient(problem, torch.zeros(3), problem.tasks, method)
        assert found.dtype == torch.float32
    expected = momentum_gradient(problem, torch.zeros(3), problem.tasks, 0.9)
    assert_agree(hypergradient(problem, torch.zeros(3), problem.tasks, Reversible(), per_task=True), expected, 1e-6)


def noisy():
    calls = []

    def inner(theta, phi, task):
        calls.append(0)
        return (1 + 1e-6 * len(calls)) * (phi - theta).square().sum()

    return BilevelProblem(
        inner, lambda t, p, x: p.sum(), lambda t, x: t + 1, [0.1] * 3, tasks=torch.ones(1, 2, dtype=F64)
    )


def drifting():
    """φ passes 2^22 in steps that are small themselves."""
    return BilevelProblem(
        lambda t, p, x: -1e5 * p.sum(), lambda t, p, x: p.sum(), lambda t, x: t, [1.0] * 5,
        tasks=torch.ones(1, 2, dtype=F64),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Forward(0), "at least 1"),
        (lambda: TruncatedBackprop(-1), "at least 0"),
        (lambda: hypergradient(*drawn("coupled"), TruncatedBackprop(9)), "keep K ≤ r"),
        (lambda: RootCheckpointing(0), "at least 1"),
        (lambda: Reversible("1"), r"in \(0, 1\)"),
        (lambda: Reversible(Fraction(1, 2**17)), r"d ≤ 2\^16"),
        (lambda: Reversible("nine"), "is not a fraction"),
        (lambda: Reversible("1/0"), "is not a fraction"),
        (lambda: Reversible(bits=0), "at least 1"),
        (lambda: Reversible(bits=53), "at most 52"),
        (lambda: hypergradient(noisy(), torch.ones(2, dtype=F64), noisy().tasks, Reversible()), "must be a function"),
        (
            lambda: hypergradient(quadratic(), 1e7 * quadratic().initial, torch.zeros(1, 5, dtype=F64), Reversible()),
            r"beyond 2\^22",
        ),
        (
            lambda: hypergradient(drifting(), 4.1e6 * torch.ones(2, dtype=F64), drifting().tasks, Reversible()),
            r"beyond 2\^22",
        ),
        (lambda: hypergradient(*drawn("coupled"), Forward(), coins=torch.ones(3).bool()), "tosses no coins"),
        (lambda: hypergradient(*drawn("coupled"), Forward(), chunk=0), "at least 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()
