"""What to run within a memory: the time to a given precision, (19), of everything that fits, each at its own best q."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ufom_theory.checks import UfomError, byte_count, bytes_text, finite, instance, integer, positive, scalar
from ufom_theory.coins import Coins, coin_moments, stratified_q, with_coins
from ufom_theory.cost import CostModel, Sweep, Truncated
from ufom_theory.laws import Progress, exponent_of
from ufom_theory.optimum import optimal_q
from ufom_theory.quantities import Moments
from ufom_theory.roulette import optimal_survival


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to estimate ∇M, as it was measured or counted.

    Attributes:
        label: what it is called: a text, or whatever finds it again.
        moments: of one task; for a roulette one a level, for G_{K_0} … G_{K_{n−1}}, all with the same V².
        cost: of one task; for a roulette c_0 … c_n, as `level_costs` gives them.
        bytes: the most that it holds.
        coin: "task", "batch" or "stratified"; they differ where a batch is larger than one task.
        q: the probability of a correction where it is fixed, as 1 for the exact gradient; None: the best one is sought.

    Raises:
        UfomError: a value of another kind, moments or a cost that are arrays, V² = 0, levels that do not fit the costs.
    """

    label: Hashable
    moments: Moments | Sequence[Moments]
    cost: CostModel | Sequence[float]
    bytes: int
    coin: Coins = "task"
    q: float | None = None

    def __post_init__(self) -> None:
        held = scalar(f"the bytes of {self.label}", self.bytes, finite, "a finite number ≥ 0", 0.0)
        object.__setattr__(self, "bytes", int(held))
        if not isinstance(self.coin, str) or self.coin not in ("task", "batch", "stratified"):
            raise UfomError(f"coin = {self.coin!r} must be 'task', 'batch' or 'stratified'")
        if self.q is not None and not 0 < scalar("q", self.q) <= 1:
            raise UfomError(f"q = {self.q:g} of {self.label} must lie in (0, 1]: it is a probability")
        for moments in self.levels:
            instance(f"the moments of {self.label}", moments, Moments, "write Moments(d2, v2)")
            if moments.shape:
                raise UfomError(f"the moments of {self.label} are arrays: plan compares single values, give one θ's")
            if moments.v2 == 0:
                raise UfomError(f"V² = 0 for {self.label}: the exact gradient vanishes there; measure at another θ")
        if isinstance(self.moments, Moments):
            instance(f"the cost of {self.label}", self.cost, CostModel, "write CostModel.of(c_det=..., c_rnd=...)")
            if self.cost.shape:  # type: ignore[union-attr]
                raise UfomError(f"the cost of {self.label} is an array: plan compares single values")
        elif not isinstance(self.cost, Sequence) or not 2 <= len(self.cost) == len(self.levels) + 1:
            raise UfomError(f"{self.label} has {len(self.levels)} levels: give costs c_0 … c_n, one more than these")
        elif self.coin != "task" or self.q is not None:
            raise UfomError(f"{self.label} is a roulette, one uniform number a task: leave coin and q out")
        else:
            positive(f"the costs of {self.label}", self.cost)
            v2 = [float(moments.v2) for moments in self.levels]
            if max(v2) > min(v2) * (1 + 1e-6):
                raise UfomError(
                    f"the levels of {self.label} have V² from {min(v2):g} to {max(v2):g}, but all have the same exact "
                    "gradient: measure them at one θ, on the same tasks"
                )

    @property
    def levels(self) -> tuple[Moments, ...]:
        """The moments of each level; of an estimator with one correction there is one."""
        return tuple(self.moments) if isinstance(self.moments, Sequence) else (self.moments,)


@dataclass(frozen=True, eq=False)
class Choice:
    """A candidate that fits, at its best q.

    Attributes:
        candidate: what is run.
        q: the best probability of a correction; 0.0 where the proxy is exact (D² = 0). Of a roulette q_1 … q_n.
        second_moment: A, of the mean over a batch.
        cost: C of one task, expected over the coins.
        slower: A^m·C over the winner's.
        why: the reason, in words.
    """

    candidate: Candidate
    q: float | tuple[float, ...]
    second_moment: float
    cost: float
    slower: float = 1.0
    why: str = ""

    @property
    def label(self) -> Any:
        """The candidate's."""
        return self.candidate.label

    @property
    def bytes(self) -> int:
        """The candidate's."""
        return self.candidate.bytes

    def log_time(self, m: float) -> float:
        """log A^m·C."""
        return m * math.log(self.second_moment) + math.log(self.cost)


def plan(
    candidates: Iterable[Candidate],
    memory: int | str,
    m: float | None = None,
    outer: str | None = None,
    batch: int = 1,
) -> list[Choice]:
    """Everything that fits in the memory, the soonest to a given precision first; ties go to fewer bytes.

    The time is A(q)^m·C(q), (19). Candidates that are best at q = 1 are the exact gradient: where some are given as
    that, with q=1, the others are left out.

    Args:
        candidates: all measured at the same θ, on the same tasks, with costs in one unit.
        memory: bytes that may be held: a number, or a text such as "50MB", which is 5·10⁷.
        m: exponent of the time to precision; give exactly one of m and outer.
        outer: how the outer steps are taken, as in `optimal_q`.
        batch: tasks an outer step; above 1 the moments need ‖∇M‖², and for a coin other than "task" ‖E(F − G)‖² too.

    >>> fom = Candidate("UFOM, recomputed", Moments(0.1, 1.0), CostModel(100), bytes=10**6)
    >>> exact = Candidate("exact, stored", Moments(0.1, 1.0), CostModel(100, sweep=Sweep.stored()), 10**8, q=1)
    >>> [(x.label, round(x.q, 3)) for x in plan([fom, exact], "50MB", outer="paper")]
    [('UFOM, recomputed', 0.142)]

    Raises:
        UfomError: no candidate, or none that fits; neither or both of m and outer; moments that a batch needs and lack.
    """
    most, b = byte_count("memory", memory), scalar("batch", batch, integer, 1)
    exponent = float(scalar("m", exponent_of(m, outer)[0]))
    instance("candidates", candidates, Iterable, "give a list of Candidate(label, moments, cost, bytes)")
    given = list(candidates)
    for candidate in given:
        instance("a candidate", candidate, Candidate, "write Candidate(label, moments, cost, bytes)")
    fits = [candidate for candidate in given if candidate.bytes <= most]
    if not fits:
        least = min((candidate.bytes for candidate in given), default=0)
        what = f"the least that one holds is {bytes_text(least)}" if given else "no candidate was given"
        raise UfomError(f"nothing fits in memory = {bytes_text(most)}: {what}; raise it, or measure shorter proxies")
    found = [_best(candidate, exponent, b) for candidate in fits]
    if any(x.candidate.q == 1 for x in found):
        found = [x for x in found if x.candidate.q == 1 or np.min(x.q) < 1]
    found.sort(key=lambda x: (x.log_time(exponent), x.bytes))
    winner = found[0].log_time(exponent)
    rows = [replace(x, slower=math.exp(x.log_time(exponent) - winner)) for x in found]
    return [replace(x, why=_reason(x, rows, most)) for x in rows]


def _best(x: Candidate, m: float, batch: int) -> Choice:
    """The candidate at its best q."""
    if isinstance(x.cost, CostModel):
        assert isinstance(x.moments, Moments)
        if x.coin == "stratified" and batch > 1:
            return _stratified(x, x.moments, x.cost, m, batch)
        moments = coin_moments(x.moments, x.coin, batch)
        q = float(optimal_q(moments, x.cost, m).q) if x.q is None else float(x.q)
        excess = (1 / q - 1) * float(moments.d2) if q else 0.0  # D² = 0: the time's limit as q → 0
        return Choice(x, q, (float(moments.v2) + excess) / batch, float(x.cost.c_det + q * x.cost.c_rnd))
    v2 = float(coin_moments(x.levels[0], "task", batch).v2)
    d2, costs = [float(moments.d2) for moments in x.levels], [float(cost) for cost in x.cost]
    best = optimal_survival(d2, v2, costs, m)
    return Choice(x, tuple(best.q.tolist()), best.second_moment / batch, best.cost)


def _stratified(x: Candidate, moments: Moments, cost: CostModel, m: float, batch: int) -> Choice:
    """At the given q, or the best one. With weight B/k where qB ≥ 1 A^m·C is best at whole qB, or below 1."""
    progress = Progress.of(moments)
    if x.q is None:
        free = stratified_q(progress, cost, batch, m)
        if free == 0:
            return Choice(x, 0.0, float(coin_moments(moments, "task", batch).v2) / batch, float(cost.c_det))
        every = [k / batch for k in range(1, batch + 1)] + [free] * (free * batch < 1)
    else:
        every = [float(x.q)]
    choices = [
        Choice(
            x,
            q,
            float(with_coins(progress, q, batch, "stratified").second_moment(q, batch)),
            float(cost.c_det + q * cost.c_rnd),
        )
        for q in every
    ]
    return min(choices, key=lambda choice: choice.log_time(m))


def _reason(x: Choice, rows: Sequence[Choice], memory: int) -> str:
    """What it is and holds, and what it gains over the next one and over the exact gradient."""
    if x is not rows[0]:
        said = [f"{x.slower:.3g}× the winner's time"]
    else:
        q = ", ".join(f"{value:.3g}" for value in np.atleast_1d(x.q))
        what = f"run {x.label}" if x.q == 1 else f"run {x.label} at q = {q}"
        said = [f"{what}, which holds {bytes_text(x.bytes)} of {bytes_text(memory)}"]
        if len(rows) > 1:
            said.append(f"{rows[1].slower:.3g}× sooner than {rows[1].label}")
        exact = next((row for row in rows if row.candidate.q == 1), x)
        if exact not in (x, *rows[1:2]):
            said.append(f"{exact.slower:.3g}× sooner than {exact.label}")
    first = x.candidate.levels[0]
    if x.candidate.q is None and first.d2 >= first.v2 and len(x.candidate.levels) == 1:
        said.append("D² ≥ V²: a proxy of zero would do as well")
    return "; ".join(said)


class Recipe(NamedTuple):
    """A proxy that is debiased, and a sweep; the exact gradient by that sweep where the proxy is None."""

    proxy: Truncated | None
    sweep: Sweep

    def __str__(self) -> str:
        if self.proxy is None:
            return f"the exact gradient with the {self.sweep} sweep"
        named = {Truncated(): "FOM", Truncated(held=True): "HELD"}
        return f"UFOM on {named.get(self.proxy, f'the last K = {self.proxy.steps} steps')} with the {self.sweep} sweep"


def states_held(r: int, proxy: Truncated, sweep: Sweep) -> int:
    """Inner states held by a proxy and a sweep of r steps: K for the ring, and the sweep's for the other r − K.

    They are added: the ring is counted until the call returns. An implementation that frees it before the exact sweep
    starts needs only the larger of the two, so what is planned here always fits. A proxy with held gradients holds r.
    """
    if proxy.held:
        return max(r, sweep.states_held(r))
    return proxy.steps + sweep.states_held(r - proxy.steps)


def _sweeps(r: int, proxy: Truncated, states: int) -> list[Sweep]:
    """The sweeps that fit beside the proxy's ring. More slots are never slower: a few counts and the most suffice."""
    most = min(states, r) - proxy.steps - 1
    # with φ_0 and r − K − 1 slots every state is held, which the stored sweep does without repeating a step
    slots = {s for s in (1, 2, 4, 8, 16, 32, most) if 0 < s <= most and s < r - proxy.steps - 1}
    every = [Sweep.recomputed(), *map(Sweep.checkpointed, sorted(slots)), Sweep.stored()]
    return [sweep for sweep in every if states_held(r, proxy, sweep) <= states]


def counted_candidates(
    moments_by_proxy: Mapping[Truncated, Moments],
    r: int,
    c1: float,
    c2: float,
    memory: int | str,
    state_bytes: int = 1,
    as_printed: bool = False,
) -> list[Candidate]:
    """Every proxy with every sweep, and the exact gradient, by counted calls and the inner states held.

    The labels are pairs (proxy, sweep), the proxy None for the exact gradient.

    Args:
        moments_by_proxy: D_K² and V² of each proxy that may be used, all measured at the same θ and tasks.
        r: inner steps.
        c1: cost of a gradient.
        c2: cost of a Hessian-vector product, in the same unit.
        memory: bytes that may be held; it says how many checkpoints are worth a candidate.
        state_bytes: bytes of one state; 1: the memory is a number of states. See `states_held`.
        as_printed: whether calls are counted as in Proposition 1, not as they are made; as in `CostModel`.

    >>> best, *_ = plan(counted_candidates({Truncated(): Moments(0.1, 1.0)}, 100, 1.0, 1.0, memory=2), 2, m=2)
    >>> print(best.label, f"{best.q:.3f}")
    UFOM on FOM with the checkpointed:1 sweep 0.228

    Raises:
        UfomError: no proxy given, keys that are no `Truncated`, moments that are arrays, no proxy that fits, r < 1,
            K > r, costs ≤ 0.
    """
    r, one = scalar("r", r, integer, 1), scalar("state_bytes", state_bytes, integer, 1)
    c1, c2 = (scalar(name, x, positive) for name, x in (("c1", c1), ("c2", c2)))
    states = min(byte_count("memory", memory) // one, r)
    instance("moments_by_proxy", moments_by_proxy, Mapping, "write {Truncated(0): Moments(d2, v2)}")
    if not moments_by_proxy:
        raise UfomError("moments_by_proxy is empty: measure D² and V² for at least one proxy, Truncated(0) is FOM")
    found = []
    for proxy, moments in moments_by_proxy.items():
        instance("a key of moments_by_proxy", proxy, Truncated, "write Truncated(K), K = 0 for FOM")
        proxy.refuse_beyond(r)
        for sweep in _sweeps(r, proxy, states):
            cost = CostModel(r, c1, c2, sweep, proxy, as_printed=as_printed)
            found.append(Candidate(Recipe(proxy, sweep), moments, cost, one * states_held(r, proxy, sweep)))
    if not found:
        shortest = min(proxy.steps for proxy in moments_by_proxy)
        raise UfomError(f"memory = {memory} cannot hold K = {shortest} states and φ_0: raise it, or measure K = 0")
    moments = next(iter(moments_by_proxy.values()))
    for sweep in _sweeps(r, Truncated(), states):
        cost, held = CostModel(r, c1, c2, sweep, as_printed=as_printed), states_held(r, Truncated(), sweep)
        found.append(Candidate(Recipe(None, sweep), moments, cost, one * held, q=1))
    return found
