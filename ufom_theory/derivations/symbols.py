"""The symbols of the paper, each once, with the assumptions the paper states for it."""

import sympy as sp

Q = sp.Symbol("q", positive=True)  # probability of the exact correction
D2, V2 = sp.symbols("D2 V2", positive=True)  # 𝔻² (14) and 𝕍² (16)
RHO = sp.Symbol("rho", positive=True)  # D2/V2
KAPPA = sp.Symbol("kappa", positive=True)  # C_det/C_rnd
M = sp.Symbol("m", positive=True)  # exponent of the time to precision; 2/(1 − 2ε) in the paper
EPSILON = sp.Symbol("epsilon", nonnegative=True)
C1, C2, C_DET, C_RND = sp.symbols("C1 C2 C_det C_rnd", positive=True)

R = sp.Symbol("r", integer=True, positive=True)  # inner steps
K = sp.Symbol("K", integer=True, nonnegative=True)  # proxy length
J = sp.Symbol("j", integer=True, positive=True)
ALPHA = sp.Symbol("alpha", positive=True)  # a constant inner step size
M1, M2, L1, L2, L3 = sp.symbols("M1 M2 L1 L2 L3", positive=True)  # Assumption 1

GAMMA = sp.Symbol("gamma", positive=True)  # an outer step size
TAU = sp.Symbol("tau", integer=True, positive=True)  # outer iterations, as in Algorithm 1
A_Q = sp.Symbol("A_q", positive=True)  # A(q) = (1/q − 1)·D2 + V2, Lemma 1's bound
L_M = sp.Symbol("L_M", positive=True)  # Lipschitz constant of ∇M
GAP = sp.Symbol("Delta", positive=True)  # M(θ_0) − M_*
DELTA = sp.Symbol("delta", positive=True)  # the precision asked for


def step_sizes(r: int) -> tuple[sp.Symbol, ...]:
    """α_1 … α_r as symbols."""
    return sp.symbols(f"alpha1:{r + 1}", positive=True)  # type: ignore[no-any-return]
