"""optimal_q against 50-digit arithmetic, scipy's minimum of (19), finite differences and simulated measurements."""

import json
import os
import subprocess
import sys

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from ufom_theory import CostModel, Moments, Sweep, Truncated, UfomError, exponent, optimal_q

DRAWS = int(os.environ.get("UFOM_DRAWS", "400"))


def reference(d2: float, v2: float, cost: CostModel, m: float) -> mpmath.mpf:
    """The root of (21) by the textbook formula in 50 digits, from the very floats that optimal_q was given."""
    with mpmath.workdps(50):
        d, v, exponent_, det, rnd = (mpmath.mpf(x) for x in (d2, v2, m, cost.c_det, cost.c_rnd))
        a, b, c = rnd * (v - d), (1 - exponent_) * rnd * d, -exponent_ * d * det
        if a == 0:
            return min(mpmath.mpf(1), -c / b)
        return min(mpmath.mpf(1), (-b + mpmath.sqrt(b * b - 4 * a * c)) / (2 * a))


def test_reference_point():
    p = optimal_q(Moments(d2=0.02, v2=0.9), CostModel(r=10), m=2.0)
    assert p.q == pytest.approx(0.1073846826, rel=1e-9)
    assert p.dq_dd2 == pytest.approx(3.0705635341, rel=1e-10)
    assert p.dq_dv2 == pytest.approx(-0.0682347452, abs=1e-10)
    assert p.pays == "yes"
    assert p.interval == (p.q, p.q)


@pytest.mark.parametrize(
    ("d2", "v2", "q"), [(53.21197334, 2229.315673, 0.111879), (2659.539581, 200500.3125, 0.080358)]
)
def test_toy_of_figure_1(d2, v2, q):
    assert optimal_q(Moments(d2, v2), CostModel(r=10), m=2).q == pytest.approx(q, abs=5e-7)


@pytest.mark.parametrize(("batch", "q"), [(1, 0.274), (4, 0.152), (32, 0.053)])
def test_batches(batch, q):
    p = optimal_q(Moments(0.1, 1.0, mean_gradient_sq=0.5), CostModel(r=10), batch=batch, m=2)
    assert p.q == pytest.approx(q, abs=5e-4)


def test_root_keeps_its_digits():
    rng = np.random.default_rng(0)
    v2 = 10 ** rng.uniform(-6, 6, DRAWS)
    d2 = v2 * 10 ** rng.uniform(-16, 0, DRAWS)
    for d, v, r, m in zip(d2, v2, rng.integers(1, 10_001, DRAWS), rng.choice([0.5, 0.8, 1, 1.5, 2, 2.2], DRAWS)):  # noqa: B905
        cost = CostModel(r=int(r))
        expected = reference(d, v, cost, m)
        assert abs(optimal_q(Moments(d, v), cost, m=m).q - expected) <= 1e-12 * expected


@settings(deadline=None, max_examples=DRAWS // 5)
@given(
    rho=st.floats(-6, 1).map(lambda x: 10**x),
    r=st.integers(1, 300),
    m=st.sampled_from([0.5, 0.75, 1.0, 2.0, 3.0]),
    slots=st.integers(0, 5),
)
def test_nothing_on_a_fine_grid_is_sooner(rho, r, m, slots):
    moments, cost = Moments(rho, 1.0), CostModel(r=r, c2=2.5, sweep=Sweep.checkpointed(slots))
    p = optimal_q(moments, cost, m=m)
    grid = np.append(np.geomspace(1e-7, 1, 4000), 1.0)
    assert cost.time(p.q, moments, m) <= cost.time(grid, moments, m).min() * (1 + 1e-12)


def test_against_scipys_minimum_of_19():
    rng = np.random.default_rng(1)
    for rho, r, m in zip(10 ** rng.uniform(-5, -0.5, 50), rng.integers(2, 500, 50), rng.uniform(0.5, 3, 50)):  # noqa: B905
        moments, cost = Moments(rho, 1.0), CostModel(r=int(r))
        found = minimize_scalar(
            lambda u, c=cost, x=moments, m=m: np.log(c.time(np.exp(u), x, m)), bounds=(-15, 0), method="bounded",
            options={"xatol": 1e-12},
        )  # fmt: skip
        assert optimal_q(moments, cost, m=m).q == pytest.approx(np.exp(found.x), rel=1e-6)


def test_below_m_1_the_minimum_can_be_inside_though_condition_20_fails():
    moments, cost = Moments(3.0, 1.0), CostModel(r=1000)
    p = optimal_q(moments, cost, m=0.5)
    assert p.condition_margin < 0
    assert p.q < 0.01
    assert cost.time(p.q, moments, 0.5) < cost.time(1.0, moments, 0.5) / 2
    assert "only sufficient" in p.why


@pytest.mark.parametrize("m", [0.5, 1.0, 2.0])
def test_sensitivities_against_central_differences(m):
    d2, v2, h = 0.03, 0.8, 1e-6
    cost = CostModel(r=20, c2=3.0)
    p = optimal_q(Moments(d2, v2), cost, m=m)
    by_d2 = (optimal_q(Moments(d2 + h, v2), cost, m=m).q - optimal_q(Moments(d2 - h, v2), cost, m=m).q) / (2 * h)
    by_v2 = (optimal_q(Moments(d2, v2 + h), cost, m=m).q - optimal_q(Moments(d2, v2 - h), cost, m=m).q) / (2 * h)
    assert p.dq_dd2 == pytest.approx(by_d2, rel=1e-7)
    assert p.dq_dv2 == pytest.approx(by_v2, rel=1e-7)


def test_speedup_is_the_ratio_of_times():
    moments, cost = Moments(0.05, 1.0), CostModel(r=30, c2=2.0)
    p = optimal_q(moments, cost, m=2)
    assert p.speedup_over_exact == pytest.approx(cost.time(1.0, moments, m=2) / cost.time(p.q, moments, m=2), rel=1e-13)
    assert p.cost_over_fom == pytest.approx((cost.c_det + p.q * cost.c_rnd) / 31, rel=1e-13)


def test_speedup_for_long_loops_tends_to_its_limit():
    assert optimal_q(Moments(0.1, 1.0), CostModel(r=10**7), m=2.0).speedup_over_exact == pytest.approx(
        1 / (4 * 0.1 * 0.9), rel=1e-5
    )


def test_edges():
    cost = CostModel(r=10)
    zero = optimal_q(Moments(0.0, 1.0), cost, m=2)
    assert (zero.q, zero.pays) == (0.0, "yes")
    assert "proxy is exact" in zero.why
    assert zero.speedup_over_exact == pytest.approx((cost.c_det + cost.c_rnd) / cost.c_det)
    equal = optimal_q(Moments(1.0, 1.0), cost, m=2)
    assert (equal.q, equal.pays, equal.speedup_over_exact) == (1.0, "no", 1.0)
    assert (equal.dq_dd2, equal.dq_dv2) == (0.0, 0.0)
    assert optimal_q(Moments(1.0, 0.0), cost, m=2).q == 1.0
    assert optimal_q(Moments(0.1, 1.0), CostModel(r=5, proxy=Truncated(5)), m=2).q == 1.0  # a correction that is free


def test_broadcasting():
    d2, r = np.array([[0.01], [0.1], [0.9]]), np.array([5, 50])
    p = optimal_q(Moments(d2, 1.0), CostModel(r=r), m=2)
    singly = [[optimal_q(Moments(float(d), 1.0), CostModel(r=int(n)), m=2).q for n in r] for d in d2[:, 0]]
    assert p.q.shape == p.pays.shape == p.why.shape == p.interval[0].shape == (3, 2)
    np.testing.assert_array_equal(p.q, singly)
    assert isinstance(optimal_q(Moments(0.1, 1.0), CostModel(r=5), m=2).q, float)


@pytest.mark.parametrize("correlation", [-0.6, 0.0, 0.95])
def test_interval_covers_simulated_truth(correlation):
    rng = np.random.default_rng(2)
    truth, cost = (0.05, 1.0), CostModel(r=20, c1_sem=0.01, c2_sem=0.02)
    sem = np.array([0.1 * truth[0], 0.1 * truth[1]])
    cov = np.outer(sem, sem) * np.array([[1, correlation], [correlation, 1]])
    d2, v2 = rng.multivariate_normal(truth, cov, 4000).T
    c1, c2 = rng.normal(1, 0.01, 4000), rng.normal(1, 0.02, 4000)
    p = optimal_q(Moments(d2, v2, cov=cov), CostModel(r=20, c1=c1, c2=c2, c1_sem=0.01, c2_sem=0.02), m=2)
    q = optimal_q(Moments(*truth), cost, m=2).q
    covered = np.mean((p.interval[0] <= q) & (q <= p.interval[1]))
    assert 0.935 <= covered <= 0.965  # 4000 draws: ± 0.007 at two standard errors


@pytest.mark.parametrize("scale", [1e-300, 1e-168, 1.0, 1e150, 1e300])
def test_the_interval_is_free_of_the_unit(scale):
    """Squares of small D² underflow; only relative errors count."""
    exactly = optimal_q(Moments(0.01 * scale, scale), CostModel(r=3), m=2)
    assert exactly.interval == (exactly.q, exactly.q)
    assert exactly.pays == "yes"
    if 1e-150 < scale < 1e150:
        cov = np.array([[1e-6, 1e-5], [1e-5, 1e-3]])
        near = optimal_q(Moments(0.01, 1.0, cov), CostModel(r=3), m=2).interval
        assert optimal_q(Moments(0.01 * scale, scale, cov * scale**2), CostModel(r=3), m=2).interval == pytest.approx(
            near, rel=1e-12
        )


@pytest.mark.parametrize("m", [0.5, 1.0, 2.0])
def test_the_smallest_bias_still_has_a_q(m):
    p = optimal_q(Moments(1e-320, 1.0), CostModel(r=30_000, c2=1000.0), m)
    assert 0 < p.q < 1e-150
    assert p.speedup_over_exact > 1


def test_interval_at_the_end_of_the_range():
    p = optimal_q(Moments(0.35, 1.0, cov=np.diag([0.1, 0.01])), CostModel(r=10), m=2)
    assert (p.pays, p.interval[1]) == ("cannot tell", 1.0)
    assert "more tasks" in p.why
    p = optimal_q(Moments(0.42, 1.0), CostModel(r=10, c1=1.0, c2=1.0, c1_sem=0.5), m=2)
    assert (p.pays, p.interval[1]) == ("cannot tell", 1.0)
    assert "C1 and C2 again" in p.why


def test_interval_of_a_batch_uses_the_mean_gradient():
    cov = np.diag([1e-4, 1e-3])
    loose = Moments(0.1, 1.0, np.diag([*np.diag(cov), 0.01]), mean_gradient_sq=0.5)
    tight = Moments(0.1, 1.0, cov, mean_gradient_sq=0.5)
    widths = [np.diff(optimal_q(m, CostModel(r=10), batch=8, m=2).interval)[0] for m in (loose, tight)]
    assert widths[0] > 1.5 * widths[1] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Moments(float("nan"), 1), "finite number ≥ 0"),
        (lambda: Moments(-1, 1), "finite number ≥ 0"),
        (lambda: Moments(1, float("inf")), "finite number ≥ 0"),
        (lambda: Moments(0, 0), "measure at another θ"),
        (lambda: Moments("x", 1), "not a number"),
        (lambda: Moments([], 1), "empty"),
        (lambda: Moments(1, 1, cov=np.eye(8)), "last axes"),
        (lambda: Moments(1, 1, cov=-np.eye(2)), "never negative"),
        (lambda: CostModel(r=0), "at least 1"),
        (lambda: CostModel(r=2.5), "must be an integer"),
        (lambda: CostModel(r=5, c1=0), "> 0"),
        (lambda: CostModel(r=5, c2_sem=-1), "≥ 0"),
        (lambda: CostModel(r=5, proxy=Truncated(6)), "keep K ≤ r"),
        (lambda: CostModel(r=5).time(1.5, Moments(1, 2), m=2), "probability"),
        (lambda: Sweep.checkpointed(-1), "at least 0"),
        (lambda: Sweep("stored", 3), "go with"),
        (lambda: Sweep.parse("all"), "is unknown"),
        (lambda: Sweep.parse("checkpointed"), "checkpointed:SLOTS"),
        (lambda: optimal_q(Moments(0.1, 1), CostModel(r=5), m=0), "> 0"),
        (lambda: optimal_q(Moments(0.1, 1), CostModel(r=5), batch=0, m=2), "at least 1"),
        (lambda: optimal_q(Moments(0.1, 1), CostModel(r=5), batch=4, m=2), "needs ‖∇M‖²"),
        (lambda: exponent(0.5), r"\[0, 0.5\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()


@pytest.mark.parametrize("text", ["stored", "recomputed", "unrolled", "checkpointed:3"])
def test_sweeps_are_parsed_as_they_print(text):
    assert str(Sweep.parse(text)) == text
    assert Sweep.parse(f"{text}:one-pass") == Sweep.parse(text)  # as older results name them


def exhaustive_extra_steps(r: int, slots: int, known: dict[tuple[int, int], int]) -> int:
    """Fewest advances that visit r states backwards from the first one, by dynamic programming over the first slot."""
    if r <= 1 or slots == 0:
        return r * (r - 1) // 2
    if (r, slots) not in known:
        known[r, slots] = min(
            k + exhaustive_extra_steps(r - k, slots - 1, known) + exhaustive_extra_steps(k, slots, known)
            for k in range(1, r)
        )
    return known[r, slots]


def test_binomial_count_against_dynamic_programming():
    known: dict[tuple[int, int], int] = {}
    for slots in range(13):
        for r in range(1, 121):
            assert Sweep.checkpointed(slots).extra_steps(r) == exhaustive_extra_steps(r, slots, known)


def test_one_stored_state_at_q_1_beats_the_papers_optimal_ufom():
    moments = Moments(0.1, 1.0)
    ufom = CostModel(r=100)
    one_state = CostModel(r=100, sweep=Sweep.checkpointed(1))
    assert ufom.time(optimal_q(moments, ufom, m=2).q, moments, m=2) > 1.9 * one_state.time(1.0, moments, m=2)


def test_theory_imports_numpy_alone():
    code = (
        "import sys, json; from ufom_theory import Moments, CostModel, optimal_q;"
        "optimal_q(Moments(d2=.02, v2=.9), CostModel(r=10), m=2).why;"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "sympy", "scipy", "pandas", "typer", "rich"} & set(json.loads(out))


def test_costs_given_directly():
    given, model = CostModel.of(c_det=11.0, c_rnd=55.0), CostModel(r=10)
    assert (given.c_det, given.c_rnd) == (model.c_det, model.c_rnd) == (11.0, 55.0)
    moments = Moments(0.02, 0.9)
    ours, theirs = optimal_q(moments, given, m=2), optimal_q(moments, model, m=2)
    assert (ours.q, ours.speedup_over_exact, ours.cost_over_fom) == (
        theirs.q, theirs.speedup_over_exact, theirs.cost_over_fom
    )  # fmt: skip
    uncertain = CostModel.of(np.array([11.0, 22.0]), 55.0, c_det_sem=1.1, c_rnd_sem=11.0)
    assert uncertain.log_kappa_sem == pytest.approx([np.hypot(0.1, 0.2), np.hypot(0.05, 0.2)], rel=1e-12)
    with pytest.raises(UfomError, match="c_rnd = 0 must be a finite number > 0"):
        CostModel.of(1.0, 0.0)


@pytest.mark.parametrize("c1", [1e-18, 1e-300])
def test_a_nearly_free_proxy_keeps_its_interval_below_m_1(c1):
    """There q* hardly depends on ρ, and q² + (m − 1)q + mκ cancels: q² of (21) over ρ does not."""
    cost = CostModel(r=10, c1=c1, c1_sem=c1 / 10)
    moments = Moments(1e-3, 1.0, np.diag([1e-8, 1e-4]))
    p = optimal_q(moments, cost, m=0.5)
    kappa_error = 1.959963984540054 * cost.log_kappa_sem
    assert np.log(p.interval) - np.log(p.q) == pytest.approx([-kappa_error, kappa_error], rel=1e-6)
    assert p.dq_dd2 == pytest.approx(float(reference_slope(p)), rel=1e-9)


def reference_slope(p):
    """∂q/∂D² of (21)'s root in 60 digits."""
    with mpmath.workdps(700):
        rho, kappa, m = mpmath.mpf(p.rho), mpmath.mpf(p.cost.c_det) / mpmath.mpf(p.cost.c_rnd), mpmath.mpf(p.m)

        def root(rho):
            s = mpmath.sqrt(((m - 1) * rho) ** 2 + 4 * m * kappa * rho * (1 - rho))
            return 2 * m * kappa * rho / (s - (m - 1) * rho)

        return mpmath.diff(root, rho)


def test_a_proxy_that_keeps_every_step_is_exact():
    p = optimal_q(Moments(0.0, 1.0), CostModel(r=10, proxy=Truncated(10)), m=2.0)
    assert (p.q, p.pays) == (1.0, "no")
    assert "it is the exact gradient" in p.why


def test_a_ratio_below_floating_point_is_refused():
    with pytest.raises(UfomError, match="below floating point"):
        optimal_q(Moments(1e-300, 1e30), CostModel(r=10), m=2.0)
    assert optimal_q(Moments(1e-300, 1.0), CostModel(r=10), m=1.0).q == pytest.approx(20**0.5 * 1e-151)


def test_a_single_task_without_noise_is_named():
    """The exact gradient of one task is ∇M itself: the promise of (19) rests on noise that is not there."""
    cost = CostModel(r=10)
    for batch in (1, 4):
        assert "has no noise here" in optimal_q(Moments(0.1, 1.0, mean_gradient_sq=1.0), cost, 2.0, batch=batch).why
        assert "no noise" not in optimal_q(Moments(0.1, 1.0, mean_gradient_sq=0.9), cost, 2.0, batch=batch).why
    assert "no noise" not in optimal_q(Moments(0.1, 1.0), cost, 2.0).why
    assert "no noise" not in optimal_q(Moments(2.0, 1.0, mean_gradient_sq=1.0), cost, 2.0).why  # exact steps anyway
    sampled = Moments(0.1, 1.0, np.eye(3) * 1e-4, 30, mean_gradient_sq=1.0)
    assert not sampled.noiseless
