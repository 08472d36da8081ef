"""What a hypergradient costs: Proposition 1 for every sweep and proxy. Derived in `derivations/complexity.py`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ufom_theory.checks import Number, UfomError, broadcast, finite, instance, integer, plain, positive, scalar
from ufom_theory.quantities import Moments

SweepKind = Literal["stored", "recomputed", "checkpointed", "unrolled"]


@dataclass
class Calls:
    """Calls counted the paper's way: gradients (inner and outer) and Hessian-vector products (both blocks at once).

    What is counted is an integer; what is expected need not be.
    """

    gradients: float = 0
    hessian_vector_products: float = 0

    def price(self, c1: float = 1.0, c2: float = 1.0) -> float:
        """What they cost: C1 each gradient, C2 each product."""
        return c1 * self.gradients + c2 * self.hessian_vector_products


def binomial_steps(r: int, slots: int) -> int:
    """Least number of inner steps repeated when r states are visited backwards with φ_0 and `slots` more states held.

    t(r, c) = n·r − C(c + n, n − 1) with c = slots + 1 and n the least integer with C(c + n, c) ≥ r (Griewank 1992).
    The pass that first reaches φ_r is not counted: the schedule starts from φ_0 again.
    """
    c, n = slots + 1, 0
    if c == 1:  # C(1 + n, 1) ≥ r at n = r − 1: the paper's recomputed sweep, without counting up to it
        return r * (r - 1) // 2
    while math.comb(c + n, c) < r:
        n += 1
    return n * r - math.comb(c + n, n - 1) if n else 0


@dataclass(frozen=True)
class Sweep:
    """How the backward loop of the exact gradient recovers the states φ_0 … φ_{r−1}.

    Build one with `stored()` (Algorithm 2), `recomputed()` (Algorithm 4), `checkpointed(slots)` (binomial schedule) or
    `unrolled()` (the autodiff graph of the whole loop is kept).

    Attributes:
        kind: "stored", "recomputed", "checkpointed" or "unrolled".
        slots: states besides φ_0 that `checkpointed` keeps, ≥ 0.

    Raises:
        UfomError: another kind, slots < 0 or for another kind.
    """

    kind: SweepKind
    slots: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in ("stored", "recomputed", "checkpointed", "unrolled"):
            raise UfomError(f"sweep {self.kind!r} is unknown: use stored, recomputed, checkpointed:SLOTS or unrolled")
        scalar("slots", self.slots, integer, 0)
        if self.slots and self.kind != "checkpointed":
            raise UfomError(f"slots = {self.slots} go with Sweep.checkpointed(slots), not with {self.kind}")

    @classmethod
    def stored(cls) -> Sweep:
        """Every state kept (Algorithm 2): no inner step is repeated, r states are held."""
        return cls("stored")

    @classmethod
    def recomputed(cls) -> Sweep:
        """Each state again from φ_0 (Algorithm 4)."""
        return cls("recomputed")

    @classmethod
    def checkpointed(cls, slots: int) -> Sweep:
        """`slots` states besides φ_0 kept, placed by the binomial schedule (Griewank 1992)."""
        return cls("checkpointed", slots)

    @classmethod
    def unrolled(cls) -> Sweep:
        """The graph of the loop kept, as autodiff libraries do: r gradients, and r products through their graphs.

        Such a product costs less than a Hessian-vector product, which evaluates the gradient again. C2 is its price:
        `ufom_runtime.measure_cost(problem, theta, tasks, sweep=Sweep.unrolled())` measures it.
        """
        return cls("unrolled")

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """The sweep whose `str` is `text`, "stored" or "checkpointed:3" and the like; else `UfomError`.

        ":one-pass" after a name, as older results have it, is passed over: every sweep runs so.
        """
        match = re.fullmatch(
            r"(stored|recomputed|unrolled|checkpointed(?=:\d))(?::(\d+))?(?::one-pass)?", str(text).strip()
        )
        if not match:
            raise UfomError(f"sweep {text!r} is unknown: use stored, recomputed, checkpointed:SLOTS or unrolled")
        return cls(match[1], int(match[2] or 0))  # type: ignore[arg-type]

    def __str__(self) -> str:
        slots = f":{self.slots}" if self.kind == "checkpointed" else ""
        return f"{self.kind}{slots}"

    @property
    def keeps_steps(self) -> bool:
        """Whether something of every forward step is kept, so that none is repeated."""
        return self.kind in ("stored", "unrolled")

    def extra_steps(self, n: Any, as_printed: bool = True) -> Any:
        """Inner steps repeated while n states are visited backwards, φ_{n−1} to φ_0; n an int or an array of them.

        In the paper the coin is drawn at φ_r, and the backward loop begins at φ_0 again: recomputed, that is n(n − 1)/2
        steps. Where the coin is drawn before the first step, the way to φ_r is the first way to φ_{n−1}, too, and n − 1
        steps fewer are repeated: this is how `ufom_runtime` runs, and what is counted without `as_printed`.
        """
        n = integer("the number of backward steps", n, 0)
        if self.keeps_steps:
            return n * 0
        if self.kind == "recomputed":
            steps = n * (n - 1) // 2
        else:
            steps = plain(np.vectorize(binomial_steps, otypes=[np.int64])(n, self.slots))
        return steps if as_printed else plain(steps - np.maximum(np.asarray(n) - 1, 0))

    def states_held(self, n: int) -> int:
        """States held while n of them are visited backwards; φ_0's copy counts as one, the working state does not.

        `unrolled` holds at least these n, and what its graph keeps besides.
        """
        n = scalar("the number of backward steps", n, integer, 0)
        if self.keeps_steps:
            return n
        return min(self.slots + 1, n)


@dataclass(frozen=True)
class Truncated:
    """The proxy that keeps the last K backward steps (truncated back-propagation); 0 is FOM, Algorithm 3.

    Attributes:
        steps: K, an integer ≥ 0.
        held: at K = 0, the inner steps are differentiated with their gradients held constant, as other libraries do in
            their first-order mode; otherwise their Jacobians are taken for the identity, as in the paper. For gradient
            descent with fixed step sizes the two are equal. It costs no further gradients or products, but holds the r
            states and gradients of the inner loop.

    Raises:
        UfomError: K < 0 or not an integer, or K > 0 with `held`.
    """

    steps: int = 0
    held: bool = False

    def __post_init__(self) -> None:
        scalar("proxy length K", self.steps, integer, 0)
        instance("held", self.held, bool, "write True or False")
        if self.held and self.steps:
            raise UfomError(f"proxy length K = {self.steps} with held=True: only K = 0 can hold the gradients constant")

    def calls(self, r: int, s: int = 1) -> Calls:
        """The calls for one task and r inner steps, r + 1 gradients and K products; s does not matter.

        Raises:
            UfomError: K > r.
        """
        self.refuse_beyond(r)
        return Calls(r + 1, self.steps)

    def states(self, r: int, s: int = 1) -> int:
        """The inner states held for one task, the last K, or with `held` all r; s does not matter.

        Raises:
            UfomError: K > r.
        """
        self.refuse_beyond(r)
        return r if self.held else self.steps

    def refuse_beyond(self, r: Any) -> None:
        """`UfomError` where K is longer than an inner loop of r steps, r an int or an array of them."""
        if np.any(np.asarray(r) < self.steps):
            raise UfomError(f"proxy length K = {self.steps} is longer than the inner loop, r = {np.min(r)}: keep K ≤ r")


@dataclass(frozen=True, eq=False)
class CostModel:
    """Expected cost C_det + q·C_rnd of one debiased hypergradient, (19), for any sweep and proxy.

    C_det = C1·(r + 1) + C2·K and C_rnd = C2·(r − K) + C1·extra(r − K), where extra is the sweep's count of repeated
    inner steps; at K = 0 and the recomputed sweep, as printed, this is Proposition 1.

    Attributes:
        r: inner steps, at most 3e9; an integer, or an array of them that broadcasts with the costs.
        c1: cost of a gradient ∂L/∂φ, in function calls or in seconds.
        c2: cost of a Hessian-vector product (both blocks), in the same unit.
        sweep: how the exact gradient recovers its states.
        proxy: what is debiased.
        as_printed: count the repeated steps as the paper does, or else as they are run, r − K − 1 fewer: see
            `Sweep.extra_steps`.
        c1_sem: standard error of c1, 0 where it is given.
        c2_sem: standard error of c2.
        shape: what all of these broadcast to.

    Raises:
        UfomError: r < 1 or r > 3e9, K > r, a cost that is not a finite number > 0 or beyond 1e300, a negative standard
            error, shapes that do not broadcast, a sweep or proxy of another type.
    """

    r: Any
    c1: Number = 1.0
    c2: Number = 1.0
    sweep: Sweep = field(default_factory=Sweep.recomputed)
    proxy: Truncated = field(default_factory=Truncated)
    c1_sem: Number = 0.0
    c2_sem: Number = 0.0
    as_printed: bool = True
    shape: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        instance("sweep", self.sweep, Sweep, 'write Sweep.stored(), or Sweep.parse("checkpointed:3")')
        instance("proxy", self.proxy, Truncated, "write Truncated(K), K = 0 for FOM")
        set_(self, "r", integer("r, the number of inner steps,", self.r, 1))
        for name in ("c1", "c2"):
            set_(self, name, positive(name, getattr(self, name)))
        for name in ("c1_sem", "c2_sem"):
            set_(self, name, finite(name, getattr(self, name), "a finite number ≥ 0", 0.0))
        shapes = {name: np.shape(getattr(self, name)) for name in ("r", "c1", "c2", "c1_sem", "c2_sem")}
        set_(self, "shape", broadcast(**shapes))
        self.proxy.refuse_beyond(self.r)
        with np.errstate(over="ignore"):
            steps = np.asarray(self.r, dtype=np.float64)
            most = np.max((steps + 1) ** 2 * self.c1 + steps * self.c2)
        if not most < 1e300:
            raise UfomError(f"r, c1 and c2 make a cost of {most:g}, beyond floating point: choose another unit of cost")

    @classmethod
    def of(cls, c_det: Number, c_rnd: Number, c_det_sem: Number = 0.0, c_rnd_sem: Number = 0.0) -> CostModel:
        """The model of costs that are given directly, as of a proxy of one's own.

        It is one inner step that is stored, with C1 = C_det/2 and C2 = C_rnd, so that C_det = C1·(r + 1),
        C_rnd = C2·r.

        Args:
            c_det: C_det, what every call pays.
            c_rnd: C_rnd, what is paid with probability q, in the same unit.
            c_det_sem: standard error of c_det.
            c_rnd_sem: standard error of c_rnd.

        >>> CostModel.of(c_det=11.0, c_rnd=55.0).c_rnd
        55.0

        Raises:
            UfomError: a cost that is not a finite number > 0, a negative standard error.
        """
        det, rnd = np.asarray(positive("c_det", c_det)), positive("c_rnd", c_rnd)
        sem = np.asarray(finite("c_det_sem", c_det_sem, "a finite number ≥ 0", 0.0))
        return cls(1, plain(det / 2), rnd, Sweep.stored(), c1_sem=plain(sem / 2), c2_sem=c_rnd_sem)

    @property
    def backward_steps(self) -> Any:
        """Backward steps that only the exact gradient takes, r − K."""
        return self.r - self.proxy.steps

    @property
    def extra_steps(self) -> Any:
        """Inner steps repeated by one exact sweep."""
        return self.sweep.extra_steps(self.backward_steps, self.as_printed)

    @property
    def c_det(self) -> Number:
        """C_det: cost that every call pays, the proxy's."""
        return self.c1 * (self.r + 1) + self.c2 * self.proxy.steps  # type: ignore[no-any-return]

    @property
    def c_rnd(self) -> Number:
        """C_rnd: cost of going on to the exact gradient, paid with probability q."""
        return self.c2 * self.backward_steps + self.c1 * self.extra_steps  # type: ignore[no-any-return]

    @property
    def log_kappa_sem(self) -> Number:
        """Standard error of log κ, κ = C_det/C_rnd, by the delta method; c1 and c2 are timed independently."""
        with np.errstate(divide="ignore", invalid="ignore"):
            by_c1 = (np.asarray(self.r) + 1) / self.c_det - self.extra_steps / np.asarray(self.c_rnd)
            by_c2 = self.proxy.steps / self.c_det - self.backward_steps / np.asarray(self.c_rnd)
        sem = np.hypot(by_c1 * self.c1_sem, by_c2 * self.c2_sem)
        return plain(np.where(np.asarray(self.c_rnd) > 0, sem, 0.0))  # type: ignore[no-any-return]

    def time(self, q: Number, moments: Moments, m: Number) -> Number:
        """((1/q − 1)·D² + V²)^m·(C_det + C_rnd·q), to which the time to a given precision is proportional (19).

        Args:
            q: probability of the exact correction, in (0, 1], float or array.
            moments: D², V² of the estimator (for a batch, `optimum.batch_moments`).
            m: exponent of the time to precision; 2 for the paper's γ_k = k^(−1/2) at ε = 0.

        Raises:
            UfomError: q outside (0, 1], m ≤ 0, shapes that do not broadcast, or a time beyond floating point.
        """
        q = positive("q", q)
        if np.any(np.asarray(q) > 1):
            raise UfomError(f"q = {np.max(q):g} must lie in (0, 1]: it is a probability")
        m = positive("m", m)
        broadcast(q=np.shape(q), m=np.shape(m), moments=moments.shape, cost=self.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            a = (1 / np.asarray(q) - 1) * moments.d2 + moments.v2
            value = a**m * (self.c_det + self.c_rnd * np.asarray(q))
        return finite("the time", value, "within floating point: rescale D² and V², or take a larger q")
