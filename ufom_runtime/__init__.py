"""Hypergradient estimators in torch, and the measurement of their bias, second moment and cost.

Names are handed out lazily, so that `ufom q` starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ufom_runtime.adaptation import adapt as adapt
    from ufom_runtime.adaptation import losses as losses
    from ufom_runtime.audit.audit import Audit as Audit
    from ufom_runtime.audit.audit import audit_gradient as audit_gradient
    from ufom_runtime.derivatives import Calls as Calls
    from ufom_runtime.derivatives import count_calls as count_calls
    from ufom_runtime.estimators import EXACT as EXACT
    from ufom_runtime.estimators import FOM as FOM
    from ufom_runtime.estimators import HELD as HELD
    from ufom_runtime.estimators import RECOMPUTED as RECOMPUTED
    from ufom_runtime.estimators import UFOM as UFOM
    from ufom_runtime.estimators import Direction as Direction
    from ufom_runtime.estimators import Estimator as Estimator
    from ufom_runtime.estimators import Method as Method
    from ufom_runtime.estimators import hypergradient as hypergradient
    from ufom_runtime.measure.clock import choose_chunk as choose_chunk
    from ufom_runtime.measure.clock import measure_cost as measure_cost
    from ufom_runtime.measure.compare import Comparison as Comparison
    from ufom_runtime.measure.compare import compare as compare
    from ufom_runtime.measure.constants import compare_bounds as compare_bounds
    from ufom_runtime.measure.constants import estimate_constants as estimate_constants
    from ufom_runtime.measure.curvature import MeasuredCurvature as MeasuredCurvature
    from ufom_runtime.measure.curvature import measure_curvature as measure_curvature
    from ufom_runtime.measure.forecast import Forecast as Forecast
    from ufom_runtime.measure.forecast import forecast as forecast
    from ufom_runtime.measure.moments import MeasuredMoments as MeasuredMoments
    from ufom_runtime.measure.moments import measure_moments as measure_moments
    from ufom_runtime.measure.moments import moments_by_proxy as moments_by_proxy
    from ufom_runtime.measure.planning import Planned as Planned
    from ufom_runtime.measure.planning import plan_estimators as plan_estimators
    from ufom_runtime.memory import peak_bytes as peak_bytes
    from ufom_runtime.methods import ES as ES
    from ufom_runtime.methods import METHODS as METHODS
    from ufom_runtime.methods import Forward as Forward
    from ufom_runtime.methods import GuidedES as GuidedES
    from ufom_runtime.methods import Implicit as Implicit
    from ufom_runtime.methods import Reversible as Reversible
    from ufom_runtime.methods import Telescoping as Telescoping
    from ufom_runtime.methods.adaptive import AdaptiveUFOM as AdaptiveUFOM
    from ufom_runtime.methods.followed import FollowedScale as FollowedScale
    from ufom_runtime.methods.reptile import REPTILE as REPTILE
    from ufom_runtime.methods.roulette import Roulette as Roulette
    from ufom_runtime.methods.switch import Switch as Switch
    from ufom_runtime.parameters import FlatModule as FlatModule
    from ufom_runtime.problem import BilevelProblem as BilevelProblem
    from ufom_runtime.training.log import Run as Run
    from ufom_runtime.training.log import Stopped as Stopped
    from ufom_runtime.training.run_seeds import SeedRuns as SeedRuns
    from ufom_runtime.training.run_seeds import run_seeds as run_seeds
    from ufom_runtime.training.train import outer_sgd as outer_sgd
    from ufom_runtime.training.train import train as train

_ROOMS = {
    "adaptation": ["adapt", "losses"],
    "methods.adaptive": ["AdaptiveUFOM"],
    "audit.audit": ["Audit", "audit_gradient"],
    "measure.clock": ["choose_chunk", "measure_cost"],
    "measure.compare": ["Comparison", "compare"],
    "measure.constants": ["compare_bounds", "estimate_constants"],
    "measure.curvature": ["MeasuredCurvature", "measure_curvature"],
    "derivatives": ["Calls", "count_calls"],
    "estimators": ["EXACT", "FOM", "HELD", "RECOMPUTED", "UFOM", "Direction", "Estimator", "Method", "hypergradient"],
    "measure.forecast": ["Forecast", "forecast"],
    "measure.planning": ["Planned", "plan_estimators"],
    "memory": ["peak_bytes"],
    "measure.moments": ["MeasuredMoments", "measure_moments", "moments_by_proxy"],
    "training.log": ["Run", "Stopped"],
    "training.run_seeds": ["SeedRuns", "run_seeds"],
    "training.train": ["outer_sgd", "train"],
    "parameters": ["FlatModule"],
    "problem": ["BilevelProblem"],
    "methods.followed": ["FollowedScale"],
    "methods.reptile": ["REPTILE"],
    "methods.roulette": ["Roulette"],
    "methods.switch": ["Switch"],
    "methods": ["ES", "METHODS", "Forward", "GuidedES", "Implicit", "Reversible", "Telescoping"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'ufom_runtime' has no attribute {name!r}")
    try:
        room = importlib.import_module(f"ufom_runtime.{_ROOM_OF[name]}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            "ufom_runtime needs torch: pip install '.[runtime]' from a checkout", name="torch"
        ) from error
    return getattr(room, name)
