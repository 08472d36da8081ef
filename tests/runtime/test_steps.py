"""The compiled path against the oracle; a trace is never stale, and never silently wrong."""

import warnings

import pytest
import torch

from tests.oracles import unrolled_gradient
from tests.runtime.conftest import F64, coupled
from ufom_runtime import EXACT, UFOM, BilevelProblem, Estimator, count_calls, hypergradient
from ufom_runtime.kept import kept
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.steps import Steps
from ufom_theory import Sweep, Truncated, UfomError

ONE = torch.ones(1, 2, dtype=F64)
THETA = torch.tensor([0.3, -0.2], dtype=F64)


def few_shot():
    problem = digits_few_shot(filters=2, ways=2, r=2, dtype=F64)  # batch-norm, twice differentiated
    return problem, problem.initial, problem.sample(1, torch.Generator().manual_seed(0))


def hypercleaning():
    problem = digits_hypercleaning(n_train=12, n_validation=10, hidden=3, r=4, dtype=F64)
    return problem, torch.linspace(-1, 1, 12, dtype=F64), problem.tasks


def sines():
    problem = coupled()
    return problem, problem.initial, problem.sample(3, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [sines, hypercleaning, few_shot])
def test_compiled_steps_agree_with_the_unrolled_loop(make):
    problem, theta, tasks = make()
    exact, fom = unrolled_gradient(problem, theta, tasks), unrolled_gradient(problem, theta, tasks, 0)
    for estimator, expected in (
        (EXACT, exact),
        (Estimator(1.0, Sweep.unrolled()), exact),
        (Estimator(1.0, Sweep.checkpointed(1, one_pass=True)), exact),
        (Estimator(0.0), fom),
        (Estimator(0.0, proxy=Truncated(1)), unrolled_gradient(problem, theta, tasks, 1)),
    ):
        found = hypergradient(problem, theta, tasks, estimator, per_task=True, compile=True)
        assert (found - expected).norm() <= 1e-10 * max(1e-3, expected.norm())
    # the three steps, whatever the estimator, and how a stored and an unrolled sweep record one
    assert len(kept(problem, "graphs")) == 5


def test_compiled_batches_are_of_one_length_and_counted_without_the_filling():
    problem, theta, tasks = sines()
    coins = torch.tensor([True, False, True])
    with count_calls() as calls:
        found = hypergradient(problem, theta, tasks, UFOM(0.4), coins=coins, per_task=True, chunk=2, compile=True)
    expected = hypergradient(problem, theta, tasks, UFOM(0.4), coins=coins, per_task=True)
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    assert (calls.gradients, calls.hessian_vector_products) == (3 * 6 + 2 * 10, 2 * 5)
    assert len(kept(problem, "graphs")) == 3


def test_one_tensor_in_two_places_stays_two_arguments():
    problem, theta, tasks = sines()
    phi = torch.linspace(0.1, 1, 9, dtype=F64).view(3, 3)
    rows = theta.expand(3, -1)
    compiled, plain = (Steps(problem, rows, Tasks.of(tasks), compile=c) for c in (True, False))
    for other in (phi, 2 * phi):
        for a, b in zip(compiled.back(phi, 1, other), plain.back(phi, 1, other), strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()


SCALE = 1.0


class Weighted:
    def __init__(self):
        self.weight = 1.0

    def loss(self, theta, phi, task):
        return self.weight * SCALE * (torch.sin(phi * theta) * task).sum()


def test_what_the_loss_closes_over_may_be_rebound(monkeypatch):
    model, factor, tensor = Weighted(), 1.0, torch.ones((), dtype=F64)

    def inner(theta, phi, task):
        return (lambda: factor * tensor)() * model.loss(theta, phi, task)

    problem = BilevelProblem(inner, lambda t, p, x: (p**2).sum(), lambda t, x: t, [0.3] * 2, tasks=ONE)

    def check():
        found = hypergradient(problem, THETA, ONE, EXACT, per_task=True, compile=True)
        expected = unrolled_gradient(problem, THETA, ONE)
        assert (found - expected).norm() <= 1e-12 * expected.norm()
        return found

    values = [check()]
    factor = 2.0
    values.append(check())
    model.weight = 0.3
    values.append(check())
    monkeypatch.setattr(f"{__name__}.SCALE", 1.7)
    values.append(check())
    tensor = torch.tensor(0.2, dtype=F64)
    values.append(check())
    tensor.fill_(0.9)
    values.append(check())
    assert len({v.sum().item() for v in values}) == 6


def failing(*_, **__):
    raise RuntimeError("no compiler here")


def test_without_a_compiler_the_plain_path_is_used_and_said_so(monkeypatch):
    problem, theta, tasks = sines()
    monkeypatch.setattr(torch._inductor, "compile", failing)
    with pytest.warns(UserWarning, match=r"plain path is used, since the \w+_step cannot .*no compiler") as said:
        found = hypergradient(problem, theta, tasks, EXACT, compile=True)
    assert len(said) == 3
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error")
        assert torch.equal(found, hypergradient(problem, theta, tasks, EXACT, compile=True))
    assert (found - hypergradient(problem, theta, tasks, EXACT)).norm() <= 1e-12


def test_a_branch_on_data_is_not_baked_in():
    def inner(theta, phi, task):
        return (phi * theta).sin().sum() if phi.sum() > 0 else (phi**2).sum()

    problem = BilevelProblem(inner, lambda t, p, x: (p**2).sum(), lambda t, x: t, [0.3] * 2, tasks=ONE)
    with pytest.warns(UserWarning, match="no residuals are kept"), pytest.warns(match="the plain path is used"):
        hypergradient(problem, THETA, ONE, EXACT, compile=True)
    for theta in (THETA, -THETA):
        found = hypergradient(problem, theta, ONE, EXACT, per_task=True, compile=True)
        assert (found - unrolled_gradient(problem, theta, ONE)).norm() <= 1e-12


def test_a_wrong_compiler_is_caught(monkeypatch):
    problem, theta, tasks = sines()
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, _: lambda *a: [1.01 * t for t in graph(*a)])
    with pytest.raises(UfomError, match=r"compiled inner_step differs from the plain one by 0.01"):
        hypergradient(problem, theta, tasks, EXACT, compile=True)
