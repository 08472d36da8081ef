"""D² (14) and V² (16) measured, with their joint covariance; and whether the proxy is good enough as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.algorithms import first_order_vanishes
from ufom_runtime.estimators import EXACT, Each, in_chunks, refuse_divergence
from ufom_runtime.problem import BilevelProblem, Task, check, count, take
from ufom_theory import Moments, Truncated, UfomError

Array = NDArray[np.float64]
_HELD = 512 * 2**20  # bytes of gradients at several θ; not by the memory that is free, which must not decide the chunks


@dataclass(frozen=True, eq=False, kw_only=True)
class MeasuredMoments(Moments):
    """Moments of a problem, measured; D² and V² are suprema over the given θ.

    Attributes:
        proxy: the proxy that was measured.
        bias_sq: ‖E(G_proxy − G)‖² at D²'s θ, unbiased (so it can be slightly negative): what debiasing removes.
        bias_sq_sem: its standard error.
        cosine: cosine between the mean proxy and the mean exact gradient at D²'s θ; nan where one of them vanishes.
        vanishes: the proxy is FOM, and identically zero: neither the start nor the outer loss contains θ.
        samples: ‖G_proxy − G‖² and ‖G‖² of each task behind D² and V², shape (2, n); for `bootstrap_interval`.
        per_theta: one entry a θ, from all tasks: d2, d2_sem, v2, v2_sem, mean_gradient_sq, bias_sq, cosine.
    """

    proxy: Truncated = field(default_factory=Truncated)
    bias_sq: float = float("nan")
    bias_sq_sem: float = 0.0
    cosine: float = float("nan")
    vanishes: bool = False
    samples: Array = field(default_factory=lambda: np.zeros((2, 0)), repr=False)
    per_theta: dict[str, Array] = field(default_factory=dict, repr=False)


def measure_moments(
    problem: BilevelProblem,
    thetas: Tensor,
    tasks: Task | None = None,
    proxy: Truncated | None = None,
    *,
    chunk: int | None = None,
    compile: bool = False,
    progress: Callable[[float], object] | None = None,
) -> MeasuredMoments:
    """Measure D² of a proxy and V², as suprema over the given θ, with their joint covariance.

    With several θ and sampled tasks, each supremum's θ is chosen on the first half of the tasks and the value is taken
    on the second half: the largest of noisy means would be too large. Where `tasks` is the problem's finite Ω (or not
    given), expectations are exact sums, nothing is split and standard errors are 0.

    Args:
        problem: the problem.
        thetas: outer parameters to measure at, shape (k, s), or (s,) for one.
        tasks: n stacked tasks, drawn from the problem; None for the problem's finite Ω. At least 2, or 4
            where several θ ask for a split.
        proxy: FOM if not given.
        chunk: (θ, task) pairs run together; None: as many as the memory budget holds. Besides, all n gradients at
            one θ are held.
        compile: as in `hypergradient`.
        progress: called with the share of the work that is done.

    Returns:
        D² (14), V² (16), their covariance, ‖∇M‖² and the bias; `.per_theta` keeps the values at every θ.

    Raises:
        UfomError: wrong shapes, too few tasks, an inner loop that diverged, or a gradient that vanishes everywhere.
    """
    proxy = proxy or Truncated()
    return moments_by_proxy(problem, thetas, tasks, (proxy,), chunk=chunk, compile=compile, progress=progress)[proxy]


def moments_by_proxy(
    problem: BilevelProblem,
    thetas: Tensor,
    tasks: Task | None = None,
    proxies: Iterable[Truncated] = (Truncated(),),
    *,
    chunk: int | None = None,
    compile: bool = False,
    progress: Callable[[float], object] | None = None,
    each: Each = map,
) -> dict[Truncated, MeasuredMoments]:
    """`measure_moments` for several truncation lengths at the price of one: every proxy falls out of one sweep.

    Args:
        problem: the problem.
        thetas: θ of shape (s,), or (k, s) for a supremum over k of them.
        tasks: n stacked tasks; None: the problem's finite Ω.
        proxies: those to be measured, at least one.
        chunk: (θ, task) pairs run together, as in `measure_moments`.
        compile: as in `hypergradient`.
        progress: called with the share of the work that is done.
        each: runs the chunks, as `map` does: several processes share them by `partial(processes.map, thetas)` and a
            `chunk`.

    Returns:
        The moments of each proxy, all with the same V².

    Raises:
        UfomError: no proxy, or what `measure_moments` raises.
    """
    exact_sums = tasks is None or tasks is problem.tasks
    tasks = problem.tasks if tasks is None else tasks
    if tasks is None:
        raise UfomError("the problem has no finite set of tasks: draw some, tasks = problem.sample(n, generator)")
    proxies = list(proxies)
    if not proxies or not all(isinstance(p, Truncated) for p in proxies):
        raise UfomError(f"proxies = {proxies!r}: give at least one Truncated(K); K = 0 is FOM")
    proxies = sorted(set(proxies), key=lambda p: p.steps)
    check(problem, thetas, tasks, dimensions=(1, 2))
    thetas = thetas[None] if thetas.ndim == 1 else thetas
    proxies[-1].refuse_beyond(problem.r)
    n, split = count(tasks), len(thetas) > 1 and not exact_sums
    if not exact_sums and n < (4 if split else 2):
        raise UfomError(f"{n} task(s) give no standard error: draw at least {4 if split else 2}")
    judged = slice(n // 2 if split else 0, n)
    lengths = sorted({p.steps for p in proxies} | {problem.r})
    rows: dict[Truncated, list[_AtTheta]] = {p: [] for p in proxies}
    for found in _by_theta(problem, thetas, tasks, tuple(lengths), chunk, compile, progress, each):
        exact = refuse_divergence(found[-1])
        for p in proxies:
            rows[p].append(_AtTheta.of(found[lengths.index(p.steps)], exact, judged, exact_sums))
    choosing, one = slice(0, judged.start or n), take(tasks, slice(0, 1))
    vanishes = first_order_vanishes(problem, thetas[:1], one)
    return {
        p: replace(_supremum(p, rows[p], choosing, judged, exact_sums), vanishes=vanishes and p.steps == 0)
        for p in proxies
    }


def _by_theta(
    problem: BilevelProblem,
    thetas: Tensor,
    tasks: Task,
    lengths: tuple[int, ...],
    chunk: int | None,
    compile: bool,
    progress: Callable[[float], object] | None,
    each: Each,
) -> Iterator[list[Tensor]]:
    """For each θ the gradients of all tasks, one tensor (n, s) a length; many θ run together where they are small."""
    n, (k, s) = count(tasks), thetas.shape
    together = max(1, _HELD // (n * s * thetas.element_size() * len(lengths)))
    for group in torch.split(torch.arange(k), together):
        pairs = torch.stack([group.repeat_interleave(n), torch.arange(n).repeat(len(group))])
        pieces = []
        rows = in_chunks(problem, thetas, tasks, pairs, lengths, EXACT.sweep, chunk, each=each, compile=compile)
        for _, found in rows:
            pieces.append(found)
            if progress:
                progress((int(group[0]) * n + sum(len(f[0]) for f in pieces)) / (k * n))
        yield from zip(*(torch.cat(x).view(len(group), n, s) for x in zip(*pieces, strict=True)), strict=True)


@dataclass
class SquaredMean:
    """‖E x‖² of vectors x, one a task, unbiased; with each task's influence on it, shape (n,)."""

    value: float
    influence: Array

    @property
    def sem(self) -> float:
        """Standard error of the value."""
        return _sem(self.influence)

    @classmethod
    def of(cls, x: Tensor, exact_sums: bool) -> SquaredMean:
        """From vectors, shape (n, s); with exact sums they are all that there are, and there is no error."""
        total = x.sum(0)
        if exact_sums:
            return cls(float(total @ total) / len(x) ** 2, np.zeros(len(x)))
        # U-statistic: the mean of x_i·x_j over i ≠ j, by its leave-one-out parts
        parts_ = _numpy(x @ total - (x * x).sum(1)) / (len(x) - 1)
        return cls(float(parts_.mean()), 2 * (parts_ - parts_.mean()))


@dataclass
class _AtTheta:
    """The numbers that are kept of the gradients at one θ; those with a mean, over all tasks and over those judged."""

    d2: Array  # ‖G_proxy − G‖² of each task
    v2: Array  # ‖G‖² of each task
    gradient: tuple[SquaredMean, SquaredMean]
    bias: tuple[SquaredMean, SquaredMean]
    cosine: tuple[float, float]

    @classmethod
    def of(cls, proxy: Tensor, exact: Tensor, judged: slice, exact_sums: bool) -> _AtTheta:
        d = proxy - exact
        subsets = (slice(None), judged)
        return cls(
            d2=_numpy((d * d).sum(1)),
            v2=_numpy((exact * exact).sum(1)),
            gradient=tuple(SquaredMean.of(exact[i], exact_sums) for i in subsets),  # type: ignore[arg-type]
            bias=tuple(SquaredMean.of(d[i], exact_sums) for i in subsets),  # type: ignore[arg-type]
            cosine=tuple(_cosine(proxy[i].mean(0), exact[i].mean(0)) for i in subsets),  # type: ignore[arg-type]
        )


def _supremum(
    proxy: Truncated, rows: Sequence[_AtTheta], choosing: slice, judged: slice, exact_sums: bool
) -> MeasuredMoments:
    """Choose each supremum's θ on the one half of the tasks, and take its value on the other."""
    at_d = max(rows, key=lambda row: row.d2[choosing].mean())
    at_v = max(rows, key=lambda row: row.v2[choosing].mean())
    d2, v2, gradient, bias = at_d.d2[judged], at_v.v2[judged], at_v.gradient[1], at_d.bias[1]
    n = len(d2)
    cov = np.zeros((3, 3)) if exact_sums else np.cov([d2, v2, gradient.influence]) / n
    return MeasuredMoments(
        d2=d2.mean(),
        v2=v2.mean(),
        cov=cov[:2, :2],
        n=n,
        mean_gradient_sq=max(gradient.value, 0.0),
        mean_gradient_cov=cov[2],
        proxy=proxy,
        bias_sq=bias.value,
        bias_sq_sem=bias.sem,
        cosine=at_d.cosine[1],
        samples=np.stack([d2, v2]),
        per_theta={
            "d2": np.array([row.d2.mean() for row in rows]),
            "d2_sem": np.array([0.0 if exact_sums else _sem(row.d2) for row in rows]),
            "v2": np.array([row.v2.mean() for row in rows]),
            "v2_sem": np.array([0.0 if exact_sums else _sem(row.v2) for row in rows]),
            "mean_gradient_sq": np.array([row.gradient[0].value for row in rows]),
            "bias_sq": np.array([row.bias[0].value for row in rows]),
            "cosine": np.array([row.cosine[0] for row in rows]),
        },
    )


def _sem(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _cosine(x: Tensor, y: Tensor) -> float:
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms > 0 else float("nan")


def _numpy(x: Tensor) -> Array:
    return np.asarray(x.double().cpu().numpy())
