"""What each method declares, calls and states, against what is counted; and the list of methods."""

import re
from pathlib import Path

import pytest
import torch

from tests.runtime.conftest import coupled
from ufom_runtime import METHODS, BilevelProblem, Estimator, count_calls, hypergradient, outer_sgd
from ufom_runtime.memory import peak_bytes
from ufom_runtime.methods import ES, Entry, Forward, Implicit, Reversible, Telescoping
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import Sweep, UfomError

F64 = torch.float64
P = 5_000


def wide(r):
    """φ far longer than θ, so that a vector of length p stands out; a stationary point; θ everywhere."""
    return BilevelProblem(
        inner_loss=lambda theta, phi, task: (phi - theta.sum() * task).square().sum() / 2 + phi.cos().sum() / 10,
        outer_loss=lambda theta, phi, task: (phi * task).sum() + theta.sum() * phi[0],
        start=lambda theta, task: theta.mean() * task,
        step_sizes=[0.5] * r,
        tasks=torch.linspace(0.5, 1, P, dtype=F64)[None],
    )


THETA = torch.tensor([0.3, -0.2, 0.5], dtype=F64)


def outcomes(method, problem, theta=THETA):
    """(probability, call) of everything that a method may draw; the last one holds the most."""
    tasks = Tasks.of(problem.tasks)

    def with_coin(coin):
        coins = torch.tensor([coin])
        return lambda: hypergradient(problem, theta, tasks, method, coins=coins)

    if isinstance(method, Estimator) and 0 < method.q < 1:
        return [(1 - method.q, with_coin(False)), (method.q, with_coin(True))]
    if isinstance(method, Telescoping):
        return [(p, lambda i=i: method.at(problem, theta[None], tasks, i)) for i, p in enumerate(method.probabilities)]
    return [(1.0, lambda: method.direction(problem, theta, tasks, draws=torch.Generator().manual_seed(0)))]


def quiet(method):
    return Implicit(method.solver, method.steps, warn_above=99.0) if isinstance(method, Implicit) else method


CALLED = [name for name in METHODS if name not in ("adaptive-ufom", "reptile")]  # q changes; tested by itself


@pytest.mark.parametrize("r", [1, 6, 11])
@pytest.mark.parametrize("name", CALLED)
def test_calls_are_those_counted(name, r):
    method, problem, found = quiet(METHODS[name].make(r)), wide(r), torch.zeros(2, dtype=F64)
    for probability, call in outcomes(method, problem):
        with count_calls() as calls, torch.enable_grad():
            call()
        found += probability * torch.tensor([calls.gradients, calls.hessian_vector_products], dtype=F64)
    declared = method.calls(r, len(THETA))
    assert found.tolist() == pytest.approx([declared.gradients, declared.hessian_vector_products], rel=1e-12)


@pytest.mark.parametrize("method", [Forward(1), Forward(2), ES(pairs=3), Implicit("cg", 3, warn_above=99.0)], ids=str)
def test_calls_follow_the_settings(method):
    problem = coupled(r=4)
    problem = BilevelProblem(
        problem.inner_loss if not isinstance(method, Implicit) else wide(4).inner_loss, problem.outer_loss,
        problem.start, [0.1] * 4, problem.sample_tasks,
    )  # fmt: skip
    tasks = problem.sample(5, torch.Generator().manual_seed(0))
    with count_calls() as calls:
        hypergradient(problem, THETA, tasks, method, generator=torch.Generator().manual_seed(0), chunk=2)
    declared = method.calls(4, 3)
    assert (calls.gradients, calls.hessian_vector_products) == (
        5 * declared.gradients, 5 * declared.hessian_vector_products
    )  # fmt: skip


def peak(method, r):
    """Peak bytes of one task in vectors of length p."""
    problem = wide(r)
    *_, (_, call) = outcomes(method, problem)
    with torch.enable_grad():
        return peak_bytes(call, (problem.tasks, THETA)) / (8 * P)


@pytest.mark.parametrize("name", CALLED)
def test_states_grow_as_declared(name):
    """In live bytes, between 8 inner steps and 14: with φ of 5000 numbers, all else is small."""
    long = 41 if name == "reversible" else 14
    few, many = (quiet(METHODS[name].make(r)) for r in (8, long))
    if name == "reversible":
        few = many = Reversible("1/4")  # 31 steps fill a word
    declared = many.states(long, 3) - few.states(8, 3)
    grown = peak(many, long) - peak(few, 8)
    if name == "unrolled":  # and the graph
        assert grown > declared
    else:
        assert grown == pytest.approx(declared, abs=0.05)


def test_forward_holds_its_tangents_and_nothing_that_grows_with_r():
    assert peak(Forward(3), 30) == pytest.approx(peak(Forward(3), 8), abs=0.05)
    one, two, three = (peak(Forward(c), 8) for c in (1, 2, 3))
    assert min(three - two, two - one) > 0.99  # a tangent each


def test_adaptive_and_reptile_run_in_outer_sgd_alone():
    problem = quadratic(dim=3, r=4)
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    for name in ("adaptive-ufom", "reptile"):
        method = METHODS[name].make(4)
        assert outer_sgd(problem, problem.initial, method, [0.1] * 2, 2).log.step.tolist() == [1, 2]
        with pytest.raises(UfomError, match="use train"):
            hypergradient(problem, problem.initial, tasks, method)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name):
    """With steps of the mean estimate, as a loop written out takes them; the task's generator is another one."""
    problem, entry = wide(5), METHODS[name]
    if name == "reptile":
        problem = quadratic(dim=3, r=5)
    method = quiet(entry.make(5))
    run = outer_sgd(problem, THETA, method, [0.01] * 3, 3, batch=2, seed=1)
    again = outer_sgd(problem, THETA, method, [0.01] * 3, 3, batch=2, seed=1)
    assert torch.equal(run.theta, again.theta)
    assert run.theta.isfinite().all()
    assert not torch.equal(run.theta, THETA)
    assert run.log.gradients.gt(0).all()


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    problem = quadratic(dim=3, r=4)

    def run(**options):
        return outer_sgd(problem, problem.initial, Telescoping((1, 4)), [0.1] * 4, 4, **options).theta

    def stop(share):
        if share >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path / "run", progress=stop)
    assert torch.equal(run(checkpoint=tmp_path / "run"), run())


def test_the_mean_is_the_mean_of_the_tasks_estimates():
    problem = coupled()
    tasks = problem.sample(4, torch.Generator().manual_seed(0))
    each = hypergradient(problem, problem.initial, tasks, Forward(), per_task=True)
    assert each.shape == (4, 3)
    torch.testing.assert_close(hypergradient(problem, problem.initial, tasks, Forward()), each.mean(0))


def test_our_estimators_declare_proposition_1_in_one_pass():
    estimator = Estimator(0.25, Sweep.recomputed())
    declared = estimator.calls(10)
    assert (declared.gradients, declared.hessian_vector_products) == (11 + 0.25 * 36, 2.5)


PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_lists_every_method_as_it_is():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| [^|]+ \| ([a-z ]+) \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert dict(rows) == {name: entry.kind for name, entry in METHODS.items()}
    assert all(isinstance(entry, Entry) and entry.valid for entry in METHODS.values())
