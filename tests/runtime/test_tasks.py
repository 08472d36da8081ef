"""Tasks as users hand them in: the forms that are accepted, and those that are refused."""

from collections import namedtuple

import pytest
import torch

from tests.oracles import unrolled_gradient
from ufom_runtime import EXACT, BilevelProblem, hypergradient, measure_moments
from ufom_runtime.problem import Tasks
from ufom_theory import UfomError

F64 = torch.float64
THETA = torch.linspace(-1, 1, 3, dtype=F64)
Episode = namedtuple("Episode", "x y")


def draw(n, generator):
    return Episode(*(torch.randn(n, 5, k, generator=generator, dtype=F64) for k in (3, 1)))


def problem(sample_tasks=draw, **fields):
    """A loss that works on any number of examples, so that one example would pass for a task."""

    def loss(theta, phi, task):
        return (torch.tanh(task.x @ phi) - task.y.squeeze(-1)).square().mean() + 0.1 * (theta * phi).sum() ** 2

    return BilevelProblem(loss, loss, lambda theta, task: theta.sin(), [0.3, 0.2], sample_tasks, **fields)


TASKS = draw(4, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"chunk": 3}])
def test_losses_see_the_named_tuple_that_was_given(options):
    found = hypergradient(problem(), THETA, TASKS, EXACT, per_task=True, **options)
    torch.testing.assert_close(found, unrolled_gradient(problem(), THETA, TASKS), rtol=1e-12, atol=1e-12)
    assert measure_moments(problem(), THETA, TASKS).v2 == pytest.approx(float(found.square().sum(1).mean()))


def test_a_stack_keeps_its_form_through_every_change():
    stack = Tasks.of(TASKS)
    for changed in (stack, stack.take(torch.tensor([2, 0])), stack.take(slice(2)).to(torch.float32)):
        assert isinstance(changed.stack, Episode)
    assert torch.equal(stack.take(slice(1, 2)).one().x, TASKS.x[1])
    assert len(stack.take(slice(1)).repeat(7)) == 7
    assert isinstance(Tasks.of(tuple(TASKS)).stack, tuple)
    assert isinstance(Tasks.of(TASKS.x).stack, torch.Tensor)


def test_a_finite_set_of_named_tuples_is_sampled_as_such():
    drawn = problem(None, tasks=TASKS).sample(6, torch.Generator().manual_seed(0))
    assert isinstance(drawn, Episode)
    assert all(any(torch.equal(x, known) for known in TASKS.x) for x in drawn.x)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([THETA, THETA], "not a list: torch.stack"),
        ({"x": THETA}, "not a dict"),
        ((TASKS.x, None), "tuple of tensors"),
        ((), "tuple of tensors"),
        (torch.tensor(1.0), r"no dimensions.*t\[None\]"),
        ((TASKS.x, TASKS.y[:2]), r"leading dimensions \[2, 4\].*single task is given as t\[None\]"),
        ((TASKS.x[:0], TASKS.y[:0]), "there are no tasks"),
        (TASKS.x.to_sparse(), "nested or sparse.*padded.*mask"),
    ],
)
def test_what_is_not_a_stack_is_refused(tasks, message):
    with pytest.raises(UfomError, match=message):
        hypergradient(problem(), THETA, tasks, EXACT)


def test_nested_tensors_are_refused():
    ragged = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    with pytest.raises(UfomError, match="padded"):
        hypergradient(problem(), THETA, ragged, EXACT)
