"""Random calls of every public function, with arguments that are right, nearly right, or of another kind altogether.

`python -m tests.face 5000` makes that many calls and prints everything but `UfomError` and `TypeError` came out.
"""

from __future__ import annotations

import datetime
import inspect
import sys
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch

import ufom_runtime
import ufom_theory
from ufom_runtime import EXACT, FOM, UFOM, BilevelProblem
from ufom_theory import AssumptionConstants, CostModel, Moments, Sweep, Truncated, UfomError

F64 = torch.float64
PAIR = ufom_theory.diverging_problem(1.0, 4, 0.1)


def quadratic(**changes: Any) -> BilevelProblem:
    """A problem of two parameters and two steps."""
    right = {
        "inner_loss": lambda t, p, x: (p - x).square().sum(),
        "outer_loss": lambda t, p, x: (p - x).square().sum(),
        "start": lambda t, x: t,
        "step_sizes": [0.1, 0.2],
        "sample_tasks": lambda n, g: torch.randn(n, 2, generator=g, dtype=F64),
    }
    return BilevelProblem(**{**right, **changes})


PROBLEM = quadratic()
RIGHT: dict[str, Any] = {
    "A": 1.0, "B": 4, "M1": 1.0, "M2": 0.0, "L1": 1.0, "L2": 1.0, "L3": 1.0, "a": (0.5, 1.5), "b": (0.0, 10.0),
    "alpha": 0.1, "agrees": "yes", "batch": 2, "beta": 0.5, "c1": 1.0, "c2": 1.0, "chunk": 1, "coin": "task",
    "coins": torch.tensor([True, False, True]), "compile": False, "constants": AssumptionConstants(1, 0, 1, 1, 1),
    "cost": CostModel(r=4), "cov": np.eye(2) * 1e-6, "d2": 0.1, "d2_samples": [0.1, 0.2, 0.1], "delta": 0.5,
    "differences": [0.1, 0.2, 0.3], "draws": 5, "epsilon": 0.1, "estimator": UFOM(0.5), "every": 1,
    "function": lambda: 0,
    "gap": 1.0, "generator": torch.Generator(), "gradient": lambda t, x: t, "kind": "stored", "level": 0.9, "m": 2.0,
    "measured": 1.0, "candidates": [ufom_theory.Candidate("x", Moments(0.1, 1.0), CostModel(r=4), 3)], "label": "x",
    "bytes": 3, "state_bytes": 1, "base": UFOM(0.5), "method": FOM, "moments": Moments(0.1, 1.0, mean_gradient_sq=0.5),
    "moments_by_proxy": {Truncated(0): Moments(0.1, 1.0)}, "n": 3, "outer": "tuned", "outer_steps": [0.1, 0.1],
    "per_task": False, "predicted": 1.0, "problem": PROBLEM, "proxies": [Truncated(0)], "proxy": Truncated(0), "q": 0.5,
    "q_min": 0.1, "r": 2, "relation": "=", "repeats": 5, "samples": np.ones((2, 3)), "seconds": 0.0, "seed": 0,
    "slots": 1, "smoothness": 1.0, "step_sizes": [0.1, 0.2], "steps": 2, "subject": "x", "sweep": Sweep.stored(),
    "tasks": torch.ones(3, 2, dtype=F64), "theta": torch.ones(2, dtype=F64), "thetas": torch.ones(2, dtype=F64),
    "theta_in_losses": True, "tolerance": 0.1, "two": PAIR, "v2": 1.0, "v2_samples": [1.0, 2.0, 1.0], "cross": None,
    "inner_loss": PROBLEM.inner_loss, "outer_loss": PROBLEM.outer_loss, "start": PROBLEM.start,
    "sample_tasks": PROBLEM.sample_tasks, "initial": None, "module": torch.nn.Linear(2, 1), "second_moment": 1.0,
    "as_printed": False, "scale": 1.0, "outer_step": 0.1, "step_size": 0.1, "lr": 0.1, "step": lambda k: 0.1,
    "methods": {"FOM": FOM}, "seeds": 2, "law": "step", "allow_biased": True, "memory": False, "checkpoint": None,
    "budget": 0.1, "first": FOM, "until": 1, "then": UFOM(0.5),
}  # fmt: skip
WRONG: list[Any] = [
    None, True, 0, -1, 3, 2**31, 2**63, 10**400, -0.0, 0.5, 1e308, -1e-320, float("nan"), float("inf"), 1j, "x", "",
    b"x",
    [], [1, 2], [[1], [1, 2]], {}, set(), object(), lambda *a: None, datetime.datetime(2020, 1, 1),
    np.float32(0.3), np.float16(0.3), np.int8(3), np.bool_(True), np.array(3), np.array([]), np.array([0.1, 0.2]),
    np.array([1, "x"], dtype=object), np.array(["x"]), np.array([1j]),
    np.datetime64("2020-01-01"), np.timedelta64(3, "s"),
    np.ma.array([0.1, 0.2], mask=[True, False]), np.ma.masked, np.zeros((2, 2)), np.full((3, 2, 2), np.nan),
    torch.tensor(0.5), torch.tensor(0.5, requires_grad=True), torch.tensor([0.1, 0.2], requires_grad=True),
    torch.ones(2, dtype=F64, requires_grad=True), torch.tensor([1j]), torch.tensor([]), torch.ones(3, 2),
    torch.ones(1, 2),
    torch.ones(2, dtype=torch.int64), torch.full((2,), float("nan"), dtype=F64), torch.ones(0, 2, dtype=F64),
    torch.ones(2, dtype=torch.float16), torch.empty(2, device="meta"), (torch.ones(3, 2, dtype=F64),),
    (torch.ones(3), torch.ones(2)),
    Moments(0.1, 1.0), CostModel(r=4), Truncated(9), Sweep.checkpointed(2), EXACT, PROBLEM, PAIR, torch.Generator(),
    quadratic(inner_loss=lambda t, p, x: p), quadratic(outer_loss=lambda t, p, x: t.sum() * float("nan")),
    quadratic(start=lambda t, x: None), quadratic(sample_tasks=lambda n, g: [1, 2]),
]  # fmt: skip
RESULTS = {
    "Calls",
    "Choice",
    "Direction",
    "Forecast",
    "MeasuredCurvature",
    "MeasuredMoments",
    "Method",
    "Planned",
}  # which are given out, not called
NOT_CALLED = RESULTS | {"EXACT", "FOM", "HELD", "METHODS", "RECOMPUTED", "REPTILE", "Stopped", "UfomError"}
FACE = [
    (module, name) for module in (ufom_theory, ufom_runtime) for name in module.__all__ if name not in NOT_CALLED
]  # fmt: skip


def call(seed: int) -> tuple[str, str]:
    """Make one call; what was called with what, and the exception that should not have come out, or ""."""
    rng = np.random.default_rng(seed)
    module, name = FACE[rng.integers(len(FACE))]
    target = getattr(module, name)
    parameters = [
        p for p in inspect.signature(target).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    arguments = {}
    for p in parameters:
        if p.default is p.empty or rng.random() < 0.3:
            arguments[p.name] = RIGHT.get(p.name, WRONG[rng.integers(len(WRONG))])
    for key in rng.permutation(list(arguments))[: rng.integers(0, 3)]:
        arguments[str(key)] = WRONG[rng.integers(len(WRONG))]
    said = f"{module.__name__}.{name}({', '.join(f'{k}={_short(v)}' for k, v in arguments.items())})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = target(**arguments)
            parts = (
                () if isinstance(target, type) else ("why", "interval", "pays", "doubts", "speedup_over_exact", "rho")
            )
            for part in parts:
                getattr(result, part, None)
    except (UfomError, TypeError):
        return said, ""
    except Exception as error:
        return said, f"{type(error).__name__}: {str(error)[:200]}"
    return said, ""


def _short(value: Any) -> str:
    try:
        return repr(value)[:60].replace("\n", " ")
    except ValueError:  # 10**400
        return "10**400"


def main(calls: int) -> int:
    """Make calls, print each failure once a function, and count them."""
    found: Counter[str] = Counter()
    for seed in range(calls):
        said, error = call(seed)
        if error:
            kind = f"{said.split('(')[0]}: {error}"
            if not found[kind]:
                print(f"{seed}: {said}\n    {error}", flush=True)
            found[kind] += 1
    print(f"{calls} calls of {len(FACE)} public functions: {sum(found.values())} raised something else")
    return len(found)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])) > 0)
