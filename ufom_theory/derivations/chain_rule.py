"""The chain rule (6)–(9): the backward loop of Algorithm 2 against differentiation of the unrolled problem."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import sympy as sp

from ufom_theory.derivations.symbols import ALPHA, Q


class Problem(NamedTuple):
    """One task of a bilevel problem in symbols: θ ∈ ℝˢ and φ ∈ ℝᵖ are columns, the losses and V expressions of them."""

    theta: sp.Matrix
    phi: sp.Matrix
    inner: sp.Expr
    outer: sp.Expr
    start: sp.Matrix


Point = dict[sp.Symbol, sp.Expr]


def polynomial_problem() -> Problem:
    """A problem with s = 2 ≠ p = 3 in which every derivative of (6)–(9) depends on θ and on φ."""
    t1, t2 = theta = sp.Matrix(sp.symbols("theta1:3"))
    f1, f2, f3 = phi = sp.Matrix(sp.symbols("phi1:4"))
    inner = f1**2 * f2 / 2 + t1 * f1 * f3 - t2 * f2 + f3**2 / 2
    return Problem(theta, phi, inner, f1 * f2 + t2 * f3 + t1**2, sp.Matrix([t1, t1 - t2, 1]))


def _at(matrix: sp.Matrix, values: Point) -> sp.Matrix:
    return matrix.subs(values, simultaneous=True).applyfunc(sp.expand)


def states(problem: Problem, alphas: Sequence[sp.Expr], at: Point | None = None) -> list[sp.Matrix]:
    """φ_0 … φ_r of (2)–(3) as functions of θ, or at the point `at`."""
    slope = sp.Matrix([problem.inner]).jacobian(problem.phi).T
    visited = [_at(problem.start, at or {})]
    for alpha in alphas:
        here = dict(zip(problem.phi, visited[-1], strict=True)) | (at or {})
        visited.append((visited[-1] - alpha * _at(slope, here)).applyfunc(sp.expand))
    return visited


def unrolled_gradient(problem: Problem, alphas: Sequence[sp.Expr]) -> sp.Matrix:
    """∇_θ L_out(θ, φ_r(θ)) by substituting the whole loop and differentiating once."""
    last = dict(zip(problem.phi, states(problem, alphas)[-1], strict=True))
    return sp.Matrix([problem.outer.subs(last, simultaneous=True)]).jacobian(problem.theta).T.applyfunc(sp.expand)


def backward_loop(
    problem: Problem, alphas: Sequence[sp.Expr], kept: int | None = None, at: Point | None = None
) -> sp.Matrix:
    """Algorithm 2's b1 + (∂V/∂θ)ᵀb2 after the last `kept` backward steps: all of them (None) is exact, 0 is FOM.

    b2 after the step j is ∇_{φ_{j−1}} L_out (9), b1 gathers D_r, …, D_j (7).
    """
    mixed = sp.hessian(problem.inner, [*problem.phi, *problem.theta])[: len(problem.phi), len(problem.phi) :]
    hessian = sp.hessian(problem.inner, list(problem.phi))
    outer = sp.Matrix([problem.outer])
    visited = states(problem, alphas, at)
    last = dict(zip(problem.phi, visited[-1], strict=True)) | (at or {})
    b1, b2 = _at(outer.jacobian(problem.theta).T, last), _at(outer.jacobian(problem.phi).T, last)
    stop = 0 if kept is None else len(alphas) - kept
    for j in range(len(alphas), stop, -1):
        here = dict(zip(problem.phi, visited[j - 1], strict=True)) | (at or {})
        b1 = (b1 - alphas[j - 1] * _at(mixed, here).T * b2).applyfunc(sp.expand)
        b2 = (b2 - alphas[j - 1] * _at(hessian, here).T * b2).applyfunc(sp.expand)
    return (b1 + _at(problem.start.jacobian(problem.theta), at or {}).T * b2).applyfunc(sp.expand)


def algorithm_4(
    problem: Problem, alphas: Sequence[sp.Expr], coin: int, rerun: Callable[[int], int] = lambda j: j - 1
) -> sp.Matrix:
    """Algorithm 4 with its coin given: b_FO + (ξ/q)·(b_Exact − b_FO), of the inner states φ_0 alone held.

    Before the backward step j, `rerun(j)` inner steps are run from φ_0 again. The Hessian-vector products are those of
    §2.2: (∂L_in/∂φ)ᵀb2 differentiated in θ and φ with b2 held fixed.
    """

    def descend(steps: int) -> Point:
        return dict(zip(problem.phi, states(problem, alphas[:steps])[-1], strict=True))

    held = sp.Matrix(sp.symbols(f"b2_:{len(problem.phi)}"))
    functional = (sp.Matrix([problem.inner]).jacobian(problem.phi) * held).applyfunc(sp.expand)
    products = [functional.jacobian(x).T for x in (problem.theta, problem.phi)]
    outer, by_start = sp.Matrix([problem.outer]), problem.start.jacobian(problem.theta).T
    b1, b2 = (_at(outer.jacobian(x).T, descend(len(alphas))) for x in (problem.theta, problem.phi))
    first_order = (b1 + by_start * b2).applyfunc(sp.expand)
    if not coin:
        return first_order
    for j in range(len(alphas), 0, -1):
        here = descend(rerun(j)) | dict(zip(held, b2, strict=True))
        h1, h2 = (_at(product, here) for product in products)
        b1, b2 = b1 - alphas[j - 1] * h1, b2 - alphas[j - 1] * h2
    return (first_order + (b1 + by_start * b2 - first_order) / Q).applyfunc(sp.expand)


def mixed_derivative_shape(problem: Problem) -> tuple[int, int]:
    """Shape of ∂²L_in/∂θ∂φ, the Jacobian in θ of ∂L_in/∂φ: p×s, for its transpose maps b2 ∈ ℝᵖ to ℝˢ in (7)."""
    slope = sp.Matrix([problem.inner]).jacobian(problem.phi).T
    return slope.jacobian(problem.theta).shape  # type: ignore[no-any-return]


def invariant(s: int = 2, p: int = 3) -> tuple[sp.Matrix, sp.Matrix]:
    """The induction that proves (6)–(9) for every r: b1 + J_jᵀb2 before and after the backward step j, J_j = ∂φ_j/∂θ.

    Differentiating (3) gives J_j = (I − α_j·H)·J_{j−1} − α_j·B with H, B arbitrary p×p and p×s. At j = r the quantity
    is the total derivative of L_out, at j = 0 it is what Algorithm 2 returns; every step leaves it as it is.
    """
    jacobian, b = (sp.Matrix(p, s, sp.symbols(f"{name}:{p * s}")) for name in ("J", "B"))
    hessian = sp.Matrix(p, p, sp.symbols(f"H:{p * p}"))
    b1, b2 = sp.Matrix(sp.symbols(f"b1_:{s}")), sp.Matrix(sp.symbols(f"b2_:{p}"))
    keep = sp.eye(p) - ALPHA * hessian
    before = b1 + (keep * jacobian - ALPHA * b).T * b2
    after = (b1 - ALPHA * b.T * b2) + jacobian.T * (keep.T * b2)
    return before.applyfunc(sp.expand), after.applyfunc(sp.expand)
