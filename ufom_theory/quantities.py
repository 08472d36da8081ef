"""What the theory speaks of: moments, assumption constants, verdicts. Floats or numpy arrays, frozen and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufom_theory.checks import Number, UfomError, broadcast, finite, integer, plain, scalar

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True, eq=False)
class Moments:
    """Bias D² (14) and second moment V² (16), as given or as measured.

    Attributes:
        d2: D² = sup_θ E‖G_proxy − G‖², a float or an array; with a truncated proxy, D_K².
        v2: V² = sup_θ E‖G‖², broadcastable with `d2`.
        cov: covariance of the two *estimates* (not of one task), shape (..., 2, 2); zeros for exact values.
        n: number of tasks behind the estimates, None when the values are given.
        mean_gradient_sq: ‖∇M‖² at the same θ as V², needed for batches of tasks with independent coins.
        mean_gradient_cov: Cov(‖∇M‖², (D², V², ‖∇M‖²)) of the estimates, shape (..., 3); zeros for exact values.
        shape: what all of these broadcast to.

    Raises:
        UfomError: a value that is negative or not finite, or D² = V² = 0; shapes that do not broadcast; a covariance of
            another shape, not symmetric, with a negative variance or a correlation above 1; an exact ‖∇M‖² > V².
    """

    d2: Number
    v2: Number
    cov: NDArray[np.float64] | None = None
    n: int | None = None
    mean_gradient_sq: Number | None = None
    mean_gradient_cov: NDArray[np.float64] | None = None
    shape: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rule = "a finite number ≥ 0: it is the mean of a squared norm"
        d2, v2 = finite("D² (d2)", self.d2, rule, 0.0), finite("V² (v2)", self.v2, rule, 0.0)
        set_ = object.__setattr__
        set_(self, "d2", d2)
        set_(self, "v2", v2)
        set_(self, "cov", _covariance("cov", self.cov, (2, 2)))
        set_(self, "mean_gradient_cov", _covariance("mean_gradient_cov", self.mean_gradient_cov, (3,)))
        if self.mean_gradient_sq is not None:
            set_(self, "mean_gradient_sq", finite("‖∇M‖² (mean_gradient_sq)", self.mean_gradient_sq, rule, 0.0))
        if self.n is not None:
            set_(self, "n", scalar("n, the number of tasks,", self.n, integer, 1))
        shapes = {name: np.shape(getattr(self, name)) for name in ("d2", "v2", "mean_gradient_sq")}
        joint = self.joint_cov()
        set_(self, "shape", broadcast(**shapes, covariance=joint.shape[:-2]))
        if np.any((np.asarray(d2) == 0) & (np.asarray(v2) == 0)):
            raise UfomError("D² = V² = 0: the gradient vanishes, so every q is equally good; measure at another θ")
        self._check_possible(joint)

    def _check_possible(self, joint: NDArray[np.float64]) -> None:
        sems = np.sqrt(np.diagonal(joint, axis1=-2, axis2=-1))
        with np.errstate(over="ignore"):
            most = sems[..., :, None] * sems[..., None, :]
            if (abs(joint - joint.swapaxes(-1, -2)) > 1e-6 * most).any():
                raise UfomError("cov is not symmetric, but Cov(D², V²) = Cov(V², D²): give the whole matrix")
            if (abs(joint) > (1 + 1e-6) * most).any():
                raise UfomError("cov holds a correlation beyond ±1: |Cov(x, y)| ≤ √(Var x·Var y), check its entries")
        if self.mean_gradient_sq is not None:
            exact = (joint[..., 1, 1] == 0) & (joint[..., 2, 2] == 0)
            above = np.asarray(self.mean_gradient_sq) > np.asarray(self.v2) * (1 + 1e-4)  # of float32 gradients
            if (exact & above).any():
                raise UfomError(
                    f"‖∇M‖² = {np.max(self.mean_gradient_sq):g} is above V² = {np.min(self.v2):g}, but the square of a "
                    "mean is never above the mean of the squares: take both at the same θ"
                )

    @property
    def d2_sem(self) -> Number:
        """Standard error of D²."""
        assert self.cov is not None
        return plain(np.sqrt(self.cov[..., 0, 0]))  # type: ignore[no-any-return]

    @property
    def v2_sem(self) -> Number:
        """Standard error of V²."""
        assert self.cov is not None
        return plain(np.sqrt(self.cov[..., 1, 1]))  # type: ignore[no-any-return]

    def joint_cov(self) -> NDArray[np.float64]:
        """Covariance of the estimates of (D², V², ‖∇M‖²), shape (..., 3, 3)."""
        assert self.cov is not None
        assert self.mean_gradient_cov is not None
        shape = broadcast(cov=self.cov.shape[:-2], mean_gradient_cov=self.mean_gradient_cov.shape[:-1])
        joint = np.zeros((*shape, 3, 3))
        joint[..., :2, :2] = self.cov
        joint[..., 2, :] = joint[..., :, 2] = self.mean_gradient_cov
        return joint


def _covariance(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.float64]:
    if value is None:
        return np.zeros(shape)
    cov = np.asarray(finite(name, value))
    if cov.shape[-len(shape) :] != shape:
        raise UfomError(f"{name} has shape {cov.shape}, but the last axes must be {shape}")
    variances = np.diagonal(cov, axis1=-2, axis2=-1) if len(shape) == 2 else cov[..., -1:]
    if (variances < 0).any():
        raise UfomError(f"{name} holds the variance {variances.min():g}, but a variance is never negative")
    return cov


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


Agreement = Literal["yes", "no", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    """One comparison of what was predicted with what was measured.

    Attributes:
        subject: what is compared.
        relation: what the theory says of measured against predicted.
        predicted: the predicted value or bound.
        measured: the measured value.
        tolerance: how far measured may be off, in the unit of both: a 95 % half-width, or 0 for exact values.
        agrees: "inconclusive" where the tolerance is too wide to decide.
    """

    subject: str
    relation: Literal["=", "<=", ">="]
    predicted: float
    measured: float
    tolerance: float
    agrees: Agreement

    @classmethod
    def from_paired(
        cls,
        subject: str,
        relation: Literal["=", "<=", ">="],
        bound: float,
        differences: ArrayLike,
        widest: float = 0.1,
        margin: float = 0.0,
    ) -> Verdict:
        """Judge the mean of paired `differences`, shape (n,), n ≥ 2, against a bound by its 95 % t-interval.

        `subject` says what is compared; an error names it.

        "yes" where the whole interval keeps the bound, "no" where it breaks it as a whole; in between, an interval no
        wider than `widest` is judged by its centre, and a wider one is "inconclusive". With "=", the bound is kept
        within ± `margin`. Differences that are not all finite (a run given up) are "inconclusive" too.

        Raises:
            UfomError: another relation, fewer than 2 differences, or differences that are not numbers.
        """
        if relation not in ("=", "<=", ">="):
            raise UfomError(f"{subject}: relation {relation!r} is unknown: use =, <= or >=")
        bound = scalar("bound", bound)
        try:
            x = np.asarray(differences, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise UfomError(f"{subject}: the differences are not one vector of numbers") from error
        if x.ndim != 1 or len(x) < 2:
            raise UfomError(f"{subject}: {x.size} paired difference(s), but an interval needs at least 2")
        from scipy.stats import t  # a study's cost, not the import's

        mean = float(x.mean())
        half = float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
        verdict = cls.from_interval(subject, relation, bound, mean, half, margin)
        if verdict.agrees == "inconclusive" and 2 * half <= widest:
            return replace(cls.from_interval(subject, relation, bound, mean, 0.0, margin), tolerance=half)
        return verdict

    @classmethod
    def from_interval(
        cls,
        subject: str,
        relation: Literal["=", "<=", ">="],
        predicted: float,
        measured: float,
        half: float = 0.0,
        margin: float = 0.0,
    ) -> Verdict:
        """Judge the 95 % interval `measured` ± `half` of a `subject` against a `predicted` value or bound.

        "yes" where all of it keeps the `relation`, "no" where all of it breaks it, else "inconclusive", as where a
        number is nan; the relation is kept within `margin`.
        """
        over = {"<=": measured - predicted, ">=": predicted - measured, "=": abs(measured - predicted)}[relation]
        agrees: Agreement = "yes" if over - margin + half <= 0 else "no" if over - margin - half > 0 else "inconclusive"
        return cls(subject, relation, predicted, measured, half, agrees)
