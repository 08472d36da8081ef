"""D² (14) and V² (16) measured, with their joint covariance; and whether the proxy is good enough as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.algorithms import first_order_vanishes
from ufom_runtime.batching import in_chunks, refuse_divergence
from ufom_runtime.estimators import EXACT, Estimator, as_proxy, is_method, proxy_length
from ufom_runtime.methods.debiased import Proxy
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_theory import Moments, Truncated, UfomError
from ufom_theory.checks import typed
from ufom_theory.quantities import ENTRIES

Array = NDArray[np.float64]
AnyProxy = TypeVar("AnyProxy", bound=Truncated | Proxy)
_PIECE = 2**22  # numbers that are squared in float64 at once
_TOGETHER = 16  # tasks of a method that does not measure its own memory
_HELD = 512 * 2**20  # bytes of gradients at several θ; not by the memory that is free, which must not decide the chunks


@dataclass(frozen=True, eq=False, kw_only=True)
class MeasuredMoments(Moments):
    """Moments of a problem, measured; D² and V² are suprema over the given θ.

    Attributes:
        proxy: the proxy that was measured.
        bias_sq: ‖E(G_proxy − G)‖² at D²'s θ, unbiased (so it can be slightly negative): what debiasing removes.
        bias_sq_sem: its standard error.
        cosine: cosine between the mean proxy and the mean exact gradient at D²'s θ; nan where one of them vanishes.
        vanishes: the proxy is FOM or HELD, and identically zero: θ stands in nothing that it differentiates, which is
            the start and the outer loss, with HELD the inner update too.
        per_theta: one entry a θ, from all tasks: d2, d2_sem, v2, v2_sem, cross, proxy_sq, mean_gradient_sq, mean_cross,
            mean_proxy_sq, bias_sq, cosine.
    """

    proxy: Truncated | Proxy = field(default_factory=Truncated)
    bias_sq: float = float("nan")
    bias_sq_sem: float = 0.0
    cosine: float = float("nan")
    vanishes: bool = False
    per_theta: dict[str, Array] = field(default_factory=dict, repr=False)


@typed
def measure_moments(
    problem: BilevelProblem,
    thetas: Tensor,
    tasks: Task | Tasks | None = None,
    proxy: Truncated | Estimator | Proxy | None = None,
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
        proxy: FOM if not given; HELD, Truncated(K), or another stateless method, such as Implicit().
        chunk: (θ, task) pairs run together; None: as many as the memory budget holds. Besides, all n gradients at
            one θ are held.
        compile: as in `hypergradient`.
        progress: called with the share of the work that is done.

    Returns:
        D² (14), V² (16), their covariance, ‖∇M‖² and the bias; `.per_theta` keeps the values at every θ.

    >>> from ufom_runtime.problems.quadratic import quadratic
    >>> problem = quadratic()
    >>> tasks = problem.sample(64, torch.Generator().manual_seed(0))
    >>> moments = measure_moments(problem, problem.initial, tasks)
    >>> 0 < moments.d2 < moments.v2
    True

    Raises:
        UfomError: wrong shapes, too few tasks, an inner loop that diverged, or a gradient that vanishes everywhere.
    """
    one = any_proxy(proxy)
    return moments_by_proxy(problem, thetas, tasks, (one,), chunk=chunk, compile=compile, progress=progress)[one]


@typed
def moments_by_proxy(
    problem: BilevelProblem,
    thetas: Tensor,
    tasks: Task | Tasks | None = None,
    proxies: Iterable[AnyProxy] = (Truncated(),),  # type: ignore[assignment]
    *,
    chunk: int | None = None,
    compile: bool = False,
    progress: Callable[[float], object] | None = None,
) -> dict[AnyProxy, MeasuredMoments]:
    """`measure_moments` for several proxies. Those of truncation lengths all fall out of one sweep.

    Args:
        problem: the problem.
        thetas: θ of shape (s,), or (k, s) for a supremum over k of them.
        tasks: n stacked tasks; None: the problem's finite Ω.
        proxies: those to be measured, at least one; a method such as Implicit() is called besides.
        chunk: (θ, task) pairs run together, as in `measure_moments`.
        compile: as in `hypergradient`.
        progress: called with the share of the work that is done.

    Returns:
        The moments of each proxy, all with the same V².

    Raises:
        UfomError: no proxy, or what `measure_moments` raises.
    """
    tasks, exact_sums = tasks_or_all(problem, tasks)
    if progress is not None and not callable(progress):
        raise UfomError(f"progress = {progress!r:.200} must be a function of the share that is done")
    proxies = list(proxies)
    if not proxies or not all(isinstance(p, Truncated) or is_method(type(p)) for p in proxies):
        raise UfomError(f"proxies = {proxies!r}: give at least one Truncated(K); K = 0 is FOM")
    others = [p for p in dict.fromkeys(proxies) if not isinstance(p, Truncated)]
    cuts = sorted({p for p in proxies if isinstance(p, Truncated)}, key=lambda p: p.steps)
    tasks = check(problem, thetas, tasks, dimensions=(1, 2))
    thetas = thetas[None] if thetas.ndim == 1 else thetas
    if cuts:
        cuts[-1].refuse_beyond(problem.r)
    n, split = len(tasks), len(thetas) > 1 and not exact_sums
    if not exact_sums and n < (4 if split else 2):
        raise UfomError(f"{n} task(s) give no standard error: draw at least {4 if split else 2}")
    judged = slice(n // 2 if split else 0, n)
    lengths = sorted({proxy_length(problem, p) for p in cuts} | {problem.r})
    rows: dict[Any, list[_AtTheta]] = {p: [] for p in (*cuts, *others)}
    besides = {other: proxy_rows(problem, thetas, tasks, other, chunk, compile) for other in others}
    for i, found in enumerate(_by_theta(problem, thetas, tasks, tuple(lengths), chunk, compile, progress)):
        exact = refuse_divergence(found[-1])
        for p in cuts:
            rows[p].append(_AtTheta.of(found[lengths.index(proxy_length(problem, p))], exact, judged, exact_sums))
        for other, given in besides.items():
            rows[other].append(_AtTheta.of(given[i], exact, judged, exact_sums))
    choosing, one = slice(0, judged.start or n), tasks.take(slice(1))
    vanishing = {p for p in cuts if not p.steps and first_order_vanishes(problem, thetas[:1], one, p.held)}
    return {p: replace(_supremum(p, rows[p], choosing, judged, exact_sums), vanishes=p in vanishing) for p in rows}


def any_proxy(proxy: Truncated | Estimator | Proxy | None) -> Truncated | Proxy:
    """As `as_proxy`, and a stateless method whose direction is a gradient as it is; else `UfomError`."""
    if isinstance(proxy, Truncated | Estimator | None) or not is_method(type(proxy)):
        return as_proxy(proxy)
    if proxy.begin() or not proxy.gradient:
        raise UfomError(f"proxy = {proxy!r}: give FOM, HELD, Truncated(K), or a stateless gradient, Implicit()")
    return proxy


def proxy_rows(
    problem: BilevelProblem, thetas: Tensor, tasks: Tasks, proxy: Proxy, chunk: int | None, compile: bool
) -> list[Tensor]:
    """The gradients of all n tasks by a method that tosses no coins, shape (n, s), at each θ of shape (k, s)."""
    found, chunk = [], chunk or min(len(tasks), _TOGETHER)
    for theta in thetas:
        rows = proxy.direction(problem, theta, tasks, per_task=True, chunk=chunk, compile=compile).per_task
        assert rows is not None
        found.append(rows)
    return found


def tasks_or_all(problem: BilevelProblem, tasks: Task | Tasks | None) -> tuple[Task | Tasks, bool]:
    """The tasks given, or all of a finite Ω; and whether they are all, so that sums over them are exact."""
    chosen = problem.tasks if tasks is None else tasks
    if chosen is None:
        raise UfomError("the problem has no finite set of tasks: draw some, tasks = problem.sample(n, generator)")
    return chosen, chosen is problem.tasks


def _by_theta(
    problem: BilevelProblem,
    thetas: Tensor,
    tasks: Tasks,
    lengths: tuple[int, ...],
    chunk: int | None,
    compile: bool,
    progress: Callable[[float], object] | None,
) -> Iterator[list[Tensor]]:
    """For each θ the gradients of all tasks, one tensor (n, s) a length; many θ run together where they are small."""
    n, (k, s) = len(tasks), thetas.shape
    together = max(1, _HELD // (n * s * thetas.element_size() * len(lengths)))
    for group in torch.split(torch.arange(k, device="cpu"), together):
        pairs = torch.stack([group.repeat_interleave(n), torch.arange(n, device="cpu").repeat(len(group))])
        pieces = []
        rows = in_chunks(problem, thetas, tasks, pairs, lengths, EXACT.sweep, chunk, compile=compile)
        for _, found in rows:
            pieces.append(found)
            if progress:
                progress((int(group[0]) * n + sum(len(f[0]) for f in pieces)) / (k * n))
        yield from zip(*(torch.cat(x).view(len(group), n, s) for x in zip(*pieces, strict=True)), strict=True)


@dataclass(frozen=True)
class Estimate:
    """An estimate from n tasks, with each task's influence on it, shape (n,): its standard error is theirs over √n."""

    value: float
    influence: Array

    @property
    def sem(self) -> float:
        """Standard error of the value."""
        n = len(self.influence)
        return float(self.influence.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0

    @classmethod
    def mean(cls, x: Array) -> Estimate:
        """The mean of one number a task."""
        return cls(float(x.mean()), x)

    @classmethod
    def product_of_means(cls, x: Tensor, y: Tensor, exact_sums: bool) -> Estimate:
        """⟨E x, E y⟩ of pairs of vectors (x, y), one a task, shape (n, s) each, unbiased.

        With exact sums the vectors are all that there are. Otherwise it is a U-statistic, the mean of x_i·y_j over
        i ≠ j, which may be negative where x = y.
        """
        n = len(x)
        sum_x, sum_y = x.sum(0, dtype=torch.float64), y.sum(0, dtype=torch.float64)
        if exact_sums:
            return cls(float(sum_x @ sum_y) / n**2, np.zeros(n))
        # by its leave-one-out parts: x_i and y_i with the sums over all other tasks
        leave_one_out = _products(x, sum_y.expand(n, -1)) + _products(y, sum_x.expand(n, -1)) - 2 * _products(x, y)
        return cls(float(leave_one_out.mean()) / (2 * (n - 1)), leave_one_out / (n - 1))


def _products(x: Tensor, y: Tensor) -> Array:
    """⟨x_i, y_i⟩ of each row in float64, whatever the dtype of the vectors, a few rows at a time."""
    pieces = zip(*(torch.split(rows, max(1, _PIECE // x.shape[1])) for rows in (x, y)), strict=True)
    return np.concatenate([(a.double() * b.double()).sum(1).cpu().numpy() for a, b in pieces])


@dataclass(frozen=True)
class _AtTheta:
    """The numbers that are kept of the gradients at one θ, from all tasks and from those judged."""

    d2: Array  # ‖F − G‖² of each task
    v2: Array  # ‖G‖² of each task
    whole: dict[str, Estimate]
    judged: dict[str, Estimate]

    @classmethod
    def of(cls, proxy: Tensor, exact: Tensor, judged: slice, exact_sums: bool) -> _AtTheta:
        d = proxy.double() - exact.double()
        tasks = {
            "d2": _products(d, d), "v2": _products(exact, exact), "cross": _products(exact, proxy),
            "proxy_sq": _products(proxy, proxy),
        }  # fmt: skip
        means = {
            "mean_gradient_sq": (exact, exact), "mean_cross": (exact, proxy), "mean_proxy_sq": (proxy, proxy),
            "bias_sq": (d, d),
        }  # fmt: skip

        def estimates(of: slice) -> dict[str, Estimate]:
            found = {name: Estimate.mean(x[of]) for name, x in tasks.items()}
            found |= {name: Estimate.product_of_means(x[of], y[of], exact_sums) for name, (x, y) in means.items()}
            return found | {"cosine": Estimate(_cosine(proxy[of], exact[of]), np.zeros(1))}

        whole = estimates(slice(None))
        return cls(tasks["d2"], tasks["v2"], whole, estimates(judged) if judged.start else whole)


def _supremum(
    proxy: Truncated | Proxy, rows: Sequence[_AtTheta], choosing: slice, judged: slice, exact_sums: bool
) -> MeasuredMoments:
    """Choose each supremum's θ on the one half of the tasks, and take its value on the other."""
    at_d = max(rows, key=lambda row: row.d2[choosing].mean())
    at_v = max(rows, key=lambda row: row.v2[choosing].mean())
    # what joins D² to V² exists only where both are taken at one θ
    names = ENTRIES if at_d is at_v else ENTRIES[:3]
    kept = [(at_d if name == "d2" else at_v).judged[name] for name in names]
    values: dict[str, Any] = {name: estimate.value for name, estimate in zip(names, kept, strict=True)}
    samples, n = np.stack([estimate.influence for estimate in kept]), len(at_d.d2[judged])
    sems = {f"{x}_sem": [0.0 if exact_sums else row.whole[x].sem for row in rows] for x in ("d2", "v2")}
    return MeasuredMoments(
        **values,
        cov=np.zeros((len(names),) * 2) if exact_sums else np.cov(samples) / n,
        n=n,
        proxy=proxy,
        bias_sq=at_d.judged["bias_sq"].value,
        bias_sq_sem=at_d.judged["bias_sq"].sem,
        cosine=at_d.judged["cosine"].value,
        samples=None if exact_sums else samples[:2],
        per_theta={name: np.array([row.whole[name].value for row in rows]) for name in rows[0].whole}
        | {name: np.array(values) for name, values in sems.items()},
    )


def _cosine(x: Tensor, y: Tensor) -> float:
    """Cosine between the means of two sets of vectors."""
    x, y = x.mean(0, dtype=torch.float64), y.mean(0, dtype=torch.float64)
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms > 0 else float("nan")
