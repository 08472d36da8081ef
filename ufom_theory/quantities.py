"""What the theory speaks of: moments, assumption constants, verdicts. Floats or numpy arrays, frozen and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufom_theory.checks import Number, UfomError, broadcast, finite, integer, plain, scalar
from ufom_theory.tails import Tail

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
ENTRIES = ("d2", "v2", "mean_gradient_sq", "cross", "proxy_sq", "mean_cross", "mean_proxy_sq")
_SYMBOLS = dict(zip(ENTRIES, ("D²", "V²", "‖∇M‖²", "E⟨G, F⟩", "E‖F‖²", "⟨∇M, E F⟩", "‖E F‖²"), strict=True))
_ROUNDING = 1e-6  # of numbers that were rounded or come from float32, relative to the terms of a comparison


@dataclass(frozen=True, eq=False)
class Moments:
    """Bias D² (14) and second moment V² (16) of the exact gradient G and a proxy F, as given or as measured.

    Attributes:
        d2: D² = sup_θ E‖F − G‖², a float or an array; with a truncated proxy, D_K².
        v2: V² = sup_θ E‖G‖², broadcastable with `d2`.
        cov: covariance of the *estimates* (not of one task), stored with shape (..., 7, 7), in the order of `ENTRIES`:
            d2, v2, mean_gradient_sq, cross, proxy_sq, mean_cross, mean_proxy_sq. Give the first k rows and columns,
            k ≥ 2: what follows them is exact, and so is everything where nothing is given.
        n: number of tasks behind the estimates, None when the values are given.
        mean_gradient_sq: ‖∇M‖² at the same θ as V², needed for batches of tasks with independent coins.
        cross: E⟨G, F⟩, a mean over tasks.
        proxy_sq: E‖F‖², a mean over tasks, given together with `cross`. Then D² = V² − 2·cross + proxy_sq.
        mean_cross: ⟨∇M, E F⟩, of the means.
        mean_proxy_sq: ‖E F‖², of the means.
        samples: ‖F − G‖² and ‖G‖² of each task behind the estimates, shape (2, n); they show the tails. See `of_tasks`.
        shape: what all of these broadcast to.

    Unbiased estimates of ‖∇M‖² and ‖E F‖² may be negative; exact values may not.

    Raises:
        UfomError: a value that is negative or not finite, or D² = V² = 0; shapes that do not broadcast; a covariance of
            another shape, not symmetric, with a negative variance or a correlation above 1; values that contradict
            each other: D² ≠ V² − 2·cross + proxy_sq, cross² > V²·proxy_sq, an exact ‖∇M‖² > V² or ‖E F‖² > E‖F‖².
    """

    d2: Number
    v2: Number
    cov: NDArray[np.float64] | None = None
    n: int | None = None
    mean_gradient_sq: Number | None = None
    cross: Number | None = None
    proxy_sq: Number | None = None
    mean_cross: Number | None = None
    mean_proxy_sq: Number | None = None
    samples: NDArray[np.float64] | None = field(default=None, repr=False)
    shape: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        for name in ENTRIES:
            if (value := getattr(self, name)) is not None or name in ("d2", "v2"):
                squared = name in ("d2", "v2", "proxy_sq")
                rule = ("a finite number ≥ 0: it is the mean of a squared norm", 0.0) if squared else ()
                set_(self, name, finite(f"{_SYMBOLS[name]} ({name})", value, *rule))
        if (self.cross is None) != (self.proxy_sq is None):
            raise UfomError("cross = E⟨G, F⟩ and proxy_sq = E‖F‖² belong together: give both, or neither")
        set_(self, "cov", _covariance(self.cov))
        if self.n is not None:
            set_(self, "n", scalar("n, the number of tasks,", self.n, integer, 1))
            if self.n == 1 and self._variance("d2").any() | self._variance("v2").any():
                raise UfomError("n = 1 task shows no errors, but cov holds some: give n = None, or no cov")
        if self.samples is not None:
            set_(self, "samples", _samples(self.samples))
        shapes = {name: np.shape(getattr(self, name)) for name in ENTRIES if getattr(self, name) is not None}
        set_(self, "shape", broadcast(**shapes, covariance=self.covariance("d2").shape[:-2]))
        if np.any((np.asarray(self.d2) == 0) & (np.asarray(self.v2) == 0)):
            raise UfomError("D² = V² = 0: the gradient vanishes, so every q is equally good; measure at another θ")
        with np.errstate(over="ignore", invalid="ignore"):
            self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        for name, most in (("mean_gradient_sq", "v2"), ("mean_proxy_sq", "proxy_sq")):
            if getattr(self, name) is None:
                continue
            mean, square = np.asarray(getattr(self, name), dtype=np.float64), getattr(self, most)
            below = (mean < 0) & (self._variance(name) == 0)
            if self.n is None and below.any():  # of two tasks the error cannot be seen
                value = np.broadcast_to(mean, below.shape)[below][0]
                raise UfomError(f"{_SYMBOLS[name]} ({name}) = {value:g} is negative, but it is given without an error")
            exact = (self._variance(name) == 0) & (self._variance(most) == 0)
            if square is not None and (exact & (mean > np.asarray(square) * (1 + _ROUNDING))).any():
                raise UfomError(
                    f"{_SYMBOLS[name]} = {mean.max():g} is above {_SYMBOLS[most]} = {np.min(square):g}, but the "
                    "square of a mean is never above the mean of the squares: take both at the same θ"
                )
        if self.cross is None or self.proxy_sq is None:
            return
        d2, v2, cross, proxy_sq = (np.asarray(x) for x in (self.d2, self.v2, self.cross, self.proxy_sq))
        implied = v2 - 2 * cross + proxy_sq
        if np.any(abs(d2 - implied) > _ROUNDING * (v2 + 2 * abs(cross) + proxy_sq)):
            raise UfomError(
                f"D² = {d2.max():g} contradicts V² − 2·cross + proxy_sq = {implied.max():g}: E‖F − G‖² is their sum at "
                "one θ, so take all four there"
            )
        if np.any(abs(cross) > np.sqrt(v2) * np.sqrt(proxy_sq) * (1 + _ROUNDING)):
            raise UfomError(
                "cross² is above V²·proxy_sq, but |E⟨G, F⟩| ≤ √(E‖G‖²·E‖F‖²): take all of them over the same tasks"
            )
        identity = np.array([1.0, -1.0, 0.0, 2.0, -1.0, 0.0, 0.0])
        terms = self.covariance(*ENTRIES) * np.outer(identity, identity)
        if (abs(terms.sum((-2, -1))) > _ROUNDING * abs(terms).sum((-2, -1))).any():
            raise UfomError(
                "cov contradicts D² = V² − 2·cross + proxy_sq: with errors of D² or V², give those of cross and "
                "proxy_sq too, the covariance of all the estimates over the same tasks"
            )

    @staticmethod
    def of_tasks(d2: ArrayLike, v2: ArrayLike) -> Moments:
        """The moments of n ≥ 2 sampled tasks, by ‖F − G‖² and ‖G‖² of each, shape (n,): their means and covariance."""
        samples = _samples((d2, v2))
        n = samples.shape[1]
        return Moments(samples[0].mean(), samples[1].mean(), np.cov(samples) / n, n, samples=samples)

    def covariance(self, *names: str) -> NDArray[np.float64]:
        """Covariance of the estimates of the named `ENTRIES`, shape (..., k, k)."""
        assert self.cov is not None
        index = [ENTRIES.index(name) for name in names]
        return self.cov[..., index, :][..., index]

    def sem(self, name: str) -> Number:
        """Standard error of the estimate of one of the `ENTRIES`; 0 for an exact value."""
        return plain(np.sqrt(self._variance(name)))  # type: ignore[no-any-return]

    def _variance(self, name: str) -> NDArray[np.float64]:
        return self.covariance(name)[..., 0, 0]

    @property
    def d2_sem(self) -> Number:
        """Standard error of D²."""
        return self.sem("d2")

    @property
    def v2_sem(self) -> Number:
        """Standard error of V²."""
        return self.sem("v2")

    @property
    def quantile(self) -> float:
        """Half a 95 % interval over its standard error: Student's t for n tasks, widened where their tail is long."""
        if self.n is None:
            return Z95
        from scipy.special import stdtrit  # not where nothing was sampled: importing it takes longer than all else

        return float(stdtrit(max(self.n - 1, 1), 0.975)) * (self.tail.widening if self.tail else 1.0)

    @cached_property
    def tail(self) -> Tail | None:
        """The upper tails of the tasks, where `samples` are given."""
        return None if self.samples is None else Tail.of(self.samples)

    @property
    def rho(self) -> Number:
        """ρ = D²/V²; ∞ where V² = 0."""
        with np.errstate(divide="ignore", over="ignore"):
            return plain(np.asarray(self.d2) / np.asarray(self.v2))  # type: ignore[no-any-return]

    @property
    def noiseless(self) -> bool:
        """Whether the exact gradient is known to have no noise, ‖∇M‖² = V² without errors, as with a single task."""
        if self.mean_gradient_sq is None or np.any([np.any(self.sem(x)) for x in ("v2", "mean_gradient_sq")]):
            return False
        return bool(np.all(np.asarray(self.v2) - self.mean_gradient_sq <= 1e-12 * np.asarray(self.v2)))

    def scaled(self) -> Scaled:
        """The best scaled proxy c*·F and its moments: c* = E⟨G, F⟩/E‖F‖², D_c² = V² − E⟨G, F⟩²/E‖F‖² ≤ min(D², V²).

        c* = 0 where F vanishes. Its `moments.rho` is ρ_c, one minus the square of `pooled_cosine`; (20)–(21) hold with
        D_c² for D². c* is fitted to the same tasks, so that D_c² of a few tasks is somewhat too small.

        Raises:
            UfomError: moments without `cross` and `proxy_sq`.
        """
        v2, cross, proxy_sq = (np.asarray(x) for x in (self.v2, *self._cross("scaled()")))
        with np.errstate(all="ignore"):
            c = np.where(proxy_sq > 0, cross / proxy_sq, 0.0)
            inverse = np.where(proxy_sq > 0, 1 / proxy_sq, 0.0)
        # D² less what c gains: V² − c·cross would cancel where the proxy is good
        d2 = np.clip(self.d2 - ((1 - c) * np.sqrt(proxy_sq)) ** 2, 0.0, v2)
        explained = c * cross  # = c²·E‖F‖²
        means = [0.0 if x is None else x for x in (self.mean_cross, self.mean_proxy_sq)]
        by_c = {"cross": inverse, "proxy_sq": -c * inverse}  # derivatives of c*
        explained_by = {"cross": 2 * c, "proxy_sq": -c * c}
        cov = self._carried(
            {"v2": 1.0, "cross": -2 * c, "proxy_sq": c * c},
            {"v2": 1.0},
            {"mean_gradient_sq": 1.0},
            explained_by,
            explained_by,
            {"mean_cross": c, **{name: means[0] * d for name, d in by_c.items()}},
            {"mean_proxy_sq": c * c, **{name: 2 * c * means[1] * d for name, d in by_c.items()}},
        )
        new = [None if x is None else f * x for f, x in ((c, self.mean_cross), (c * c, self.mean_proxy_sq))]
        moments = Moments(d2, v2, cov, self.n, self.mean_gradient_sq, explained, explained, *new)
        return Scaled(plain(c), plain(np.sqrt(self._carried(by_c)[..., 0, 0])), moments)

    def pooled_cosine(self) -> tuple[Number, Number]:
        """E⟨G, F⟩/√(E‖G‖²·E‖F‖²), the cosine of a task's proxy to its gradient, pooled, and its standard error.

        It is a ratio of means over the tasks: neither the cosine of the mean gradients nor the mean of the cosines.
        Both numbers are nan where G or F vanishes.

        Raises:
            UfomError: moments without `cross` and `proxy_sq`.
        """
        v2, cross, proxy_sq = (np.asarray(x) for x in (self.v2, *self._cross("pooled_cosine()")))
        with np.errstate(all="ignore"):
            norms = np.sqrt(v2) * np.sqrt(proxy_sq)
            cosine = np.where(norms > 0, cross / norms, np.nan)
            by = {"cross": 1 / norms, "v2": -cosine / (2 * v2), "proxy_sq": -cosine / (2 * proxy_sq)}
            sem = np.where(norms > 0, np.sqrt(self._carried(by)[..., 0, 0]), np.nan)
        return plain(np.clip(cosine, -1, 1)), plain(sem)

    def _cross(self, name: str) -> tuple[Number, Number]:
        if self.cross is None or self.proxy_sq is None:
            raise UfomError(f"{name} needs E⟨G, F⟩ and E‖F‖² at one θ: give Moments(cross=..., proxy_sq=...)")
        return self.cross, self.proxy_sq

    def _carried(self, *derivatives: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
        """Covariance of functions of the entries, by the derivatives of each: the delta method."""
        shape = np.broadcast_shapes(*(np.shape(d) for row in derivatives for d in row.values()))
        jacobian = np.zeros((*shape, len(derivatives), len(ENTRIES)))
        for i, row in enumerate(derivatives):
            for name, derivative in row.items():
                jacobian[..., i, ENTRIES.index(name)] = derivative
        found = jacobian @ self.covariance(*ENTRIES) @ jacobian.swapaxes(-1, -2)
        # a variance that is 0 in exact arithmetic may come out below
        index = np.arange(len(derivatives))
        found[..., index, index] = np.maximum(found[..., index, index], 0.0)
        return found


def _samples(value: ArrayLike | tuple[ArrayLike, ArrayLike]) -> NDArray[np.float64]:
    try:
        rows = [np.asarray(finite("samples", row, "a finite number ≥ 0: it is a squared norm", 0.0)) for row in value]  # type: ignore[union-attr]
    except TypeError as error:
        raise UfomError(f"samples = {value!r}: give two rows, ‖F − G‖² and ‖G‖² of each task") from error
    if len(rows) != 2 or rows[0].shape != rows[1].shape or rows[0].ndim != 1 or len(rows[0]) < 2:
        raise UfomError(f"samples have shapes {[row.shape for row in rows]}: d2 and v2 must pair the same n ≥ 2 tasks")
    return np.stack(rows)


class Scaled(NamedTuple):
    """A proxy scaled by its best factor: c*, its standard error, and the moments of c*·F."""

    c: Number
    c_sem: Number
    moments: Moments


def _covariance(value: ArrayLike | None) -> NDArray[np.float64]:
    """A covariance of the first k entries, checked, and padded with zeros to all of them."""
    full = len(ENTRIES)
    if value is None:
        return np.zeros((full, full))
    cov = np.asarray(finite("cov", value))
    k = cov.shape[-1] if cov.ndim > 1 else 0
    if not (2 <= k <= full and cov.shape[-2] == k):
        raise UfomError(f"cov has shape {cov.shape}, but the last axes must be (k, k), 2 ≤ k ≤ {full}, for {ENTRIES}")
    variances = np.diagonal(cov, axis1=-2, axis2=-1)
    if (variances < 0).any():
        raise UfomError(f"cov holds the variance {variances.min():g}, but a variance is never negative")
    sems = np.sqrt(variances)
    with np.errstate(over="ignore"):
        most = sems[..., :, None] * sems[..., None, :]
        if (abs(cov - cov.swapaxes(-1, -2)) > 1e-6 * most).any():
            raise UfomError("cov is not symmetric, but Cov(x, y) = Cov(y, x): give the whole matrix")
        if (abs(cov) > (1 + 1e-6) * most).any():
            raise UfomError("cov holds a correlation beyond ±1: |Cov(x, y)| ≤ √(Var x·Var y), check its entries")
    padded = np.zeros((*cov.shape[:-2], full, full))
    padded[..., :k, :k] = cov
    return padded


@dataclass(frozen=True)
class AssumptionConstants:
    """The constants of Assumption 1, valid for every task.

    Attributes:
        M1: bound of ‖∂V/∂θ‖₂.
        M2: Lipschitz constant of ∂V/∂θ.
        L1: bound of ‖∂L/∂θ‖ and ‖∂L/∂φ‖, inner and outer.
        L2: Lipschitz constant of these gradients, inner and outer.
        L3: Lipschitz constant of ∂²L_in/∂θ∂φ and ∂²L_in/∂φ².

    Raises:
        UfomError: a constant that is negative or not finite. (The paper asks for > 0; 0 is the limit case, for
            example M1 = 0 where the start does not depend on θ.)
    """

    M1: float
    M2: float
    L1: float
    L2: float
    L3: float

    def __post_init__(self) -> None:
        for name in ("M1", "M2", "L1", "L2", "L3"):
            value = scalar(name, getattr(self, name), finite, "a finite number ≥ 0 (Assumption 1)", 0.0)
            object.__setattr__(self, name, value)


def t_interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[Any, Any]:
    """Mean over the rows and half of Student's interval; infinitely wide for one row, `UfomError` for another level."""
    from scipy.special import stdtrit  # not where nothing is repeated: importing it takes longer than all else

    level, n = scalar("level", level), len(values)
    if not 0 < level < 1:
        raise UfomError(f"level = {level:g} must lie in (0, 1)")
    mean = values.mean(0)
    if n == 1:
        return mean, np.full_like(mean, np.inf)
    return mean, stdtrit(n - 1, (1 + level) / 2) * values.std(0, ddof=1) / np.sqrt(n)
