"""What measured moments and curvatures leave open: draws of `Progress`, and every estimator's steps over exact's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufom_runtime.coins import Coin
from ufom_runtime.measure.curvature import MeasuredCurvature
from ufom_runtime.measure.moments import MeasuredMoments
from ufom_runtime.methods.debiased import Proxy
from ufom_theory import Truncated
from ufom_theory.coins import best_scale, with_coins
from ufom_theory.laws import Outer, Progress
from ufom_theory.quantities import ENTRIES, Z95
from ufom_theory.scores import coordinate_fom, coordinate_progress, fom_progress, ufom_progress

Array = NDArray[np.float64]
Key = Truncated | Proxy
DRAWS = 400
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


@dataclass(frozen=True, eq=False)
class Path:
    """What was measured along a run.

    Attributes:
        outer: how the outer steps are taken.
        batch: tasks an outer step.
        horizon: outer steps of the exact gradient that are looked ahead.
        steps: outer steps at which it was measured, rising from 0.
        weights: the share of the horizon for which each point stands; their sum is 1.
        progress: by the proxy, one `Progress` of draws a point, shape (DRAWS + 1,) each; for Adam (DRAWS + 1, c), by
            coordinate.
        measured: the same of every proxy that was measured, without curvatures or coordinates.
        first: the moments of FOM at the first point.
        noiseless: whether the exact gradient has no noise: it is the same for all tasks, as where there is one.
        vanishes: whether FOM is identically zero.
    """

    outer: Outer
    batch: int
    horizon: int
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    progress: Mapping[Key, list[Progress]]
    measured: Mapping[Key, list[Progress]] = field(default_factory=dict)
    first: MeasuredMoments | None = None
    noiseless: bool = False
    vanishes: bool = False

    @property
    def reference(self) -> list[Progress]:
        """What the exact gradient's own progress is taken from."""
        return next(iter(self.progress.values()))

    @cached_property
    def exact(self) -> Array:
        """Progress of an exact step, shape (points, DRAWS + 1)."""
        return np.array([self._ufom(p, 1.0, i) for i, p in enumerate(self.reference)])

    def fom(self) -> Array:
        """Steps over exact's of FOM, shape (points, DRAWS + 1); ∞ where it makes no progress."""
        return self._ratios(self._fom(p, i) for i, p in enumerate(self.progress[Truncated()]))

    def ufom(self, progress: Iterable[Progress], q: float, coin: Coin) -> Array:
        """Steps over exact's of UFOM on the proxy of this progress, one a point."""
        return self._ratios(self._ufom(with_coins(p, q, self.batch, coin), q, i) for i, p in enumerate(progress))

    def noisier(self, proxy: Key, excess: Array) -> Array:
        """Steps over exact's of an unbiased estimate that adds excess·D² of this proxy to V²; excess (points, draws).

        Its noise is taken to lie along d as UFOM's does.
        """

        def progress(p: Progress, i: int) -> Array:
            more = excess[i].reshape(-1, *[1] * (np.ndim(p.d2) - 1))
            return self._ufom(p.changed(d2=p.d2 * more), 0.5, i)  # 1/q − 1 = 1

        return self._ratios(progress(p, i) for i, p in enumerate(self.progress[proxy]))

    def scale(self, proxy: Key) -> float:
        """c* of the proxy over the horizon, in two digits."""
        shares: list[Any] = []
        for name in ("gradient_sq", "variance", "d2", "cross", "proxy_mean_sq", "proxy_variance"):
            at = [np.asarray(getattr(p, name))[0].sum() for p in self.progress[proxy]]
            shares.append(float(np.asarray(self.weights) @ np.array(at)))
        shares[2] = max(shares[2], 0.0)
        return float(f"{float(best_scale(Progress(*shares))):.2g}")

    def _ratios(self, every: Iterable[Array]) -> Array:
        found, by_coordinate = [], np.ndim(self.reference[0].gradient_sq) > 1
        for exact, ours in zip(self.exact, every, strict=True):
            made = (ours > 0) & (exact > 0)
            ratio = np.where(made, exact / np.where(made, ours, 1.0), np.inf)
            if by_coordinate and np.isfinite(middle := np.median(ratio)) and np.isfinite(ratio[0]):
                ratio[1:] *= ratio[0] / middle  # tasks drawn again have the spread, but noise in each square besides
            found.append(ratio)
        return np.array(found)

    def _ufom(self, p: Progress, q: float, point: int) -> Array:
        if np.ndim(p.gradient_sq) > 1:
            return np.broadcast_to(coordinate_progress(p, q, self.batch), DRAWS + 1)
        return np.asarray(ufom_progress(p, q, self.outer, self.batch, self.steps[point] + 1))

    def _fom(self, p: Progress, point: int) -> Array:
        if np.ndim(p.gradient_sq) > 1:
            return np.broadcast_to(coordinate_fom(p, self.batch), DRAWS + 1)
        return np.asarray(fom_progress(p, self.outer, self.batch, self.steps[point] + 1))


def interval(values: Array) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the draws, some of which may be ∞; entry 0 is left out."""
    ordered = np.sort(values[1:])
    n = len(ordered)
    return float(ordered[int(0.025 * n)]), float(ordered[min(int(np.ceil(0.975 * n)), n - 1)])
