"""Any differentiable inner step φ_j = Φ_j(θ, φ_{j−1}): the chain rule, the two first-order proxies, their errors.

States of an optimiser are part of φ. J_j = ∂Φ_j/∂φ and B_j = ∂Φ_j/∂θ; a proxy puts J̃_j and B̃_j in their place, on the
same trajectory: the identity proxy (the paper's FOM) has J̃ = I and B̃ = 0, the held one holds ∂L_in/∂φ constant.
"""

import sympy as sp

from ufom_theory.derivations.registry import claim, same, vanishes

ALPHA, BETA = sp.symbols("alpha beta", positive=True)
HESSIAN = sp.Symbol("H", real=True)
DECAY = sp.Symbol("w", real=True)


def invariant() -> tuple[sp.Matrix, sp.Matrix]:
    """b1 + (dφ_j/dθ)ᵀb2 before and after the backward step j, b1 += B_jᵀb2, then b2 = J_jᵀb2, for arbitrary J_j, B_j.

    Differentiating φ_j = Φ_j(θ, φ_{j−1}) gives dφ_j/dθ = J_j·dφ_{j−1}/dθ + B_j. With b1 = ∂L_out/∂θ, b2 = ∂L_out/∂φ at
    j = r it is dL_out/dθ, and every step leaves it as it is: (6)–(9) for any step, proved by induction over j.
    """
    s, p = 2, 3
    before, step, mixed = (
        sp.Matrix(rows, columns, sp.symbols(f"{name}:{rows * columns}"))
        for name, rows, columns in (("D", p, s), ("J", p, p), ("B", p, s))
    )
    b1, b2 = sp.Matrix(sp.symbols(f"b1_:{s}")), sp.Matrix(sp.symbols(f"b2_:{p}"))
    at_j = b1 + (step * before + mixed).T * b2
    at_j_minus_1 = (b1 + mixed.T * b2) + before.T * (step.T * b2)
    return at_j.applyfunc(sp.expand), at_j_minus_1.applyfunc(sp.expand)


def difference(r: int = 3) -> tuple[sp.Expr, sp.Expr]:
    """G − F, and Σ_j[(B_j − B̃_j)ᵀP_jᵀ + B̃_jᵀ(P_j − P̃_j)ᵀ]λ + V'ᵀ(P_0 − P̃_0)ᵀλ, P_j = J_r…J_{j+1}, in transposes.

    Norms of the second form bound ‖G − F‖ by L1·[Σ_j(‖B_j − B̃_j‖·‖P_j‖ + ‖B̃_j‖·‖P_j − P̃_j‖) + M1·‖P_0 − P̃_0‖].
    """
    names = {name: sp.symbols(f"{name}1:{r + 1}", commutative=False) for name in ("J", "Jt", "B", "Bt")}
    start, slope = sp.symbols("V lambda", commutative=False)

    def product(kind: str, j: int) -> sp.Expr:
        return sp.prod(names[kind][j:])  # J_{j+1}ᵀ … J_rᵀ

    def gradient(steps: str, mixed: str) -> sp.Expr:
        total = sum((names[mixed][j - 1] * product(steps, j) for j in range(1, r + 1)), sp.S.Zero)
        return total * slope + start * product(steps, 0) * slope

    split = start * (product("J", 0) - product("Jt", 0)) * slope
    for j in range(1, r + 1):
        b, held = names["B"][j - 1], names["Bt"][j - 1]
        split += ((b - held) * product("J", j) + held * (product("J", j) - product("Jt", j))) * slope
    return sp.expand(gradient("J", "B") - gradient("Jt", "Bt")), sp.expand(split)


def _jacobians(step: sp.Matrix, state: sp.Matrix, slope: sp.Expr, parameter: sp.Symbol) -> tuple[sp.Matrix, ...]:
    """(J, B, J̃, B̃) of a step in which `slope` stands for ∂L_in/∂φ; J̃ and B̃ hold it constant."""
    held = sp.Symbol("held", real=True)
    frozen = step.subs(slope, held)
    return step.jacobian(state), step.jacobian([parameter]), frozen.jacobian(state), frozen.jacobian([parameter])


def gradient_descent() -> tuple[sp.Matrix, sp.Matrix]:
    """J̃ and B̃ of the held proxy for φ − α·L', L' = H·φ: 1 and 0, so both proxies are one for gradient descent."""
    phi, theta = sp.symbols("phi theta", real=True)
    *_, step, mixed = _jacobians(sp.Matrix([phi - ALPHA * (HESSIAN * phi)]), sp.Matrix([phi]), HESSIAN * phi, theta)
    return step, mixed


def momentum() -> tuple[sp.Matrix, sp.Matrix]:
    """J − I and J − J̃ (held) of v ← βv + Hφ, φ ← φ − αv on the state (φ, v).

    As α → 0 the first keeps the entry β − 1, so ‖J − I‖ ≥ 1 − β and the bound does not vanish though D does. Its row of
    the parameters is O(α): the outer loss sees these alone, and there the bound is to be applied.
    """
    phi, v, theta = sp.symbols("phi v theta", real=True)
    slope = HESSIAN * phi
    velocity = BETA * v + slope
    state = sp.Matrix([phi, v])
    exact, _, held, _ = _jacobians(sp.Matrix([phi - ALPHA * velocity, velocity]), state, slope, theta)
    return exact - sp.eye(2), exact - held


def weight_decay() -> tuple[sp.Expr, sp.Expr]:
    """B̃ of the held proxy and of the identity one for φ − α(L' + w·φ), θ = w: −α·φ and 0.

    On hyperparameters of the optimiser the identity proxy vanishes; the held one does not.
    """
    phi = sp.Symbol("phi", real=True)
    step = sp.Matrix([phi - ALPHA * (HESSIAN * phi + DECAY * phi)])
    return _jacobians(step, sp.Matrix([phi]), HESSIAN * phi, DECAY)[3][0], sp.S.Zero


S, P = sp.symbols("s p", integer=True, positive=True)
STEP, MIXED = sp.MatrixSymbol("J_j", P, P), sp.MatrixSymbol("B_j", P, S)
BEFORE, ADJOINT = sp.MatrixSymbol("D_{j-1}", P, S), sp.MatrixSymbol("b_j", P, 1)


@claim("any-step", "ours", says=r"b_1 \mathrel{+}= %s,\quad b_{j-1} = %s", form=(MIXED.T * ADJOINT, STEP.T * ADJOINT))
def backward_step(own: sp.Expr, adjoint: sp.Expr) -> str:
    """(6)–(9) for any differentiable inner step φ_j = Φ_j(θ, φ_{j−1}), for every s and p: D_j = J_jD_{j−1} + B_j, and
    b_1 + D_jᵀb_j is kept."""
    return same((own + BEFORE.T * adjoint, (STEP * BEFORE + MIXED).T * ADJOINT))


@claim("held-decay", "ours", says=r"\tilde B = %s", form=-ALPHA * sp.Symbol("phi", real=True))
def held_decay(form: sp.Expr) -> str:
    """Decoupled weight decay, φ − α(L' + wφ), in w: the proxy that holds the gradient constant sees it; the identity
    proxy gives 0."""
    return vanishes(weight_decay()[0] - form)
