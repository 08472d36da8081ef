"""A compiled step is never stale: what the losses read outside their arguments may change in any way."""

import array
import collections
import contextvars
import ctypes
import gc
import os
import sys
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import compile_by
from tests.oracles import unrolled_gradient
from tests.runtime.conftest import F64, coupled
from ufom_runtime import EXACT, UFOM, BilevelProblem, Estimator, FlatModule, hypergradient
from ufom_runtime.problem import kept
from ufom_theory import Sweep, UfomError

UNROLLED = Estimator(1.0, Sweep.unrolled())
THETA, ONE = torch.tensor([0.3, -0.2, 0.5], dtype=F64), torch.ones(1, 3, dtype=F64)
pytestmark = pytest.mark.filterwarnings("ignore:the plain path is used", "ignore:no residuals are kept")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Graphs as they were traced, without seconds of compiling; test_steps compiles some."""
    compile_by(monkeypatch)


def weighted(weight):
    return BilevelProblem(
        inner_loss=lambda theta, phi, task: ((phi - task) ** 2).sum() + weight() * (phi**4).sum(),
        outer_loss=lambda theta, phi, task: ((phi - task) ** 2).sum(),
        start=lambda theta, task: theta,
        step_sizes=[0.1] * 3,
        tasks=ONE,
    )


class Base:
    lam = 0.5


class Derived(Base):
    __slots__ = ("own",)

    @property
    def hidden(self):
        return self.own["lam"][0]


LAM = 0.5


def by_name():
    return globals()["LAM"]


def imported():
    import weight_of_a_test

    return weight_of_a_test.lam


def module_attribute():
    made = types.ModuleType("weight_of_a_test")
    made.lam = 0.5
    sys.modules["weight_of_a_test"] = made
    return imported, lambda: setattr(made, "lam", 3.0)


def set_global():
    global LAM
    LAM = 3.0


def holder(kind, change):
    return lambda: (lambda held: (lambda: float(next(iter(held))), lambda: change(held)))(kind([0.5]))


def slots():
    held = Derived()
    held.own = {"lam": [0.5]}
    return lambda: held.hidden, lambda: held.own["lam"].insert(0, 3.0)


def environment():
    os.environ["UFOM_TEST_LAM"] = "0.5"
    return lambda: float(os.getenv("UFOM_TEST_LAM")), lambda: os.environ.update(UFOM_TEST_LAM="3")


def tensor(read):
    def make():
        held = torch.tensor([0.5], dtype=F64)
        return lambda: read(held), lambda: held.fill_(3.0)

    return make


def context():
    held = contextvars.ContextVar("lam", default=0.5)
    return held.get, lambda: held.set(3.0)


def in_c():
    held = ctypes.c_double(0.5)
    return lambda: held.value, lambda: setattr(held, "value", 3.0)


WAYS = {
    "a class attribute": lambda: (lambda: Derived.lam, lambda: setattr(Base, "lam", 3.0)),
    "a module's attribute": module_attribute,
    "a global": lambda: (lambda: LAM, set_global),
    "a global found by name": lambda: (by_name, set_global),
    "slots behind a property": slots,
    "a set": holder(set, lambda held: (held.clear(), held.add(3.0))),
    "a deque": holder(collections.deque, lambda held: held.appendleft(3.0)),
    "numpy in place": holder(np.array, lambda held: held.fill(3.0)),
    "an array in place": holder(lambda x: array.array("d", x), lambda held: held.__setitem__(0, 3.0)),
    "the environment": environment,
    "a tensor in place": tensor(lambda held: held[0]),
    "a tensor's number": tensor(lambda held: held.item()),
    "a tensor's list": tensor(lambda held: held.tolist()[0]),
    "a context variable": context,
    "an object written in C": in_c,
}


@pytest.mark.parametrize("way", WAYS)
def test_no_step_is_stale(monkeypatch, way):
    monkeypatch.setattr(Base, "lam", 0.5)
    monkeypatch.setitem(globals(), "LAM", 0.5)
    weight, change = WAYS[way]()
    problem, found = weighted(weight), []
    for _ in range(2):
        found.append(hypergradient(problem, THETA, ONE, EXACT, per_task=True, compile=True))
        expected = unrolled_gradient(problem, THETA, ONE)
        assert (found[-1] - expected).norm() <= 1e-10 * expected.norm()
        change()
    assert (found[0] - found[1]).norm() > 0.1 * found[1].norm()


def test_what_keeps_changing_is_computed_plainly_and_said_once():
    schedule = [0.1]
    problem = weighted(lambda: schedule[-1])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for k in range(6):
            schedule.append(k / 10)
            found = hypergradient(problem, THETA, ONE, UNROLLED, per_task=True, compile=True)
            expected = unrolled_gradient(problem, THETA, ONE)
            assert (found - expected).norm() <= 1e-10 * expected.norm()
    assert len(said) == 1
    assert "Pass a changing number in the task or in θ" in str(said[0].message)
    assert not kept(problem, "graphs")


@pytest.mark.parametrize(
    "read",
    [lambda t: sum(t.tolist()), lambda t: t.sum().item(), lambda t: float(t.detach().numpy().sum()),
     lambda t: t[t > 0.15].sum(), lambda t: 2.0 if t.sum() > 1 else 1.0],
)  # fmt: skip
@pytest.mark.parametrize("of_phi", [False, True])
def test_numbers_read_out_of_a_task_or_a_state_are_not_those_of_the_first(read, of_phi):
    problem = BilevelProblem(
        lambda theta, phi, task: ((phi - task) ** 2).sum() * read(phi.detach() if of_phi else task),
        lambda theta, phi, task: ((phi - task) ** 2).sum(), lambda theta, task: theta, [0.05] * 3, tasks=ONE,
    )  # fmt: skip
    tasks = torch.tensor([[1.0, 1, 1], [0.1, 0.2, 0.1]], dtype=F64)
    found = hypergradient(problem, THETA, tasks, EXACT, per_task=True, chunk=1, compile=True)
    expected = unrolled_gradient(problem, THETA, tasks)
    assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_steps_traced_inside_autocast_are_not_used_outside():
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) / 4
    problem = BilevelProblem(
        lambda theta, phi, task: (torch.tanh(phi @ mix) @ mix - task).pow(2).sum(),
        lambda theta, phi, task: (phi @ mix - task).pow(2).sum(), lambda theta, task: theta, [0.1] * 3,
        tasks=torch.ones(1, 16),
    )  # fmt: skip
    theta = torch.ones(16) / 2
    for estimator in (EXACT, UNROLLED):
        for autocast, tolerance in ((True, 0.05), (False, 1e-5)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found, expected = (
                    hypergradient(problem, theta, problem.tasks, estimator, compile=c) for c in (True, False)
                )
            assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("dtype", "wrong"), [(torch.bfloat16, 1.3), (torch.float16, 1.1), (torch.float32, 1.001)])
def test_a_compiler_that_is_wrong_by_more_than_rounding_is_caught(monkeypatch, dtype, wrong):
    compile_by(monkeypatch, lambda graph, _: lambda *a: [wrong * t for t in graph(*a)])
    problem, tasks = weighted(lambda: 0.5), torch.ones(1, 3, dtype=dtype)
    with pytest.raises(UfomError, match=r"the compiled \w+_step differs from the plain one by"):
        hypergradient(problem, THETA.to(dtype), tasks, EXACT, compile=True)


def test_pooling_keeps_its_residuals_and_a_loss_may_have_no_module():
    torch.manual_seed(0)
    net = FlatModule(nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2)).double())

    def loss(theta, phi, task):
        return (net(phi, task[0]) - task[1]).square().sum()

    loss.__module__ = None
    tasks = torch.randn(2, 3, 1, 5, 5, dtype=F64), torch.randn(2, 3, 2, dtype=F64)
    problem = BilevelProblem(loss, loss, lambda theta, task: theta, [0.1] * 2, tasks=tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hypergradient(problem, net.vector(), tasks, UNROLLED, per_task=True, compile=True)
    expected = unrolled_gradient(problem, net.vector(), tasks)
    assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_a_deleted_problem_is_collected_with_all_that_was_kept_for_it():
    problem = coupled()
    theta, tasks = problem.initial, problem.sample(2, torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)
    for compile in (False, True):
        hypergradient(problem, theta, tasks, UFOM(0.5), generator=draws, compile=compile)
    assert kept(problem, "graphs")
    alive = weakref.ref(problem)
    del problem
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("on", [True, False])
def test_garbage_is_not_collected_while_steps_are_compiled(monkeypatch, on):
    seen = []
    compile_by(monkeypatch, lambda graph, _: seen.append(gc.isenabled()) or graph)
    try:
        (gc.enable if on else gc.disable)()
        hypergradient(weighted(lambda: 0.5), THETA, torch.ones(1, 3, dtype=F64), EXACT, compile=True)
        assert seen
        assert not any(seen)
        assert gc.isenabled() is on
    finally:
        gc.enable()


def test_few_numbers_of_rows_are_compiled(monkeypatch):
    """Corrected rows are filled up to a power of two: 1, 2, 4 and 8 of eight, and none is compiled again."""
    compiled = []
    compile_by(monkeypatch, lambda graph, given: compiled.append(given[0].shape) or graph)
    problem = weighted(lambda: 0.1)
    tasks = torch.linspace(-1, 1, 24, dtype=F64).reshape(8, 3)
    plain = [hypergradient(problem, THETA, tasks, UFOM(0.5), coins=torch.arange(8) < k) for k in range(9)]
    for again in range(2):
        for k, expected in enumerate(plain):
            coins, before = torch.arange(8) < k, len(compiled)
            found = hypergradient(problem, THETA, tasks, UFOM(0.5), coins=coins, chunk=8, compile=True)
            assert (found - expected).norm() <= 1e-12 * expected.norm()
            assert not again or len(compiled) == before
    assert {shape[0] for shape in compiled} == {1, 2, 4, 8}
