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
    return Moments(moments.d2, moments.v2 + (b - 1) * square, cov, moments.n, square)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the theory predicts for given moments and costs. `q` is computed at once, all else when asked for.

    Attributes:
        moments: D², V² of one call of the estimator (of the batch mean, where batch > 1).
        cost: the cost model.
        m: exponent of the time to precision.
        q: the q* that minimises (19); 0.0 where D² = 0 (FOM is exact: run it, or the smallest q that you like).
        law: what m rests on, such as "model of 'adam:0.001'"; "" where m was given.
    """

    moments: Moments
    cost: CostModel
    m: Number
    q: Number
    law: str = ""

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
        """∂q/∂ρ = (q² + (m − 1)q + mκ)/S and ∂q/∂κ = mρ/S; 0 where q* = 1 is the end of the range."""
        rho, gap = _ratios(self.moments)
        kappa, q, m = _kappa(self.cost), np.asarray(self.q), np.asarray(self.m)
        inside = (q < 1) & np.isfinite(kappa) & np.isfinite(rho)
        with np.errstate(all="ignore"):
            root_s = discriminant_root(rho, gap, kappa, m)
            by_rho, by_kappa = (q * q + (m - 1) * q + m * kappa) / root_s, m * rho / root_s
        return np.where(inside, by_rho, 0.0), np.where(inside, np.where(rho == 0, np.inf, by_kappa), 0.0)

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
    def interval(self) -> tuple[Number, Number]:
        """95 % interval of q* by the delta method, from the joint covariance of D², V² and the errors of C1, C2.

        The error is carried on log ρ, where the estimates are nearest to normal and q* is monotone; the error of
        log κ is added at the rate at which κ moves q* against ρ, ∂log q/∂log κ : ∂log q/∂log ρ = mκ : q² + (m−1)q + mκ.
        The ends are q* at the ends of that range, so they stay in [0, 1] also where (20) fails.
        """
        rho, gap = _ratios(self.moments)
        kappa, q, m = _kappa(self.cost), np.asarray(self.q), np.asarray(self.m)
        cov, d2, v2 = self.moments.cov, np.asarray(self.moments.d2), np.asarray(self.moments.v2)
        assert cov is not None
        sem_d, sem_v = np.sqrt(cov[..., 0, 0]), np.sqrt(cov[..., 1, 1])
        with np.errstate(all="ignore"):
            # Var log ρ from relative errors and their correlation: squares of D² and V² could underflow
            r_d, r_v = sem_d / d2, sem_v / v2
            correlation = np.where((sem_d > 0) & (sem_v > 0), np.clip(cov[..., 0, 1] / sem_d / sem_v, -1, 1), 0.0)
            by_rho = np.hypot(r_d - correlation * r_v, np.sqrt(1 - correlation**2) * r_v)
            exchange = np.where(np.isfinite(kappa), m * kappa / (q * q + (m - 1) * q + m * kappa), 0.0)
            half = Z95 * np.hypot(by_rho, exchange * self.cost.log_kappa_sem)
            half = np.where((d2 > 0) & (v2 > 0), half, 0.0)
            low, high = rho * np.exp(-half), rho * np.exp(half)
            high = np.where(d2 > 0, high, Z95 * sem_d / v2)  # D² = 0: no logarithm
        # where nothing is uncertain the ends are q* itself, to the last bit
        ends = [
            np.where(end == rho, q, minimiser(end, np.where(end == rho, gap, 1 - end), kappa, m)) for end in (low, high)
        ]
        return plain(ends[0]), plain(ends[1])

    @cached_property
    def pays(self) -> Any:
        """ "yes" where q* < 1 over the whole interval, "no" where q* = 1 over all of it, else "cannot tell"."""
        low, high = (np.asarray(end) for end in self.interval)
        return plain(np.where(high < 1, "yes", np.where(low >= 1, "no", "cannot tell")))

    @cached_property
    def why(self) -> Any:
        """The reason for `pays` in a sentence; an array of sentences where the inputs were arrays."""
        assert self.moments.cov is not None
        sampled = self.moments.cov.any(axis=(-2, -1))
        fields = (self.pays, self.q, self.rho, self.condition_margin, self.speedup_over_exact, *self.interval, self.m)
        with np.errstate(all="ignore"):
            return plain(np.vectorize(_reason, otypes=[object])(*fields, sampled, self.law))


def _reason(
    pays: str,
    q: float,
    rho: float,
    margin: float,
    speedup: float,
    low: float,
    high: float,
    m: float,
    sampled: bool,
    law: str,
) -> str:
    at = f"m = {m:.3g}" + (f" ({law})" if law else "")
    if rho == 0:
        return "D² = 0: the proxy is exact here, so the best q tends to 0: run the proxy alone, or any small q"
    if pays == "cannot tell":
        remedy = "D² and V² on more tasks" if sampled else "C1 and C2 again, on a quiet machine"
        return f"the 95 % interval of q*, [{low:.3g}, {high:.3g}], reaches 1; measure {remedy}"
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
    moments = batch_moments(moments, batch)
    broadcast(moments=moments.shape, cost=cost.shape, m=np.shape(m))
    rho, gap = _ratios(moments)
    return Prediction(moments, cost, m, plain(minimiser(rho, gap, _kappa(cost), m)), law)
