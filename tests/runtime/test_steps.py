"""The compiled path against the oracle."""

import warnings

import pytest
import torch

from tests.conftest import compile_by
from tests.oracles import unrolled_gradient
from tests.runtime.conftest import F64, coupled
from ufom_runtime import EXACT, UFOM, Estimator, count_calls, hypergradient
from ufom_runtime.problem import Tasks, kept
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.steps import Steps
from ufom_theory import Sweep, Truncated, UfomError


def few_shot():
    problem = digits_few_shot(filters=2, ways=2, r=2, dtype=F64)  # batch-norm, twice differentiated
    return problem, problem.initial, problem.sample(1, torch.Generator().manual_seed(0))


def hypercleaning():
    problem = digits_hypercleaning(n_train=12, n_validation=10, hidden=3, r=4, dtype=F64)
    return problem, torch.linspace(-1, 1, 12, dtype=F64), problem.tasks


def sines():
    problem = coupled()
    return problem, problem.initial, problem.sample(3, torch.Generator().manual_seed(1))


def _slow(make):
    return pytest.param(make, marks=pytest.mark.slow)


@pytest.mark.parametrize("make", [sines, _slow(hypercleaning), _slow(few_shot)])
def test_compiled_steps_agree_with_the_unrolled_loop(make):
    problem, theta, tasks = make()
    found, exact = hypergradient(problem, theta, tasks, EXACT, per_task=True, compile=True), unrolled_gradient(*make())
    assert (found - exact).norm() <= 1e-10 * exact.norm()


@pytest.mark.parametrize("make", [sines, _slow(hypercleaning), _slow(few_shot)])
@pytest.mark.parametrize("compiled", [False, _slow(True)])
def test_every_sweep_by_traced_steps_agrees_with_the_unrolled_loop(make, compiled, monkeypatch):
    if not compiled:
        compile_by(monkeypatch)
    problem, theta, tasks = make()
    exact, fom = unrolled_gradient(problem, theta, tasks), unrolled_gradient(problem, theta, tasks, 0)
    for estimator, expected in (
        (EXACT, exact),
        (Estimator(1.0, Sweep.unrolled()), exact),
        (Estimator(1.0, Sweep.checkpointed(1)), exact),
        (Estimator(0.0), fom),
        (Estimator(0.0, proxy=Truncated(1)), unrolled_gradient(problem, theta, tasks, 1)),
    ):
        found = hypergradient(problem, theta, tasks, estimator, per_task=True, compile=True)
        assert (found - expected).norm() <= 1e-10 * max(1e-3, expected.norm())
    # the three steps, whatever the estimator, and how a stored and an unrolled sweep record one
    assert len(kept(problem, "graphs")) == 5


def test_compiled_batches_are_of_one_length_and_counted_without_the_filling(monkeypatch):
    compile_by(monkeypatch)
    problem, theta, tasks = sines()
    coins = torch.tensor([True, False, True])
    with count_calls() as calls:
        found = hypergradient(problem, theta, tasks, UFOM(0.4), coins=coins, per_task=True, chunk=2, compile=True)
    expected = hypergradient(problem, theta, tasks, UFOM(0.4), coins=coins, per_task=True)
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    assert (calls.gradients, calls.hessian_vector_products) == (3 * 6 + 2 * 6, 2 * 5)  # 4 steps are not repeated
    assert len(kept(problem, "graphs")) == 5  # as in the sweeps above: none more for another number of rows


def test_one_tensor_in_two_places_stays_two_arguments(monkeypatch):
    compile_by(monkeypatch)
    problem, theta, tasks = sines()
    phi = torch.linspace(0.1, 1, 9, dtype=F64).view(3, 3)
    rows = theta.expand(3, -1)
    compiled, plain = (Steps(problem, rows, Tasks.of(tasks), compile=c) for c in (True, False))
    for other in (phi, 2 * phi):
        for a, b in zip(compiled.back(phi, 1, phi, other), plain.back(phi, 1, phi, other), strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()


def failing(*_, **__):
    raise RuntimeError("no compiler here")


def test_without_a_compiler_the_plain_path_is_used_and_said_so(monkeypatch):
    problem, theta, tasks = sines()
    compile_by(monkeypatch, failing)
    plainly = pytest.warns(UserWarning, match=r"plain path is used, since the \w+_step cannot .*no compiler")
    with pytest.warns(match="no residuals are kept.*no compiler"), plainly as said:
        found = hypergradient(problem, theta, tasks, EXACT, compile=True)
    assert len(said) == 4  # the three steps, and that no residuals are kept
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error")
        assert torch.equal(found, hypergradient(problem, theta, tasks, EXACT, compile=True))
    assert (found - hypergradient(problem, theta, tasks, EXACT)).norm() <= 1e-12


def test_a_torch_that_builds_its_kernels_in_another_way_is_let_do_so(monkeypatch):
    problem, theta, tasks = sines()
    compile_by(monkeypatch, lambda graph, _: lambda *a: list(graph(*a)))
    monkeypatch.setattr("ufom_runtime.compiled.trace.built_together", failing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hypergradient(problem, theta, tasks, EXACT, compile=True)
    assert (found - hypergradient(problem, theta, tasks, EXACT)).norm() <= 1e-12


def test_a_wrong_compiler_is_caught(monkeypatch):
    problem, theta, tasks = sines()
    compile_by(monkeypatch, lambda graph, _: lambda *a: [1.01 * t for t in graph(*a)])
    with pytest.raises(UfomError, match=r"compiled joint_step differs from the plain one by 0.01"):
        hypergradient(problem, theta, tasks, EXACT, compile=True)
