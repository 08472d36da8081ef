"""The constants of Assumption 1, estimated from below on the states that inner GD visits.

Each is a maximum over finitely many points where the assumption asks for a supremum, and each spectral norm comes by
power iteration, so every number is a *lower* estimate of the true constant. At these numbers the bounds D and V hold on
the very states that were visited, up to the power iteration's remainder, but nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad

from ufom_runtime.algorithms import first_state
from ufom_runtime.batching import in_chunks, refuse_divergence
from ufom_runtime.derivatives import leaf, start, total_loss
from ufom_runtime.estimators import EXACT
from ufom_runtime.inspection.non_finite import refuse_non_finite
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check, refuse_update
from ufom_runtime.steps import Steps
from ufom_runtime.training.seeds import seeded
from ufom_theory import AssumptionConstants, bias_bound, gradient_bound, smoothness_bound
from ufom_theory.checks import instance, integer, typed

Operator = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # a linear map of each row, and its transpose
_ITERATIONS, _STATES = 20, 10
_STEP = 1e-3  # of the differences, relative to 1 + ‖x‖


@dataclass(frozen=True)
class EstimatedConstants(AssumptionConstants):
    """Lower estimates of the constants of Assumption 1.

    Attributes:
        theta_in_losses: whether a loss contains θ; where none does, 1 + M1 becomes M1 in every bound.
    """

    theta_in_losses: bool = True


@torch.enable_grad()
@typed
def estimate_constants(
    problem: BilevelProblem,
    thetas: Tensor,
    tasks: Task | Tasks,
    *,
    seed: int = 0,
    chunk: int | None = None,
    compile: bool = False,
) -> EstimatedConstants:
    """Estimate M1, M2, L1, L2, L3 from below, over all given θ and tasks, and up to ten states of the loop.

    M1 and L2 are spectral norms by power iteration on Jacobian- and Hessian-vector products, L1 is the largest gradient
    norm; M2 and L3 are norms of the differences of ∂V/∂θ, and of the inner loss's Hessian blocks, over short random
    steps, divided by the step. The outer loss is met at φ_r alone.

    Args:
        problem: the problem.
        thetas: outer parameters, shape (k, s), or (s,).
        tasks: n stacked tasks.
        seed: of the directions.
        chunk: (θ, task) pairs run together; None: all k·n; 1: one at a time, without vmap.
        compile: as in `hypergradient`; only the inner loop is compiled.

    Raises:
        UfomError: wrong shapes or devices, a loss that ignores φ, an inner loop that diverged.
    """
    theta, rows, index = _pairs(problem, thetas, tasks)
    generator, size = seeded(seed), len(theta) if chunk is None else chunk
    found = [
        _visit(problem, theta[piece.to(theta.device)], rows.take(piece), generator, compile)
        for piece in torch.split(index[0], integer("chunk, the pairs run together,", size, 1))
    ]
    largest = {name: max(values[name] for values, _ in found) for name in found[0][0]}
    return EstimatedConstants(**largest, theta_in_losses=any(uses for _, uses in found))


def _visit(
    problem: BilevelProblem, theta: Tensor, rows: Tasks, generator: torch.Generator, compile: bool
) -> tuple[dict[str, float], bool]:
    """The largest of each constant over these rows, and whether a loss contains θ."""

    def direction(like: Tensor) -> Tensor:
        x = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)
        return torch.nn.functional.normalize(x)

    def step(x: Tensor) -> Tensor:
        return direction(x).mul(_STEP * (1 + x.norm(dim=1, keepdim=True)))

    phi, states = _states(problem, theta, rows, compile)
    shift = step(theta)
    jacobian, moved = (_jacobian(problem, x, rows) for x in (theta, theta + shift))
    m1 = [_norm(jacobian, direction(theta))]
    m2 = [_norm(_minus(moved, jacobian), direction(theta)) / shift.norm(dim=1)]
    l1, l2, l3 = [], [], []
    theta_in_losses = False
    visited = [("inner_loss", state) for state in states]
    for name, state in [*visited, ("outer_loss", phi)]:
        here = _Hessian(problem, name, theta, state, rows)
        l1 += [g.norm(dim=1) for g in here.gradients]
        theta_in_losses |= here.uses_theta
        l2 += [_norm(here.block(a, b), direction((theta, state)[b])) for a, b in ((0, 0), (0, 1), (1, 1))]
        if name == "inner_loss":
            shifts = step(theta), step(state)
            there = _Hessian(problem, name, theta + shifts[0], state + shifts[1], rows)
            distance = shifts[0].norm(dim=1) + shifts[1].norm(dim=1)
            differences = (_minus(there.block(a, 1), here.block(a, 1)) for a in (0, 1))
            l3 += [_norm(d, direction(state)) / distance for d in differences]
    found = {"M1": m1, "M2": m2, "L1": l1, "L2": l2, "L3": l3}
    return {name: max(float(x.max()) for x in values) for name, values in found.items()}, theta_in_losses


def _states(problem: BilevelProblem, theta: Tensor, rows: Tasks, compile: bool) -> tuple[Tensor, list[Tensor]]:
    """φ_r, and up to ten of the states before it."""
    steps, states = Steps(problem, theta, rows, compile=compile), [first_state(problem, theta, rows)]
    for j in range(problem.r):
        states.append(steps.inner(states[-1], j))
    refuse_non_finite(problem, theta, rows, [phi := states.pop()])
    chosen = (
        torch.linspace(0, problem.r - 1, min(problem.r, _STATES), dtype=torch.float32, device="cpu")
        .round()
        .int()
        .tolist()
    )
    return phi, [states[i] for i in chosen]


@typed
def compare_bounds(
    problem: BilevelProblem,
    thetas: Tensor,
    tasks: Task | Tasks,
    known: AssumptionConstants | None = None,
    *,
    chunk: int | None = None,
    compile: bool = False,
) -> list[dict[str, str | float | None]]:
    """Bound, estimate and observation side by side, for D, V and the Lipschitz constant L_M of ∇M.

    Args:
        problem: the problem.
        thetas: shape (k, s), or (s,).
        tasks: n stacked tasks, all of Ω where L_M is to be one of the problem's.
        known: the true constants, if there are any.
        chunk, compile: as in `hypergradient` and `estimate_constants`.

    Returns:
        Three rows, each with "quantity"; "bound" at the known constants; "estimate", the same formula at
        `estimate_constants`; "observed", the largest ‖G_FO − G‖, ‖G‖ and ‖∇M(θ') − ∇M(θ'')‖/‖θ' − θ''‖ over the
        given θ and tasks. None where there is nothing to fill in: no known constants, or a single θ.

    Raises:
        UfomError: `known` of another type; as `hypergradient`.
    """
    tasks = check(problem, thetas, tasks, dimensions=(1, 2))
    if known is not None:
        instance("known", known, AssumptionConstants, "write AssumptionConstants(M1, M2, L1, L2, L3)")
    estimated = estimate_constants(problem, thetas, tasks, chunk=chunk, compile=compile)
    theta, rows, pairs = _pairs(problem, thetas, tasks)
    lengths = (0, problem.r)
    chunks = in_chunks(problem, theta, rows, pairs, lengths, EXACT.sweep, chunk, compile=compile)
    pieces = [found for _, found in chunks]
    proxy, exact = (refuse_divergence(torch.cat(x)) for x in zip(*pieces, strict=True))
    k = len(theta) // len(tasks)
    means, points = (x.view(k, -1, x.shape[1]).mean(1) for x in (exact, theta))
    apart = torch.nn.functional.pdist(points)
    steepest = torch.nn.functional.pdist(means)[apart > 0] / apart[apart > 0]
    observed = [
        float((proxy - exact).norm(dim=1).max()),
        float(exact.norm(dim=1).max()),
        float(steepest.max()) if len(steepest) else None,
    ]

    def at(constants: AssumptionConstants | None) -> list[float | None]:
        alphas, in_losses = problem.alphas, estimated.theta_in_losses
        formulas = (bias_bound, gradient_bound, smoothness_bound)
        return [f(constants, alphas, theta_in_losses=in_losses) if constants else None for f in formulas]

    columns = zip(("D", "V", "L_M"), at(known), at(estimated), observed, strict=True)
    return [dict(zip(("quantity", "bound", "estimate", "observed"), row, strict=True)) for row in columns]


def _pairs(problem: BilevelProblem, thetas: Tensor, tasks: Task | Tasks) -> tuple[Tensor, Tasks, Tensor]:
    """Every θ with every task: θ of shape (k·n, s), the tasks stacked alike, and the indices that pair the two."""
    refuse_update(problem, "Assumption 1", "its constants and the bounds (15)–(16) are those of gradient descent")
    tasks = check(problem, thetas, tasks, dimensions=(1, 2))
    thetas = thetas[None] if thetas.ndim == 1 else thetas
    n, k = len(tasks), len(thetas)
    index = torch.arange(k * n, device="cpu")
    return thetas.repeat_interleave(n, 0), tasks.take(index % n), torch.stack([index, index])


class _Hessian:
    """Gradients of a loss in (θ, φ) at given points, and products with the blocks of its Hessian."""

    def __init__(self, problem: BilevelProblem, name: str, theta: Tensor, phi: Tensor, tasks: Tasks) -> None:
        self._leaves = leaf(theta), leaf(phi)
        total = total_loss(problem, name, *self._leaves, tasks)
        found = grad(total, self._leaves, create_graph=True, allow_unused=True)
        self.uses_theta = found[0] is not None
        self._graph = [torch.zeros_like(x) if g is None else g for g, x in zip(found, self._leaves, strict=True)]
        self.gradients = [g.detach() for g in self._graph]

    def block(self, a: int, b: int) -> Operator:
        """∂²/∂x_a∂x_b, x = (θ, φ): maps the b-th to the a-th space."""
        return lambda v: self._product(a, b, v), lambda v: self._product(b, a, v)

    def _product(self, out: int, into: int, v: Tensor) -> Tensor:
        g, x = self._graph[into], self._leaves[out]
        h = grad(g, x, grad_outputs=v, retain_graph=True, allow_unused=True)[0] if g.requires_grad else None
        return torch.zeros_like(x) if h is None else h


def _jacobian(problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> Operator:
    """∂V/∂θ of each row."""
    theta = leaf(theta)
    phi = start(problem, theta, tasks)

    def transpose(u: Tensor) -> Tensor:
        if not phi.requires_grad:
            return torch.zeros_like(theta)
        return grad(phi, theta, grad_outputs=u, retain_graph=True, create_graph=u.requires_grad)[0]

    def apply(v: Tensor) -> Tensor:  # uᵀ(∂V/∂θ)v is linear in u, and its derivative in u the product
        u = torch.zeros_like(phi).requires_grad_()
        through = transpose(u)
        return grad(through, u, grad_outputs=v)[0] if through.requires_grad else torch.zeros_like(phi)

    return apply, transpose


def _minus(a: Operator, b: Operator) -> Operator:
    return lambda v: a[0](v) - b[0](v), lambda v: a[1](v) - b[1](v)


def _norm(operator: Operator, v: Tensor) -> Tensor:
    """Spectral norm of each row's map from below, shape (n,): power iteration from unit vectors v."""
    apply, transpose = operator
    for _ in range(_ITERATIONS):
        v = torch.nn.functional.normalize(transpose(apply(v)), eps=torch.finfo(v.dtype).tiny)
    norms: Tensor = torch.linalg.vector_norm(apply(v).detach(), dim=1)
    return norms
