"""What the study of sinusoid regression computes: many runs of outer Adam at once, stacked in one tensor.

The net's gradient is written out, and a backward step is autodiff through it, φ ↦ (I − α·H)v: the stored sweep. It is
the library's `hypergradient` to rounding (tested), without the cost of a call for each of some ten thousand steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufom_runtime import AdaptiveUFOM
from ufom_runtime.problems.sinusoid import sample_waves, sinusoid
from ufom_theory import CostModel, Moments, optimal_q
from ufom_theory.laws import Progress
from ufom_theory.scores import scores

FIRST = 4  # steps that are exact in the law of one step, before there are estimates to choose by
ADAM = (0.9, 0.999, 1e-8)
TEST_SEED = 10**6  # of the tasks that judge, the same for all runs
Wave = tuple[Tensor, Tensor, Tensor, Tensor]  # x, y for training, x, y for the test, each (n, K, 1)


def pieces(phi: Tensor, width: int) -> list[Tensor]:
    """Weights and biases of nets 1 – width – width – 1 from flat rows, shape (n, p), in the order of `FlatModule`."""
    sizes = ((width, 1), (1, width), (width, width), (1, width), (1, width), (1, 1))
    flat = torch.split(phi, [a * b for a, b in sizes], dim=1)
    return [piece.view(len(phi), *size) for piece, size in zip(flat, sizes, strict=True)]


def predict(phi: Tensor, x: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both hidden layers and the output of each net at its points x, shape (n, K, 1)."""
    w1, b1, w2, b2, w3, b3 = pieces(phi, width)
    first = torch.baddbmm(b1, x, w1.mT).relu()
    second = torch.baddbmm(b2, first, w2.mT).relu()
    return first, second, torch.baddbmm(b3, second, w3.mT)


def loss(phi: Tensor, x: Tensor, y: Tensor, width: int) -> Tensor:
    """The mean squared error of each net, shape (n,)."""
    return (predict(phi, x, width)[2] - y).square().mean((1, 2))


def gradient(phi: Tensor, x: Tensor, y: Tensor, width: int) -> Tensor:
    """∂ of the mean squared error by φ, shape (n, p); itself differentiable."""
    _, _, w2, _, w3, _ = pieces(phi, width)
    first, second, out = predict(phi, x, width)
    d3 = (out - y) * (2 / x.shape[1])
    d2 = (d3 @ w3) * (second > 0)
    d1 = (d2 @ w2) * (first > 0)
    layers = ((d1, x), (d2, first), (d3, second))
    return torch.cat([part for d, h in layers for part in ((d.mT @ h).flatten(1), d.sum(1))], dim=1)


def inner_loop(theta: Tensor, waves: Wave, r: int, alpha: float, width: int) -> list[Tensor]:
    """φ_0 … φ_r of each row."""
    states = [theta]
    for _ in range(r):
        states.append(states[-1] - alpha * gradient(states[-1], waves[0], waves[1], width))
    return states


def backward(states: list[Tensor], v: Tensor, waves: Wave, alpha: float, width: int) -> Tensor:
    """The exact gradient from v = ∂L_out/∂φ_r: v ← (I − α·∂²L_in(φ_j))·v for j = r − 1 … 0."""
    for state in reversed(states[:-1]):
        phi = state.detach().requires_grad_()
        with torch.enable_grad():
            slope = gradient(phi, waves[0], waves[1], width)
        v = v - alpha * torch.autograd.grad(slope, phi, v)[0]
    return v


class Fixed:
    """Fixed probabilities, one for each run of a method."""

    def __init__(self, q: float, runs: int) -> None:
        self.q, self.c = torch.full((runs,), q), torch.ones(runs)

    def after(self, estimate: Tensor, proxy: Tensor, exact: Tensor, coins: Tensor) -> None:
        """Nothing is learnt."""


class Adaptive(Fixed):
    """`AdaptiveUFOM(cost=cost)` in many runs at once: section 4.5 as printed, m = 2."""

    def __init__(self, rule: AdaptiveUFOM, runs: int) -> None:
        super().__init__(rule.q_min, runs)
        self.rule, self.updates, self.smooth = rule, torch.zeros(runs), torch.zeros(runs, 2)

    def after(self, estimate: Tensor, proxy: Tensor, exact: Tensor, coins: Tensor) -> None:
        """q after a step; estimate (runs, p), proxy and exact (runs, B, p), of which what has a coin (runs, B) is read.

        (23)–(24) with the means over the corrected tasks of a batch, and (22) and (21) for q.
        """
        rule, seen, cost = self.rule, coins.any(1), self.rule.cost
        assert cost is not None
        squares = torch.stack([(x.square().sum(2) * coins).sum(1) for x in (exact - proxy, exact)], 1)
        new = rule.beta * self.smooth + (1 - rule.beta) * squares / coins.sum(1).clamp(min=1)[:, None]
        self.smooth = torch.where(seen[:, None], new, self.smooth)
        self.updates += seen
        known = self.updates > 0
        d2, v2 = (self.smooth[known] / (1 - rule.beta ** self.updates[known])[:, None]).double().numpy().T
        if known.any():
            q = np.maximum(optimal_q(Moments(d2, v2), cost, rule.m).q, rule.q_min)
            self.q[known] = torch.as_tensor(q, dtype=self.q.dtype)


class LawOfOneStep(Fixed):
    """`AdaptiveUFOM(law="step", outer="adam:γ", cost=cost)` in many runs at once; the sums are those of `StepState`."""

    def __init__(self, rule: AdaptiveUFOM, runs: int) -> None:
        super().__init__(1.0, runs)
        self.rule, self.steps, self.mean = rule, 0, torch.zeros(0)
        self.means, self.norms = torch.zeros(runs, 4), torch.zeros(runs, 4)

    def after(self, estimate: Tensor, proxy: Tensor, exact: Tensor, coins: Tensor) -> None:
        """q and c after a step; arguments as `Adaptive.after`'s."""
        d, first, beta = exact - proxy, proxy.mean(1), self.rule.beta
        pairs = ((d, d), (d, proxy), (proxy, proxy))
        norms = torch.stack([coins.sum(1), *(((a * b).sum(2) * coins).sum(1) for a, b in pairs)], 1)
        self.steps += 1
        if self.steps == 1:
            self.norms, self.mean = norms, estimate.clone()
            return
        ones = torch.ones(len(coins))
        found = [ones, *((a * b).sum(1) for a, b in ((self.mean, estimate), (self.mean, first), (first, first)))]
        self.means = beta * self.means + torch.stack(found, 1)
        self.norms = torch.where(coins.any(1, keepdim=True), beta * self.norms + norms, self.norms)
        self.mean = torch.lerp(self.mean, estimate, (1 - beta) / (1 - beta**self.steps))
        if self.steps >= FIRST:
            self._choose(coins.shape[1])

    def _choose(self, batch: int) -> None:
        rule = self.rule
        assert rule.cost is not None
        weight, dd, df, ff = self.norms.double().numpy().T
        c = 1 + df / ff
        of_weight, gradient_sq, cross, fom_sq = self.means.double().numpy().T

        def bias_sq(c: Any) -> Any:
            return np.maximum(dd + 2 * (1 - c) * df + (1 - c) ** 2 * ff, 0.0) / weight

        v2 = bias_sq(0.0)
        gradient_sq = np.minimum(gradient_sq / of_weight, v2)
        progress = Progress(gradient_sq, v2 - gradient_sq, bias_sq(c), cross / of_weight, fom_sq / of_weight, 0.0)
        found = scores(progress, rule.cost, str(rule.outer), batch, self.steps + 1, rule.q_min).q
        self.c, self.q = (torch.as_tensor(x, dtype=self.c.dtype) for x in (c, np.nan_to_num(found, nan=1.0)))


def rule_of(method: str, runs: int, r: int, rate: float) -> Fixed:
    """What a method's name stands for; the adaptive rules are told the printed cost of the recomputed sweep."""
    cost = CostModel(r=r, as_printed=True)
    if method == "adaptive":
        return Adaptive(AdaptiveUFOM(cost=cost), runs)
    if method == "law of one step":
        return LawOfOneStep(AdaptiveUFOM(law="step", outer=f"adam:{rate:g}", cost=cost), runs)
    return Fixed({"FOM": 0.0, "exact": 1.0}[method] if method in ("FOM", "exact") else float(method.split()[1]), runs)


def run_cell(cell: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """All methods on some seeds at one K and r; a row for each run and record."""
    torch.set_num_threads(1)
    shots, r, alpha, batch, width = (cell[name] for name in ("shots", "r", "alpha", "batch", "width"))
    runs = [(method, seed) for method in cell["methods"] for seed in cell["seeds"]]
    rules = [rule_of(method, len(cell["seeds"]), r, cell["rate"]) for method in cell["methods"]]
    of_seed = torch.tensor([cell["seeds"].index(seed) for _, seed in runs])
    starts = [sinusoid(shots, r, alpha, width, seed=seed).initial for seed in cell["seeds"]]
    theta = torch.stack([x for x in starts if x is not None]).to(dtype)[of_seed]
    streams = [torch.Generator().manual_seed(10_000 * shots + 100 * r + seed) for seed in cell["seeds"]]
    test: Any = tuple(x.to(dtype) for x in sample_waves(cell["test"], shots, torch.Generator().manual_seed(TEST_SEED)))
    mean, square, since, average = (torch.zeros_like(theta) for _ in range(4))
    corrected, rows = torch.zeros(len(runs)), list[dict[str, Any]]()
    every = cell["steps"] // cell["records"]
    for step in range(1, cell["steps"] + 1):
        drawn = [sample_waves(batch, shots, stream) for stream in streams]
        uniform = torch.stack([torch.rand(batch, generator=stream) for stream in streams])[of_seed]
        waves: Any = tuple(torch.stack(part).to(dtype)[of_seed].flatten(0, 1) for part in zip(*drawn, strict=True))
        q = torch.cat([rule.q for rule in rules])
        coins = uniform < q[:, None]
        estimate = _step(theta, waves, coins, cell, rules)
        corrected += coins.sum(1)
        theta = _adam(theta, estimate, mean, square, step, cell["rate"])
        since += theta
        if step % every == 0:
            average, since = since / every, torch.zeros_like(since)
            found = evaluate(average, test, r, alpha, width)
            for (method, seed), value, done, now in zip(runs, found, corrected.tolist(), q.tolist(), strict=True):
                rows.append({"method": method, "seed": seed, "step": step, "loss": value, "corrected": done, "q": now})
    moments = [final_moments(one, test, r, alpha, width) for one in average]
    for row, last in zip(rows[-len(runs) :], moments, strict=True):
        row |= last
    return rows


def _step(theta: Tensor, waves: Wave, coins: Tensor, cell: Mapping[str, Any], rules: list[Fixed]) -> Tensor:
    """The estimate of each run, shape (runs, p); the rules are told what was seen."""
    batch, alpha, width = coins.shape[1], cell["alpha"], cell["width"]
    states = inner_loop(theta.repeat_interleave(batch, 0), waves, cell["r"], alpha, width)
    proxy = gradient(states[-1], waves[2], waves[3], width)
    chosen = coins.flatten().nonzero()[:, 0]
    exact = torch.zeros_like(proxy)
    if len(chosen):
        some: Any = tuple(part[chosen] for part in waves)
        exact[chosen] = backward([state[chosen] for state in states], proxy[chosen], some, alpha, width)
    proxy, exact = (x.view(*coins.shape, -1) for x in (proxy, exact))
    q, c = (torch.cat([getattr(rule, name) for rule in rules]).to(theta) for name in "qc")
    weight = torch.where(coins, 1 / q[:, None], 0.0).to(theta)[..., None]
    scaled = c[:, None, None] * proxy
    estimate = (scaled + weight * (exact - scaled)).mean(1)
    seeds = len(cell["seeds"])
    for i, rule in enumerate(rules):
        own = slice(i * seeds, (i + 1) * seeds)
        rule.after(estimate[own], proxy[own], exact[own], coins[own])
    return estimate


def _adam(theta: Tensor, g: Tensor, mean: Tensor, square: Tensor, step: int, rate: float) -> Tensor:
    one, two, eps = ADAM
    mean.lerp_(g, 1 - one)
    square.lerp_(g * g, 1 - two)
    return theta - rate * (mean / (1 - one**step)) / ((square / (1 - two**step)).sqrt() + eps)


def evaluate(thetas: Tensor, test: Wave, r: int, alpha: float, width: int) -> list[float]:
    """The mean outer loss of each θ, shape (runs, p), over the test tasks."""
    return [
        float(
            loss(inner_loop(theta.expand(len(test[0]), -1), test, r, alpha, width)[-1], test[2], test[3], width).mean()
        )
        for theta in thetas
    ]


def final_moments(theta: Tensor, test: Wave, r: int, alpha: float, width: int) -> dict[str, float]:
    """‖∇M‖² (a U-statistic), D² and V² at θ over the test tasks."""
    n = len(test[0])
    states = inner_loop(theta.expand(n, -1), test, r, alpha, width)
    proxy = gradient(states[-1], test[2], test[3], width)
    exact = backward(states, proxy, test, alpha, width).double()
    v2 = float(exact.square().sum(1).mean())
    return {
        "gradient_sq": (n * float(exact.mean(0).square().sum()) - v2) / (n - 1),
        "d2": float((exact - proxy).square().sum(1).mean()),
        "v2": v2,
    }
