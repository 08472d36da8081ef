"""Other coins and other proxies: stratified coins, a scaled proxy, a share of a correction, and the size of the batch.

All take `laws.Progress`. Derived in `derivations/stratified.py` and `derivations/scaled_proxy.py`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from ufom_theory.checks import Number, UfomError, finite, integer, plain, positive, scalar
from ufom_theory.cost import CostModel
from ufom_theory.laws import Progress, noise_q
from ufom_theory.optimum import batch_moments
from ufom_theory.quantities import Moments

Weight = Literal["1/q", "B/k"]
Coins = Literal["task", "batch", "stratified"]


def coin_moments(moments: Moments, coin: Coins, batch: int) -> Moments:
    """D² and V² of the mean over B tasks, up to the common factor 1/B, so that (20)–(21) hold with them.

    V² becomes V² + (B − 1)·‖∇M‖², and D² stays with a coin a task, becomes D² + (B − 1)·‖E d‖² with one coin for the
    batch, and D² − ‖E d‖² with stratified coins where qB is an integer.

    Raises:
        UfomError: batch < 1, or batch > 1 and moments without what it needs.
    """
    b = scalar("batch", batch, integer, 1)
    if coin == "task" or b == 1:
        return batch_moments(moments, b)
    bias, spread = _bias_and_spread(Progress.of(moments))
    d2 = spread if coin == "stratified" else spread + b * bias
    return Moments(float(d2), batch_moments(moments, b).v2)


def _single(progress: Progress) -> Progress:
    if any(np.ndim(value) for value in vars(progress).values() if value is not None):
        raise UfomError("the progress holds arrays: choose coins for one θ at a time")
    return progress


def _covariance(p: Progress) -> Number:
    """E⟨G, F⟩ − ⟨g, f⟩, from D² = V² − 2·E⟨G, F⟩ + E‖F‖²."""
    squares = p.variance + p.gradient_sq + p.proxy_variance + p.proxy_mean_sq
    return (squares - p.d2) / 2 - p.cross


def _bias_and_spread(p: Progress) -> tuple[Any, Any]:
    """‖E d‖² and D² − ‖E d‖², neither below 0: an unbiased estimate of ‖E d‖² may lie outside [0, D²]."""
    bias = np.minimum(np.maximum(p.bias_sq, 0.0), p.d2)
    return bias, p.d2 - bias


def with_coins(progress: Progress, q: float, batch: int, coin: Coins) -> Progress:
    """With the D² whose (1/q − 1)·D²/B is the noise that these coins add to the mean over a batch.

    "task": D² itself; "batch", one coin for all: D² + (B − 1)·‖E d‖²; "stratified": what `stratified_second_moment`
    says, with the weight B/k where qB ≥ 1, else 1/q. Curvatures are left as they are: that of E d counts as that of d.

    Args:
        progress: numbers or arrays.
        q: probability of a correction, in (0, 1].
        batch: B.
        coin: which coins.

    Raises:
        UfomError: q outside (0, 1], batch < 1.
    """
    p, b, q = progress, scalar("batch", batch, integer, 1), _one_probability(q)
    bias, _ = _bias_and_spread(p)
    if coin == "task" or q == 1 or b == 1:
        return p
    if coin == "batch":
        return p.changed(d2=p.d2 + (b - 1) * bias)
    noise = _stratified_noise(p, q, b, "B/k" if q * b >= 1 else "1/q")
    return p.changed(d2=np.maximum(noise, 0.0) * b / (1 / q - 1))


def best_scale(progress: Progress) -> Number:
    """c* = E⟨G, F⟩/E‖F‖², at which D_c² = E‖G − c·F‖² is least; 0 where F vanishes."""
    p = progress
    v2, proxy_sq = np.asarray(p.variance + p.gradient_sq), np.asarray(p.proxy_variance + p.proxy_mean_sq)
    vanishes = proxy_sq <= 0
    return plain(np.where(vanishes, 0.0, (v2 + proxy_sq - p.d2) / (2 * np.where(vanishes, 1.0, proxy_sq))))  # type: ignore[no-any-return]


def scaled_proxy(progress: Progress, c: float) -> Progress:
    """With c·F in the place of F, for a fixed c: D_c² = (1 − c)·V² + c·D² + c(c − 1)·E‖F‖², and so its curvature.

    The same identity holds of E[xᵀHx] for x = G, d and F, from which ℓ_d of d_c = G − c·F follows.
    """
    p, c = progress, scalar("c", c, finite)

    def of_scaled(of_g: Any, of_d: Any, of_f: Any) -> Any:
        """E[xᵀHx] of x = d_c, by those of G, d and F."""
        return (1 - c) * of_g + c * of_d + c * (c - 1) * of_f

    v2, proxy_sq = np.asarray(p.variance + p.gradient_sq), np.asarray(p.proxy_variance + p.proxy_mean_sq)
    d2, by_d = np.maximum(of_scaled(v2, p.d2, proxy_sq), 0.0), None
    if p.curvature_correction is not None:
        by_g, noise, ours, by_f, noise_f = p.curvatures(
            "curvature_gradient", "curvature_noise", "curvature_correction", "curvature_proxy", "curvature_proxy_noise"
        )
        form = of_scaled(
            by_g * p.gradient_sq + noise * p.variance, ours * p.d2, by_f * p.proxy_mean_sq + noise_f * p.proxy_variance
        )
        by_d = plain(np.where(d2 > 0, form / np.where(d2 > 0, d2, 1.0), 0.0))
    return p.changed(
        d2=plain(d2), cross=c * p.cross, proxy_mean_sq=c * c * p.proxy_mean_sq,
        proxy_variance=c * c * p.proxy_variance, curvature_correction=by_d,
    )  # fmt: skip


def _one_probability(q: float) -> float:
    q = scalar("q", q, positive)
    if q > 1:
        raise UfomError(f"q = {q:g} must lie in (0, 1]: it is a probability")
    return q


def _stratified_noise(p: Progress, q: float, b: int, weight: Weight) -> Any:
    """What stratified coins add to the second moment of the mean."""
    bias, spread = _bias_and_spread(p)
    k = math.floor(q * b)
    share = q * b - k
    if weight == "1/q":
        return (1 / q - 1) * spread / b + share * (1 - share) * bias / (q * b) ** 2
    if weight != "B/k":
        raise UfomError(f"weight = {weight!r} is unknown: use '1/q' or 'B/k'")
    if k < 1:
        raise UfomError(f"weight = 'B/k' needs qB ≥ 1, but qB = {q * b:g}: a batch could have k = 0; use '1/q'")
    return ((1 - share) / k + share / (k + 1) - 1 / b) * spread


def stratified_second_moment(progress: Progress, q: float, batch: int, weight: Weight = "1/q") -> float:
    """Second moment of the mean over B tasks of which exactly k are corrected, drawn without replacement.

    k = ⌊qB⌋ + Bernoulli(f), f = frac(qB). The coins add (1/B)(1/q − 1)(D² − ‖E d‖²) + f(1 − f)·‖E d‖²/(qB)² where a
    correction has the weight 1/q, and (1/B)(E[B/k] − 1)(D² − ‖E d‖²) where it has B/k. Where qB is an integer both are
    UFOM's, with D² − ‖E d‖² for D².

    Args:
        progress: numbers, not arrays.
        q: probability of a correction, in (0, 1].
        batch: B.
        weight: "1/q", for any q, or "B/k", for qB ≥ 1. The latter's moment is smaller where
            k(k + 1)·‖E d‖² > qB·(D² − ‖E d‖²), k = ⌊qB⌋.

    Raises:
        UfomError: q outside (0, 1], another weight, "B/k" with qB < 1, arrays.
    """
    p, b, q = _single(progress), scalar("batch", batch, integer, 1), _one_probability(q)
    return float(p.gradient_sq + p.variance / b + _stratified_noise(p, q, b, weight))


def stratified_q(progress: Progress, cost: CostModel, batch: int, m: float = 1.0) -> float:
    """The q of the least A^m·C with stratified coins of either weight; weight 1/q attains it. 0.0 where D² = 0.

    Between two integers qB the moment with weight B/k is linear in q, so log A^m·C is concave and best at an end, where
    both weights agree. With weight 1/q it is a quadratic in u = 1/(qB), and A^m·C is stationary at roots of a cubic.

    Raises:
        UfomError: m ≤ 0, arrays, an estimate of ‖g‖² + Var/B that is not above 0.
    """
    p, b, m = _single(progress), scalar("batch", batch, integer, 1), scalar("m", m, positive)
    if not p.gradient_sq + p.variance / b > 0:
        raise UfomError(f"‖g‖² + Var/B = {p.gradient_sq + p.variance / b:g} is not above 0: measure on more tasks")
    if p.d2 == 0:
        return 0.0
    det, rnd = (float(scalar(name, x, positive)) for name, x in (("C_det", cost.c_det), ("C_rnd", cost.c_rnd)))
    (bias, spread), each = _bias_and_spread(p), rnd / b
    constant = p.gradient_sq + (p.variance - spread) / b - bias
    found: list[float] = [k / b for k in range(1, b + 1)]
    for k in range(b):  # A = constant + linear·u + square·u² for k ≤ qB ≤ k + 1
        linear, square = spread + (2 * k + 1) * bias, -k * (k + 1) * bias
        cubic = [2 * m * square * det, m * linear * det + (2 * m - 1) * square * each, (m - 1) * linear * each]
        roots = np.roots([*cubic, -each * constant])
        real = [float(1 / u.real) for u in roots if abs(u.imag) < 1e-9 * u.real]
        found += [x / b for x in real if k < x < k + 1]
    return min(found, key=lambda q: m * math.log(stratified_second_moment(p, q, b)) + math.log(det + rnd * q))


def stratified_scale(progress: Progress) -> float:
    """c* = (E⟨G, F⟩ − ⟨g, f⟩)/Var_F, which minimises D_c² − ‖E d_c‖², all that stratified coins see of c·F.

    Raises:
        UfomError: Var_F ≤ 0, arrays.
    """
    p = _single(progress)
    if not p.proxy_variance > 0:
        raise UfomError(f"Var_F = {p.proxy_variance:g} is not above 0: no scale of the proxy changes the spread of d")
    return float(_covariance(p) / p.proxy_variance)


def partial_error(progress: Progress, share: Number, q: Number, batch: int = 1) -> Number:
    """Mean squared error of F + λ·(ξ/q)·d, the correction taken with a share λ of its weight; biased for λ < 1.

    (1 − λ)²‖E d‖² + [(1 − λ)²Var_F + λ²Var + 2λ(1 − λ)·Cov(G, F) + λ²(1/q − 1)D²]/B; λ = 1 is UFOM, λ = 0 FOM.

    Raises:
        UfomError: q outside (0, 1], λ not finite.
    """
    p, x, b = progress, finite("share", share), scalar("batch", batch, integer, 1)
    coins = p.second_moment(q) - p.gradient_sq - p.variance
    noise = (1 - x) ** 2 * p.proxy_variance + x * x * (p.variance + coins) + 2 * x * (1 - x) * _covariance(p)
    return plain((1 - x) ** 2 * p.bias_sq + noise / b)  # type: ignore[no-any-return]


def partial_share(progress: Progress, q: Number, batch: int = 1) -> Number:
    """λ* = (B‖E d‖² + Var_F − Cov(G, F))/((B − 1)‖E d‖² + D²/q), which minimises `partial_error`.

    It tends to 1 as the batch grows: only a small batch gains from a bias.

    Raises:
        UfomError: q ≤ 0, D² = 0.
    """
    p, b = progress, scalar("batch", batch, integer, 1)
    under = (b - 1) * p.bias_sq + p.d2 / positive("q", q)
    if not np.all(under > 0):
        raise UfomError("D² = 0: the proxy is exact, and every share λ gives the same estimate")
    return plain((b * p.bias_sq + p.proxy_variance - _covariance(p)) / under)  # type: ignore[no-any-return]


def best_batch(progress: Progress, cost: CostModel, budget: Number) -> tuple[Any, Number]:
    """(B, q) with B·C(q) ≤ budget and the least noise (Var + (1/q − 1)·D²)/B of the outer gradient.

    Were B continuous, q would not depend on the budget: it is `noise_q`, and B = budget/C(q). So B is that number
    rounded down or up, and q spends the rest of the budget.

    Args:
        progress: at one θ, or arrays.
        cost: of one task.
        budget: cost of one outer step, in the unit of `cost`.

    Raises:
        UfomError: a budget that does not pay for one proxy and more, C_rnd = 0.
    """
    most, det, rnd = (np.asarray(positive(name, x)) for name, x in
                      (("budget", budget), ("C_det", cost.c_det), ("C_rnd", cost.c_rnd)))  # fmt: skip
    if (most <= det).any():
        raise UfomError(f"budget = {most.min():g} leaves nothing for a correction: one proxy costs {det.max():g}")
    ideal = np.floor(most / (det + rnd * noise_q(progress, cost)))
    sizes = np.maximum(np.stack([ideal, ideal + 1]), 1.0)
    q = np.minimum((most / sizes - det) / rnd, 1.0)
    with np.errstate(divide="ignore"):
        noise = np.where(q > 0, (progress.variance + (1 / q - 1) * progress.d2) / sizes, np.inf)
    first = noise[0] <= noise[1]
    return plain(np.where(first, *sizes).astype(np.int64)), plain(np.where(first, *q))
