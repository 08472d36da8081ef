"""Numbers of any library as q; and torch's default device and dtype, which must move no draw, coin or gradient."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from ufom_runtime import EXACT, METHODS, UFOM, Estimator, hypergradient, measure_moments, train
from ufom_runtime.measure.constants import estimate_constants
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory import UfomError


@contextmanager
def dtype(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# nothing can be computed on the device "meta": what is made there by mistake fails, or differs
OTHER = {"device": lambda: torch.device("meta"), "dtype": lambda: dtype(torch.float64)}


def draws(problem):
    tasks = Tasks.of(problem.sample(4, torch.Generator().manual_seed(1)))
    theta = problem.initial[-1] if problem.initial.ndim == 2 else problem.initial
    return [theta, *tasks.parts, problem.step_sizes]


def gradients(problem):
    tasks, theta = problem.sample(4, torch.Generator().manual_seed(1)), problem.initial
    for method in [entry.make(problem.r) for name, entry in METHODS.items() if "implicit" not in name]:
        if not method.begin() and method.gradient:
            yield hypergradient(problem, theta, tasks, method, generator=torch.Generator().manual_seed(2))
    yield train(problem, theta, UFOM(0.5), lambda k: 0.01, 3, batch=3).theta
    moments = measure_moments(problem, theta, tasks, chunk=3)
    constants = estimate_constants(problem, theta, tasks)
    yield torch.tensor([moments.d2, moments.v2, constants.L2], device="cpu", dtype=torch.float64)


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize(
    "make",
    [
        lambda: quadratic(dim=3, r=4),
        lambda: synthetic(r=3),
        lambda: digits_few_shot(ways=3, filters=2, r=2),
        lambda: digits_hypercleaning(n_train=6, n_validation=6, hidden=2, r=3),
    ],
)
def test_problems_and_their_draws_are_the_same(make, other):
    expected = draws(make())
    with OTHER[other]():
        found = draws(make())
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("other", OTHER)
def test_every_method_and_measurement_is_the_same(other):
    problem = quadratic(dim=3, r=4, alpha=0.4)
    expected = list(gradients(problem))
    with OTHER[other]():
        found = list(gradients(problem))
    assert len(expected) > 15
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "q", [np.float32(0.25), np.float64(0.25), np.array(0.25), torch.tensor(0.25), torch.tensor(0.25).double()]
)
def test_a_number_of_any_library_is_a_probability(q):
    assert UFOM(q) == UFOM(0.25) == Estimator(q)
    assert type(UFOM(q).q) is float


def test_integers_are_probabilities_too():
    assert UFOM(np.int64(1)).q == UFOM(1).q == EXACT.q


@pytest.mark.parametrize("make", [UFOM, Estimator])
@pytest.mark.parametrize(
    ("q", "message"),
    [
        ("0.3", "q = '0.3' is a str: give one real number"),
        (True, "q = True is a bool: give one real number"),
        (None, "q = None is a NoneType"),
        (1j, "is a complex"),
        (np.array([0.3]), "is a ndarray"),
        (torch.tensor([0.3]), "is a Tensor"),
        (torch.tensor(0.3, requires_grad=True), "is a Tensor: give one real number, a probability without a gradient"),
        (np.float32(1.5), r"q = 1.5 must lie in .*1\]: it is a probability"),
        (float("nan"), r"q = nan must lie in .*1\]"),
    ],
)
def test_what_is_no_probability_is_named(make, q, message):
    with pytest.raises(UfomError, match=message):
        make(q)
