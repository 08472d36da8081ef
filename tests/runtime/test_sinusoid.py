"""The sinusoid problem: its waves, its gradients against autodiff, and how it is called from outside."""

import json
import math
import sys

import pytest
import torch

from tests.oracles import unrolled_gradient
from ufom_runtime import EXACT, FOM, hypergradient
from ufom_runtime.command.cli import main
from ufom_runtime.problems import load_problem
from ufom_runtime.problems.sinusoid import sample_waves, sinusoid
from ufom_theory import UfomError


def test_a_task_is_one_wave_at_2k_points():
    waves = sample_waves(400, 5, torch.Generator().manual_seed(0))
    x, y = (torch.cat(pair, 1)[..., 0] for pair in ((waves[0], waves[2]), (waves[1], waves[3])))
    # y = A·sin(x − φ) is linear in sin x and cos x, with A² = a² + b²
    basis = torch.stack([x.sin(), -x.cos()], -1)
    a, b = torch.linalg.lstsq(basis, y[..., None]).solution[..., 0].unbind(-1)
    amplitude, phase = (a**2 + b**2).sqrt(), torch.atan2(b, a)
    assert torch.allclose((basis @ torch.stack([a, b], -1)[..., None])[..., 0], y, atol=1e-8)
    for value, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, math.pi), (x, -5.0, 5.0)):
        near = (high - low) / 50
        assert low <= value.min() < low + near
        assert high - near < value.max() <= high


def test_gradients_are_those_of_the_unrolled_loop():
    problem = sinusoid(shots=3, r=3, alpha=0.05, width=4, seed=1)
    tasks = problem.sample(4, torch.Generator().manual_seed(1))
    for estimator, kept in ((EXACT, None), (FOM, 0)):
        expected = unrolled_gradient(problem, problem.initial, tasks, kept).mean(0)
        found = hypergradient(problem, problem.initial, tasks, estimator)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_the_net_is_the_sources_and_the_seed_its_weights():
    net = load_problem("sinusoid").net.module
    assert [tuple(p.shape) for p in net.parameters()] == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]
    assert torch.equal(sinusoid(seed=3).initial, sinusoid(seed=3, r=1).initial)
    assert not torch.equal(sinusoid(seed=3).initial, sinusoid(seed=4).initial)


def test_ufom_measure_takes_it(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ufom", "measure", "sinusoid", "--tasks", "4", "--m", "2", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    found = json.loads(capsys.readouterr().out)
    assert not stop.value.code
    assert (found["s"], found["r"]) == (1761, 5)
    assert 0 < found["d2"] < found["v2"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"shots": 0}, "shots = 0"), ({"r": 0}, "r = 0"), ({"alpha": 0.0}, "alpha = 0"), ({"width": 1.5}, "width")],
)
def test_sizes_that_make_no_problem_are_refused(wrong, words):
    with pytest.raises(UfomError, match=words):
        sinusoid(**wrong)
