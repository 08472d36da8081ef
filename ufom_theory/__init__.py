"""The theory of UFOM (Likhosherstov et al., ICML 2021): costs, bounds and the optimal q, derived in `derivations`."""

from typing import Any

from ufom_theory.bootstrap import bootstrap_interval
from ufom_theory.bounds import (
    bias_bound,
    bias_bound_printed,
    gradient_bound,
    rate_bound,
    rate_constant,
    smoothness_bound,
    time_bound,
)
from ufom_theory.checks import UfomError
from ufom_theory.cost import CostModel, Sweep, Truncated
from ufom_theory.optimum import Prediction, exponent, optimal_q
from ufom_theory.planner import Candidate, Choice, counted_candidates, plan
from ufom_theory.quantities import AssumptionConstants, Moments
from ufom_theory.roulette import Survival, optimal_survival
from ufom_theory.two_tasks import TwoTaskProblem, diverging_problem, squared_gradient_norms

__all__ = [
    "AssumptionConstants",
    "Candidate",
    "Choice",
    "CostModel",
    "Moments",
    "Prediction",
    "Survival",
    "Sweep",
    "Truncated",
    "TwoTaskProblem",
    "UfomError",
    "bias_bound",
    "bias_bound_printed",
    "bootstrap_interval",
    "counted_candidates",
    "diverging_problem",
    "exponent",
    "gradient_bound",
    "optimal_q",
    "optimal_survival",
    "plan",
    "rate_bound",
    "rate_constant",
    "smoothness_bound",
    "squared_gradient_norms",
    "time_bound",
]


def __getattr__(name: str) -> Any:
    if name == "derive":  # the one name that needs sympy; not in __all__, so that a star import does not load it
        from ufom_theory.derivations.derive import derive

        return derive
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
