"""Is a hypergradient exact, first-order, truncated — or wrong? One's own code against a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ufom_runtime.audit.oracle import Oracle
from ufom_runtime.problem import BilevelProblem, Task, all_finite, check
from ufom_theory import UfomError
from ufom_theory.checks import integer, typed

_FAR = 4.0  # standard errors at which a mean is called biased
_LEAST = 10  # calls: fewer would take a coin that is mostly 1, without its weight 1/q, for the exact gradient
_FEW = 5  # calls that carry the variance, below which it is not known


@dataclass(frozen=True)
class Audit:
    """What a hypergradient was found to be; norms are relative to that of the exact gradient.

    Attributes:
        verdict: "exact", "first-order", "truncated", "wrong"; "unbiased", "biased" where calls differ; "cannot tell".
        kept: the numbers K of kept backward steps that the gradient agrees with: (r,) is exact, (0,) first-order.
        errors: ‖g − G_K‖ for K = 0 … r, where g is the gradient, or the mean of the calls where they differ.
        cosine: of g to the exact gradient.
        scale: c that makes g nearest to c × the exact gradient.
        noise: rounding error of the exact gradient in θ's dtype, measured.
        tolerance: largest error at which g counts as exact.
        z: standard errors between the mean of the calls and the exact gradient; None where the calls agree.
        calls: how often the code was called.
        oracle: dtype of the reference, float64 wherever the problem runs in it.
        why: the reason, in words.
    """

    verdict: str
    kept: tuple[int, ...]
    errors: tuple[float, ...]
    cosine: float
    scale: float
    noise: float
    tolerance: float
    z: float | None
    calls: int
    oracle: str
    why: str

    def __str__(self) -> str:
        nearest = min(range(len(self.errors)), key=self.errors.__getitem__)
        rows = [
            ("relative error to the exact gradient", f"{self.errors[-1]:.2g}, tolerance {self.tolerance:.2g}"),
            ("relative error to the first-order gradient", f"{self.errors[0]:.2g}"),
            (f"relative error to the nearest, K = {nearest} of {len(self.errors) - 1}", f"{self.errors[nearest]:.2g}"),
            ("cosine to the exact gradient, scale", f"{self.cosine:.6g}, {self.scale:.6g}"),
            (f"rounding noise against {self.oracle}", f"{self.noise:.2g}"),
            ("calls of the code", f"{self.calls}"),
        ]
        return "\n".join([f"{self.verdict}: {self.why}", *(f"  {name:<42} {value}" for name, value in rows)])


@typed
def audit_gradient(
    fn: Callable[[Tensor, Task], Tensor],
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task,
    *,
    repeats: int = 50,
    chunk: int | None = None,
    compile: bool = False,
) -> Audit:
    """Say whether `fn` computes the exact gradient of the outer loss, and if not, what it computes instead.

    The oracle is this package's sweep in float64, all truncation lengths K = 0 … r at once. What rounding alone may
    do, which near the kinks of a ReLU is several percent in float32, is measured: the same sweep in θ's dtype, also
    with φ_0 moved by one rounding error.

    Args:
        fn: the code to judge; called with a copy of θ that requires grad, in θ's own dtype, and the tasks.
        problem: what it claims to differentiate. A problem that cannot run in float64, since its functions close over
            tensors of another dtype, is judged in θ's dtype with twice the tolerance.
        theta: outer parameters, shape (s,), where the gradient does not vanish.
        tasks: n stacked tasks, few: every call takes all of them.
        repeats: calls of `fn`, at least 10; where the first 10 all give the exact gradient they are the only ones.
        chunk, compile: how the oracle is run, as in `hypergradient`; the slips that a wrong gradient is compared with
            are never compiled.

    Returns:
        The verdict with its numbers; it holds at this θ and for these tasks.

    Raises:
        UfomError: wrong shapes, an output of `fn` that is not a finite real tensor (s,), the mean over the tasks, or
            (n, s), a task each; or an exact gradient that is lost in the rounding noise.
    """
    stack = check(problem, theta, tasks)
    integer("repeats", repeats, _LEAST)
    shapes: tuple[tuple[int, ...], ...] = ((len(theta),), (len(stack), len(theta)))
    calls = [_call(fn, theta, tasks, shapes)]
    shape = tuple(calls[0].shape)
    oracle = Oracle.of(problem, theta, stack, len(shape) == 2, chunk, compile)
    exact, size = oracle.table[-1], float(oracle.table[-1].norm())
    limit, noise = float(oracle.limits[-1]), float(oracle.noise[-1])
    if size <= limit:
        raise UfomError(
            f"the exact gradient's norm, {size:.3g}, is lost in rounding errors of {noise:.2g}: give another θ, or θ "
            "and tasks in float64"
        )
    calls += [_call(fn, theta, tasks, (shape,)) for _ in range(_LEAST - 1)]
    if any(oracle.agreeing(g) != (problem.r,) for g in calls):
        calls += [_call(fn, theta, tasks, (shape,)) for _ in range(repeats - _LEAST)]  # a rare coin may not have shown
    draws, z = torch.stack(calls).flatten(1), None
    if float((draws - draws[0]).norm(dim=1).max()) <= limit / size * float(draws[0].norm()):
        g = draws[0]
        kept = oracle.agreeing(g)
        verdict, why = _of_kept(kept, problem.r) if kept else ("wrong", _name_fault(g, oracle))
    else:
        g, kept = draws.mean(0), ()
        verdict, why, z = _of_draws(draws, oracle)
    dtype = oracle.theta.dtype
    if dtype != torch.float64:
        why += f"; the problem cannot run in float64 and was judged in {dtype}, with twice the tolerance"
    return Audit(
        verdict=verdict,
        kept=kept,
        errors=tuple(((g - oracle.table).norm(dim=1) / size).tolist()),
        cosine=float(g @ exact / (g.norm() * size)) if g.any() else float("nan"),
        scale=float(g @ exact) / size**2,
        noise=noise / size,
        tolerance=limit / size,
        z=z,
        calls=len(draws),
        oracle=str(dtype).removeprefix("torch."),
        why=why,
    )


def _call(
    fn: Callable[[Tensor, Task], Tensor], theta: Tensor, tasks: Task, shapes: tuple[tuple[int, ...], ...]
) -> Tensor:
    """One output of the user's code, in float64; refused if it has none of a gradient's shapes."""
    with torch.enable_grad():
        g = fn(theta.detach().clone().requires_grad_(), tasks)
    if not isinstance(g, Tensor) or not g.is_floating_point() or g.shape not in shapes:
        what = f"{g.dtype} of shape {tuple(g.shape)}" if isinstance(g, Tensor) else f"a {type(g).__name__}"
        raise UfomError(
            f"fn returned {what}: return floats of shape {' or '.join(map(str, shapes))} in every call, the mean over "
            "the tasks or a gradient for each"
        )
    if not all_finite(g):
        raise UfomError("fn returned NaN or ±inf, which cannot be judged; does its inner loop diverge?")
    return g.detach().to(theta.device, torch.float64)


def _of_kept(kept: tuple[int, ...], r: int) -> tuple[str, str]:
    """Verdict and reason where the gradient is one of G_0 … G_r."""
    if kept == (r,):
        return "exact", f"it keeps all {r} backward steps"
    run = len(kept) > 2 and kept[-1] - kept[0] == len(kept) - 1
    alike = f"K = {kept[0]} … {kept[-1]}" if run else "K = " + ", ".join(map(str, kept))
    if r in kept:
        other = "first-order" if 0 in kept else "truncated"
        remedy = "take another θ, larger inner steps, or float64"
        return "cannot tell", f"{alike} of {r} are alike here: cannot tell exact from {other}; {remedy}"
    if 0 in kept:
        return "first-order", "no second derivative is in it" + f", or {alike}, alike here" * (len(kept) > 1)
    return "truncated", f"it keeps the last {alike} of {r} backward steps"


def _name_fault(g: Tensor, oracle: Oracle) -> str:
    """What a deterministic gradient that is not a G_K is instead, if it is a factor or a usual slip."""
    if not g.any():
        return "it is zero: is the graph cut between θ and the outer loss?"
    n, r = len(oracle.tasks), oracle.problem.r
    names = {0: "the first-order gradient", r: "the exact gradient"}
    truncated = [
        (names.get(k, f"the gradient truncated at K = {k}"), oracle.table[k], float(oracle.limits[k]))
        for k in (r, *range(r))
    ]
    scales = {
        n: f"{n} × {{}} (a sum over the tasks?)",
        1 / n: f"1/{n} × {{}} (divided by their number twice?)",
        -1.0: "minus {}",
        1.0: "{}",  # the last, for n = 1
    }
    for targets in (truncated, oracle.slips()):
        found = sorted(
            (error, said.format(name))
            for name, target, limit in targets
            for c, said in scales.items()
            if (error := float((g / c - target).norm())) <= limit
        )
        if found:
            return "it is " + ", or ".join(name for _, name in found[:3])
    for name, target, limit in truncated if len(g) > 1 else []:  # on a line everything is a multiple of everything
        c = float(g @ target / (target @ target)) if target.any() else 0.0
        if float((g - c * target).norm()) <= abs(c) * limit:
            return f"it is {c:.6g} × {name}"
    return (
        "it is not a truncated gradient or a multiple of one, and not a usual slip: are losses, start and step sizes "
        "the same?"
    )


def _of_draws(draws: Tensor, oracle: Oracle) -> tuple[str, str, float]:
    """Verdict, reason and z where the calls differ, draws (calls, rows·s): is their mean the exact gradient?

    Asked of the whole vector and, since a fault of a debiased estimator shows there, along the first-order bias and the
    gradient.
    """
    exact, limit = oracle.table[-1], float(oracle.limits[-1])
    x, bias = draws - exact, oracle.table[0] - exact
    biased = float(bias.norm()) > limit
    along = x @ bias / bias.norm() if biased else x.new_zeros(len(x))
    tests = [_test(y, limit) for y in (x, along[:, None], (x @ exact / exact.norm())[:, None])]
    z, effective = max(z for z, _ in tests), min(n for _, n in tests)
    said = f"its calls differ; their mean is {z:.1f} standard errors from the exact gradient"
    if biased:
        share, sem = float(along.mean() / bias.norm()), float(along.std() / bias.norm()) / len(x) ** 0.5
        said += f" and keeps {share:.0%} ± {sem:.0%} of the first-order bias"
    if effective < _FEW:
        return "cannot tell", f"{said}, but the error rests on {effective:.1f} rare calls: take more repeats", z
    if z > _FAR:
        return "biased", said, z
    if not biased or _test((along - bias.norm())[:, None], limit)[0] <= _FAR:
        return "cannot tell", f"{said}, so it may be the first-order one: take more repeats, or another θ", z
    return "unbiased", said, z


def _test(x: Tensor, rounding: float) -> tuple[float, float]:
    """‖mean‖ of the rows of x in standard errors, and how many rows the variance rests on: few where a coin is rare."""
    n, mean = len(x), x.mean(0)
    squares = (x - mean).square().sum(1)
    effective = float(squares.sum() ** 2 / squares.square().sum()) if squares.any() else float(n)
    return float(mean.norm() / (squares.sum() / (n - 1) / n + rounding**2).sqrt()), effective
