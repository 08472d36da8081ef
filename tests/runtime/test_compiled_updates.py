"""Compiled steps of inner updates, against the plain ones: one graph serves all j where the update does not use it."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import compile_by
from tests.grids import slow_unless
from tests.runtime.test_inner_sweeps import batch, problem_of, setting
from ufom_runtime import EXACT, HELD, UFOM, Estimator, hypergradient
from ufom_runtime.inner import adam, momentum
from ufom_runtime.problem import kept
from ufom_theory import Sweep, Truncated

UNROLLED = Estimator(1.0, Sweep.unrolled())
RATES = 0.02 + 0.01 * torch.arange(2, dtype=torch.float64)


class SignedMomentum:
    """An update whose use of j shows neither at the start, where v = 0, nor in the sign of v."""

    def init(self, theta, phi, task):
        return torch.zeros_like(phi)

    def update(self, theta, phi, v, grad, task, j):
        following = j / (j + 3) * v + grad
        return phi - 0.05 * following - 0.01 * torch.sign(following), following


UPDATES = {  # and whether one graph serves all j
    "adam": (adam(0.1, (0.8, 0.9)), True),
    "a schedule": (momentum(RATES, 0.8), True),
    "an update that uses j": (SignedMomentum(), False),
}


def problem_with(update):
    return replace(problem_of("sgd"), update=update, inner_batch=batch, steps=len(RATES))


def compare(problem, estimators):
    theta, tasks = setting()
    for estimator in estimators:
        options = {"per_task": True, "coins": torch.tensor([True, False])} if 0 < estimator.q < 1 else {}
        found, expected = (
            hypergradient(problem, theta, tasks, estimator, compile=compile, **options) for compile in (True, False)
        )
        assert (found - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("name", slow_unless(lambda name: name != "a schedule", UPDATES))
def test_traced_steps_give_the_plain_numbers(monkeypatch, name):
    compile_by(monkeypatch)
    update, shared = UPDATES[name]
    problem = problem_with(update)
    compare(problem, [EXACT, UNROLLED, UFOM(0.5, Sweep.checkpointed(1), proxy=Truncated(1)), UFOM(0.5, proxy=HELD)])
    # the three steps, and how a stored and an unrolled sweep record one
    assert (len(kept(problem, "graphs")) == 5) == shared


class Turned:
    """An update that uses j once `numbered` is set."""

    numbered = False

    def init(self, theta, phi, task):
        return ()

    def update(self, theta, phi, state, grad, task, j):
        return phi - 0.05 * (j if self.numbered else 1) * grad, state


def test_an_update_that_begins_to_use_j_is_traced_for_each(monkeypatch):
    compile_by(monkeypatch)
    update = Turned()
    problem = problem_with(update)
    compare(problem, [EXACT])
    update.numbered = True
    compare(problem, [EXACT])


@pytest.mark.slow  # test_steps compiles other steps in a quick run
def test_the_compiler_gives_the_plain_numbers():
    problem = problem_with(adam(RATES, (0.8, 0.9)))
    compare(problem, [EXACT, UNROLLED])
    assert len(kept(problem, "graphs")) == 3  # the outer step, and a step in two halves for each sweep
