"""Numbers computed once by other means, of the paper's toy and of memory at equal states."""

import numpy as np
import pytest

from ufom_theory import CostModel, Moments, Sweep, TwoTaskProblem, optimal_q


def least_time(moments, cost, m=1.0):
    return cost.time(optimal_q(moments, cost, m=m).q, moments, m)


@pytest.mark.parametrize(("alpha", "gain"), [(0.01, 1.29), (0.03, 1.97), (0.05, 2.54)])
def test_the_toy_at_its_minimiser(alpha, gain):
    problem = TwoTaskProblem(a=(0.5, 1.5), b=(0.0, 10.0), A=400.0, r=10, alpha=alpha)
    proxy, exact = problem.gradients(problem.theta_star)
    d2, v2 = np.mean((proxy - exact) ** 2), np.mean(exact**2)
    moments = Moments(d2, v2, cross=np.mean(proxy * exact), proxy_sq=np.mean(proxy**2))
    cost = CostModel(r=10)
    assert least_time(moments, cost) / least_time(moments.scaled().moments, cost) == pytest.approx(gain, abs=5e-3)
    stratified = np.mean(proxy - exact) ** 2 / d2  # what stratified coins take off D²
    assert 0.2 < stratified < 0.275


@pytest.mark.parametrize(("m", "ufom", "gain", "recomputed"), [(2, 567, 1.85, 2105), (1, 371, 2.82, 1024)])
def test_at_equal_memory_ufom_stays_ahead(m, ufom, gain, recomputed):
    """One stored state, r = 100, ρ = 0.1; against the paper's sweep, which holds one state fewer, m decides."""
    moments, one = Moments(0.1, 1.0), CostModel(r=100, sweep=Sweep.checkpointed(1))
    exact = one.time(1.0, moments, m)
    assert exact == 1046
    assert least_time(moments, one, m) == pytest.approx(ufom, abs=0.5)
    assert exact / least_time(moments, one, m) == pytest.approx(gain, abs=5e-3)
    assert least_time(moments, CostModel(r=100), m) == pytest.approx(recomputed, abs=0.5)
