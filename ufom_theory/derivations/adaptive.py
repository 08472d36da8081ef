"""Adaptive UFOM (22)–(24): the smoothed squares, debiased, have the means that (14) and (16) ask for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import sympy as sp

from ufom_theory.derivations.registry import claim, holds, step, vanishes, worst
from ufom_theory.derivations.second_moment import EXACT, PROXY, estimate
from ufom_theory.derivations.symbols import D2, Q

BETA, BEFORE = sp.Symbol("beta", positive=True), sp.Symbol("S_{k-1}", real=True)
UPDATES = sp.Symbol("k", integer=True, positive=True)  # k_upd
SMOOTHED = sp.Symbol("S_k", real=True)
FIRST, GRADIENT = sp.symbols("b_FO b_Exact", real=True)
OLD_AND_NEW = BETA * BEFORE + (1 - BETA) * D2


@step("constant-signal", D2 * (1 - BETA**UPDATES), "S_k = %s")
def constant_signal(form: sp.Expr) -> str:
    """A constant signal D², smoothed by (23) from S_0 = 0: base and step of the induction over k."""
    base = form.subs(UPDATES, 0)
    return vanishes(base, OLD_AND_NEW.subs(BEFORE, form) - form.subs(UPDATES, UPDATES + 1))


@claim("22", "(22)", says=r"\bar{\mathbb{D}}^2_k = %s", printed=SMOOTHED / (1 - BETA**UPDATES))
def debiased_average(form: sp.Expr) -> str:
    """Divided by 1 − β^k_upd, the smoothed square of a constant signal is that constant after any number of updates,
    and so is the mean of a noisy one, (23) being linear."""
    return vanishes(form.subs(SMOOTHED, D2 * (1 - BETA**UPDATES)) - D2)


def mean_estimate(update: sp.Expr) -> sp.Expr:
    """What three updates, debiased, are in the mean over every sequence of two equally likely tasks."""
    proxies, exacts = sp.symbols("f1:3", real=True), sp.symbols("g1:3", real=True)
    total = sp.S.Zero
    for tasks in itertools.product((0, 1), repeat=3):
        value = sp.S.Zero
        for i in tasks:
            value = update.subs({BEFORE: value, FIRST: proxies[i], GRADIENT: exacts[i]})
        total += value / 8
    return sp.expand(total) / (1 - BETA**3)


def _mean_is(update: sp.Expr, square: sp.Expr) -> str:
    mean = (
        sum(
            square.subs(dict(zip((FIRST, GRADIENT), pair, strict=True)))
            for pair in zip(sp.symbols("f1:3", real=True), sp.symbols("g1:3", real=True), strict=True)
        )
        / 2
    )

    def decided() -> Iterator[str]:  # three updates by enumeration; in general, one more update keeps the mean
        yield vanishes(sp.cancel(mean_estimate(update) - mean))
        signal = update.subs(BEFORE, D2 * (1 - BETA**UPDATES)).subs(square, D2)
        yield vanishes(signal - D2 * (1 - BETA ** (UPDATES + 1)))

    return worst(decided())


@claim("23", "(23)", says="S_k = %s", printed=BETA * BEFORE + (1 - BETA) * (FIRST - GRADIENT) ** 2)
def smoothing_of_bias(update: sp.Expr) -> str:
    """(23), debiased by (22), has the mean D² of the tasks: by an induction over the updates, and over all sequences of
    three tasks, each one of two."""
    return _mean_is(update, (FIRST - GRADIENT) ** 2)


@claim("24", "(24)", says="S_k = %s", printed=BETA * BEFORE + (1 - BETA) * GRADIENT**2)
def smoothing_of_second_moment(update: sp.Expr) -> str:
    """(24), debiased as (22) is, has the mean V², decided in the same way."""
    return _mean_is(update, GRADIENT**2)


@claim("erratum-6b", "(22)", "refuted", r"k_{upd} \ge %s", printed=sp.S.Zero, form=sp.S.One)
def before_the_first_update(first: sp.Expr) -> str:
    """The paper says that (22) serves at every step, the first too, with k_upd = 0; it is not so: it is 0/0 there, and
    D² from k_upd = 1 on. (The least k_upd at which it has a value.)"""
    counts = range(4)
    values = [(D2 * (1 - BETA**n)) / (1 - BETA**n) if n else sp.S.Zero / (1 - BETA**0) for n in counts]
    return holds(first == next(n for n in counts if values[n] == D2))


@claim(
    "erratum-12b",
    "released code",
    "refuted",
    r"\text{smoothed square} = %s",
    printed=(GRADIENT - FIRST) ** 2,
    form=(1 / Q - 1) ** 2 * (GRADIENT - FIRST) ** 2,
)
def overwritten_proxy(square: sp.Expr) -> str:
    """The paper says that (23) smooths ‖b_FO − b_Exact‖²; in the code released with it, it is not so: it subtracts
    b_Exact from UFOM's estimate, which has overwritten b_FO. That is (1/q − 1)² times too much: 361 at q = 0.05, 0 at q
    = 1."""
    after = estimate(sp.S.One).subs({EXACT: GRADIENT, PROXY: FIRST})
    return vanishes((after - GRADIENT) ** 2 - square)
