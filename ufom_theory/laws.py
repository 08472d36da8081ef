"""How progress depends on the second moment A and the cost C of one call, by the way the outer steps are taken.

Steps that decrease or are tuned have an exponent m: the time to a precision is proportional to A^m·C. A fixed step has
none: there the law of one step decides, to second order in γ (`derivations/one_step.py`). Every law is named: a
theorem, a local law or a model.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ufom_theory.checks import Number, UfomError, broadcast, finite, integer, plain, positive, scalar
from ufom_theory.cost import CostModel
from ufom_theory.power_law import minimiser
from ufom_theory.quantities import Moments

Law = Literal["theorem", "local law", "model"]

_GRAMMAR = "write sgd:γ, adam:γ, tuned, decay:s, decay:s:γ₁ or paper, as in 'sgd:0.05', 'adam:1e-3' or 'decay:0.5:1'"


@dataclass(frozen=True)
class Outer:
    """One way to take the outer steps.

    Attributes:
        kind: "sgd", a fixed step γ; "adam", at a fixed rate γ; "tuned", a fixed step tuned to the estimator; "decay",
            γ_k = γ₁·k^(−s); "paper", the reading of (19) with m = 2.
        rate: γ, or γ₁ of "decay"; None where the text gives none, and nothing can be trained with it.
        power: s of "decay", in (0, 1]; else None.
    """

    kind: Literal["sgd", "adam", "tuned", "decay", "paper"]
    rate: float | None = None
    power: float | None = None

    def __str__(self) -> str:
        return ":".join([self.kind, *(f"{x:g}" for x in (self.power, self.rate) if x is not None)])

    @property
    def law(self) -> Law:
        """What the dependence on q rests on: "model" for Adam, "local law" for "decay" and "sgd", else "theorem"."""
        laws: dict[str, Law] = {"adam": "model", "decay": "local law", "sgd": "local law"}
        return laws.get(self.kind, "theorem")

    @property
    def exponent(self) -> float:
        """m, with the time to a precision proportional to A(q)^m·C(q).

        2 for "paper" and 1 for "tuned" (Theorem 1's bound), 1/s for "decay" (the last iterate near a minimiser, with
        the moments taken there), 1/2 for "adam" (one scale for all coordinates, curvature left out).

        Raises:
            UfomError: "sgd": with one step for every q the time is not a power of A.
        """
        match self.kind:
            case "sgd":
                raise UfomError(
                    f"outer = '{self}' has no exponent m: with one fixed step the best q depends on ‖∇M‖² and on "
                    "curvatures. Use laws.fixed_step_q, or 'tuned' if the step is tuned to q"
                )
            case "decay":
                return 1 / self.power  # type: ignore[operator]
            case kind:
                return {"paper": 2.0, "tuned": 1.0, "adam": 0.5}[kind]

    def rate_at(self, step: int) -> float:
        """γ_k of the outer step k = 1, 2, …

        Raises:
            UfomError: a text without a rate, k < 1.
        """
        if self.rate is None:
            raise UfomError(f"outer = '{self}' has no rate: give sgd:γ, adam:γ or decay:s:γ₁")
        return float(self.rate * scalar("step", step, integer, 1) ** -(self.power or 0.0))


def theorem_exponent(s: float) -> float:
    """m = 1/min(s, 1 − s): Theorem 1's bound with γ_k ~ k^(−s), 0 < s < 1.

    For s > 1/2 it holds where ½·L_M·A·Σγ² dominates Δ. The local law of the last iterate has 1/s instead.

    Raises:
        UfomError: s outside (0, 1).
    """
    s = scalar("s", s)
    if not 0 < s < 1:
        raise UfomError(f"s = {s:g} must lie in (0, 1): elsewhere Theorem 1's bound is not a power of the precision")
    return 1 / min(s, 1 - s)


def exponent_of(m: Number | None, outer: str | None) -> tuple[Number, str]:
    """The exponent m and what it rests on, from exactly one of m and `outer`.

    >>> exponent_of(None, "decay:0.5")
    (2.0, "'decay:0.5', a local law")

    Raises:
        UfomError: neither or both given, m ≤ 0, a text outside the grammar or without an exponent.
    """
    if (m is None) == (outer is None):
        raise UfomError(
            f"give exactly one of m and outer, {'neither' if m is None else 'both'} given: outer='tuned' (m = 1), "
            "'decay:s' (m = 1/s), 'adam:γ' (m = 1/2), 'paper' (m = 2), or the exponent m itself"
        )
    if outer is None:
        return positive("m", m), ""  # type: ignore[arg-type]
    chosen = parse_outer(outer)
    return chosen.exponent, f"'{chosen}', a {chosen.law}"


def parse_outer(text: str) -> Outer:
    """The outer steps that `text` names.

    The grammar: `sgd:γ`, `adam:γ`, `tuned`, `decay:s` or `decay:s:γ₁` (γ_k = γ₁·k^(−s)), `paper`.

    >>> parse_outer("decay:0.5:0.1")
    Outer(kind='decay', rate=0.1, power=0.5)

    Raises:
        UfomError: a text outside the grammar, a rate that is not a finite number > 0, or s outside (0, 1].
    """
    match text.split(":") if isinstance(text, str) else ():
        case ["sgd" | "adam" as kind, rate]:
            return Outer(kind, rate=_number(text, "the rate", rate))
        case ["tuned" | "paper" as kind]:
            return Outer(kind)
        case ["decay", power, *rest] if len(rest) <= 1:
            s = _number(text, "s", power)
            if s > 1:
                raise UfomError(f"{text!r}: s = {s:g} must lie in (0, 1]: beyond 1 the steps sum to a finite length")
            return Outer("decay", rate=_number(text, "γ₁", rest[0]) if rest else None, power=s)
        case _:
            raise UfomError(f"{text!r} does not name an outer optimizer: {_GRAMMAR}")


def _number(text: str, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UfomError(f"{text!r}: {name} {value!r} must be a finite number > 0: {_GRAMMAR}")
    return number


def _entry(name: str, value: Number) -> Number:
    value = finite(name, value)
    return finite("D² (d2)", value, "≥ 0: it is the mean of a squared norm", 0.0) if name == "d2" else value


@dataclass(frozen=True, eq=False)
class Progress:
    """What the expected progress of one outer step depends on, at one θ; numbers or arrays that broadcast.

    With g = ∇M, f = E F (F the proxy's gradient of one task), d = G_exact − F and H = ∇²M. The squared means and ⟨g, f⟩
    may be U-statistics, and then negative. The curvatures are needed for a fixed step alone.

    Attributes:
        gradient_sq: ‖g‖².
        variance: Var = V² − ‖g‖², of the exact gradient of one task.
        d2: D² = E‖d‖².
        cross: ⟨g, f⟩.
        proxy_mean_sq: ‖f‖².
        proxy_variance: Var_F = E‖F‖² − ‖f‖².
        curvature_gradient: ℓ_g = gᵀHg/‖g‖².
        curvature_noise: ℓ = tr(H·Cov G_exact)/Var.
        curvature_correction: ℓ_d = E[dᵀHd]/D².
        curvature_proxy: ℓ_f = fᵀHf/‖f‖².
        curvature_proxy_noise: ℓ_F = tr(H·Cov F)/Var_F.

    Raises:
        UfomError: a value that is not finite, D² < 0, shapes that do not broadcast.
    """

    gradient_sq: Number
    variance: Number
    d2: Number
    cross: Number
    proxy_mean_sq: Number
    proxy_variance: Number
    curvature_gradient: Number | None = None
    curvature_noise: Number | None = None
    curvature_correction: Number | None = None
    curvature_proxy: Number | None = None
    curvature_proxy_noise: Number | None = None

    def __post_init__(self) -> None:
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        for name, value in given.items():
            object.__setattr__(self, name, _entry(name, value))
        broadcast(**{name: np.shape(value) for name, value in given.items()})

    def changed(self, **values: Number | None) -> Progress:
        """A copy with these values; those that stay are not checked again."""
        new = copy(self)
        for name, value in values.items():
            object.__setattr__(new, name, value if value is None else _entry(name, value))
        return new

    @classmethod
    def of(cls, moments: Moments, **curvatures: Number) -> Progress:
        """From moments that hold ‖∇M‖², E‖F‖², ⟨∇M, E F⟩ and ‖E F‖²; the curvatures by their names above.

        Raises:
            UfomError: one of these is missing.
        """
        names = ("mean_gradient_sq", "mean_cross", "proxy_sq", "mean_proxy_sq")
        missing = [name for name in names if getattr(moments, name) is None]
        if missing:
            raise UfomError(f"the law of one step needs Moments({', '.join(missing)}): measure them at the same θ")
        gradient_sq, cross, proxy_sq, proxy_mean_sq = (np.asarray(getattr(moments, name)) for name in names)
        variances = moments.v2 - gradient_sq, proxy_sq - proxy_mean_sq
        return cls(gradient_sq, variances[0], moments.d2, cross, proxy_mean_sq, variances[1], **curvatures)

    @property
    def bias_sq(self) -> Number:
        """‖E d‖² = ‖g‖² − 2⟨g, f⟩ + ‖f‖², FOM's squared bias."""
        return self.gradient_sq - 2 * self.cross + self.proxy_mean_sq

    def second_moment(self, q: Number, batch: int = 1) -> Number:
        """A_B(q) = ‖g‖² + (Var + (1/q − 1)·D²)/B, of the mean over B tasks with independent coins."""
        noise = self.variance + (1 / _probability(q) - 1) * self.d2
        return plain(self.gradient_sq + noise / _batch(batch))  # type: ignore[no-any-return]

    def curvatures(self, *names: str) -> list[Any]:
        """The curvatures of these names; `UfomError` where one is missing."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise UfomError(f"a fixed step needs {', '.join(missing)}: measure the curvatures along the gradients")
        return [getattr(self, name) for name in names]


def _probability(q: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(positive("q", q))
    if (array > 1).any():
        raise UfomError(f"q = {array.max():g} must lie in (0, 1]: it is a probability")
    return array


def _batch(batch: int) -> int:
    return scalar("batch", batch, integer, 1)  # type: ignore[no-any-return]


def _kappa(cost: CostModel) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.asarray(np.asarray(cost.c_det) / cost.c_rnd)


def _fixed(p: Progress, rate: float, batch: int) -> tuple[Any, Any]:
    """(s, D′) with E[M(θ) − M(θ⁺)] ≈ γ·(s − D′/q) to second order in γ."""
    rate, b = scalar("the rate γ", rate, positive), _batch(batch)
    by_g, noise, by_d = p.curvatures("curvature_gradient", "curvature_noise", "curvature_correction")
    s = p.gradient_sq - rate / 2 * (by_g * p.gradient_sq + (noise * p.variance - by_d * p.d2) / b)
    return s, rate * by_d * p.d2 / (2 * b)


def fixed_step_decrease(progress: Progress, q: Number, rate: float, batch: int = 1) -> Number:
    """E[M(θ) − M(θ⁺)] ≈ γ‖g‖² − (γ²/2)·[ℓ_g‖g‖² + (ℓ·Var + ℓ_d·(1/q − 1)·D²)/B] of a step of UFOM; q = 1 is exact."""
    s, slope = _fixed(progress, rate, batch)
    return plain(rate * (s - slope / _probability(q)))  # type: ignore[no-any-return]


def fixed_step_fom(progress: Progress, rate: float, batch: int = 1) -> Number:
    """E[M(θ) − M(θ⁺)] ≈ γ⟨g, f⟩ − (γ²/2)·[ℓ_f‖f‖² + ℓ_F·Var_F/B] of a step of FOM."""
    rate, p = scalar("the rate γ", rate, positive), progress
    by_f, noise = p.curvatures("curvature_proxy", "curvature_proxy_noise")
    curved = by_f * p.proxy_mean_sq + noise * p.proxy_variance / _batch(batch)
    return plain(rate * (p.cross - rate / 2 * curved))  # type: ignore[no-any-return]


def fixed_step_q(progress: Progress, cost: CostModel, rate: float, batch: int = 1, q_min: float = 0.0) -> Number:
    """The q of the most expected progress per cost, at one step γ that is the same for every q.

    With (s, D′) of γ·(s − D′/q) = `fixed_step_decrease` and κ = C_det/C_rnd: [D′ + √(D′² + κsD′)]/s where
    s > (2 + κ)·D′, 1 where D′ < s ≤ (2 + κ)·D′, and nan where s ≤ D′: there no q, the exact gradient included, makes
    expected progress; γ is too large or the batch too small. Where ℓ_d·D² ≤ 0 the smallest q is best.

    Args:
        progress: with ℓ_g, ℓ and ℓ_d.
        cost: of one task.
        rate: γ.
        batch: tasks a step, each with its own coin.
        q_min: the least q allowed; 0.0 is returned where the best q tends to 0.

    Raises:
        UfomError: a missing curvature, γ ≤ 0, batch < 1, q_min outside [0, 1].
    """
    floor = scalar("q_min", q_min, finite, "in [0, 1]", 0.0)
    if floor > 1:
        raise UfomError(f"q_min = {floor:g} must lie in [0, 1]: it is a probability")
    s, slope, kappa = np.broadcast_arrays(*_fixed(progress, rate, batch), _kappa(cost))
    with np.errstate(all="ignore"):
        rising = np.maximum(slope, 0.0)
        inside = (rising + np.sqrt(rising) * np.sqrt(rising + kappa * s)) / s
        q = np.where(s > (2 + kappa) * rising, np.maximum(inside, floor), 1.0)
        least = np.where(slope > 0, 1.0, max(floor, 1e-300))  # progress is largest at q = 1, or at the smallest q
        return plain(np.where(s - slope / least > 0, np.where(slope > 0, q, floor), np.nan))  # type: ignore[no-any-return]


def noise_q(progress: Progress, cost: CostModel) -> Number:
    """The q of the least noise at a given cost, (A(q) − ‖g‖²)·C(q): (21) with m = 1 and Var for V²."""
    variance = np.maximum(progress.variance, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho, gap = progress.d2 / variance, (variance - progress.d2) / variance
        rho, gap = np.where(variance > 0, rho, np.inf), np.where(variance > 0, gap, -np.inf)
    return plain(minimiser(rho, gap, _kappa(cost), 1.0))  # type: ignore[no-any-return]


def break_even(progress: Progress, cost: CostModel, q: Number | None = None) -> Number:
    """N_b = [(A(q) − ‖g‖²)·C(q)/C_det − Var_F]/‖E d‖², in FOM's task gradients; q is `noise_q` if not given.

    Averaged over fewer than N_b of them, FOM's gradient is nearer to ∇M than UFOM's at the same cost; over more, UFOM's
    is. N_b ≤ 0: UFOM is always ahead. ‖E d‖² ≤ 0 (no bias above its noise): ∞, or −∞ where UFOM's noise is the smaller.
    """
    best = np.asarray(noise_q(progress, cost) if q is None else _probability(q))
    with np.errstate(all="ignore"):
        noise = progress.variance + np.where(progress.d2 == 0, 0.0, (1 / best - 1) * progress.d2)
        excess = noise * (cost.c_det + cost.c_rnd * best) / cost.c_det - progress.proxy_variance
        bias = np.maximum(progress.bias_sq, 0.0)
        return plain(np.where(bias > 0, excess / bias, np.where(excess >= 0, np.inf, -np.inf)))  # type: ignore[no-any-return]


def fom_second_moment(progress: Progress, batch: int = 1) -> Any:
    """‖f‖² + Var_F/B, of FOM's gradient of a batch."""
    return progress.proxy_mean_sq + progress.proxy_variance / _batch(batch)


def quotient(over: Any, under: Any) -> NDArray[np.float64]:
    """over/under, 0 where `under` is not positive: a gradient that is 0 makes no progress."""
    kept = np.asarray(under) > 0
    return np.where(kept, over / np.where(kept, under, 1.0), 0.0)
