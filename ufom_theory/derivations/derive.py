"""A numbered result derived again under assumptions of one's own: `derive("20", m=1, batch=4)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy as sp
from sympy.printing.latex import LatexPrinter

from ufom_theory.checks import UfomError
from ufom_theory.derivations import convergence, optimum
from ufom_theory.derivations.symbols import (
    ALPHA,
    C_DET,
    C_RND,
    D2,
    EPSILON,
    KAPPA,
    L1,
    L2,
    L3,
    M1,
    RHO,
    TAU,
    V2,
    J,
    K,
    M,
    Q,
    R,
)

BATCH = sp.Symbol("B", integer=True, positive=True)
MEAN2 = sp.Symbol("mean_gradient_sq", nonnegative=True)
GAP_M, L_EFF = sp.symbols("Delta L_eff", positive=True)
CURVATURE, FIRST_STEP, STEP = sp.symbols("h c gamma", positive=True)
NAMES = {
    D2: r"\mathbb{D}^2",
    V2: r"\mathbb{V}^2",
    C_DET: r"C_{det}",
    C_RND: r"C_{rnd}",
    MEAN2: r"\|\nabla \mathcal{M}\|^2",
    EPSILON: r"\epsilon",
    TAU: "k",
    L_EFF: r"L_{eff}",
}


@dataclass(frozen=True, eq=False)
class Derived:
    """A result, as `derive` found it.

    Attributes:
        number: the paper's number.
        left: LaTeX of the left side with its relation, "" where the right side says all.
        terms: the factors of each term in the paper's order; their sum is the right side, or an equation's left.
        right: LaTeX after the sum, such as "= 0".
        value: what `numpy` computes, an expression or a relation.
    """

    number: str
    left: str
    terms: tuple[tuple[sp.Expr, ...], ...]
    right: str
    value: Any

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments of `numpy()`."""
        return tuple(sorted(str(symbol) for symbol in self.value.free_symbols))

    def latex(self) -> str:
        """The result in the paper's notation, factored as the paper writes it."""
        total = " + ".join(_term(factors) for factors in self.terms if 0 not in factors).replace("+ -", "- ")
        return " ".join(part for part in (self.left, total, self.right) if part)

    def text(self) -> str:
        """What `numpy` computes, for a terminal."""
        name = {"15": "D_bound = ", "18": "min E‖∇M(θ_u)‖² ≤ ", "21": "q* = ", "local": "lim E‖θ_k − θ*‖²/γ_k = "}
        return f"{name.get(self.number, '')}{self.value}"

    def numpy(self) -> Callable[..., Any]:
        """A function of the keyword arguments `arguments`, numbers or arrays: what the result says in numbers.

        (15), (18) and "local": the right side; (20): whether it holds; (21): its root in (0, 1).
        """
        return sp.lambdify([sp.Symbol(name) for name in self.arguments], _plain(self.value), "numpy")  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """The same with symbols free of assumptions, so that they are called by name."""
    return value.subs({symbol: sp.Symbol(str(symbol)) for symbol in value.free_symbols}, simultaneous=True)


class _Printer(LatexPrinter):  # type: ignore[misc]
    """Sums as one writes them: what is added first, what is subtracted last."""

    def _as_ordered_terms(self, expr: sp.Expr, order: str | None = None) -> list[sp.Expr]:
        return sorted(expr.args, key=lambda term: bool(term.as_coeff_Mul()[0].is_negative))


def _term(factors: tuple[sp.Expr, ...]) -> str:
    """Numbers first, then the factors in their order, sums in brackets."""
    printer = _Printer({"symbol_names": NAMES, "order": "none"})
    split = [(sp.S.One, x) if x.is_Add or not (x.is_number or sp.denom(x) == 1) else x.as_coeff_Mul() for x in factors]
    number, rest = sp.prod(x for x, _ in split), [x for _, x in split if x != 1]
    words = [printer.doprint(x) for x in rest]
    if len(rest) > 1 or number != 1:
        words = [rf"\left({word}\right)" if x.is_Add else word for x, word in zip(rest, words, strict=True)]
    sign, size = "-" * bool(number < 0), abs(number)
    return sign + " ".join(([] if size == 1 and words else [printer.doprint(size)]) + words)


def _given(name: str, value: Any, default: sp.Expr) -> sp.Expr:
    """A number or an expression > 0; the symbol if None."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | sp.Expr):
        raise UfomError(f"{name} = {value!r} must be a number or a sympy expression: sympy.Symbol('x') leaves it open")
    expression = value if isinstance(value, sp.Expr) else sp.nsimplify(value, rational=True)
    if expression is sp.nan or expression.is_extended_positive is False or expression.is_finite is False:
        raise UfomError(f"{name} = {value} must be finite and > 0")
    return expression


def _moment(batch: Any) -> sp.Expr:
    """What stands for V² in A(q): V² + (B − 1)·‖∇M‖² for a batch, up to the factor 1/B."""
    size = _given("batch", batch, sp.S.One)
    if size.is_integer is False or (size.is_number and size < 1):
        raise UfomError(f"batch = {batch} must be an integer ≥ 1")
    return V2 + (size - 1) * MEAN2


def _second_moment(batch: Any) -> sp.Expr:
    """A(q) of the batch mean, with (1/q − 1)·D² written in that order."""
    correction = sp.Mul(1 / Q - 1, D2, evaluate=False)
    total = sp.Add(correction, *sp.Add.make_args(_moment(batch)), evaluate=False)
    return total if batch is None else sp.Mul(1 / _given("batch", batch, sp.S.One), total, evaluate=False)


def _bias_bound(kept: Any = None) -> Derived:
    none = kept is None or (kept == 0 and not isinstance(kept, bool))
    length = sp.S.Zero if none else _given("kept", kept, K)
    if length.is_integer is False:
        raise UfomError(f"kept = {kept} must be an integer ≥ 0: it is a number of backward steps")
    total = sp.summation(ALPHA * L_EFF * L1 * (1 + ALPHA * L_EFF) ** (R - J), (J, 1, R - length))
    growth = sp.simplify(total / L1)
    value = ((1 + M1) * L1 * growth).subs(L_EFF, sp.Min(L2, sp.sqrt(2 * L1 * L3)))
    return Derived("15", r"\mathbb{D}_{bound} =", ((1 + M1, L1, growth),), "", value)


def _rate(batch: Any = None) -> Derived:
    """With Δ ≤ A·Δ/V² as A ≥ V²; a batch has A_B ≥ V²/B."""
    constant = convergence.constant_18().subs(V2, V2 / _given("batch", batch, sp.S.One))
    moment, power = _second_moment(batch), TAU ** (EPSILON - sp.S.Half)
    left = r"\min_{u < k} \mathbb{E}\|\nabla \mathcal{M}(\theta_u)\|^2 \leq"
    return Derived("18", left, ((*_factors(moment), constant, power),), "", moment * constant * power)


def _factors(moment: sp.Expr) -> tuple[sp.Expr, ...]:
    return moment.args if moment.is_Mul else (moment,)


def _costs(c_det: Any, c_rnd: Any) -> dict[sp.Symbol, sp.Expr]:
    return {C_DET: _given("c_det", c_det, C_DET), C_RND: _given("c_rnd", c_rnd, C_RND)}


def _condition(m: Any = None, batch: Any = None, c_det: Any = None, c_rnd: Any = None) -> Derived:
    (bias,) = sp.solve(optimum.condition(), D2)  # the condition is linear in D², and falls with it
    share = sp.factor(sp.cancel(bias / V2)).subs(_costs(c_det, c_rnd)).subs(M, _given("m", m, M))
    moment = _moment(batch)
    return Derived("20", r"\mathbb{D}^2 <", ((share, moment),), "", sp.Lt(D2, share * moment))


def _quadratic(m: Any = None, batch: Any = None, c_det: Any = None, c_rnd: Any = None) -> Derived:
    exponent, moment, costs = _given("m", m, M), _moment(batch), _costs(c_det, c_rnd)
    leading, linear, constant = optimum.quadratic().all_coeffs()
    ratios = [sp.cancel(x) for x in (leading / (V2 - D2) / C_RND, linear / D2 / C_RND, constant / D2 / C_DET)]
    one, by_q, free = (x.subs(M, exponent) for x in ratios)  # 1, 1 − m and −m
    det, rnd = costs[C_DET], costs[C_RND]
    terms = ((one, rnd, moment - D2, Q**2), (by_q, D2, rnd, Q), (free, D2, det))
    small = exponent.is_number and exponent < 1
    root = (optimum.root_small_exponent() if small else optimum.root()).subs(M, exponent)
    value = sp.simplify(root.subs({RHO: D2 / moment, KAPPA: det / rnd}))
    return Derived("21", "", terms, "= 0", value)


def _local(s: Any = None, batch: Any = None) -> Derived:
    """e_k/γ_k → A/lim w with w_k = (1 − (γ_{k−1}/γ_k)(1 − hγ_k)²)/γ_k for γ_k = c·k^(−s)."""
    power, k = _given("s", s, sp.S.Half), sp.Symbol("k", positive=True)
    if not power.is_number or power > 1:
        raise UfomError(f"s = {s} must be a number in (0, 1]: γ_k = c·k^(−s)")
    rate = FIRST_STEP * k ** (-power)
    weight = sp.limit(sp.expand((1 - (k / (k - 1)) ** power * (1 - CURVATURE * rate) ** 2) / rate), k, sp.oo)
    moment = _second_moment(batch)
    left = r"\lim_{k \to \infty} \mathbb{E}\|\theta_k - \theta^*\|^2 / \gamma_k ="
    return Derived("local", left, ((1 / sp.expand(weight), *_factors(moment)),), "", moment / weight)


RESULTS: dict[str, Callable[..., Derived]] = {
    "15": _bias_bound,
    "18": _rate,
    "20": _condition,
    "21": _quadratic,
    "local": _local,
}


def derive(number: str | int, **assumptions: Any) -> Derived:
    """Derive a numbered result again under other assumptions.

    >>> derive("20", m=1, c_det=11, c_rnd=55).latex()
    '\\\\mathbb{D}^2 < \\\\frac{5}{6} \\\\mathbb{V}^2'

    Args:
        number: "15", D_bound of a proxy that keeps K steps, for one step size α, with L_eff = min(L2, √(2·L1·L3));
            "18", the rate for γ_k = k^(−1/2); "20", the condition; "21", the quadratic of q*; "local", the last iterate
            near a minimiser for γ_k = c·k^(−s).
        assumptions: m, c_det, c_rnd for "20" and "21", `batch` (B tasks with their own coins) for all but "15", `kept`
            (K) for "15", s for "local". Numbers or sympy expressions; what is not given stays a symbol, and batch is 1.

    Raises:
        UfomError: another number, an assumption that the result does not depend on, a value that is not > 0.
    """
    name = str(number).strip("()")
    if name not in RESULTS:
        raise UfomError(f"result {number!r} cannot be derived again: there are {', '.join(RESULTS)}")
    result = RESULTS[name]
    taken = result.__code__.co_varnames[: result.__code__.co_argcount]
    given = {key: value for key, value in assumptions.items() if value is not None}
    if other := sorted(set(given) - set(taken)):
        raise UfomError(f"({name}) does not depend on {', '.join(other)}: it takes {', '.join(taken)}")
    return result(**given)
