"""Every sweep and proxy against autodiff through the unrolled loop; unbiasedness by enumerating the coins."""

import functools
import itertools

import pytest
import torch

from tests.grids import slow_unless
from tests.oracles import unrolled_gradient
from tests.runtime.conftest import F64, REAL, coupled, make_case, needs_data
from ufom_runtime import (
    EXACT,
    FOM,
    RECOMPUTED,
    UFOM,
    BilevelProblem,
    Estimator,
    Roulette,
    count_calls,
    hypergradient,
    measure_moments,
    peak_bytes,
)
from ufom_runtime.checkpointing import backwards, checkpoints
from ufom_runtime.coins import draw_coins
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory import CostModel, Sweep, Truncated, UfomError

SWEEPS = [
    Sweep.stored(), Sweep.recomputed(), Sweep.checkpointed(1), Sweep.checkpointed(2), Sweep.unrolled(),
]  # fmt: skip


def assert_agree(found, expected, digits):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= digits * max(1e-3, expected.norm().item())


@pytest.fixture(scope="module")
def oracle(case):
    """The case's gradients through the unrolled loop, of its last k steps if k is given."""
    return functools.cache(functools.partial(unrolled_gradient, *case))


@pytest.mark.parametrize(
    ("sweep", "chunk"),
    slow_unless(lambda case: case[1] is None or case[0] == SWEEPS[0], itertools.product(SWEEPS, (None, 1, 3))),
    ids=str,
)
def test_exact_sweeps_agree_with_the_unrolled_loop(case, oracle, sweep, chunk):
    problem, theta, tasks = case
    found = hypergradient(problem, theta, tasks, Estimator(1.0, sweep), per_task=True, chunk=chunk)
    assert_agree(found, oracle(), 1e-10)


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_the_exact_gradient_on_real_data_agrees_with_the_unrolled_loop(name):
    problem, theta, tasks = make_case(name)
    one = Tasks.of(tasks).take(slice(1)).stack
    found = hypergradient(problem, theta, one, EXACT, per_task=True)
    assert_agree(found, unrolled_gradient(problem, theta, one), 1e-10)


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_proxies_agree_with_the_truncated_loop(case, oracle, sweep):
    problem, theta, tasks = case
    for k in {0, 1, problem.r // 2, problem.r}:
        found = hypergradient(problem, theta, tasks, Estimator(0.0, sweep, Truncated(k)), per_task=True)
        assert_agree(found, oracle(k), 1e-10)


@pytest.mark.parametrize(
    ("sweep", "k"),
    slow_unless(lambda case: case[1] or case[0] == SWEEPS[0], itertools.product(SWEEPS, (0, 2))),
    ids=str,
)
def test_unbiased_with_the_second_moment_of_lemma_1(case, oracle, sweep, k):
    problem, theta, tasks = case
    n, q = len(Tasks.of(tasks)), 0.3
    exact, proxy = oracle(), oracle(k)
    estimates = [
        hypergradient(problem, theta, tasks, UFOM(q, sweep, Truncated(k)), coins=torch.full((n,), coin), per_task=True)
        for coin in (False, True)
    ]
    scale = estimates[1].norm().item() ** 2
    mean = (1 - q) * estimates[0] + q * estimates[1]
    second = (1 - q) * estimates[0].square().sum(1) + q * estimates[1].square().sum(1)
    assert (mean - exact).norm() <= 1e-12 * scale**0.5
    assert (second - exact.square().sum(1) - (1 / q - 1) * (exact - proxy).square().sum(1)).norm() <= 1e-12 * scale


def test_mean_over_a_batch_splits_by_coin():
    problem = coupled()
    tasks = problem.sample(5, torch.Generator().manual_seed(0))
    coins = torch.tensor([True, False, True, False, False])
    estimator = UFOM(0.4, proxy=Truncated(1))
    per_task = hypergradient(problem, problem.initial, tasks, estimator, coins=coins, per_task=True)
    proxy, exact = (unrolled_gradient(problem, problem.initial, tasks, k) for k in (1, problem.r))
    assert_agree(per_task, torch.where(coins[:, None], proxy + (exact - proxy) / 0.4, proxy), 1e-12)
    assert_agree(hypergradient(problem, problem.initial, tasks, estimator, coins=coins), per_task.mean(0), 1e-14)


@pytest.mark.parametrize("r", [*range(1, 9), 13, 30, 50])
def test_calls_are_those_of_proposition_1_in_one_pass(r):
    problem = quadratic(dim=1, r=r, alpha=0.01)
    evaluations = {"inner": 0, "outer": 0}

    def counted(name, loss):
        def wrapped(theta, phi, task):
            evaluations[name] += 1
            return loss(theta, phi, task)

        return wrapped

    watched = BilevelProblem(
        counted("inner", problem.inner_loss), counted("outer", problem.outer_loss), problem.start,
        problem.step_sizes, problem.sample_tasks,
    )  # fmt: skip
    task = problem.sample(1, torch.Generator().manual_seed(0))
    hypergradient(watched, problem.initial, task, EXACT)  # the first use checks the losses
    for coin in (False, True):
        evaluations.update(inner=0, outer=0)
        with count_calls() as calls:
            hypergradient(watched, problem.initial, task, UFOM(0.5), coins=torch.tensor([coin]))
        assert calls.gradients == r + 1 + coin * (r * (r - 1) // 2 - (r - 1))  # the way to φ_r is not taken twice
        assert calls.hessian_vector_products == coin * r
        assert evaluations == {"inner": calls.gradients - 1 + calls.hessian_vector_products, "outer": 1}


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
@pytest.mark.parametrize(("r", "k"), [(1, 0), (9, 0), (30, 7), (5, 5)])
def test_calls_are_those_of_the_cost_model(sweep, r, k):
    problem = quadratic(dim=2, r=r)
    tasks = problem.sample(3, torch.Generator().manual_seed(0))
    cost = CostModel(r=r, sweep=sweep, proxy=Truncated(k), as_printed=False)
    coins = torch.tensor([True, False, True])
    with count_calls() as calls:
        hypergradient(problem, problem.initial, tasks, UFOM(0.5, sweep, Truncated(k)), coins=coins)
    assert calls.gradients + calls.hessian_vector_products == 3 * cost.c_det + 2 * cost.c_rnd


def test_schedule_visits_every_state_with_the_fewest_steps():
    for slots, states in itertools.product(range(13), (*range(1, 40), 64, 99, 120)):
        steps = 0

        def step(x, j):
            nonlocal steps
            assert x == j
            steps += 1
            return x + 1

        kept = checkpoints(states, slots)
        assert len(kept) <= slots + 2
        assert list(backwards(step, [(j, j) for j in kept], slots)) == list(range(states - 1, -1, -1))
        assert steps == Sweep.checkpointed(slots).extra_steps(states, as_printed=False)


def fewest_steps(states, slots):
    """Steps to reverse a chain of `states` in one pass, by exhaustive search; the one to φ_r is not counted."""

    @functools.cache
    def least(n, free):
        if n <= 1:
            return 0
        again = n * (n - 1) // 2
        return min([again, *(m + least(n - m, free - 1) + least(m, free) for m in range(1, n))]) if free else again

    return least(states, slots)


@pytest.mark.parametrize("slots", [0, 1, 2, 3, 5, 12])
def test_one_pass_takes_the_fewest_steps_that_any_schedule_does(slots):
    for r in (1, 2, 3, 7, 10, 24):
        sweep = Sweep.checkpointed(slots)
        problem = quadratic(dim=1, r=r, alpha=0.01)
        with count_calls() as calls:
            hypergradient(problem, problem.initial, TASKS[:1, :1], Estimator(1.0, sweep))
        # in all r + 1 gradients of a bare loop, φ_r among them, and what is repeated
        assert calls.gradients == fewest_steps(r, slots) + 2
        assert sweep.extra_steps(r, as_printed=False) == calls.gradients - (r + 1)


@pytest.mark.parametrize(
    ("estimator", "state_bytes_a_step"),
    [
        (FOM, 0), (RECOMPUTED, 0), (UFOM(0.5), 0), (UFOM(0.5, Sweep.checkpointed(3)), 0), (EXACT, 8),
    ],
)  # fmt: skip
def test_live_memory_over_the_length_of_the_loop(estimator, state_bytes_a_step):
    dim, peaks = 300, {}
    for r in (10, 30):
        problem = quadratic(dim=dim, r=r, alpha=0.01)
        task = problem.sample(1, torch.Generator().manual_seed(0))
        coins = torch.tensor([estimator.q > 0])
        peaks[r] = peak_bytes(
            lambda p=problem, t=task, c=coins: hypergradient(p, p.initial, t, estimator, coins=c),
            (problem.initial, task, problem.step_sizes),
        )
    if state_bytes_a_step:
        assert peaks[30] - peaks[10] == 20 * dim * state_bytes_a_step
    else:
        assert abs(peaks[30] / peaks[10] - 1) < 0.01


def test_live_memory_of_a_batch_under_vmap():
    dim, n, peaks = 50, 8, {}
    for r in (10, 30):
        problem = quadratic(dim=dim, r=r, alpha=0.01)
        tasks = problem.sample(n, torch.Generator().manual_seed(0))
        peaks[r] = [
            peak_bytes(lambda e=e, p=problem, t=tasks: hypergradient(p, p.initial, t, e, chunk=n), (tasks,))
            for e in (EXACT, RECOMPUTED)
        ]
    assert peaks[30][0] - peaks[10][0] == 20 * n * dim * 8
    assert peaks[30][1] == pytest.approx(peaks[10][1], rel=0.01)


def test_coins_are_bernoulli_and_a_function_of_the_generator():
    coins = draw_coins(100_000, 0.2, torch.Generator().manual_seed(3))
    assert torch.equal(coins, draw_coins(100_000, 0.2, torch.Generator().manual_seed(3)))
    assert abs(coins.double().mean().item() - 0.2) < 4 * (0.16 / 100_000) ** 0.5


def test_one_coin_for_the_batch():
    problem = coupled()
    tasks = problem.sample(4, torch.Generator().manual_seed(0))
    estimator = UFOM(0.3, coin="batch")
    seen = set()
    for seed in range(20):
        coins = draw_coins(4, 0.3, torch.Generator().manual_seed(seed), "batch")
        assert coins.any() == coins.all()
        seen.add(bool(coins[0]))
        found = hypergradient(
            problem, problem.initial, tasks, estimator, generator=torch.Generator().manual_seed(seed), per_task=True
        )
        proxy, exact = (unrolled_gradient(problem, problem.initial, tasks, k) for k in (0, problem.r))
        assert_agree(found, proxy + (exact - proxy) / 0.3 if coins[0] else proxy, 1e-12)
    assert seen == {False, True}
    with pytest.raises(UfomError, match="one coin for all"):
        hypergradient(problem, problem.initial, tasks, estimator, coins=torch.tensor([True, False, True, True]))
    with pytest.raises(UfomError, match="coin = 'each' must be"):
        UFOM(0.3, coin="each")


def test_a_generator_draws_the_coins():
    problem = coupled()
    tasks = problem.sample(6, torch.Generator().manual_seed(0))
    a, b = (
        hypergradient(problem, problem.initial, tasks, UFOM(0.5), generator=torch.Generator().manual_seed(4))
        for _ in range(2)
    )
    coins = draw_coins(6, 0.5, torch.Generator().manual_seed(4))
    assert torch.equal(a, b)
    assert torch.equal(a, hypergradient(problem, problem.initial, tasks, UFOM(0.5), coins=coins))


def test_float32_stays_float32():
    problem = quadratic(dim=3)
    tasks = problem.sample(2, torch.Generator().manual_seed(0)).float()
    with_float = BilevelProblem(
        lambda theta, phi, task: (phi - task).square().sum(), lambda theta, phi, task: phi.square().sum(),
        lambda theta, task: theta, torch.full((3,), 0.1), lambda n, g: torch.randn(n, 3, generator=g),
    )  # fmt: skip
    assert hypergradient(with_float, problem.initial.float(), tasks, EXACT).dtype == torch.float32


def test_a_loss_linear_in_phi_has_no_curvature():
    problem = replaced(inner_loss=lambda t, p, x: (p * x).sum())
    found = hypergradient(problem, THETA, TASKS, EXACT, per_task=True)
    assert_agree(found, unrolled_gradient(problem, THETA, TASKS, 0), 1e-12)


def test_works_where_gradients_are_switched_off():
    problem = coupled()
    tasks = problem.sample(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = hypergradient(problem, problem.initial, tasks, UFOM(1.0))
    assert torch.equal(found, hypergradient(problem, problem.initial, tasks, UFOM(1.0)))
    with torch.inference_mode():
        made_there = problem.initial.clone()
        with pytest.raises(UfomError, match="inference_mode"):
            hypergradient(problem, problem.initial, tasks, FOM)
    with pytest.raises(UfomError, match=r"theta was made in torch.inference_mode\(\).* give theta.clone\(\)"):
        hypergradient(problem, made_there, tasks, FOM)
    assert torch.equal(hypergradient(problem, made_there.clone(), tasks, UFOM(1.0)), found)


def test_one_task_for_many_thetas_is_held_once():
    """A data set of 8 MB, met by many θ, must not be copied for each."""
    big = torch.ones(1, 1_000_000, dtype=F64)
    problem = BilevelProblem(
        lambda t, p, x: ((p - t) ** 2).sum() * x[0], lambda t, p, x: (p**2).sum(), lambda t, x: t, [0.1] * 3, tasks=big
    )
    thetas = torch.ones(50, 2, dtype=F64) * torch.arange(1, 51)[:, None]
    assert peak_bytes(lambda: measure_moments(problem, thetas), (big, thetas)) < 1_000_000


def replaced(**changes):
    p = coupled()
    fields = ("inner_loss", "outer_loss", "start", "step_sizes", "sample_tasks")
    return BilevelProblem(**{**{name: getattr(p, name) for name in fields}, **changes})


class OnceOnly(torch.autograd.Function):
    """x², whose backward pass has no derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


once_only = OnceOnly.apply
TASKS = torch.ones(2, 3, dtype=F64)
THETA = torch.zeros(3, dtype=F64)
DRAWS = Roulette((0, 5), (0.5,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UFOM(0.0), r"lie in \(0, 1\]"),
        (lambda: UFOM(1.5), r"lie in \(0, 1\]"),
        (lambda: UFOM(float("nan")), r"lie in \(0, 1\]"),
        (lambda: replaced(step_sizes=torch.zeros(0)), "r ≥ 1"),
        (lambda: replaced(step_sizes=torch.tensor([0.1, float("nan")])), "finite number > 0"),
        (lambda: replaced(step_sizes=torch.tensor([0.1, -0.1])), "-0.1 must be"),
        (lambda: replaced(sample_tasks=None), "no tasks"),
        (lambda: coupled().sample(0, torch.Generator()), "n ≥ 1"),
        (
            lambda: replaced(sample_tasks=lambda n: TASKS).sample(2, torch.Generator()),
            r"sample_tasks\(n, generator\) failed",
        ),
        (lambda: replaced(sample_tasks=lambda n, g: TASKS).sample(9, torch.Generator()), "returned 2 task"),
        (lambda: hypergradient(coupled(), THETA[None], TASKS, FOM), r"shape \(1, 3\): give one vector, \(s,\)"),
        (lambda: hypergradient(coupled(), THETA * float("nan"), TASKS, FOM), "NaN"),
        (lambda: hypergradient(coupled(), torch.zeros(3, dtype=torch.int64), TASKS, FOM), "floating"),
        (lambda: hypergradient(coupled(), torch.zeros(4, dtype=F64), TASKS, FOM), "theta has 4 parameters"),
        (
            lambda: hypergradient(replaced(), torch.zeros(4, dtype=F64), TASKS, FOM),
            "start failed on arguments of shapes",
        ),
        (lambda: Estimator(1.5), r"lie in \[0, 1\]"),
        (lambda: Estimator(float("nan")), r"lie in \[0, 1\]"),
        (lambda: UFOM("a"), "a str: give one real number"),
        (lambda: UFOM(0.3, sweep="recomputed"), "must be of type Sweep: write Sweep"),
        (lambda: replaced(step_sizes="abc"), "as floats or as a tensor"),
        (lambda: replaced(initial=[1.0]), "floating-point"),
        (lambda: hypergradient(coupled(), THETA, TASKS, EXACT, coins=torch.zeros(2).bool()), "corrects always"),
        (lambda: hypergradient(coupled(), THETA, TASKS, UFOM(0.5), coins=[True, True]), "give a bool tensor"),
        (lambda: hypergradient(coupled(), THETA, TASKS, UFOM(0.5), generator=3), "must be a CPU one"),
        (
            lambda: hypergradient(coupled(), THETA, TASKS, UFOM(0.5, proxy=DRAWS), coins=TASKS[:, 0] > 0),
            "proxy take a method that does not draw",
        ),
        (lambda: hypergradient(coupled(), THETA, TASKS, FOM, chunk=1.5), "must be an integer"),
        (lambda: hypergradient(replaced(start=lambda t, x: x.long()), THETA, TASKS, FOM), "floating-point numbers"),
        (lambda: hypergradient(replaced(inner_loss=lambda t, p, x: {}["key"]), THETA, TASKS, FOM), "KeyError: 'key'"),
        (
            lambda: hypergradient(replaced(inner_loss=lambda t, p, x: once_only(p).sum()), THETA, TASKS, EXACT),
            "cannot be differentiated",
        ),
        (lambda: hypergradient(coupled(), THETA, TASKS[:0], FOM), "no tasks"),
        (lambda: hypergradient(coupled(), THETA, (TASKS, TASKS[:1]), FOM), "leading dimensions"),
        (lambda: hypergradient(coupled(), THETA, [1, 2], FOM), r"not a list: torch\.stack"),
        (lambda: hypergradient(coupled(), THETA, TASKS.to("meta"), FOM), "move both to one device"),
        (lambda: hypergradient(coupled(), THETA, TASKS, UFOM(0.5)), "needs coins"),
        (lambda: hypergradient(coupled(), THETA, TASKS, UFOM(0.5), coins=torch.ones(2)), "give bool"),
        (lambda: hypergradient(coupled(), THETA, TASKS, FOM, coins=torch.ones(2).bool()), "a coin is 1"),
        (lambda: hypergradient(coupled(), THETA, TASKS, UFOM(1.0, proxy=Truncated(9))), "keep K ≤ r"),
        (lambda: hypergradient(coupled(), THETA, TASKS, FOM, chunk=0), "at least 1"),
        (
            lambda: hypergradient(replaced(inner_loss=lambda t, p, x: t.sum()), THETA, TASKS, EXACT),
            "inner_loss does not depend on φ",
        ),
        (
            lambda: hypergradient(
                replaced(inner_loss=lambda t, p, x: t.sum()), THETA, TASKS, Estimator(1.0, Sweep.unrolled())
            ),
            "inner_loss does not depend on φ",
        ),
        (
            lambda: hypergradient(replaced(outer_loss=lambda t, p, x: t.sum()), THETA, TASKS, FOM),
            "outer_loss does not depend on φ",
        ),
        (lambda: hypergradient(replaced(inner_loss=lambda t, p, x: p * 2), THETA, TASKS, FOM), "must return a scalar"),
        (lambda: hypergradient(replaced(outer_loss=lambda t, p, x: 1.0), THETA, TASKS, FOM), "returned a float"),
        (lambda: hypergradient(replaced(start=lambda t, x: t.sum()), THETA, TASKS, FOM), "must return φ_0 as a vector"),
        (
            lambda: hypergradient(
                replaced(inner_loss=lambda t, p, x: (p**4).sum(), step_sizes=torch.full((30,), 9.0)), THETA, TASKS, FOM
            ),
            "inner loop diverged",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()


def test_the_synthetic_gradient_where_its_pieces_meet():
    problem = synthetic(alpha=0.3, r=3, A=2.0)
    for theta in (-3.0, -2.0, 2.0, 3.0):
        at = torch.tensor([theta], dtype=F64)
        found = hypergradient(problem, at, problem.tasks, EXACT, per_task=True)[:, 0]
        assert found.tolist() == pytest.approx(problem.pair.gradients(theta)[1].tolist(), rel=1e-12)
