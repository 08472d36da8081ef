"""The compiled simulation of outer SGD against the runtime's hypergradients, and against exact moments."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.runtime.conftest import F64
from ufom_runtime import FOM, UFOM, chains, hypergradient
from ufom_runtime.chains import BLOCK, simulate
from ufom_runtime.problem import Tasks
from ufom_runtime.problems.synthetic import synthetic
from ufom_theory import UfomError
from ufom_theory.two_tasks import TwoTaskProblem, squared_gradient_norms

PAIR = TwoTaskProblem(alpha=0.1, r=10, a=(0.5, 1.5), b=(0.0, 10.0), A=400.0)
NARROW = TwoTaskProblem(alpha=0.3, r=10, a=(0.5, 1.5), b=(0.0, 10.0), A=2.0)  # all three pieces are visited


def gamma(k):
    return 2 / (k + 10)


def run(pairs=PAIR, q=(0.0, 0.3), theta0=(-20.0, 20.0), step_sizes=gamma, steps=20, **options):
    return simulate(pairs, q, theta0, step_sizes, steps, **{"compiled": False, **options})


def test_an_outer_step_is_the_runtimes_on_every_piece():
    problem = synthetic(**NARROW.parameters)
    theta = torch.linspace(-8.01, 16.02, 13, dtype=F64)  # off the ends of the pieces, where f'' has a kink
    for q in (0.0, 0.3):
        cells, _, r = chains._cells(NARROW, q)
        for task, coin in ((0, 0.1), (0, 0.9), (1, 0.1), (1, 0.9)):
            found = theta.clone()
            draw = torch.full_like(theta, (task + coin) / 2)
            chains._advance(found[None], draw[None], torch.tensor([0.7], dtype=F64), cells, r)
            one, coins = Tasks.of(problem.tasks).take(torch.tensor([task])), torch.tensor([coin < q])
            estimator = UFOM(q) if q else FOM
            for x, y in zip(theta, found, strict=True):
                g = hypergradient(problem, x[None], one, estimator, coins=coins if q else None)
                assert float(y) == pytest.approx(float(x - 0.7 * g[0]), rel=1e-12, abs=1e-12)
    distances = (theta - problem.tasks[1, 1]).abs()
    assert (distances < 2).any()
    assert ((distances > 2) & (distances < 3)).any()
    assert (distances > 3).any()


def test_many_steps_are_those_of_a_plain_loop():
    grid, seeds, n, steps = [0.0, 0.3, 1.0], [7, 2], 5, 20
    pairs = [NARROW, replace(NARROW, alpha=0.05, A=1.0)]
    found = run(pairs, grid, steps=steps, seeds=seeds, chains=n, every=8)
    assert found.steps.tolist() == [8, 16, 20]
    assert found.gradient_sq.shape == found.sem.shape == (2, 3, 2, 3)
    for s, seed in enumerate(seeds):
        rng = np.random.default_rng([seed, 0])
        start = rng.uniform(-20, 20, n)
        draws = rng.random((32, n))
        for p, pair in enumerate(pairs):
            for i, q in enumerate(grid):
                theta = start.copy()
                norms = {}
                for k in range(1, steps + 1):
                    for c in range(n):
                        task, coin = divmod(2 * draws[k - 1, c], 1)
                        proxy, exact = (g[int(task)] for g in pair.gradients(theta[c]))
                        theta[c] -= gamma(k) * (proxy + ((exact - proxy) / q if coin < q else 0))
                    norms[k] = pair.gradients(theta)[1].mean(0) ** 2
                for j, k in enumerate(found.steps):
                    assert found.gradient_sq[p, i, s, j] == pytest.approx(norms[k].mean(), rel=1e-9)
                    assert found.sem[p, i, s, j] == pytest.approx(norms[k].std(ddof=1) / n**0.5, rel=1e-6)


def test_means_are_those_of_the_exact_recursion():
    grid = np.array([0.0, 0.2, 1.0])
    found = run(q=grid, theta0=8.0, steps=40, seeds=range(5), chains=2000, every=10)
    exact = list(squared_gradient_norms(PAIR, grid, map(gamma, range(1, 41)), 8.0))
    z = (found.gradient_sq.mean(2)[0] - np.array(exact)[9::10].T) / np.sqrt((found.sem[0] ** 2).sum(1)) * 5
    assert abs(z).max() < 4
    assert found.sem.max() < 0.2 * found.gradient_sq.max()


def test_chunks_change_no_bit(monkeypatch):
    options = {"pairs": [PAIR, NARROW], "chains": 3 * BLOCK, "seeds": [4, 1], "steps": 40, "every": 3}
    whole = run(**options, chunk=6 * BLOCK)
    found = [run(**options, chunk=chunk, compiled=compiled) for chunk in (1, 4 * BLOCK) for compiled in (False, True)]
    three_cells = torch.get_num_threads() * 8 * BLOCK * (3 * 4 + 2 * chains._HELD)
    monkeypatch.setattr(chains, "budget", lambda device: three_cells)
    found.append(run(**options, chunk=BLOCK))
    for other in found:
        np.testing.assert_array_equal(other.gradient_sq, whole.gradient_sq)
        np.testing.assert_array_equal(other.sem, whole.sem)


def test_problems_and_q_share_their_random_numbers_and_seeds_do_not():
    together = run([PAIR, NARROW], [[0.2, 0.5], [0.1, 0.9]], seeds=[1, 2], chains=50)
    alone = run(NARROW, [0.9], seeds=[2], chains=50)
    np.testing.assert_array_equal(together.gradient_sq[1, 1, 1], alone.gradient_sq[0, 0, 0])
    assert not np.isin(together.gradient_sq[:, :, 0], together.gradient_sq[:, :, 1]).any()


def test_one_chain_has_a_mean_without_an_error():
    found = run(chains=1)
    assert np.isfinite(found.gradient_sq).all()
    assert np.isnan(found.sem).all()


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler: chains.cpp is not tested")
@pytest.mark.parametrize("n", [7, 2 * BLOCK])
def test_compiled_is_plain_torch_to_the_bit(n):
    options = {"pairs": [NARROW, PAIR], "q": [0.0, 0.3, 1.0], "chains": n, "steps": 40, "every": 5}
    plain, compiled = run(**options), run(**options, compiled=True)
    np.testing.assert_array_equal(compiled.gradient_sq, plain.gradient_sq)
    np.testing.assert_array_equal(compiled.sem, plain.sem)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_plain_torch_runs_and_says_so(monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    chains._library.cache_clear()
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler .*: plain torch is used"):
        found = run(compiled=True)
    chains._library.cache_clear()
    np.testing.assert_array_equal(found.gradient_sq, run().gradient_sq)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"pairs": []}, r"r = \[\]: give at least one"),
        ({"pairs": [PAIR, 3]}, "must be of type TwoTaskProblem"),
        ({"pairs": [PAIR, NARROW, replace(PAIR, r=7)], "q": [0.5]}, r"r = \[7, 10\]: .*call once for each r"),
        ({"q": [0.5, 1.5]}, r"q = 1.5 must lie in \[0, 1\]"),
        ({"q": [-0.1]}, r"q = -0.1 must be in \[0, 1\]"),
        ({"q": [[0.1], [0.2]]}, r"q has shape \(2, 1\) for 1 problem"),
        ({"theta0": (1, 2, 3)}, "give one number, or"),
        ({"theta0": float("nan")}, "θ_0 = nan must be finite"),
        ({"steps": 0}, "steps = 0 must be at least 1"),
        ({"every": 0}, "every = 0 must be at least 1"),
        ({"chunk": 0}, "chunk = 0 must be at least 1"),
        ({"chains": 2.5}, "chains = 2.5 must be an integer"),
        ({"chains": BLOCK + 1}, f"chains = {BLOCK + 1} is above {BLOCK} and no multiple"),
        ({"seeds": [1, 2, 1]}, r"seeds = \[1, 2, 1\] repeat"),
        ({"seeds": [-1]}, "seeds = -1 must be at least 0"),
        ({"step_sizes": [0.1] * 3}, "3 entries for 20 steps"),
        ({"step_sizes": lambda k: -0.1}, "γ_k = -0.1 must be a finite number > 0"),
        ({"step_sizes": lambda k: 1e308, "theta0": 1e150}, "no longer finite"),
    ],
)
def test_bad_input_is_refused(bad, words):
    with pytest.raises(UfomError, match=words):
        run(**bad)
