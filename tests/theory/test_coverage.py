"""How often the interval of q* holds the true one, for light and heavy tails, with and without the tail warning."""

import numpy as np
import pytest

from tests.grids import slow_unless
from ufom_theory import CostModel, Moments, UfomError, optimal_q

COST, D2, V2 = CostModel(r=10), 0.05, 1.0
TRUTH = optimal_q(Moments(D2, V2), COST, m=2.0).q
REPEATS = 500


def tasks(kind, n, sigma, correlation, rng):
    """‖F − G‖² and ‖G‖² of n tasks with the means D2 and V2."""
    z = rng.normal(size=(2, n))
    z[1] = correlation * z[0] + np.sqrt(1 - correlation**2) * z[1]
    x = np.exp(sigma * z - sigma**2 / 2) if kind == "log-normal" else np.abs(1 + sigma * z)
    return x * [[D2], [V2]]


def coverage(kind, n, sigma, correlation):
    """Share warned of, and the coverage of the intervals without the warning and with it."""
    rng, found = np.random.default_rng([n, int(10 * sigma), int(10 * correlation)]), []
    for _ in range(REPEATS):
        prediction = optimal_q(Moments.of_tasks(*tasks(kind, n, sigma, correlation, rng)), COST, m=2.0)
        low, high = prediction.interval
        found.append(("a few tasks carry" in prediction.why, low <= TRUTH <= high))
    warned, covered = np.array(found).T
    with_warning = covered[warned].mean() if warned.any() else np.nan
    print(f"{kind}, n = {n}, σ = {sigma}, correlation {correlation}: warned {warned.mean():.2f}, coverage "
          f"{covered[~warned].mean():.3f} without and {with_warning:.3f} with the warning")  # fmt: skip
    return warned.mean(), covered[~warned].mean(), with_warning


@pytest.mark.parametrize(
    ("n", "sigma", "correlation"),
    slow_unless(
        lambda case: case in ((16, 1.0, 0.9), (64, 1.6, 0.0)),
        [(16, 1.0, 0.0), (16, 1.0, 0.9), (64, 1.6, 0.0), (64, 1.6, 0.9)],
    ),
)
def test_intervals_of_heavy_tails_cover(n, sigma, correlation):
    warned, without, with_ = coverage("log-normal", n, sigma, correlation)
    assert 0.1 < warned < 0.9  # neither always nor never: the coverage of both kinds means something
    assert without >= 0.92
    assert with_ >= 0.92


@pytest.mark.parametrize("sigma", slow_unless(lambda sigma: sigma == 0.3, (0.1, 0.3)))
def test_normal_tasks_are_not_warned_of(sigma):
    warned, without, _ = coverage("normal", 16, sigma, 0.0)
    assert warned <= 0.1
    assert 0.92 <= without <= 0.98


def test_few_tasks_have_a_wider_interval():
    def width(n):
        low, high = optimal_q(Moments(D2, V2, np.diag([1e-6, 1e-4]), n), COST, m=2.0).interval
        return np.log(high / low)

    assert width(4) / width(None) == pytest.approx(3.182446 / 1.959964, rel=1e-3)  # t of 3 degrees of freedom
    assert width(10**6) == pytest.approx(width(None), rel=1e-5)
    with pytest.raises(UfomError, match="n = 1 task shows no errors"):
        Moments(D2, V2, np.diag([1e-6, 1e-4]), 1)
    assert optimal_q(Moments(D2, V2, n=1), COST, m=2.0).interval == pytest.approx((TRUTH, TRUTH), rel=1e-15)


def test_what_weakens_the_answer_is_said_with_it():
    rng = np.random.default_rng(0)
    tail = optimal_q(Moments.of_tasks(*tasks("log-normal", 16, 2.5, 0.0, rng)), COST, m=2.0)
    assert "More tasks only meet more of it: take a smaller inner step, clip" in tail.why
    assert "measure D² and V² on more tasks" not in tail.why
    clock = optimal_q(Moments(D2, V2), CostModel(r=10, c1=2.3, c1_sem=2.0), m=2.0)
    assert clock.why.endswith("C1 is known to ± 87% only: time it again, on a quiet machine")
    assert optimal_q(Moments(D2, V2), CostModel(r=10, c1_sem=0.01), m=2.0).doubts == ""
