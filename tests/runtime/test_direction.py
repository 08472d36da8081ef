"""The one protocol: every method gives a `Direction`, and what is not a method is refused for the right reason."""

import pytest
import torch

from tests.runtime.conftest import F64, coupled
from tests.runtime.test_rivals_declared import THETA, quiet, wide
from ufom_runtime import METHODS, REPTILE, UFOM, AdaptiveUFOM, hypergradient
from ufom_runtime.problems.quadratic import quadratic
from ufom_theory import Sweep, Truncated, UfomError


@pytest.mark.parametrize("name", METHODS)
def test_the_value_is_the_mean_of_the_tasks_directions(name):
    problem = quadratic(dim=3, r=4) if name == "reptile" else wide(4)
    tasks = problem.sample(3, torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [0.9], [0.7]], dtype=F64)
    method = quiet(METHODS[name].make(4))

    def direction(**options):
        draws = torch.Generator().manual_seed(1)
        return method.direction(problem, THETA, tasks, method.begin(), draws, **options)

    each = direction(per_task=True)
    assert each.per_task.shape == (3, 3)
    torch.testing.assert_close(direction().value, each.per_task.mean(0), rtol=1e-12, atol=1e-13)
    assert each.state == direction().state
    assert 0 <= each.corrected <= 3


def test_coins_may_be_given_to_the_adaptive_rule():
    problem, rule = coupled(), AdaptiveUFOM(q_min=0.25)
    tasks, coins = problem.sample(3, torch.Generator().manual_seed(0)), torch.tensor([True, False, True])
    found = rule.direction(problem, problem.initial, tasks, draws=coins)
    assert found.corrected == 2
    expected = hypergradient(problem, problem.initial, tasks, UFOM(0.25), coins=coins)
    assert torch.equal(found.value, expected)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        ("exact", "'exact' is a name, and not the method itself: give FOM, EXACT"),
        (Sweep.stored(), r"is a sweep, how the exact gradient recovers its states \(Estimator\(1.0, sweep\)"),
        (Truncated(2), "is a proxy, which an estimator debiases"),
        (UFOM, "UFOM is a function that makes a method, and has to be called"),
        (0.3, "0.3 is a number, and q goes into an estimator"),
        (AdaptiveUFOM, "AdaptiveUFOM is a class"),
        (AdaptiveUFOM(), "keeps a state between outer steps.* use train"),
        (REPTILE, "not a gradient"),
        (None, "None is not a method"),
    ],
)
def test_what_is_not_a_method_is_refused_for_the_right_reason(estimator, message):
    problem = quadratic(dim=3, r=4)
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    with pytest.raises(UfomError, match=message):
        hypergradient(problem, problem.initial, tasks, estimator)
