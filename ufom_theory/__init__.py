"""The theory of UFOM (Likhosherstov et al., ICML 2021): costs, bounds and the optimal q, derived in `derivations`."""

from ufom_theory.bounds import bias_bound, bias_bound_printed, gradient_bound
from ufom_theory.complexity import CostModel, Sweep, Truncated
from ufom_theory.optimum import Prediction, exponent, optimal_q
from ufom_theory.quantities import AssumptionConstants, Moments, UfomError, Verdict

__all__ = [
    "AssumptionConstants",
    "CostModel",
    "Moments",
    "Prediction",
    "Sweep",
    "Truncated",
    "UfomError",
    "Verdict",
    "bias_bound",
    "bias_bound_printed",
    "exponent",
    "gradient_bound",
    "optimal_q",
]
