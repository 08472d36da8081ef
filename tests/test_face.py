"""Random calls of the public functions: bad input is named, and nothing else comes out."""

import inspect

import numpy as np
import pytest
import torch

import ufom_runtime
from tests import face
from ufom_runtime import (
    EXACT,
    UFOM,
    FlatModule,
    adapt,
    estimate_constants,
    hypergradient,
    measure_cost,
    measure_moments,
    peak_bytes,
)
from ufom_theory import UfomError, optimal_survival


@pytest.mark.parametrize("block", range(6))
def test_nothing_but_named_errors_comes_out(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [face.call(seed) for seed in range(50 * block, 50 * (block + 1))]
    assert not [(said, error) for said, error in calls if error]


HERE = face.RIGHT["theta"], face.RIGHT["tasks"]
MANY = torch.ones(2, 2)
META = torch.empty(2, device="meta")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: hypergradient(p, *HERE, EXACT, per_task=MANY), r"per_task = .* must be of type bool: write True"),
        (lambda p: hypergradient(p, *HERE, EXACT, compile=np.zeros(2)), "compile = .* must be of type bool"),
        (lambda p: adapt(p, *HERE, with_state=META), "with_state = .* must be of type bool"),
        (lambda p: UFOM(0.5, MANY), r"sweep = .* must be of type Sweep: write Sweep\.stored"),
        (lambda p: measure_cost(p, *HERE, sweep=np.int8(3)), r"sweep = .* must be of type Sweep"),
        (lambda p: measure_cost(p, *HERE, seconds=MANY), "seconds has shape"),
        (lambda p: measure_moments(p, *HERE, proxy=np.zeros((2, 2))), "proxy = .* give FOM, HELD, or Truncated"),
        (lambda p: estimate_constants(p, *HERE, seed=MANY), "seed = .* must be an integer"),
        (lambda p: estimate_constants(MANY, *HERE), "problem = .* must be of type BilevelProblem"),
        (lambda p: FlatModule(torch.nn.Linear(2, 1), adapt=META), "a Tensor is not a name"),
        (lambda p: FlatModule(torch.nn.Linear(2, 1), adapt=["weight", 3]), "a int is not a name"),
        (lambda p: peak_bytes(lambda: 0, known=[1]), "known holds a int"),
        (lambda p: UFOM(10**400), r"q = 1000.*must lie in \[0, 1\]"),
        (lambda p: optimal_survival(0, 1.0, 3), "must hold D²_0"),
    ],
)
def test_arguments_of_another_type_are_named(call, message):
    with pytest.raises(UfomError, match=f"(?s){message}"):
        call(face.PROBLEM)


OF_PROBLEMS = [
    name
    for name in ufom_runtime.__all__
    if inspect.isfunction(f := getattr(ufom_runtime, name)) and "problem" in inspect.signature(f).parameters
]


@pytest.mark.parametrize("name", OF_PROBLEMS)
def test_what_is_not_a_problem_is_named_by_every_function(name):
    function = getattr(ufom_runtime, name)
    parameters = inspect.signature(function).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    arguments = {key: face.RIGHT.get(key) for key in required} | {"problem": set()}
    with pytest.raises(UfomError, match=r"problem = set\(\) must be of type BilevelProblem: write BilevelProblem\("):
        function(**arguments)
