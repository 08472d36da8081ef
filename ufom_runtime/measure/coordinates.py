"""What a step of Adam makes of a gradient, coordinate by coordinate: a model, since curvature is left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.batching import in_chunks, refuse_divergence
from ufom_runtime.estimators import EXACT, proxy_length
from ufom_runtime.measure.moments import proxy_rows, tasks_or_all
from ufom_runtime.methods.debiased import Proxy
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_theory import Truncated
from ufom_theory.laws import Progress

Array = NDArray[np.float64]
_MOST = 1024  # coordinates, evenly spaced over θ: sums over more of them differ little, and only ratios are used


def measure_coordinates(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks | None,
    proxies: Sequence[Truncated | Proxy],
    draws: int,
    chunk: int | None = None,
    compile: bool = False,
) -> dict[Truncated | Proxy, Progress]:
    """`Progress` by coordinate, shape (draws + 1, c): as measured, entry 0, then for tasks drawn again.

    g_i² = (E G_i)², g_i·f_i and f_i² are unbiased, and may be negative. With exact sums over a finite Ω there is
    nothing to draw, and the first axis has length 1.
    """
    given, exact_sums = tasks_or_all(problem, tasks)
    stack = check(problem, theta, given)
    n, chosen = len(stack), torch.linspace(0, len(theta) - 1, min(len(theta), _MOST), device="cpu").long()
    cuts = [p for p in proxies if isinstance(p, Truncated)]
    lengths = tuple(sorted({proxy_length(problem, p) for p in cuts} | {problem.r}))
    pairs = torch.stack([torch.zeros(n, dtype=torch.int64, device="cpu"), torch.arange(n, device="cpu")])
    rows = in_chunks(problem, theta[None], stack, pairs, lengths, EXACT.sweep, chunk, compile=compile)
    found = [refuse_divergence(torch.cat(x)) for x in zip(*(f for _, f in rows), strict=True)]
    by_proxy: dict[Truncated | Proxy, Tensor] = {p: found[lengths.index(proxy_length(problem, p))] for p in cuts}
    for p in proxies:
        if not isinstance(p, Truncated):
            by_proxy[p] = proxy_rows(problem, theta[None], stack, p, chunk, compile)[0]
    rng = np.random.default_rng(0)
    shares = np.full((1, n), 1 / n)
    if not exact_sums:
        shares = np.vstack([shares, rng.multinomial(n, shares[0], draws) / n])

    def numbers(x: Tensor) -> Array:
        return x[:, chosen.to(x.device)].double().cpu().numpy()

    exact = numbers(found[-1])
    return {p: _progress(shares, exact, numbers(x), exact_sums) for p, x in by_proxy.items()}


def _progress(shares: Array, exact: Array, first: Array, exact_sums: bool) -> Progress:
    n = shares.shape[1]
    # a mean over tasks drawn again is off by the noise of the first draw, too: what its square is too large by is twice
    # as much as that of the mean itself
    excess = np.append(1.0, np.full(len(shares) - 1, 2.0))[:, None] * (0.0 if exact_sums else 1 / (n - 1))

    def product(x: Array, y: Array) -> tuple[Array, Array]:
        """x_i·y_i of the means, and the covariance of a task."""
        means = (shares @ x) * (shares @ y)
        covariance = shares @ (x * y) - means
        return means - excess * covariance, covariance * (1.0 if exact_sums else n / (n - 1))

    gradient_sq, variance = product(exact, exact)
    cross, _ = product(exact, first)
    proxy_sq, proxy_variance = product(first, first)
    d2 = shares @ (exact - first) ** 2
    return Progress(gradient_sq, variance, d2, cross, proxy_sq, proxy_variance)
