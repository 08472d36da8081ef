"""The symbols of the paper, each once, with the assumptions the paper states for it."""

import sympy as sp

Q = sp.Symbol("q", positive=True)  # probability of the exact correction
COIN = sp.Symbol("xi", real=True)  # ξ, 0 or 1
OWN = sp.Symbol("o", nonnegative=True)  # 1 where the losses contain θ, else 0
D2, V2 = sp.symbols("D2 V2", positive=True)  # 𝔻² (14) and 𝕍² (16)
RHO = sp.Symbol("rho", positive=True)  # D2/V2
KAPPA = sp.Symbol("kappa", positive=True)  # C_det/C_rnd
M = sp.Symbol("m", positive=True)  # exponent of the time to precision; 2/(1 − 2ε) in the paper
EPSILON = sp.Symbol("epsilon", nonnegative=True)
C1, C2, C_DET, C_RND = sp.symbols("C1 C2 C_det C_rnd", positive=True)

R = sp.Symbol("r", integer=True, positive=True)  # inner steps
K = sp.Symbol("K", integer=True, nonnegative=True)  # proxy length
J = sp.Symbol("j", integer=True, positive=True)
INDEX = sp.Symbol("j", integer=True)  # of a sum or product whose range may be empty
ALPHA = sp.Symbol("alpha", positive=True)  # a constant inner step size
M1, M2, L1, L2, L3 = sp.symbols("M1 M2 L1 L2 L3", positive=True)  # Assumption 1
L_EFF = sp.Symbol("L_eff", positive=True)  # min(L2, √(2·L1·L3)), the bound of every inner Hessian block

GAMMA = sp.Symbol("gamma", positive=True)  # an outer step size
TAU = sp.Symbol("tau", integer=True, positive=True)  # outer iterations, as in Algorithm 1
A_Q = sp.Symbol("A_q", positive=True)  # A(q) = (1/q − 1)·D2 + V2, Lemma 1's bound
L_M = sp.Symbol("L_M", positive=True)  # Lipschitz constant of ∇M
GAP = sp.Symbol("Delta", positive=True)  # M(θ_0) − M_*
DELTA = sp.Symbol("delta", positive=True)  # the precision asked for


STEP_SIZES = sp.IndexedBase("alpha")  # α_j of any index


def step_sizes(r: int) -> tuple[sp.Symbol, ...]:
    """α_1 … α_r as symbols."""
    return sp.symbols(f"alpha1:{r + 1}", positive=True)  # type: ignore[no-any-return]


def at_length(form: sp.Expr, r: int, **others: int) -> sp.Expr:
    """A form with sums and products over r inner steps, at a number of them; α_1 … α_r become `step_sizes`."""
    named = {R: r} | {symbol: others[str(symbol)] for symbol in form.free_symbols if str(symbol) in others}
    written = sp.S.Zero + form.subs(named).doit()
    return written.subs({STEP_SIZES[j]: alpha for j, alpha in enumerate(step_sizes(r), 1)})
