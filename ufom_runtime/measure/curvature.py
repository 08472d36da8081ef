"""The curvatures of M that decide how long an outer step may be: forms of ∇²M, by differences of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.batching import in_chunks, refuse_divergence
from ufom_runtime.estimators import EXACT, Estimator, proxy_length
from ufom_runtime.measure.moments import Estimate, any_proxy, proxy_rows, tasks_or_all
from ufom_runtime.methods.debiased import Proxy
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_theory import Truncated, UfomError
from ufom_theory.checks import positive, scalar, typed

Array = NDArray[np.float64]
_STEPS = [4.0**-k for k in range(1, 12)]  # of the differences, relative to 1 + ‖θ‖
_HELD = 128 * 2**20  # bytes of directions that are run together
_TRIED = 4  # tasks whose directions choose the step
_ROUGHEST = 0.1  # relative error at which the differences are refused
_REMEDY = (
    "give rate=γ, for the curvature that outer steps meet; or use a smooth activation (softplus or tanh for relu), or "
    "float64"
)
_NEAREST = 1e-3  # relative to 1 + ‖θ‖; curvatures that change within so short a step are those between two kinks


@dataclass(frozen=True, kw_only=True)
class MeasuredCurvature:
    """Curvatures of M at one θ, with H = ∇²M, weighted by squared length; 0 where what they weigh is 0.

    Attributes:
        curvature_gradient: ℓ_g = gᵀHg/‖g‖², g = ∇M; both are unbiased, so that their quotient may have any sign.
        curvature_noise: ℓ = tr(H·Cov G)/Var G, of the exact gradient G of one task.
        curvature_correction: ℓ_d = E[dᵀHd]/D², d = G − F.
        curvature_proxy: ℓ_f = fᵀHf/‖f‖², f = E F.
        curvature_proxy_noise: ℓ_F = tr(H·Cov F)/Var F.
        sems: the standard error of each, by its name; 0 where Ω is finite.
        step: length of the differences, or with a rate the mean length of the outer steps ±γ·x.
        error: relative change of the quadratic forms from this step to one a quarter as long.
    """

    curvature_gradient: float
    curvature_noise: float
    curvature_correction: float
    curvature_proxy: float
    curvature_proxy_noise: float
    sems: dict[str, float]
    step: float
    error: float

    def values(self) -> dict[str, float]:
        """The five curvatures by their names, as `Progress.of(moments, **curvature.values())` takes them."""
        return {name: getattr(self, name) for name in self.sems}


@typed
def measure_curvature(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks | None = None,
    proxy: Truncated | Estimator | Proxy | None = None,
    *,
    rate: float | None = None,
    chunk: int | None = None,
    compile: bool = False,
) -> MeasuredCurvature:
    """Measure the curvatures of the law of one step by central differences of exact gradients.

    Hx is (G(θ + hx) − G(θ − hx))/2h. With a `rate` γ, h = γ: the mean curvature along the outer steps ±γ·x, which is
    what these steps meet, kinks of a ReLU net included. Without one, the step is that at which the quadratic forms of a
    few tasks change least; where they are others at longer steps, as between two kinks, they are refused. With sampled
    tasks each task's direction meets the Hessian of another task, which is unbiased and takes two gradients; in all,
    about 10·n and 260 more (60 with a rate). With the problem's finite Ω it meets the mean of all n, in 2n·(3n + 2)
    gradients.

    Args:
        problem: the problem.
        theta: θ, shape (s,); float64 is advised.
        tasks: n ≥ 2 stacked tasks, drawn from the problem; None for the problem's finite Ω.
        proxy: FOM if not given; HELD, Truncated(K), or another stateless method, such as Implicit().
        rate: γ of the outer steps.
        chunk: (θ, task) pairs run together, as in `measure_moments`.
        compile: as in `hypergradient`.

    Raises:
        UfomError: too few tasks, a rate ≤ 0, without a rate differences that do not settle at any step (kinks in the
            losses, or rounding), or what `measure_moments` raises.
    """
    one = any_proxy(proxy)
    return curvatures(problem, theta, tasks, [one], rate, chunk=chunk, compile=compile)[one]


def curvatures(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks | None,
    proxies: Sequence[Truncated | Proxy],
    rate: float | None = None,
    *,
    chunk: int | None = None,
    compile: bool = False,
    settled: bool = True,
) -> dict[Truncated | Proxy, MeasuredCurvature]:
    """`measure_curvature` for several proxies: what they share, the curvatures of the exact gradient, is measured once.

    With a rate and without `settled` the error, which takes some gradients, is left out: nan.
    """
    given, exact_sums = tasks_or_all(problem, tasks)
    tasks = check(problem, theta, given)
    if rate is not None:
        rate = scalar("rate, γ of the outer steps,", rate, positive)
    cuts = [proxy for proxy in proxies if isinstance(proxy, Truncated)]
    for cut in cuts:
        cut.refuse_beyond(problem.r)
    n = len(tasks)
    if n < 2 and not exact_sums:
        raise UfomError("one task gives no covariance: draw at least 2")
    every = torch.arange(n, device="cpu")
    slopes = _Slopes(problem, theta, tasks, chunk, compile)
    lengths = sorted({proxy_length(problem, proxy) for proxy in cuts} | {problem.r})
    *_, exact = found = slopes.at(theta[None], every, tuple(lengths))
    firsts: dict[Truncated | Proxy, Tensor] = {cut: found[lengths.index(proxy_length(problem, cut))] for cut in cuts}
    for proxy in proxies:
        if not isinstance(proxy, Truncated):
            firsts[proxy] = proxy_rows(problem, theta[None], tasks, proxy, chunk, compile)[0].double()
    means: dict[Any, Tensor] = {None: exact.mean(0), **{proxy: x.mean(0) for proxy, x in firsts.items()}}
    spreads: dict[Any, Tensor] = {None: exact - means[None]}
    for proxy, x in firsts.items():
        spreads |= {(proxy, "d"): exact - x, (proxy, "F"): x - means[proxy]}
    tried = torch.cat([x[:_TRIED] for x in spreads.values()] + [x[None] for x in means.values()])
    size = float(tried.norm(dim=1).sum() * exact.norm(dim=1).max())

    def few(h: float) -> Array:
        return slopes.forms([(tried, torch.arange(len(tried), device="cpu") % n)], h, rate is None)[0][0]

    if rate is None:
        step, error = _choose(few, theta, size)
    else:
        step, error = rate, _change(few(rate), few(rate / 4)) if settled else float("nan")
    each = [(x.repeat_interleave(n, 0), every.repeat(n)) if exact_sums else (x, (every + 1) % n)
            for x in spreads.values()]  # fmt: skip
    rows = slopes.forms([*each, *((mean.expand(n, -1), every) for mean in means.values())], step, rate is None)
    noises: dict[Any, Estimate] = {}
    for (name, x), (values, _) in zip(spreads.items(), rows, strict=False):
        values = values.reshape(n, n).mean(1) if exact_sums else values
        noises[name] = _quotient(Estimate.mean(values), Estimate.mean((x * x).sum(1).cpu().numpy()))
    along: dict[Any, Estimate] = {}
    for (name, mean), (values, product) in zip(means.items(), rows[len(spreads) :], strict=True):
        x, noise = (exact, noises[None]) if name is None else (firsts[name], noises[name, "F"])
        pull = ((x - mean) @ product).cpu().numpy()
        excess = 0.0 if exact_sums else noise.value * float((x - mean).square().sum()) / (n - 1) / n
        form = Estimate(float(values.mean()) - excess, values + 2 * pull)
        along[name] = _quotient(form, Estimate.product_of_means(x, x, exact_sums))
    length = step if rate is None else rate * float(exact.norm(dim=1).mean())
    results: dict[Truncated | Proxy, MeasuredCurvature] = {}
    for proxy in proxies:
        five = {
            "curvature_gradient": along[None], "curvature_noise": noises[None],
            "curvature_correction": noises[proxy, "d"], "curvature_proxy": along[proxy],
            "curvature_proxy_noise": noises[proxy, "F"],
        }  # fmt: skip
        sems = {name: 0.0 if exact_sums else five[name].sem for name in sorted(five)}
        results[proxy] = MeasuredCurvature(
            **{k: v.value for k, v in five.items()}, sems=sems, step=length, error=error
        )  # fmt: skip
    return results


@dataclass(frozen=True, eq=False)
class _Slopes:
    """Exact gradients near one θ, and what their differences say of ∇²M."""

    problem: BilevelProblem
    theta: Tensor
    tasks: Tasks
    chunk: int | None
    compile: bool

    def at(self, thetas: Tensor, index: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
        """For each length the gradients of the tasks at `index`, each at its θ or all at the only one."""
        at = torch.arange(len(index), device="cpu") if len(thetas) > 1 else torch.zeros_like(index)
        pairs = torch.stack([at, index])
        rows = in_chunks(
            self.problem, thetas, self.tasks, pairs, lengths, EXACT.sweep, self.chunk, compile=self.compile
        )
        return [refuse_divergence(torch.cat(x)).double() for x in zip(*(f for _, f in rows), strict=True)]

    def forms(self, asked: Sequence[tuple[Tensor, Tensor]], h: float, by_length: bool) -> list[tuple[Array, Tensor]]:
        """Of rows x with the tasks j at an index: xᵀH_jx of each, and the mean of H_jx.

        By differences of length h, or of h·x. Many are run together: a long inner loop costs little more for it.
        """
        found: list[tuple[Array, Tensor]] = []
        waiting: list[tuple[Tensor, Tensor]] = []
        for i, pair in enumerate(asked):
            waiting.append(pair)
            if i + 1 == len(asked) or sum(x.nbytes for x, _ in (*waiting, asked[i + 1])) > _HELD:
                found += self._forms(waiting, h, by_length)
                waiting = []
        return found

    def _forms(self, asked: list[tuple[Tensor, Tensor]], h: float, by_length: bool) -> list[tuple[Array, Tensor]]:
        x, index = (torch.cat(part) for part in zip(*asked, strict=True))
        length = x.norm(dim=1, keepdim=True)
        share = torch.where(length > 0, h / length, 0.0) if by_length else torch.full_like(length, h)
        shifts = (share * x).to(self.theta.dtype)
        thetas = torch.cat([self.theta + shifts, self.theta - shifts])
        ahead, behind = self.at(thetas, index.repeat(2), (self.problem.r,))[0].chunk(2)
        product = torch.where(length > 0, (ahead - behind) / (2 * share), 0.0)
        sizes = [len(one) for one, _ in asked]
        values, products = torch.split((x * product).sum(1), sizes), torch.split(product, sizes)
        return [(v.cpu().numpy(), p.mean(0)) for v, p in zip(values, products, strict=True)]


def _change(values: Array, others: Array) -> float:
    """Σ|x − y|/Σ|y|; 0 where all are 0."""
    change, size = float(abs(values - others).sum()), float(abs(others).sum())
    return change / size if size else float("inf") if change else 0.0


def _quotient(form: Estimate, square: Estimate) -> Estimate:
    """A quadratic form over a squared length, with the influence of each task on the quotient."""
    if square.value == 0:
        return Estimate(0.0, np.zeros_like(form.influence))
    value = form.value / square.value
    centred = (x.influence - x.influence.mean() for x in (form, square))
    return Estimate(value, (next(centred) - value * next(centred)) / square.value)


def _choose(forms: Callable[[float], Array], theta: Tensor, size: float) -> tuple[float, float]:
    """The step at which the forms change least to the next shorter step, and that change relative to the forms.

    `size` is that of a form whose gradients differ by their own length over a step of 1: what rounding leaves of it
    counts as no change.
    """
    unit = 1 + float(theta.double().norm())
    steps = [unit * t for t in _STEPS]
    values = np.array([forms(h) for h in steps])
    # forms that vanish at short steps alone are those of a piecewise linear M, whose curvature sits in its kinks
    vanishing = np.inf if values.any() else 0.0
    changes = [_change(*pair) if pair[1].any() else vanishing for pair in pairwise(values)]
    moved = abs(np.diff(values, axis=0)).sum(1)
    rounding = 100 * torch.finfo(theta.dtype).eps * size / np.array(steps[:-1])
    best = int(np.argmin(changes))
    if changes[best] > _ROUGHEST and moved[best] > rounding[best]:
        raise UfomError(
            f"the curvature of M does not settle at any step of the differences (relative change {changes[best]:.2g} "
            f"at best): the losses have kinks here, or the gradients too few digits; {_REMEDY}"
        )
    off = abs(values[:best] - values[best]).sum(1) > np.maximum(_ROUGHEST * abs(values[best]).sum(), rounding[:best])
    reach = steps[int(np.flatnonzero(off)[-1]) + 1 if off.any() else 0]
    # a smooth M has changes that fall as h², by 16 from step to step
    fell = [x > 0.01 and y < x / 100 for x, y in pairwise(changes[: best + 1])]
    if reach < _NEAREST * unit or (np.array(fell, dtype=bool) & (moved[:best] > rounding[:best])).any():
        raise UfomError(
            f"the curvature of M settles within steps of {reach:.2g} alone, and is another at longer ones: the losses "
            f"have kinks here, and outer steps go beyond them; {_REMEDY}"
        )
    return steps[best], changes[best]
