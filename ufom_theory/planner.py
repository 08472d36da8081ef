"""The best proxy, sweep and q within a memory budget: (19) compared over all that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ufom_theory.checks import UfomError, instance, integer, positive, scalar
from ufom_theory.cost import CostModel, Sweep, Truncated
from ufom_theory.laws import exponent_of
from ufom_theory.optimum import optimal_q
from ufom_theory.quantities import Moments


@dataclass(frozen=True)
class Candidate:
    """One way to run UFOM that fits the budget, at its own best q.

    Attributes:
        proxy: what is debiased; K = 0 is FOM. At q = 1 it is not used, and K = 0.
        sweep: how the exact gradient recovers its states.
        q: q* for this cost; 0.0 where the proxy is exact (D² = 0).
        states: inner states held at most: the proxy's ring of K, and the sweep's (φ_0's own copy counts as one).
        time: (19) with D² and V² in units of the largest V²: proportional to the time to a given precision.
        time_exact: the same at q = 1.
        slower: time over the winner's.
        why: the reason, in words.
    """

    proxy: Truncated
    sweep: Sweep
    q: float
    states: int
    time: float
    time_exact: float
    slower: float = 1.0
    why: str = ""


def states_held(r: int, proxy: Truncated, sweep: Sweep) -> int:
    """Inner states held by a proxy and a sweep of r steps: K for the ring, and the sweep's for the other r − K.

    They are added: the ring is counted until the call returns. An implementation that frees it before the exact sweep
    starts needs only the larger of the two, so what is planned here always fits. A proxy with held gradients holds r.
    """
    if proxy.held:
        return max(r, sweep.states_held(r))
    return proxy.steps + sweep.states_held(r - proxy.steps)


def _sweeps(r: int, proxy: Truncated, budget: int) -> list[Sweep]:
    """The sweeps that fit beside the proxy's ring. More slots are never slower: a few counts and the most suffice."""
    most = min(budget, r) - proxy.steps - 1
    # with φ_0 and r − K − 1 slots every state is held, which the stored sweep does without repeating a step
    slots = {s for s in (1, 2, 4, 8, 16, 32, most) if 0 < s <= most and s < r - proxy.steps - 1}
    every = [Sweep.recomputed(), *map(Sweep.checkpointed, sorted(slots)), Sweep.stored()]
    return [sweep for sweep in every if states_held(r, proxy, sweep) <= budget]


def _exact(r: int, states: int) -> Sweep:
    """The quickest sweep of the exact gradient within this many states."""
    if states >= r:
        return Sweep.stored()
    return Sweep.checkpointed(states - 1) if states > 1 else Sweep.recomputed()


def _candidate(proxy: Truncated, sweep: Sweep, moments: Moments, cost: CostModel, m: float) -> Candidate:
    q = float(optimal_q(moments, cost, m).q)
    if q == 1 and proxy.steps:  # the exact gradient, which has a quicker sweep in the memory of the proxy's ring
        proxy, sweep = Truncated(0), _exact(cost.r, states_held(cost.r, proxy, sweep))
        cost = replace(cost, sweep=sweep, proxy=proxy, as_printed=False)  # its coin is known before the first step
    exact = float(cost.time(1.0, moments, m))
    # D² = 0: the time falls to V²^m·C_det as q → 0
    time = float(cost.time(q, moments, m)) if q > 0 else exact * float(cost.c_det / (cost.c_det + cost.c_rnd))
    return Candidate(proxy, sweep, q, states_held(cost.r, proxy, sweep), time, exact)


def plan(
    moments_by_proxy: Mapping[Truncated, Moments],
    r: int,
    c1: float,
    c2: float,
    memory_slots: int,
    m: float | None = None,
    outer: str | None = None,
) -> list[Candidate]:
    """Everything that fits in `memory_slots` inner states, the fastest first; ties go to fewer states.

    Args:
        moments_by_proxy: D_K² and V² of each proxy that may be used, all measured at the same θ and tasks.
        r: inner steps.
        c1: cost of a gradient.
        c2: cost of a Hessian-vector product, in the same unit.
        memory_slots: inner states that may be held besides the working one; see `states_held`.
        m: exponent of the time to precision; give exactly one of m and outer.
        outer: how the outer steps are taken, as in `optimal_q`.

    Returns:
        Candidates by rising time; the first one's `why` says what it gains over the paper's UFOM, and whether one
        stored state already changes the answer.

    Raises:
        UfomError: no proxy given, keys that are no `Truncated`, moments or numbers that are arrays, no proxy that fits,
            r < 1, memory_slots < 1, costs or m ≤ 0, neither or both of m and outer.
    """
    budget, r = scalar("memory_slots", memory_slots, integer, 1), scalar("r", r, integer, 1)
    c1, c2 = (scalar(name, x, positive) for name, x in (("c1", c1), ("c2", c2)))
    exponent = scalar("m", exponent_of(m, outer)[0])
    instance("moments_by_proxy", moments_by_proxy, Mapping, "write {Truncated(0): Moments(d2, v2)}")
    if not moments_by_proxy:
        raise UfomError("moments_by_proxy is empty: measure D² and V² for at least one proxy, Truncated(0) is FOM")
    for proxy, moments in moments_by_proxy.items():
        instance("a key of moments_by_proxy", proxy, Truncated, "write Truncated(K), K = 0 for FOM")
        instance(f"the value at K = {proxy.steps},", moments, Moments, "write Moments(d2, v2)")
        if moments.shape:
            raise UfomError(f"the moments of K = {proxy.steps} are arrays: plan compares single values, give one θ's")
        if moments.v2 == 0:
            raise UfomError(f"V² = 0 for K = {proxy.steps}: the exact gradient vanishes there; measure at another θ")
    unit = max(float(moments.v2) for moments in moments_by_proxy.values())
    found = []
    for proxy, moments in moments_by_proxy.items():
        cost = CostModel(r=r, c1=c1, c2=c2, proxy=proxy)
        sweeps = _sweeps(r, proxy, budget)
        scaled = Moments(moments.d2 / unit, moments.v2 / unit)
        found += [_candidate(proxy, sweep, scaled, replace(cost, sweep=sweep), exponent) for sweep in sweeps]
    if not found:
        shortest = min(proxy.steps for proxy in moments_by_proxy)
        raise UfomError(
            f"memory_slots = {budget} cannot hold K = {shortest} states and φ_0: raise it, or measure K = 0"
        )
    found.sort(key=lambda c: (c.time, c.states), reverse=True)
    quickest = {(c.proxy, c.sweep): c for c in found}  # the last of each is the quickest
    found = sorted(quickest.values(), key=lambda c: (c.time, c.states))
    best = found[0]
    if not best.time > 0:
        raise UfomError(f"the winner's time is {best.time:g}, below floating point: choose another unit of cost")
    rows = [replace(c, slower=c.time / best.time, why=f"{c.time / best.time:.3g}× the winner's time") for c in found]
    return [replace(rows[0], why=_reason(rows, moments_by_proxy, budget)), *rows[1:]]


def _reason(rows: list[Candidate], moments_by_proxy: Mapping[Truncated, Moments], budget: int) -> str:
    best, fom = rows[0], Truncated(0)
    by_kind = {(c.proxy, str(c.sweep)): c for c in rows}
    proxy = "FOM" if best.proxy == fom else f"the last K = {best.proxy.steps} backward steps"
    what = "run the exact gradient" if best.q == 1 else f"debias {proxy} at q = {best.q:.3g}"
    said = [f"{what} with the {best.sweep} sweep, holding {best.states} of {budget} states"]
    paper, one = by_kind.get((fom, "recomputed")), by_kind.get((fom, "checkpointed:1"))
    if paper and paper is not best:
        said.append(f"{paper.time / best.time:.3g}× sooner than the paper's UFOM (FOM, recomputed, q = {paper.q:.3g})")
    if paper and one:
        gain, exact = paper.time / one.time_exact, "the exact gradient alone (q = 1)"
        if gain > 1:
            changes = f"with it {exact} is {gain:.3g}× sooner than the paper's UFOM"
            said.append(f"one stored state already changes the answer: {changes}")
        else:
            said.append(f"one stored state does not overturn the paper's UFOM: with it {exact} takes {1 / gain:.3g}×")
    given = moments_by_proxy.get(fom)
    if given is not None and given.d2 >= given.v2:
        said.append("FOM's D² ≥ V²: no better than a proxy of zero; keep K > 0 steps, or run the exact gradient")
    return "; ".join(said)
