"""What a compiled step keeps for its backward step: the fewest bytes, and never a wrong gradient."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.conftest import compile_by
from tests.grids import slow_unless
from tests.oracles import unrolled_gradient
from tests.runtime.conftest import F64
from tests.runtime.test_steps import failing, few_shot, hypercleaning, sines
from ufom_runtime import (
    EXACT,
    UFOM,
    BilevelProblem,
    Estimator,
    FlatModule,
    count_calls,
    hypergradient,
    measure_cost,
    peak_bytes,
)
from ufom_runtime.algorithms import first_state
from ufom_runtime.compiled.residuals import split
from ufom_runtime.problem import Tasks, kept
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.steps import Steps
from ufom_theory import Sweep, Truncated, UfomError

UNROLLED = Estimator(1.0, Sweep.unrolled())
X, PHI, ALPHA, B2 = (torch.linspace(0.1, 1, n, dtype=F64) for n in (4, 3, 1, 3))


def halves(step):
    """The two halves of a step (x, φ, α, b2) → [next φ, …], which together do as the whole; and their residuals."""
    arguments = (X, PHI, ALPHA[0], B2)
    joint = make_fx(step)(*arguments)
    first, second, keeps_state = split(joint, math.inf)
    following, *residuals = first(*arguments[:3])
    found = [following, *second(X, ALPHA[0], B2, *residuals)]
    assert not keeps_state
    again, from_state, keeps_state = split(joint, sum(r.nbytes for r in residuals) - 1)
    assert keeps_state
    in_place = [*again(*arguments[:3]), *from_state(X, ALPHA[0], B2, PHI)]
    for a, b, c in zip(found, in_place, step(*arguments), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)
    return residuals, second


def test_of_a_chain_the_smallest_link_is_kept():
    def step(x, phi, alpha, b2):
        wide = torch.outer(x, phi)  # no elementwise operation of those at hand alone: its inputs or itself are kept
        narrow = wide.sum(0, keepdim=True).cumsum(1).sum()
        return [phi - alpha * narrow, b2 * torch.exp(torch.sin(narrow))]

    residuals, _ = halves(step)
    assert [r.shape for r in residuals] == [()]


def test_what_is_cheap_is_computed_again_and_what_is_not_is_kept():
    def step(x, phi, alpha, b2):
        mixed = torch.cumsum(phi, 0)
        return [phi - alpha * mixed, b2 * torch.cos(mixed), b2 * torch.sin(mixed) * x[:3]]

    residuals, second = halves(step)
    assert len(residuals) == 1
    assert torch.equal(residuals[0], torch.cumsum(PHI, 0))
    called = {str(n.target) for n in second.graph.nodes if n.op == "call_function"}
    assert called >= {"aten.cos.default", "aten.sin.default"}
    assert "aten.cumsum.default" not in called


def test_of_a_state_of_which_little_is_needed_a_copy_of_that_is_kept():
    def step(x, phi, alpha, b2):
        return [phi - alpha * torch.cumsum(phi, 0), b2 * phi[1:2]]

    (kept,), _ = halves(step)
    assert torch.equal(kept, PHI[1:2])
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_noise_is_not_drawn_again():
    torch.manual_seed(0)
    joint = make_fx(lambda x, phi, a, b2: [phi + (noise := torch.rand_like(phi)), b2 * noise])(X, PHI, ALPHA[0], B2)
    first, second, _ = split(joint, math.inf)
    following, *residuals = first(X, PHI, ALPHA[0])
    assert torch.allclose(second(X, ALPHA[0], B2, *residuals)[0], B2 * (following - PHI))


@pytest.fixture
def uncompiled(monkeypatch):
    """The halves as they were traced and cut, without minutes of compiling; test_steps compiles some.

    As those that are compiled, they take tensors with the strides of the first call alone.
    """

    def traced(graph, shapes):
        def run(*given):
            assert [t.stride() for t in given] == [t.stride() for t in shapes]
            return graph(*given)

        return run

    compile_by(monkeypatch, traced)


def written_in_place():
    """The state is written into a view of a fresh tensor, which a trace does not follow; it starts at zero."""

    def inner(theta, phi, task):
        w = torch.zeros_like(phi).view(1, -1).repeat(2, 1)
        w[0] = phi
        w[1].add_(2 * theta)
        return ((w.sum(0) - task) ** 4).sum()

    problem = BilevelProblem(inner, lambda t, p, x: (p**3).sum(), lambda t, x: torch.zeros_like(t), [0.01] * 4,
                             tasks=torch.ones(1, 5, dtype=F64))  # fmt: skip
    return problem, torch.linspace(-1, 1, 5, dtype=F64), problem.tasks


def closed_over():
    """Its Hessian is a constant, so that nothing of a step is needed but what is at hand."""
    problem = quadratic(dim=3, r=4)
    return problem, problem.initial, problem.sample(2, torch.Generator().manual_seed(0))


def records(problem, theta, tasks, unrolled=False):
    tasks = Tasks.of(tasks)
    rows = theta.expand(len(tasks), -1)
    steps, phi = Steps(problem, rows, tasks, unrolled, compile=True), first_state(problem, rows, tasks)
    return phi, steps.record(phi, 0)[1]


def wide(r=6):
    """As few images as there are inputs: what the hidden layer says is less than its weights are."""
    problem = digits_hypercleaning(n_train=15, n_validation=15, hidden=8, r=r, dtype=F64)
    return problem, torch.linspace(-1, 1, 15, dtype=F64), problem.tasks


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("make", "small"), [(wide, True), pytest.param(few_shot, False, marks=pytest.mark.slow)])
def test_a_stored_sweep_keeps_what_is_smaller_and_an_unrolled_one_the_residuals(make, small):
    problem, theta, tasks = make()
    phi, kept = records(problem, theta, tasks, unrolled=True)
    assert (sum(t.nbytes for t in kept) <= phi.nbytes) == small
    phi, kept = records(problem, theta, tasks, unrolled=False)
    assert (kept[0] is not phi) == small


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "make",
    slow_unless(lambda make: make is not hypercleaning, (sines, hypercleaning, wide, written_in_place, closed_over)),
)
@pytest.mark.parametrize("sweep", [Sweep.stored(), Sweep.unrolled()])
def test_gradients_from_residuals_are_those_of_the_unrolled_loop_and_counted_alike(make, sweep):
    problem, theta, tasks = make()
    n, r = len(Tasks.of(tasks)), problem.r
    exact, last = (unrolled_gradient(problem, theta, tasks, k) for k in (r, 1))
    with count_calls() as calls:
        found = hypergradient(problem, theta, tasks, Estimator(1.0, sweep), per_task=True, compile=True)
    assert (found - exact).norm() <= 1e-10 * max(1e-3, exact.norm())
    assert (calls.gradients, calls.hessian_vector_products) == (n * (r + 1), n * r)
    coins, ufom = torch.ones(n, dtype=torch.bool), UFOM(0.5, sweep, Truncated(1))
    found = hypergradient(problem, theta, tasks, ufom, coins=coins, per_task=True, compile=True)
    assert (found - (2 * exact - last)).norm() <= 1e-10 * max(1e-3, exact.norm())


@pytest.mark.usefixtures("uncompiled")
def test_a_state_that_is_kept_in_place_of_residuals_may_be_one_theta_for_all_tasks():
    net = FlatModule(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))
    drawn = torch.Generator().manual_seed(0)
    theta = torch.randn(net.vector().shape, generator=drawn, dtype=F64)
    tasks = tuple(torch.randn(3, 200, size, generator=drawn, dtype=F64) for size in (4, 1))

    def loss(theta, phi, task):
        return (net(phi, task[0]) - task[1]).square().mean()

    problem = BilevelProblem(loss, loss, lambda theta, task: theta, [0.1] * 3, tasks=tasks)
    found = hypergradient(problem, theta, tasks, EXACT, per_task=True, compile=True, chunk=3)
    assert (found - unrolled_gradient(problem, theta, tasks)).norm() <= 1e-12
    assert [t.shape for t in records(problem, theta, tasks)[1]] == [(3, len(theta))]  # φ: the residuals are larger


@pytest.mark.usefixtures("uncompiled")
def test_a_stored_sweep_holds_its_residuals_and_no_state():
    def peak(r):
        problem, theta, tasks = wide(r)
        hypergradient(problem, theta, tasks, EXACT, compile=True)
        return peak_bytes(lambda: hypergradient(problem, theta, tasks, EXACT, compile=True), (theta, *tasks))

    problem, theta, tasks = wide()
    phi, kept = records(problem, theta, tasks, unrolled=False)
    size = sum(t.nbytes for t in kept)
    assert size < 0.9 * phi.nbytes
    assert peak(8) - peak(4) == pytest.approx(4 * size, rel=0.02)


@pytest.mark.parametrize("fails", ["its trace", "the compiler"])
def test_an_outer_step_that_cannot_be_compiled_leaves_the_halves_as_they_are(fails, monkeypatch):
    problem, theta, tasks = wide()
    outer_loss = problem.outer_loss

    def outer(theta, phi, task):
        loss = outer_loss(theta, phi, task).sinh()
        return loss * (loss.detach().item() > -1) if fails == "its trace" else loss

    def compiled(graph, shapes):
        if "sinh" in graph.code:
            raise RuntimeError("no sinh")
        return graph

    compile_by(monkeypatch, compiled)
    changed = replace(problem, outer_loss=outer)
    with pytest.warns(match="outer_step cannot be compiled") as said:
        found = hypergradient(changed, theta, tasks, EXACT, compile=True)
    assert len(said) == 1
    torch.testing.assert_close(found, hypergradient(changed, theta, tasks, EXACT), rtol=1e-12, atol=1e-12)
    halves, outer_step = kept(changed, "graphs").values()
    assert len(halves.graphs) == 2
    assert outer_step is None


def test_an_operation_that_writes_into_its_input_is_refused():
    def step(x, phi, alpha, b2):
        return [phi - alpha * phi, b2 * torch.zeros_like(phi).add_(phi)]

    with pytest.raises(ValueError, match=r"aten.add_.Tensor writes into its input"):
        halves(step)


def test_wrongly_compiled_halves_are_caught(monkeypatch):
    problem, theta, tasks = sines()
    compile_by(monkeypatch, lambda graph, _: lambda *a: [1.01 * t for t in graph(*a)])
    with pytest.raises(UfomError, match=r"compiled joint_step differs from the plain one by 0.01"):
        hypergradient(problem, theta, tasks, UNROLLED, compile=True)


@pytest.mark.usefixtures("uncompiled")
def test_a_task_and_a_tuple_of_one_are_not_served_the_same_graph():
    problem = BilevelProblem(lambda t, p, x: ((p * t - x[0]) ** 4).sum(), lambda t, p, x: (p**2).sum(), lambda t, x: t,
                             [0.01] * 2, tasks=torch.tensor([[1.0, 2.0]], dtype=F64))  # fmt: skip
    theta = torch.tensor([0.5, -0.5], dtype=F64)
    for tasks in (problem.tasks, (problem.tasks,)):
        found = hypergradient(problem, theta, tasks, UNROLLED, per_task=True, compile=True)
        expected = hypergradient(problem, theta, tasks, UNROLLED, per_task=True)
        assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.usefixtures("uncompiled")
def test_a_cost_is_of_the_steps_that_the_sweep_runs():
    for sweep, steps in ((Sweep.stored(), {"outer_step", "joint_step"}),
                         (None, {"outer_step", "inner_step", "backward_step"})):  # fmt: skip
        problem, theta, tasks = wide()
        cost = measure_cost(problem, theta, tasks, sweep=sweep, seconds=0.01, repeats=5, compile=True)
        assert {key[0].__name__ for key in kept(problem, "graphs")} == steps
        assert cost.sweep == (sweep or Sweep.recomputed())


def test_without_a_compiler_an_unrolled_sweep_keeps_states_and_says_so(monkeypatch):
    problem, theta, tasks = sines()
    compile_by(monkeypatch, failing)
    with pytest.warns(match="no residuals are kept.*no compiler"), pytest.warns(match="the plain path is used"):
        found = hypergradient(problem, theta, tasks, UNROLLED, compile=True)
    assert (found - hypergradient(problem, theta, tasks, EXACT)).norm() <= 1e-12
