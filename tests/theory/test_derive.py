"""Results derived again: their numbers against the library's, their LaTeX against the paper's and a parser."""

import os
import subprocess
import sys

import numpy as np
import pytest
import sympy as sp

from ufom_theory import AssumptionConstants, CostModel, Moments, UfomError, bounds, derive, optimal_q

DRAWS = int(os.environ.get("UFOM_DRAWS", "2000"))


def drawn(seed):
    rng = np.random.default_rng(seed)
    v2 = 10 ** rng.uniform(-2, 2, DRAWS)
    return rng, v2, v2 * 10 ** rng.uniform(-6, -0.3, DRAWS), v2 * rng.uniform(0, 1, DRAWS)


@pytest.mark.parametrize("m", [0.5, 1, 1.5, 2])
@pytest.mark.parametrize("batch", [None, 4])
def test_20_and_21_are_what_optimal_q_computes(m, batch):
    rng, v2, d2, mean = drawn(0)
    c_det, c_rnd = 10 ** rng.uniform(-1, 2, (2, DRAWS))
    given = {"D2": d2, "V2": v2, "C_det": c_det, "C_rnd": c_rnd} | ({"mean_gradient_sq": mean} if batch else {})
    moments = Moments(d2, v2, mean_gradient_sq=mean)
    p = optimal_q(moments, CostModel.of(c_det, c_rnd), m=m, batch=batch or 1)
    holds = derive("20", m=m, batch=batch).numpy()(**given)
    sure = np.abs(p.condition_margin) > 1e-9 * c_rnd * v2
    np.testing.assert_array_equal(holds[sure], (p.condition_margin > 0)[sure])
    root = derive("21", m=m, batch=batch).numpy()(**given)
    assert holds.any()
    np.testing.assert_allclose(root[holds], p.q[holds], rtol=1e-10)


def test_numbers_may_be_given_for_the_costs():
    given = derive("21", m=2, c_det=11.0, c_rnd=55.0)
    assert given.arguments == ("D2", "V2")
    assert given.numpy()(D2=0.02, V2=0.9) == pytest.approx(0.1073846826, rel=1e-9)


def test_15_is_the_sharp_bound():
    rng = np.random.default_rng(1)
    for kept in (0, 2):
        value = derive("15", kept=kept).numpy()
        for _ in range(DRAWS // 40):
            m1, l1, l2, alpha = 10 ** rng.uniform(-1, 0.5, 4)
            r, large = int(rng.integers(2, 12)), 1e6  # L3 large enough for L_eff = L2
            expected = bounds.bias_bound(
                AssumptionConstants(m1, 1.0, l1, l2, large), [alpha] * r, bounds.Truncated(kept)
            )
            assert value(M1=m1, L1=l1, L2=l2, L3=large, alpha=alpha, r=r) == pytest.approx(expected, rel=1e-10)
    small = derive("15").numpy()(M1=1, L1=1, L2=10, L3=1, alpha=0.1, r=10)
    assert small == pytest.approx(2 * ((1 + 0.1 * np.sqrt(2)) ** 10 - 1), rel=1e-12)
    assert small == pytest.approx(5.51, abs=5e-3)


def test_18_bounds_the_exact_rate():
    values = {"D2": 0.1, "V2": 1.0, "q": 0.3, "Delta": 2.0, "L_M": 1.5, "epsilon": 0.2}
    for tau in (1, 30, 1000):
        steps = np.arange(1, tau + 1) ** -0.5
        exact = bounds.rate_bound(2.0, 1.5, (1 / 0.3 - 1) * 0.1 + 1, steps)
        assert derive("18").numpy()(**values, tau=tau) >= exact
        batched = bounds.rate_bound(2.0, 1.5, ((1 / 0.3 - 1) * 0.1 + 1 + 3 * 0.5) / 4, steps)
        assert derive("18", batch=4).numpy()(**values, tau=tau, mean_gradient_sq=0.5) >= batched


@pytest.mark.parametrize(("s", "c"), [(0.6, 2.0), (1, 2.0)])
def test_local_is_where_the_recursion_ends(s, c):
    h, q, e = 0.8, 0.4, 1.0
    moment = (1 / q - 1) * 0.1 + 1.0
    for k in range(1, 200_000):
        rate = c * k**-s
        e = (1 - h * rate) ** 2 * e + rate**2 * moment
    given = {"D2": 0.1, "V2": 1.0, "q": q, "h": h} | ({"c": c} if s == 1 else {})
    assert derive("local", s=s).numpy()(**given) == pytest.approx(e / rate, rel=2e-3)


LATEX = {
    ("20", ()): r"\mathbb{D}^2 < \frac{C_{rnd}}{m \left(C_{det} + C_{rnd}\right)} \mathbb{V}^2",
    ("21", ()): r"C_{rnd} \left(\mathbb{V}^2 - \mathbb{D}^2\right) q^{2} + \left(1 - m\right) \mathbb{D}^2 C_{rnd} q"
    r" - m \mathbb{D}^2 C_{det} = 0",
    ("21", (("m", 1), ("batch", 4))): r"C_{rnd} \left(\mathbb{V}^2 + 3 \|\nabla \mathcal{M}\|^2 - \mathbb{D}^2\right)"
    r" q^{2} - \mathbb{D}^2 C_{det} = 0",
    (
        "15",
        (),
    ): r"\mathbb{D}_{bound} = \left(1 + M_{1}\right) L_{1} \left(\left(1 + L_{eff} \alpha\right)^{r} - 1\right)",
}


@pytest.mark.parametrize(("what", "latex"), LATEX.items(), ids=str)
def test_latex_is_factored_as_the_paper_writes_it(what, latex):
    number, given = what
    assert derive(number, **dict(given)).latex() == latex


@pytest.mark.parametrize("number", ["15", "18", "20", "21", "local"])
def test_latex_can_be_parsed(number):
    from matplotlib.mathtext import MathTextParser

    size = {} if number == "15" else {"batch": sp.Symbol("B", integer=True, positive=True)}
    MathTextParser("path").parse(f"${derive(number, **size).latex()}$")


def test_what_is_shown_is_what_is_computed():
    """The shown terms' sum, rebuilt, vanishes at the computed root."""
    for given in ({}, {"m": 1}, {"m": 2, "batch": 3}):
        found = derive("21", **given)
        total = sp.Add(*(sp.prod(factors) for factors in found.terms))
        q = next(x for x in total.free_symbols if x.name == "q")
        point = {x: sp.Rational(i + 3, 7) for i, x in enumerate(sorted(total.free_symbols - {q}, key=str))}
        assert abs(total.subs(q, found.value).subs(point).evalf(40)) < 1e-35


def test_it_is_lazy():
    code = (
        "import sys, ufom_theory; from ufom_theory import *; assert 'sympy' not in sys.modules; ufom_theory.derive(20)"
    )
    subprocess.run([sys.executable, "-c", code + "; assert 'sympy' in sys.modules"], check=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: derive("17"), "there are 15, 18, 20, 21, local"),
        (lambda: derive("15", m=2), "does not depend on m: it takes kept"),
        (lambda: derive("20", m=0), "finite and > 0"),
        (lambda: derive("20", m="x"), "a number or a sympy expression"),
        (lambda: derive("20", batch=1.5), "integer ≥ 1"),
        (lambda: derive("21", m=True), "m = True must be a number"),
        (lambda: derive("15", kept=False), "kept = False must be a number"),
        (lambda: derive("15", kept=1.5), "kept = 1.5 must be an integer ≥ 0"),
        (lambda: derive("local", s=1.5), r"\(0, 1\]"),
        (lambda: derive("21", c_det=float("inf")), "finite"),
        (lambda: derive("20", c_det=float("nan")), "c_det = nan must be finite"),
        (lambda: derive("local", s=sp.nan), "s = nan must be finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()
