"""The gradient (6)–(9) and Algorithms 2–4: what the backward loop returns is the derivative of the unrolled problem.

Write J_j = ∂φ_j/∂θ, H_j and B_j for the second derivatives of L_in at φ_{j−1} (p×p and p×s), b_j = ∇_{φ_j} L_out. By
definition the total derivative of L_out is ∂L_out/∂θ + J_rᵀb_r. The backward loop keeps ∂L_out/∂θ + Σ_{i>j} D_i +
J_jᵀb_j as it is, down to j = 0: an induction over j for every s, p and r.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import sympy as sp

from ufom_theory.derivations.registry import claim, holds, instances, same, step, vanishes, worst
from ufom_theory.derivations.symbols import ALPHA, INDEX, Q, R


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
    problem: Problem, alphas: Sequence[sp.Expr], at: Point, rerun: Callable[[int], int] = lambda j: j - 1
) -> tuple[sp.Matrix, sp.Matrix]:
    """Algorithm 4's b_FO and b_Exact at a θ, of the inner states φ_0 alone held.

    Before the backward step j, `rerun(j)` inner steps are run from φ_0 again. The Hessian-vector products are those of
    §2.2: (∂L_in/∂φ)ᵀb2 differentiated in θ and φ with b2 held fixed.
    """

    def descend(steps: int) -> Point:
        return dict(zip(problem.phi, states(problem, alphas[:steps], at)[-1], strict=True)) | at

    held = sp.Matrix(sp.symbols(f"b2_:{len(problem.phi)}"))
    functional = (sp.Matrix([problem.inner]).jacobian(problem.phi) * held).applyfunc(sp.expand)
    products = [functional.jacobian(x).T for x in (problem.theta, problem.phi)]
    outer, by_start = sp.Matrix([problem.outer]), _at(problem.start.jacobian(problem.theta).T, at)
    b1, b2 = (_at(outer.jacobian(x).T, descend(len(alphas))) for x in (problem.theta, problem.phi))
    first_order = (b1 + by_start * b2).applyfunc(sp.expand)
    for j in range(len(alphas), 0, -1):
        here = descend(rerun(j)) | dict(zip(held, b2, strict=True))
        h1, h2 = (_at(product, here) for product in products)
        b1, b2 = b1 - alphas[j - 1] * h1, b2 - alphas[j - 1] * h2
    return first_order, (b1 + by_start * b2).applyfunc(sp.expand)


S, P = sp.symbols("s p", integer=True, positive=True)
JACOBIAN, MIXED = sp.MatrixSymbol("J_{j-1}", P, S), sp.MatrixSymbol("B_j", P, S)
HESSIAN, START = sp.MatrixSymbol("H_j", P, P), sp.MatrixSymbol("J_0", P, S)
ADJOINT, OWN = sp.MatrixSymbol("b_j", P, 1), sp.MatrixSymbol(r"\partial_\theta", S, 1)
FIRST, TAIL = sp.MatrixSymbol("b_r", P, 1), sp.MatrixSymbol("b_0", P, 1)  # ∂L_out/∂φ, ∇_{φ_0} L_out
STEP = sp.Identity(P) - ALPHA * HESSIAN
MOVED = STEP * JACOBIAN - ALPHA * MIXED  # J_j
TERMS = sp.IndexedBase("D")
OWN_1, START_1, TAIL_1 = sp.symbols("L_theta V_theta b_0", real=True)


def explicit(form: sp.Expr, sizes: dict[sp.Symbol, int], values: dict[Any, sp.Matrix]) -> sp.Matrix:
    """A matrix form entry by entry, at sizes s and p, with explicit matrices for its symbols."""
    entries = {k.subs(sizes)[i, j]: v[i, j] for k, v in values.items() for i in range(v.rows) for j in range(v.cols)}
    return sp.Matrix(form.subs(sizes).doit().as_explicit()).subs(entries)


@step("state-jacobian", MOVED, r"J_j = %s")
def state_jacobian(form: sp.Expr) -> str:
    """Differentiate the inner step (3) in θ, with φ_{j−1} depending on θ: s = 1, p = 2, for any L_in, of which only the
    second derivatives matter."""
    theta = sp.Matrix([sp.Symbol("theta")])
    jacobian, mixed = (sp.Matrix(2, 1, sp.symbols(f"{name}:2")) for name in "JB")
    hessian = sp.Matrix(2, 2, lambda i, j: sp.Symbol(f"H{min(i, j)}{max(i, j)}"))
    phi = sp.Matrix(sp.symbols("phi1:3"))
    slope = sp.Matrix([(phi.T * hessian * phi)[0] / 2 + (phi.T * mixed * theta)[0]]).jacobian(phi).T
    path = dict(zip(phi, jacobian * theta, strict=True))
    stepped = (phi - ALPHA * slope).subs(path).jacobian(theta)
    return vanishes(stepped - explicit(form, {S: 1, P: 2}, {HESSIAN: hessian, MIXED: mixed, JACOBIAN: jacobian}))


@claim(
    "7-9",
    "(7)–(9)",
    says=r"D_j = %s,\quad \nabla_{\phi_{j-1}} L^{out} = %s",
    printed=(-ALPHA * MIXED.T * ADJOINT, STEP.T * ADJOINT),
)
def backward_step(mixed: sp.Expr, adjoint: sp.Expr) -> str:
    """The step of the induction, for every s and p: D_j + J_{j−1}ᵀb_{j−1} = J_jᵀb_j. With J_{j−1} arbitrary it holds
    for these D_j and b_{j−1} alone."""
    return same((mixed + JACOBIAN.T * adjoint, MOVED.T * ADJOINT))


@cache
def _scalar_jets(r: int) -> tuple[sp.Expr, dict[Any, sp.Expr]]:
    """The total derivative forwards (s = p = 1, all second derivatives arbitrary), and D_j, b_0 backwards."""
    h, b, a = (sp.symbols(f"{name}1:{r + 1}") for name in ("H", "B", "alpha"))
    jacobian, adjoint = START_1, (last := sp.Symbol("L_phi"))
    for i in range(r):
        jacobian = (1 - a[i] * h[i]) * jacobian - a[i] * b[i]
    values: dict[Any, sp.Expr] = {}
    for i in range(r, 0, -1):
        values[TERMS[i]] = -a[i - 1] * b[i - 1] * adjoint
        adjoint = (1 - a[i - 1] * h[i - 1]) * adjoint
    return OWN_1 + jacobian * last, values | {TAIL_1: adjoint}


@claim(
    "6",
    "(4), (6), Algorithm 2",
    says=r"\nabla_\theta L^{out} = %s",
    printed=OWN_1 + sp.Sum(TERMS[INDEX], (INDEX, 1, R)) + START_1 * TAIL_1,
)
def total_derivative(form: sp.Expr) -> str:
    """The gradient of one task's term of (4), differentiated as a whole, is what Algorithm 2 returns: ∂L_out/∂θ, all r
    terms D_j, and (∂V/∂θ)ᵀ∇_{φ_0} L_out. Base: r = 0. Step: (7)–(9). (The sum itself decided at r = 0…4; s = p = 1
    there.)"""
    gaps = []
    for r in range(5):
        total, values = _scalar_jets(r)
        gaps.append(total - form.subs(R, r).doit().subs(values))
    return worst(vanishes(*gaps), backward_step(-ALPHA * MIXED.T * ADJOINT, STEP.T * ADJOINT))


@claim("10-11", "(10)–(11), Algorithm 3", says=r"G_{FO} = %s", printed=OWN + START.T * FIRST)
def first_order_gradient(form: sp.Expr) -> str:
    """Zero second derivatives in (6)–(9) leave ∂L_out/∂θ + (∂V/∂θ)ᵀ∂L_out/∂φ, for every s and p: D_j = 0 and b_0 =
    b_r."""
    zero = {HESSIAN: sp.ZeroMatrix(P, P), MIXED: sp.ZeroMatrix(P, S), ADJOINT: FIRST}
    d, b_0 = ((-ALPHA * MIXED.T * ADJOINT).subs(zero).doit(), (STEP.T * ADJOINT).subs(zero).doit())
    return same((form, OWN + d + START.T * b_0))


PRODUCT, SLOPE = sp.MatrixSymbol("b_2", P, 1), sp.MatrixSymbol(r"\partial_\phi L^{in}", P, 1)


@claim("hvp", "§2.2", says=r"H(\theta, \phi) = %s", printed=SLOPE.T * PRODUCT)
def hessian_vector_products(form: sp.Expr) -> str:
    """Differentiating H = (∂L_in/∂φ)ᵀb2 in θ and φ gives both Hessian-vector products: any L_in, s = 2, p = 3."""
    theta, phi, b2 = (sp.Matrix(sp.symbols(f"{name}1:{n + 1}")) for name, n in (("theta", 2), ("phi", 3), ("b", 3)))
    slope = sp.Matrix([sp.Function("L")(*theta, *phi)]).jacobian(phi).T
    functional = explicit(form, {P: 3}, {SLOPE: slope, PRODUCT: b2})
    gaps = [functional.jacobian(x).T - slope.jacobian(x).T * b2 for x in (theta, phi)]
    return holds(*(gap.applyfunc(sp.expand) == sp.zeros(*gap.shape) for gap in gaps))


RERUN = INDEX - 1
EXACT_LOOP, FIRST_ORDER = sp.symbols("b_Exact b_FO", real=True)
ALPHAS = (sp.Rational(1, 2), sp.Rational(1, 3))
HERE = (sp.Rational(2, 3), sp.Rational(-5, 4))  # a point θ


@claim(
    "algorithm-4",
    "Algorithm 4",
    "checked on 1 instance",
    r"%s \text{ inner steps before the step } j,\quad %s",
    printed=(RERUN, FIRST_ORDER + (EXACT_LOOP - FIRST_ORDER) / Q),
)
def debiased_inner_loop(rerun: sp.Expr, returned: sp.Expr) -> str:
    """Algorithm 4, run with either coin, j − 1 inner steps from φ_0 before the backward step j, has the unrolled
    problem's gradient for its mean (r = 2, s = 2, p = 3, a polynomial problem at one θ)."""
    problem = polynomial_problem()
    at = dict(zip(problem.theta, HERE, strict=True))
    proxy, exact = algorithm_4(problem, ALPHAS, at, lambda j: int(rerun.subs(INDEX, j)))
    heads = [returned.subs({FIRST_ORDER: p, EXACT_LOOP: e}) for p, e in zip(proxy, exact, strict=True)]
    mean = sp.Matrix([(1 - Q) * p + Q * h for p, h in zip(proxy, heads, strict=True)])
    return instances(vanishes(mean - unrolled_gradient(problem, ALPHAS).subs(at)), "checked on 1 instance")
