"""Tasks as users hand them in: the forms that are accepted, and those that are refused."""

import random
from collections import namedtuple
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from tests.oracles import unrolled_gradient
from ufom_runtime import EXACT, BilevelProblem, hypergradient, measure_moments
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.synthetic import synthetic
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


SINGLE = Episode(*(t[0] for t in TASKS))  # 5 examples: without a check they pass for 5 tasks


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(problem(), id="as sample_tasks draws"),
        pytest.param(problem(None, tasks=TASKS), id="as the finite set is"),
        pytest.param(problem(lambda n, g: None, tasks=TASKS), id="as the finite set is, though nothing is drawn"),
    ],
)
def test_a_single_task_is_not_taken_for_a_stack(given):
    assert hypergradient(given, THETA, TASKS, EXACT).isfinite().all()
    for _ in range(2):  # refused once more, not learnt
        with pytest.raises(
            UfomError, match=r"single one, not a stack: shapes \(5, 3\), \(5, 1\).*tasks\[:1\].*t\[None\]"
        ):
            hypergradient(given, THETA, SINGLE, EXACT)
    with pytest.raises(UfomError, match="single one"):
        measure_moments(given, THETA, SINGLE)
    with pytest.raises(UfomError, match=r"shapes \(1, 4, 5, 3\).*one leading dimension for the tasks"):
        hypergradient(given, THETA, Episode(*(t[None] for t in TASKS)), EXACT)
    more = draw(2, torch.Generator().manual_seed(3))
    more = Episode(*(torch.cat([t, t], 1) for t in more))  # more examples a task than are drawn
    expected = unrolled_gradient(given, THETA, more)
    torch.testing.assert_close(hypergradient(given, THETA, more, EXACT, per_task=True), expected)


def test_a_single_task_is_refused_after_a_sample_that_cannot_be_drawn_apart():
    held = torch.Generator().manual_seed(0)
    own = problem(lambda n, g: draw(n, held))
    own.sample(2, torch.Generator())
    with pytest.raises(UfomError, match="single one"):
        hypergradient(own, THETA, SINGLE, EXACT)


def refuses(n, generator):
    raise RuntimeError("no data here")


@pytest.mark.parametrize("sampler", [lambda n, g: None, refuses, lambda n, g: [1, 2]])
def test_where_nothing_is_drawn_stacks_are_taken_as_they_are(sampler):
    own = problem(sampler)
    expected = unrolled_gradient(own, THETA, TASKS)
    torch.testing.assert_close(hypergradient(own, THETA, TASKS, EXACT, per_task=True), expected)


class Loader:
    """A sampler with a generator, an iterator and a count of its own."""

    def __init__(self):
        self.generator, self.stream, self.calls = torch.Generator().manual_seed(0), iter(range(100)), 0

    def sample(self, n, generator):
        self.calls += 1
        return draw(n, torch.Generator().manual_seed(next(self.stream)))

    def __call__(self, n, generator):
        self.calls += 1
        return draw(n, self.generator)


HELD = Loader()


@pytest.mark.parametrize(
    "sampler",
    [HELD, HELD.sample, partial(Loader.sample, HELD), lambda n, g: HELD(n, g), lambda n, g: (HELD(n, g) for _ in "a")],
)
def test_a_sampler_that_remembers_is_not_called(sampler):
    before, calls = HELD.generator.get_state(), HELD.calls
    hypergradient(problem(sampler), THETA, TASKS, EXACT)
    assert HELD.calls == calls
    assert torch.equal(HELD.generator.get_state(), before)


def test_the_global_generators_are_put_back():
    def careless(n, generator):
        np.random.rand()  # noqa: NPY002
        random.random()
        return Episode(torch.rand(n, 5, 3, dtype=F64), torch.rand(n, 5, 1, dtype=F64))

    def draws():
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    expected = draws()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    with pytest.raises(UfomError, match="single one"):
        hypergradient(problem(careless), THETA, SINGLE, EXACT)
    assert draws() == expected


def test_one_task_is_drawn_apart_once_a_problem():
    asked = []

    def counting(n, generator):
        asked.append(n)
        return draw(n, generator)

    own = problem(counting)
    for _ in range(3):
        hypergradient(own, THETA, TASKS, EXACT)
    assert asked == [1]
    drawn = problem(counting)
    for seed in range(3):
        hypergradient(drawn, THETA, drawn.sample(2, torch.Generator().manual_seed(seed)), EXACT)
    assert asked == [1, 2, 2, 2]


@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_step_sizes_are_copied_and_must_be_constants(kind):
    alphas = torch.tensor([0.3, 0.2], dtype=F64)
    own = BilevelProblem(lambda t, f, k: (f - k).square().sum(), lambda t, f, k: (f + k).square().sum(),
                         lambda t, k: t, alphas, sample_tasks=lambda n, g: torch.zeros(n, 3, dtype=F64))  # fmt: skip
    before = hypergradient(own, THETA, torch.ones(1, 3, dtype=F64), EXACT)
    alphas.mul_(4)
    assert own.step_sizes.tolist() == list(own.alphas) == [0.3, 0.2]
    assert torch.equal(hypergradient(own, THETA, torch.ones(1, 3, dtype=F64), EXACT), before)
    learnt = alphas.requires_grad_()
    with pytest.raises(
        UfomError, match=r"require a gradient.*detach\(\).*update=sgd\(lr=lambda theta: theta\[-1\].exp\(\)\)"
    ):
        replace(own, step_sizes=learnt if kind == "tensor" else list(learnt))


def test_a_learnt_rate_in_theta_is_what_the_message_says():
    """L_in multiplied by e^{θ_s} with step size 1 is gradient descent with that rate."""
    theta = torch.cat([THETA, torch.tensor([-1.0], dtype=F64)])
    loss = lambda t, f, k: torch.cos(f * k).sum() + (f * t[:-1]).sum() ** 2  # noqa: E731
    own = BilevelProblem(lambda t, f, k: t[-1].exp() * loss(t, f, k), loss, lambda t, k: t[:-1], [1.0] * 3,
                         sample_tasks=lambda n, g: torch.randn(n, 3, generator=g, dtype=F64))  # fmt: skip
    k = own.sample(1, torch.Generator().manual_seed(0))
    leaf = theta.clone().requires_grad_()
    phi, rate = leaf[:-1], leaf[-1].exp()
    for _ in range(3):
        phi = phi - rate * torch.autograd.grad(loss(leaf, phi, k[0]), phi, create_graph=True)[0]
    (expected,) = torch.autograd.grad(loss(leaf, phi, k[0]), leaf)
    torch.testing.assert_close(hypergradient(own, theta, k, EXACT), expected, rtol=1e-10, atol=1e-12)


def test_the_repr_of_a_problem_is_short():
    assert repr(problem()) == "BilevelProblem(r = 2, tasks drawn by sample_tasks)"
    assert repr(synthetic()) == "SyntheticProblem(r = 10, s = 1, 2 tasks)"


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        (torch.zeros(4, 5), r"shape \(4, 5\): give one vector, \(s,\); theta.flatten\(\)"),
        (torch.tensor(1.0), r"shape \(\): give one vector"),
        (torch.zeros(0), "which is empty"),
        (torch.zeros(3, dtype=torch.int64), "of torch.int64: give a tensor of floating-point"),
        ([0.0, 1.0], "a list: give a tensor"),
    ],
)
def test_a_wrong_theta_is_named(theta, message):
    with pytest.raises(UfomError, match=message):
        hypergradient(problem(), theta, TASKS, EXACT)
