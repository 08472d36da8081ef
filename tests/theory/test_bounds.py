"""The bounds hold on problems whose constants are known, and are attained where they say so."""

import numpy as np
import pytest
import sympy as sp
import torch

from tests.grids import slow_unless
from ufom_theory import (
    AssumptionConstants,
    CostModel,
    Moments,
    Truncated,
    TwoTaskProblem,
    UfomError,
    bias_bound,
    bias_bound_printed,
    exponent,
    gradient_bound,
    optimal_q,
    rate_bound,
    rate_constant,
    smoothness_bound,
    time_bound,
)
from ufom_theory.derivations import bias_bound as bias_derivation
from ufom_theory.derivations import convergence, smoothness
from ufom_theory.derivations.registry import CLAIMS
from ufom_theory.derivations.symbols import (
    A_Q,
    EPSILON,
    GAP,
    L1,
    L2,
    L3,
    L_EFF,
    L_M,
    M1,
    M2,
    TAU,
    V2,
    at_length,
    step_sizes,
)


class SineProblem:
    """L_in = c·sin(u·θ + v·φ) + …, L_out likewise, V = W·θ + w·sin(t·θ): all constants of Assumption 1 in closed form.

    For L = Σ_n c_n·sin(u_n·θ + v_n·φ): L1 = Σ|c_n|·max(|u_n|, |v_n|), L2 and L3 with one and two more such factors,
    because ‖u_n v_nᵀ‖ = |u_n||v_n|. V's bounds are ‖W‖ + |w||t| and |w||t|².
    """

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        s, p, n, self.r = 2, 3, 4, int(rng.integers(1, 7))
        self.alphas = rng.uniform(0.05, 0.5, self.r)
        self.c_in, self.c_out = rng.uniform(-0.5, 0.5, (2, n))
        self.u, self.v = rng.normal(size=(2, n, s)) * 0.7, rng.normal(size=(2, n, p)) * 0.7
        self.weight, self.w, self.t = rng.normal(size=(p, s)) * 0.5, rng.normal(size=p) * 0.4, rng.normal(size=s)
        sizes = np.maximum(np.linalg.norm(self.u, axis=-1), np.linalg.norm(self.v, axis=-1))
        c = np.abs([self.c_in, self.c_out])
        l1, l2 = (c * sizes).sum(1).max(), (c * sizes**2).sum(1).max()
        m2 = np.linalg.norm(self.w) * np.linalg.norm(self.t) ** 2
        m1 = np.linalg.norm(self.weight, 2) + np.linalg.norm(self.w) * np.linalg.norm(self.t)
        self.constants = AssumptionConstants(m1, m2, l1, l2, (c[0] * sizes[0] ** 3).sum())

    def gradient(self, theta: np.ndarray, kept: int | None = None) -> np.ndarray:
        """Exact gradient (kept = None) or the proxy that keeps the last steps, by the backward loop."""
        u, v, c = self.u[0], self.v[0], self.c_in
        visited = [self.weight @ theta + self.w * np.sin(self.t @ theta)]
        for alpha in self.alphas:
            phase = np.cos(u @ theta + v @ visited[-1])
            visited.append(visited[-1] - alpha * v.T @ (c * phase))
        outer = self.c_out * np.cos(self.u[1] @ theta + self.v[1] @ visited[-1])
        b1, b2 = self.u[1].T @ outer, self.v[1].T @ outer
        for j in range(self.r, 0 if kept is None else self.r - kept, -1):
            bend = -c * np.sin(u @ theta + v @ visited[j - 1]) * (v @ b2)
            b1, b2 = b1 - self.alphas[j - 1] * u.T @ bend, b2 - self.alphas[j - 1] * v.T @ bend
        return b1 + (self.weight + np.outer(self.w, self.t) * np.cos(self.t @ theta)).T @ b2

    def value(self, theta: np.ndarray) -> float:
        phi = self.weight @ theta + self.w * np.sin(self.t @ theta)
        for alpha in self.alphas:
            phi = phi - alpha * self.v[0].T @ (self.c_in * np.cos(self.u[0] @ theta + self.v[0] @ phi))
        return float(self.c_out @ np.sin(self.u[1] @ theta + self.v[1] @ phi))


@pytest.mark.parametrize("seed", slow_unless(lambda seed: seed < 7, range(14)))
def test_bounds_hold_on_random_problems(seed):
    problem, rng = SineProblem(seed), np.random.default_rng(100 + seed)
    thetas = rng.normal(size=(150, 2)) * 4
    exact = np.array([problem.gradient(x) for x in thetas])
    constants, alphas = problem.constants, problem.alphas
    for kept in range(problem.r + 1):
        proxy = np.array([problem.gradient(x, kept) for x in thetas])
        measured = np.linalg.norm(proxy - exact, axis=1).max()
        assert measured <= bias_bound(constants, alphas, Truncated(kept)) * (1 + 1e-12) + 1e-12
        assert kept == problem.r or measured > 0
    assert bias_bound(constants, alphas) <= bias_bound_printed(constants, alphas)
    assert np.linalg.norm(exact, axis=1).max() <= gradient_bound(constants, alphas) * (1 + 1e-12)
    near = thetas + rng.normal(size=thetas.shape) * 1e-4
    apart = np.linalg.norm([problem.gradient(x) for x in near] - exact, axis=1) / np.linalg.norm(near - thetas, axis=1)
    assert 0 < apart.max() <= smoothness_bound(constants, alphas)


@pytest.mark.parametrize("seed", range(3))
def test_the_oracle_is_the_gradient(seed):
    problem, theta, h = SineProblem(seed), np.array([0.3, -0.8]), 1e-6
    numeric = [(problem.value(theta + h * e) - problem.value(theta - h * e)) / (2 * h) for e in np.eye(2)]
    np.testing.assert_allclose(problem.gradient(theta), numeric, rtol=1e-7)


@pytest.mark.parametrize("alpha", np.geomspace(1e-3, 0.5, 14))
def test_bounds_hold_on_the_toy(alpha):
    problem = TwoTaskProblem(float(alpha), 10, (0.5, 1.5), (0.0, 10.0), 12.0)
    alphas, constants = np.full(10, alpha), problem.constants
    theta = np.linspace(-60, 60, 20_001)
    proxy, exact = problem.gradients(theta)
    bias = bias_bound(constants, alphas, theta_in_losses=False)
    assert np.abs(proxy - exact).max() <= bias <= bias_bound(constants, alphas) <= bias_bound_printed(constants, alphas)
    assert np.abs(exact).max() <= gradient_bound(constants, alphas, theta_in_losses=False)
    steepest = np.abs(np.diff(exact.mean(0))).max() / (theta[1] - theta[0])
    assert 0 < steepest <= smoothness_bound(constants, alphas, theta_in_losses=False)


def test_toys_gradient_against_differences():
    problem = TwoTaskProblem(0.1, 10, (0.5, 1.5), (0.0, 10.0), 12.0)

    def loss(theta: float) -> np.ndarray:
        values = []
        for a, b in zip(problem.a, problem.b, strict=True):
            phi = theta
            for _ in range(problem.r):
                phi -= problem.alpha * (piece(phi + 1e-6, a, b) - piece(phi - 1e-6, a, b)) / 2e-6
            values.append(piece(phi, a, b))
        return np.array(values)

    def piece(x: float, a: float, b: float) -> float:
        z, reach = abs(x - b / a), problem.A
        if z <= reach:
            return a * z**2 / 2
        if z <= reach + 1:
            return -a * (z - reach) ** 3 / 6 + a * (z - reach) ** 2 / 2 + a * reach * z - a * reach**2 / 2
        return (a / 2 + a * reach) * z - a / 6 - a * reach**2 / 2 - a * reach / 2

    for theta in (-30.0, -12.4, 3.0, 12.6, 19.1, 40.0):
        numeric = (loss(theta + 1e-3) - loss(theta - 1e-3)) / 2e-3
        np.testing.assert_allclose(problem.gradients(theta)[1], numeric, rtol=1e-4)


class SharpProblem:
    """L_in = −h(oθ + φ), L_out = ℓ(oθ + φ), V = M1·θ, o = 1 or 0, in floats: admissible for any constants.

    h' is c·z − sgn(z)·L3·z²/2 up to |z| = c/L3 and constant beyond, with c = min(L2, √(2·L1·L3)); ℓ' is L1 above 0 and
    falls smoothly to 0 below, so that M is bounded from below.
    """

    def __init__(self, constants: AssumptionConstants, own: bool):
        self.c, self.own = constants, float(own)
        self.curvature = min(constants.L2, np.sqrt(2 * constants.L1 * constants.L3))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        end = self.curvature / self.c.L3
        z = x.abs().clamp(max=end)
        return -(self.curvature * z**2 / 2 - self.c.L3 * z**3 / 6 + self.curvature * end / 2 * (x.abs() - z))

    def outer(self, x: torch.Tensor) -> torch.Tensor:
        t = (-x * 2 * self.c.L2 / (3 * self.c.L1)).clamp(0, 1)  # ℓ' = L1·(1 − 3t² + 2t³)
        return self.c.L1 * x.clamp(min=0) - 3 * self.c.L1**2 / (2 * self.c.L2) * (t - t**3 + t**4 / 2)

    def gradient(self, theta: float, alphas: np.ndarray, kept: int) -> float:
        """The gradient that keeps the last steps: autodiff through the unrolled loop, the first steps detached."""
        x = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        phi = self.c.M1 * x
        for j, alpha in enumerate(alphas):
            (slope,) = torch.autograd.grad(self.inner(self.own * x + phi).sum(), phi, create_graph=True)
            phi = phi - alpha * (slope if j >= len(alphas) - kept else slope.detach())
        return float(torch.autograd.grad(self.outer(self.own * x + phi), x)[0])


@pytest.mark.parametrize("seed", slow_unless(lambda seed: seed < 25, range(200)))
def test_bounds_are_attained_for_all_constants(seed):
    rng = np.random.default_rng(seed)
    values, own = 10 ** rng.uniform(-1.5, 1.0, 5), bool(seed % 4)
    constants = AssumptionConstants(*values)
    alphas = rng.uniform(0.01, 1.0, int(rng.integers(1, 8))) / max(1.0, constants.L2)
    problem, kept = SharpProblem(constants, own), int(rng.integers(len(alphas) + 1))
    exact = problem.gradient(1e-300, alphas, len(alphas))
    assert exact == pytest.approx(gradient_bound(constants, alphas, own), rel=1e-12)
    found = exact - problem.gradient(1e-300, alphas, kept)
    assert found == pytest.approx(bias_bound(constants, alphas, Truncated(kept), own), rel=1e-12, abs=1e-12 * exact)
    for theta in rng.normal(size=2):
        there = problem.gradient(theta, alphas, len(alphas)), problem.gradient(theta, alphas, kept)
        assert abs(there[0] - there[1]) <= found * (1 + 1e-12) + 1e-12 * exact
        assert abs(there[0]) <= exact * (1 + 1e-12)


@pytest.mark.parametrize(
    ("constants", "bias"), [((1, 0, 1, 10, 1), 5.506), ((1, 0, 2, 2, 0.1), 3.3858), ((1, 0, 1, 3, 0), 0)]
)
def test_slope_and_third_derivative_bound_the_bias(constants, bias):
    assert bias_bound(AssumptionConstants(*constants), np.full(10, 0.1)) == pytest.approx(bias, rel=1e-3)


@pytest.mark.parametrize("own", [True, False])
def test_bounds_are_the_derived_ones(own):
    values, alphas = {M1: 0.4, M2: 0.0, L1: 1.7, L2: 0.8, L3: 2.0}, [0.3, 0.05, 0.7]
    constants, point = AssumptionConstants(*values.values()), dict(zip(step_sizes(3), alphas, strict=True))
    point |= values | {L_EFF: 0.8}
    for kept in range(4):
        bias = float((sp.S.Zero + bias_derivation.bias(3, kept, int(own))).subs(point))
        assert bias_bound(constants, alphas, Truncated(kept), own) == pytest.approx(bias, rel=1e-13, abs=1e-13)
    gradient = float(bias_derivation.gradient(3, int(own)).subs(point))
    assert gradient_bound(constants, alphas, own) == pytest.approx(gradient, rel=1e-13)
    printed = at_length(CLAIMS["15"].printed, 3).subs(point)
    assert bias_bound_printed(constants, alphas) == pytest.approx(float(printed), rel=1e-12)


@pytest.mark.parametrize(
    ("constants", "alpha", "r", "tight", "printed", "gradient"),
    [
        ((1, 2, 0.7), 0.1, 10, 3.868605429, 4.139407809, 7.868605429),
        ((0.3, 5, 1.5), 0.5, 4, 54.462890625, 95.31005859, 60.962890625),
    ],
)
def test_bounds_at_the_reference_points(constants, alpha, r, tight, printed, gradient):
    m1, l1, l2 = constants
    assumed = AssumptionConstants(M1=m1, M2=0, L1=l1, L2=l2, L3=l2)
    alphas = np.full(r, alpha)
    assert bias_bound(assumed, alphas) == pytest.approx(tight, rel=1e-9)
    assert bias_bound_printed(assumed, alphas) == pytest.approx(printed, rel=1e-9)
    assert gradient_bound(assumed, alphas) == pytest.approx(gradient, rel=1e-9)


@pytest.mark.parametrize("own", [True, False])
def test_smoothness_is_the_derived_one(own):
    alphas = [0.3, 0.05, 0.7]
    values = {M1: 0.4, M2: 0.9, L1: 1.7, L2: 0.8, L3: 2.3}
    point = values | {L_EFF: 0.8} | dict(zip(step_sizes(3), alphas, strict=True))
    derived = float(smoothness.recursion(3, int(own)).subs(point))
    assert smoothness_bound(AssumptionConstants(*values.values()), alphas, own) == pytest.approx(derived, rel=1e-13)


def test_rates_are_the_derived_ones():
    point = {GAP: 3.0, L_M: 2.0, A_Q: 5.0, V2: 1.5, EPSILON: 0.2, TAU: 50}
    h = float(convergence.constant_18().subs(point))
    assert rate_constant(3.0, 2.0, 1.5, 0.2) == pytest.approx(h, rel=1e-13)
    gamma = np.arange(1, 51) ** -0.5
    s = {convergence.STEPS: gamma.sum(), convergence.SQUARES: (gamma**2).sum()}
    exactly = rate_bound(3.0, 2.0, 5.0, gamma)
    assert exactly == pytest.approx(float(convergence.any_steps().subs(point | s)), rel=1e-13)
    assert exactly <= float(convergence.root_steps().subs(point)) <= 5.0 * h * 50**-0.3


def test_time_bound_is_iterations_times_cost():
    moments, cost, q = Moments(0.5, 2.0), CostModel(r=10, c2=3.0), 0.25
    a = 3 * 0.5 + 2.0
    iterations = (rate_constant(1.0, 4.0, 2.0, 0.1) * a / 0.01) ** exponent(0.1)
    expected = iterations * (cost.c_det + q * cost.c_rnd)
    assert time_bound(moments, cost, q, 1.0, 4.0, 0.01, 0.1) == pytest.approx(expected, rel=1e-12)
    m = exponent(0.1)
    best = optimal_q(moments, cost, m)
    assert time_bound(moments, cost, best.q, 1.0, 4.0, 0.01, 0.1) <= time_bound(moments, cost, q, 1.0, 4.0, 0.01, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: bias_bound(c, [0.1, -1]), "> 0"),
        (lambda c: bias_bound(c, [[0.1]]), "one vector"),
        (lambda c: bias_bound(c, [0.1], Truncated(2)), "keep K ≤ r"),
        (lambda c: gradient_bound(c, [1e300] * 2), "exceeds floating point"),
        (lambda c: smoothness_bound(c, [1e200] * 2), "exceeds floating point"),
        (lambda c: rate_bound(1e300, 1, 1, [1e-300]), "the rate bound exceeds floating point: its arguments"),
        (lambda c: rate_bound(-1, 1, 1, [1.0]), "≥ 0"),
        (lambda c: rate_bound(1, 1, 1, [0.0]), "> 0"),
        (lambda c: rate_constant(1, 1, 1, 0.0), r"\(0, 0.5\)"),
        (lambda c: rate_constant(1, 1, 0, 0.1), "> 0"),
        (lambda c: time_bound(Moments(1, 1), CostModel(r=2), 1.0, 1, 1, -1), "> 0"),
        (lambda c: time_bound(Moments(1, 1), CostModel(r=2), 1.0, 1, 1, 1, 0.7), r"\(0, 0.5\)"),
        (lambda c: CostModel(r=2).time(1e-300, Moments(1e300, 1), m=2), "within floating point"),
        (lambda c: AssumptionConstants(-1, 0, 0, 0, 0), "Assumption 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call(AssumptionConstants(1, 1, 1, 1, 1))
