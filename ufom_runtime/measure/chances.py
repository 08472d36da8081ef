"""What measured moments and curvatures leave open: draws of `Progress`, and every estimator's steps over exact's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufom_runtime.measure.curvature import MeasuredCurvature
from ufom_runtime.measure.moments import MeasuredMoments
from ufom_theory import Truncated
from ufom_theory.laws import Outer, Progress
from ufom_theory.quantities import ENTRIES, Z95
from ufom_theory.scores import fom_progress, ufom_progress

Array = NDArray[np.float64]
DRAWS = 1000
# the entries that all proxies share come first, so that the draws of two proxies have them in common
_ORDER = ("mean_gradient_sq", "v2", "d2", "cross", "proxy_sq", "mean_cross", "mean_proxy_sq")


def draws(moments: MeasuredMoments, curvature: MeasuredCurvature | None, seed: int = 0) -> Progress:
    """`Progress` at what was measured, entry 0, and at `DRAWS` draws from the errors, shape (DRAWS + 1,).

    The moments have their joint covariance, widened as q*'s intervals are; the curvatures are drawn apart from them.
    """
    rng = np.random.default_rng(seed)
    normal = np.vstack([np.zeros(len(ENTRIES)), rng.standard_normal((DRAWS, len(ENTRIES)))])
    index = [ENTRIES.index(name) for name in _ORDER]
    assert moments.cov is not None
    cov = moments.cov[np.ix_(index, index)]
    scale = np.sqrt(np.maximum(np.diag(cov), np.finfo(float).tiny))
    root = np.linalg.cholesky(cov / np.outer(scale, scale) + 1e-9 * np.eye(len(index))) * scale[:, None]
    means = np.array([float(getattr(moments, name)) for name in _ORDER])
    sampled = means + (moments.quantile / Z95 * normal @ root.T if np.diag(cov).any() else 0.0)
    at = dict(zip(_ORDER, np.broadcast_to(sampled, normal.shape).T, strict=True))
    curvatures: dict[str, Any] = {}
    if curvature is not None:
        for name, value in curvature.values().items():
            curvatures[name] = value + curvature.sems[name] * np.append(0.0, rng.standard_normal(DRAWS))
    return Progress(
        gradient_sq=at["mean_gradient_sq"], variance=at["v2"] - at["mean_gradient_sq"], d2=np.maximum(at["d2"], 0.0),
        cross=at["mean_cross"], proxy_mean_sq=at["mean_proxy_sq"],
        proxy_variance=at["proxy_sq"] - at["mean_proxy_sq"], **curvatures,
    )  # fmt: skip


def one_coin(progress: Progress, batch: int) -> Progress:
    """With one coin for the batch D² + (B − 1)·‖E d‖² stands in the place of D²."""
    return replace(progress, d2=progress.d2 + (batch - 1) * np.maximum(progress.bias_sq, 0.0))


@dataclass(frozen=True, eq=False)
class Path:
    """What was measured along a run.

    Attributes:
        horizon: outer steps of the exact gradient that are looked ahead.
        steps: outer steps at which it was measured, rising from 0.
        weights: the share of the horizon for which each point stands; their sum is 1.
        progress: by the proxy, one `Progress` of draws a point.
    """

    horizon: int
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    progress: dict[Truncated, list[Progress]]

    def exact(self, outer: Outer, batch: int) -> Array:
        """Progress of an exact step, shape (points, DRAWS + 1)."""
        first = next(iter(self.progress.values()))
        return np.array([ufom_progress(p, 1.0, outer, batch, k + 1) for p, k in zip(first, self.steps, strict=True)])

    def ratios(self, proxy: Truncated, q: float, coin: str, outer: Outer, batch: int) -> Array:
        """Steps over exact's for the same progress, at each point, shape (points, DRAWS + 1); q = 0 is the proxy alone.

        ∞ where the estimator makes none.
        """
        found = []
        for p, step in zip(self.progress[proxy], self.steps, strict=True):
            exact = ufom_progress(p, 1.0, outer, batch, step + 1)
            if not q:
                ours = fom_progress(p, outer, batch, step + 1)
            else:
                ours = ufom_progress(one_coin(p, batch) if coin == "batch" else p, q, outer, batch, step + 1)
            with np.errstate(divide="ignore", invalid="ignore"):
                found.append(np.where((ours > 0) & (exact > 0), exact / np.where(ours > 0, ours, 1.0), np.inf))
        return np.array(found)

    def whole(self, ratios: Array) -> Array:
        """Steps over exact's along the whole horizon, shape (DRAWS + 1,)."""
        return np.asarray(np.asarray(self.weights) @ ratios)


def interval(values: Array) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the draws, some of which may be ∞; entry 0 is left out."""
    ordered = np.sort(values[1:])
    n = len(ordered)
    return float(ordered[int(0.025 * n)]), float(ordered[min(int(np.ceil(0.975 * n)), n - 1)])
