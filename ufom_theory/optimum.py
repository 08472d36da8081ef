"""The q that reaches a given precision soonest: (19)–(21) with a general exponent m; see `derivations/optimum.py`.

Everything is a function of ρ = D²/V², κ = C_det/C_rnd and m; numpy broadcasting throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ufom_theory.checks import Number, UfomError, broadcast, instance, integer, plain, scalar
from ufom_theory.cost import CostModel
from ufom_theory.laws import exponent_of
from ufom_theory.power_law import discriminant_root, minimiser
from ufom_theory.quantities import Z95, Moments

Array = NDArray[np.float64]
NOISELESS = (
    "the exact gradient has no noise here, ‖∇M‖² = V² as with a single task, and this law is about noise: where steps "
    "are not tuned to q, or near a minimum (there V² → 0 but not D²), exact steps are the choice"
)
_NOISY_CLOCK = 0.25  # relative error of a cost that is said


def exponent(epsilon: float) -> float:
    """m = 2/(1 − 2ε), the exponent of the time to precision for γ_k = k^(−1/2) in (19).

    Args:
        epsilon: ε in [0, 0.5), by which the rate of (18) falls short of k^(−1/2).

    Raises:
        UfomError: ε outside [0, 0.5), or no single number.
    """
    epsilon = scalar("ε", epsilon)
    if not 0 <= epsilon < 0.5:
        raise UfomError(f"ε = {epsilon:g} must lie in [0, 0.5): (18) has rate k^(−1/2 + ε)")
    return 2 / (1 - 2 * epsilon)


def batch_moments(moments: Moments, batch: int) -> Moments:
    """D², V² of the mean over `batch` tasks with independent coins, up to the common factor 1/batch.

    D² stays, V² becomes V² + (B − 1)·‖∇M‖², and the covariance follows; a negative estimate of ‖∇M‖² counts as 0.
    One coin for the whole batch is batch = 1 with the moments of the batch mean.

    Raises:
        UfomError: batch < 1 or an array, batch > 1 and no ‖∇M‖² in the moments.
    """
    b = scalar("batch", batch, integer, 1)
    if b == 1:
        return moments
    if moments.mean_gradient_sq is None:
        raise UfomError(f"batch = {b} needs ‖∇M‖²: give Moments(mean_gradient_sq=...), or `--mean-gradient-sq`")
    entries = ("d2", "v2", "mean_gradient_sq")
    jacobian = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, b - 1.0], [0.0, 0.0, 1.0]])
    cov = jacobian @ moments.covariance(*entries) @ jacobian.T
    square = np.maximum(moments.mean_gradient_sq, 0.0)  # an unbiased estimate may be negative, ‖∇M‖² is not
    v2 = moments.v2 + (b - 1) * square
    return Moments(moments.d2, v2, cov, moments.n, square, samples=moments.samples)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the theory predicts for given moments and costs. `q` is computed at once, all else when asked for.

    Attributes:
        moments: D², V² of one call of the estimator (of the batch mean, where batch > 1).
        cost: the cost model.
        m: exponent of the time to precision.
        q: the q* that minimises (19); 0.0 where D² = 0 (FOM is exact: run it, or the smallest q that you like).
        law: what m rests on, such as "'adam:0.001', a model"; "" where m was given.
        noiseless: whether the exact gradient has no noise, as on a single task; `why` then says what it means.
    """

    moments: Moments
    cost: CostModel
    m: Number
    q: Number
    law: str = ""
    noiseless: bool = False

    @property
    def rho(self) -> Number:
        """ρ = D²/V²."""
        return plain(_ratios(self.moments)[0])  # type: ignore[no-any-return]

    @property
    def kappa(self) -> Number:
        """κ = C_det/C_rnd."""
        return plain(_kappa(self.cost))  # type: ignore[no-any-return]

    @property
    def condition_margin(self) -> Number:
        """C_rnd·V² − m·D²·(C_det + C_rnd); condition (20) holds where it is positive."""
        c = self.cost
        with np.errstate(over="ignore", invalid="ignore"):
            return c.c_rnd * self.moments.v2 - self.m * self.moments.d2 * (c.c_det + c.c_rnd)

    @cached_property
    def speedup_over_exact(self) -> Number:
        """Time to a given precision at q = 1 over that at q*, with the same sweep; (19) at both."""
        rho, _ = _ratios(self.moments)
        c, q = self.cost, np.asarray(self.q)
        with np.errstate(all="ignore"):
            # written as 1/(A(q)/V²)^m so that V² = 0 (ρ = ∞, q = 1) gives 1
            excess = np.where((rho == 0) | (q == 1), 0.0, (1 / q - 1) * rho)
            ratio = (1 + excess) ** -np.asarray(self.m) * ((c.c_det + c.c_rnd) / (c.c_det + c.c_rnd * q))
        return plain(ratio)  # type: ignore[no-any-return]

    @property
    def cost_over_fom(self) -> Number:
        """Expected cost of one call at q* over one call of FOM, C1·(r + 1)."""
        return (self.cost.c_det + self.cost.c_rnd * self.q) / (self.cost.c1 * (self.cost.r + 1))  # type: ignore[no-any-return]

    def _sensitivity(self) -> tuple[Array, Array]:
        """∂q/∂ρ = q²/(ρS), which is (q² + (m − 1)q + mκ)/S by (21), and ∂q/∂κ = mρ/S; 0 where q* = 1 is the end."""
        rho, gap = _ratios(self.moments)
        kappa, q, m = _kappa(self.cost), np.asarray(self.q), np.asarray(self.m)
        inside = (q < 1) & np.isfinite(kappa) & np.isfinite(rho)
        with np.errstate(all="ignore"):
            root_s = discriminant_root(rho, gap, kappa, m)
            by_rho, by_kappa = (q / rho) * (q / root_s), m * rho / root_s
        slopes = (np.where(inside, np.where(rho == 0, np.inf, slope), 0.0) for slope in (by_rho, by_kappa))
        return next(slopes), next(slopes)

    @cached_property
    def dq_dd2(self) -> Number:
        """∂q*/∂D²; 0 where q* = 1, infinite where D² = 0."""
        with np.errstate(all="ignore"):
            return plain(np.where(np.asarray(self.q) < 1, self._sensitivity()[0] / self.moments.v2, 0.0))  # type: ignore[no-any-return]

    @cached_property
    def dq_dv2(self) -> Number:
        """∂q*/∂V²; 0 where q* = 1 or D² = 0."""
        with np.errstate(all="ignore"):
            value = -self._sensitivity()[0] * _ratios(self.moments)[0] / self.moments.v2
        inside = (np.asarray(self.q) < 1) & (np.asarray(self.q) > 0)
        return plain(np.where(inside, value, 0.0))  # type: ignore[no-any-return]

    @cached_property
    def _half_widths(self) -> tuple[Array, Array]:
        """Half the 95 % intervals of log ρ (of ρ where D² = 0) and of log κ."""
        joint, d2, v2 = self.moments.covariance("d2", "v2"), np.asarray(self.moments.d2), np.asarray(self.moments.v2)
        sem_d, sem_v = np.sqrt(joint[..., 0, 0]), np.sqrt(joint[..., 1, 1])
        with np.errstate(all="ignore"):
            # Var log ρ from relative errors and their correlation: squares of D² and V² could underflow
            r_d, r_v = np.where(d2 > 0, sem_d / d2, sem_d / v2), sem_v / v2
            correlation = np.where((sem_d > 0) & (sem_v > 0), np.clip(joint[..., 0, 1] / sem_d / sem_v, -1, 1), 0.0)
            by_rho = np.hypot(r_d - correlation * r_v, np.sqrt(1 - correlation**2) * r_v)
            by_rho = np.where((v2 > 0) & (by_rho > 0), self.moments.quantile * by_rho, 0.0)
        return by_rho, np.asarray(Z95 * self.cost.log_kappa_sem)

    @cached_property
    def interval(self) -> tuple[Number, Number]:
        """95 % interval of q* by the delta method, from the joint covariance of D², V² and the errors of C1, C2.

        The errors are carried on log ρ and log κ, where the estimates are nearest to normal and q* is monotone: that of
        ρ with Student's t for n − 1 degrees of freedom where `moments.n` is given, and widened for the tail of
        `moments.samples`. The ends are q* at the point of the error ellipse where it is largest to first order, and at
        the opposite one, so they stay in [0, 1] also where (20) fails.
        """
        rho, gap = _ratios(self.moments)
        kappa, q, m = _kappa(self.cost), np.asarray(self.q), np.asarray(self.m)
        by_rho, by_kappa = self._half_widths
        exact = np.asarray(self.moments.d2) == 0
        with np.errstate(all="ignore"):
            # ∂log q/∂log κ : ∂log q/∂log ρ is mκ : q² + (m − 1)q + mκ, and the latter is q²/ρ at the root of (21)
            rate = np.where(q < 1, (m * kappa / q) * (rho / q), kappa / (1 + kappa))
            rate = np.where(exact | ~np.isfinite(rate), 0.0, rate)
            half = np.hypot(by_rho, rate * by_kappa)
            shifts = [np.where(half > 0, x / half * x, 0.0) for x in (by_rho, by_kappa)]
            ends = []
            for sign in (-1, 1):
                near = rho * np.exp(sign * shifts[0])
                near = np.where(exact, max(sign, 0) * by_rho, near)  # D² = 0: no logarithm
                # where nothing is uncertain the ends are q* itself, to the last bit
                at = minimiser(near, np.where(near == rho, gap, 1 - near), kappa * np.exp(sign * rate * shifts[1]), m)
                ends.append(np.where((near == rho) & (rate * shifts[1] == 0), q, at))
        return plain(ends[0]), plain(ends[1])

    @cached_property
    def pays(self) -> Any:
        """ "yes" where q* < 1 over the whole interval, "no" where q* = 1 over all of it, else "cannot tell"."""
        low, high = (np.asarray(end) for end in self.interval)
        return plain(np.where(high < 1, "yes", np.where(low >= 1, "no", "cannot tell")))

    @property
    def doubts(self) -> str:
        """What weakens the interval, and what to do about it; "" where nothing does."""
        tail, cost = self.moments.tail, self.cost
        said = [tail.warning] if tail and tail.warning else []
        if self.noiseless and np.any((np.asarray(self.q) < 1) & (np.asarray(self.q) > 0)):
            said.append(NOISELESS)
        for name, value, sem in (("C1", cost.c1, cost.c1_sem), ("C2", cost.c2, cost.c2_sem)):
            if (error := float(np.max(np.asarray(sem) / np.asarray(value)))) > _NOISY_CLOCK:
                said.append(f"{name} is known to ± {error:.0%} only: time it again, on a quiet machine")
        return "; ".join(said)

    @cached_property
    def why(self) -> Any:
        """The reason for `pays` in a sentence, with the `doubts`; an array of them where the inputs were arrays."""
        by_rho, by_kappa = self._half_widths
        remedies = np.where(by_rho >= by_kappa, "D² and V² on more tasks", "C1 and C2 again, on a quiet machine")
        if self.moments.tail and self.moments.tail.warning:
            remedies = np.asarray("")
        fields = (self.pays, self.q, self.rho, self.kappa, self.condition_margin, self.speedup_over_exact)
        with np.errstate(all="ignore"):
            reasons = np.vectorize(_reason, otypes=[object])(*fields, *self.interval, self.m, remedies, self.law)
            return plain(reasons + f"; {self.doubts}" if self.doubts else reasons)


def _reason(
    pays: str,
    q: float,
    rho: float,
    kappa: float,
    margin: float,
    speedup: float,
    low: float,
    high: float,
    m: float,
    remedy: str,
    law: str,
) -> str:
    at = f"m = {m:.3g}" + (f" ({law})" if law else "")
    if not np.isfinite(kappa):
        return "the proxy keeps every backward step: it is the exact gradient, and nothing is left to correct"
    if rho == 0:
        return "D² = 0: the proxy is exact here, so the best q tends to 0: run the proxy alone, or any small q"
    if pays == "cannot tell":
        return f"the 95 % interval of q*, [{low:.3g}, {high:.3g}], reaches 1" + (
            f"; measure {remedy}" if remedy else ""
        )
    if pays == "no":
        return f"condition (20) fails at {at}: D²/V² = {rho:.3g} is too large for the exact correction to be rare"
    held = "condition (20) holds" if margin > 0 else "condition (20) fails, though below m = 1 it is only sufficient,"
    gain = f"with probability {q:.3g} the correction reaches a given precision {speedup:.3g}× sooner than q = 1"
    return f"{held} at {at}: {gain}"


def _ratios(moments: Moments) -> tuple[Array, Array]:
    """ρ = D²/V² and 1 − ρ without cancellation; (∞, −∞) where V² = 0."""
    d2, v2 = np.asarray(moments.d2), np.asarray(moments.v2)
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(d2 / v2), np.asarray((v2 - d2) / v2)


def _kappa(cost: CostModel) -> Array:
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(np.asarray(cost.c_det) / cost.c_rnd)


def optimal_q(
    moments: Moments, cost: CostModel, m: Number | None = None, outer: str | None = None, batch: int = 1
) -> Prediction:
    """q* of (21): the probability at which UFOM reaches a given precision soonest, with its interval and reasons.

    Give exactly one of `m` and `outer`. The time to precision is A(q)^m·(C_det + C_rnd·q).

    Args:
        moments: D², V² and, if measured, their covariance; scalars or arrays that broadcast with the costs.
        cost: r, C1, C2, sweep and proxy, or `CostModel.of(c_det=…, c_rnd=…)`.
        m: the exponent itself; `exponent(ε)` is the paper's.
        outer: how the outer steps are taken: "tuned" (m = 1), "decay:s" (m = 1/s, with the moments near the minimiser),
            "adam:γ" (m = 1/2, a model), "paper" (m = 2). "sgd:γ" has no exponent: see `laws.fixed_step_q`.
        batch: tasks an outer step, each with its own coin.

    Returns:
        Prediction: `.q`, `.interval`, `.speedup_over_exact`, `.pays`, `.why`, `.dq_dd2`, `.dq_dv2`.

    Raises:
        UfomError: neither or both of m and outer, m ≤ 0, an outer without an exponent, batch < 1, batch > 1 without
            ‖∇M‖², shapes that do not broadcast, arguments of another type.
    """
    instance("moments", moments, Moments, "write Moments(d2, v2)")
    instance("cost", cost, CostModel, "write CostModel(r=10)")
    m, law = exponent_of(m, outer)
    noiseless, moments = moments.noiseless, batch_moments(moments, batch)
    broadcast(moments=moments.shape, cost=cost.shape, m=np.shape(m))
    rho, gap = _ratios(moments)
    if np.any((np.asarray(moments.d2) > 0) & (rho == 0)):
        raise UfomError(
            f"D²/V² = {np.min(moments.d2):g}/{np.max(moments.v2):g} is below floating point, and q* nearly 0: run the "
            "proxy alone, or any small q"
        )
    return Prediction(moments, cost, m, plain(minimiser(rho, gap, _kappa(cost), m)), law, noiseless)
