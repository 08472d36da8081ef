"""The other ways to differentiate through an inner loop, behind one signature; and a list of them all.

hypergradient(problem, theta, tasks, METHODS["implicit-cg"].make(problem.r))
outer_sgd(problem, theta, METHODS["forward"].make(problem.r), ...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ufom_runtime.estimators import EXACT, FOM, RECOMPUTED, UFOM, Estimator, Method
from ufom_runtime.methods.adaptive import AdaptiveUFOM
from ufom_runtime.methods.evolution import ES as ES
from ufom_runtime.methods.evolution import GuidedES as GuidedES
from ufom_runtime.methods.forward import Forward as Forward
from ufom_runtime.methods.implicit import Implicit as Implicit
from ufom_runtime.methods.implicit import proximal as proximal
from ufom_runtime.methods.method import RowMethod as RowMethod
from ufom_runtime.methods.reptile import REPTILE
from ufom_runtime.methods.reused import Checkpointing as Checkpointing
from ufom_runtime.methods.reused import RootCheckpointing as RootCheckpointing
from ufom_runtime.methods.reused import TruncatedBackprop as TruncatedBackprop
from ufom_runtime.methods.reversible import Reversible as Reversible
from ufom_runtime.methods.telescoping import Telescoping as Telescoping
from ufom_runtime.methods.telescoping import powers_of_two
from ufom_theory import Sweep, Truncated

Kind = Literal["exact", "biased", "unbiased", "other objective", "no gradient"]


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        make: an example of it for r inner steps, for `hypergradient` and `outer_sgd` (kinds "no gradient" and Adaptive
            UFOM: `outer_sgd` alone).
        kind: what its mean is against ∇M^(r); "other objective": the gradient of another function of θ.
        valid: where it may be used, in words.
    """

    make: Callable[[int], Method]
    kind: Kind
    valid: str


METHODS: dict[str, Entry] = {
    "fom": Entry(lambda r: FOM, "biased", "everywhere; identically zero where neither start nor outer loss contains θ"),
    "truncated": Entry(lambda r: TruncatedBackprop(-(-r // 10)), "biased", "K ≤ r; exact at K = r"),
    "stored": Entry(lambda r: EXACT, "exact", "everywhere; r states"),
    "unrolled": Entry(lambda r: Estimator(1.0, Sweep.unrolled()), "exact", "everywhere; r states and the graph"),
    "recomputed": Entry(lambda r: RECOMPUTED, "exact", "everywhere; (r − 1)(r − 2)/2 steps repeated"),
    "checkpointed": Entry(lambda r: Checkpointing(3), "exact", "everywhere"),
    "checkpointed-root": Entry(RootCheckpointing, "exact", "everywhere"),
    "ufom": Entry(lambda r: UFOM(0.3), "unbiased", "0 < q ≤ 1; pays where condition (20) holds"),
    "ufom-truncated-checkpointed": Entry(
        lambda r: UFOM(0.3, Sweep.checkpointed(3), Truncated(-(-r // 10))), "unbiased", "0 < q ≤ 1, K ≤ r"
    ),
    "forward": Entry(lambda r: Forward(), "exact", "few outer parameters; operations with third derivatives"),
    "implicit-cg": Entry(
        lambda r: Implicit("cg"), "biased", "φ_r near a stationary point, θ in the inner loss, H + λI positive definite"
    ),
    "implicit-neumann": Entry(
        lambda r: Implicit("neumann"), "biased", "φ_r near a stationary point, θ in the inner loss, 0 < η(H + λI) < 2"
    ),
    "reversible": Entry(
        lambda r: Reversible(), "other objective", "momentum gradient descent; an inner gradient that is deterministic"
    ),
    "roulette": Entry(lambda r: Telescoping(powers_of_two(r)), "unbiased", "horizons that end at r; up to r states"),
    "single-sample": Entry(
        lambda r: Telescoping(powers_of_two(r), kind="single"), "unbiased", "horizons that end at r; up to r states"
    ),
    "es": Entry(lambda r: ES(), "other objective", "everywhere; the smoothed objective's gradient, O(σ²) from ∇M"),
    "guided-es": Entry(lambda r: GuidedES(), "biased", "where FOM is not zero; biased even as σ → 0"),
    "adaptive-ufom": Entry(lambda r: AdaptiveUFOM(), "unbiased", "a run of outer_sgd, which keeps its state"),
    "reptile": Entry(lambda r: REPTILE, "no gradient", "V(θ, T) = θ: compare training only"),
}
"""Every method by name. A method of your own joins by METHODS["its-name"] = Entry(...)."""
