"""Many outer runs of one problem side by side: every candidate with every seed takes its step in the same call.

The runs of one seed see the same tasks, and compare the same uniform numbers with their q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from studies.regret_problems import Made
from studies.shared.lanes import Adam, both_gradients, estimates, follow, outer_losses
from ufom_runtime import AdaptiveUFOM
from ufom_runtime.derivatives import count_calls
from ufom_runtime.estimators import State
from ufom_runtime.problem import Tasks
from ufom_runtime.training.seeds import generator
from ufom_theory import UfomError
from ufom_theory.laws import Outer

Array = NDArray[np.float64]
_ROWS = 2048  # inner loops run together where M is evaluated


@dataclass(frozen=True)
class Charge:
    """Calls of a step: `first` for each task's proxy, and `more` for the correction of a task."""

    batch: int
    first: float
    more: float

    @classmethod
    def of(cls, made: Made, batch: int) -> Charge:
        """Gradients and Hessian-vector products with stored states, each counted as 1."""
        r, k = made.problem.r, made.proxy
        return cls(batch, r + 1 + k, r - k)

    @property
    def exact(self) -> float:
        """Of a step of exact gradients."""
        return self.batch * (self.first + self.more)


@dataclass(frozen=True)
class Candidate:
    """What could be run: the proxy alone for the first `until` steps, then UFOM(q); q = 0 is the proxy, 1 is exact."""

    q: float
    until: int = 0

    @property
    def name(self) -> str:
        """As in tables: FOM, exact, UFOM(0.1), FOM until 40, then exact."""
        last = {0.0: "FOM", 1.0: "exact"}.get(self.q, f"UFOM({self.q:g})")
        return f"FOM until {self.until}, then {last}" if self.until else last

    def q_at(self, step: int) -> float:
        """q of the outer step 1, 2, …"""
        return 0.0 if step <= self.until else self.q

    def calls(self, step: NDArray[np.float64] | float, charge: Charge) -> NDArray[np.float64]:
        """Expected calls of the first `step` steps."""
        late = np.maximum(0.0, np.asarray(step) - self.until)
        return np.asarray(charge.batch * (np.asarray(step) * charge.first + late * self.q * charge.more))


Kind = Candidate | AdaptiveUFOM


@dataclass(frozen=True, eq=False)
class Curves:
    """M, less its minimum where that is known, and calls so far, every few steps from 0 on.

    Attributes:
        loss: shape (kinds, seeds, evaluations), the mean over a seed's chains; nan after the budget, ∞ once diverged.
        calls: the same of the calls.
        every: steps between two evaluations.
    """

    loss: Array
    calls: Array
    every: int


def run_lanes(
    made: Made,
    kinds: Sequence[Kind],
    outer: Outer,
    batch: int,
    seeds: Sequence[int],
    chains: int,
    budget: float,
    every: int,
) -> Curves:
    """Run every kind with every seed until `budget` calls are spent.

    A seed of a candidate is the mean of `chains` runs; of a rule, whose q is chosen run by run, it is the first.
    """
    lanes = _Lanes(made, kinds, outer, batch, seeds, chains, budget)
    losses, calls, k = [lanes.losses(np.arange(len(lanes.kind)), 0)], [lanes.calls.copy()], 1
    while len(active := lanes.active(k)):
        if not lanes.step(active, k):
            continue  # some of these runs diverged: the others take the step without them
        if k % every == 0:
            losses.append(lanes.losses(active, k))
            calls.append(lanes.calls.copy())
        k += 1
    return _curves(np.array(losses), np.array(calls), lanes, every)


def exact_run(made: Made, outer: Outer, batch: int, steps: Sequence[int], seed: int) -> Tensor:
    """θ of a run of exact gradients after each of these steps, rising from 0, shape (len(steps), s)."""
    lanes, found = _Lanes(made, [Candidate(1.0)], outer, batch, [seed], 1, np.inf), []
    for k in range(steps[-1] + 1):
        if k and not lanes.step(lanes.active(k), k):
            raise UfomError(f"the run of exact gradients diverges at step {k}")
        if k in steps:
            found.append(lanes.theta[0].clone())
    return torch.stack(found)


class _Lanes:
    """All runs and where they are: their θ, calls, and the states of the rules and of Adam."""

    def __init__(
        self,
        made: Made,
        kinds: Sequence[Kind],
        outer: Outer,
        batch: int,
        seeds: Sequence[int],
        chains: int,
        budget: float,
    ) -> None:
        self.made, self.kinds, self.outer, self.batch, self.seeds = made, kinds, outer, batch, seeds
        self.chains, self.budget, self.charge = chains, budget, Charge.of(made, batch)
        each = [
            (i, j, n)
            for i, kind in enumerate(kinds)
            for j in range(len(seeds))
            for n in range(chains if isinstance(kind, Candidate) else 1)
        ]
        self.kind, self.seed, self.chain = np.array(each).T
        self.fixed = np.array([isinstance(x, Candidate) for x in kinds])[self.kind]
        self.states = [None if isinstance(x, Candidate) else x.begin() for x in (kinds[i] for i in self.kind)]
        assert made.problem.initial is not None
        self.theta = made.problem.initial.expand(len(each), -1).clone()
        self.adam = Adam(self.theta)
        self.calls, self.lost = np.zeros(len(each)), np.zeros(len(each), bool)

    def spent(self, k: int) -> Array:
        """Calls of each run, that of a candidate after step k, that of a rule before it."""
        fixed = [float(x.calls(k, self.charge)) if isinstance(x, Candidate) else 0.0 for x in self.kinds]
        return np.where(self.fixed, np.array(fixed)[self.kind], self.calls)

    def active(self, k: int) -> NDArray[np.intp]:
        """The runs that take step k."""
        return np.flatnonzero((self.spent(k) <= self.budget * (1 + 1e-9)) & ~self.lost)

    def losses(self, active: NDArray[np.intp], k: int) -> Array:
        """M of the active runs; ∞ where one has diverged within its budget, else nan."""
        found = np.full(len(self.kind), np.nan)
        found[active] = mean_losses(self.made, self.theta[active])
        return np.where(self.lost & (self.spent(k) <= self.budget), np.inf, found)

    def step(self, active: NDArray[np.intp], k: int) -> bool:
        """Step k of these runs; False, and no step, where inner loops diverge: their runs are given up."""
        drawn = _draw(self.made, self.batch, self.chains, self.seeds, k)
        q = [_q(self.kinds[self.kind[i]], self.states[i], k) for i in active]
        thetas, stream = self.theta[active], torch.from_numpy((self.seed * self.chains + self.chain)[active])
        try:
            found = _gradients(self.made, thetas, stream, torch.tensor(q, dtype=torch.float64), self.batch, drawn)
        except UfomError:
            diverged = ~_converge(self.made, thetas, stream, self.batch, drawn)
            if not diverged.any():
                raise
            self.lost[active] |= diverged
            return False
        coins, proxy, exact = found
        gradient = torch.zeros_like(self.theta)
        gradient[active] = estimates(coins, torch.tensor(q, dtype=torch.float64), proxy, exact)
        self.calls = np.where(self.fixed & np.isin(np.arange(len(self.kind)), active), self.spent(k), self.calls)
        for at in np.flatnonzero(~self.fixed[active]):
            i = active[at]
            tasks = drawn[0].take(stream[at] * self.batch + torch.arange(self.batch))
            rule, rows = self.kinds[self.kind[i]], (coins[at], proxy[at], exact[at])
            follow = _follow(rule, self.states[i], self.made, self.theta[i], tasks, rows, self.charge)
            gradient[i], self.states[i], more = follow
            self.calls[i] += more
        self._move(gradient, k)
        return True

    def _move(self, gradient: Tensor, k: int) -> None:
        """θ after step k; Adam's step is one of each coordinate, so all runs take it at once."""
        rate = self.outer.rate_at(k)
        if self.outer.kind == "adam":
            gradient = self.adam.direction(gradient, k)
        self.theta -= rate * gradient
        bad = ~self.theta.isfinite().all(1)
        self.lost |= bad.numpy()
        self.theta[bad] = 0.0


def _curves(losses: Array, calls: Array, lanes: _Lanes, every: int) -> Curves:
    """The means over the chains of each kind and seed."""
    shape = (len(lanes.kinds), len(lanes.seeds), len(losses))
    found = Curves(np.full(shape, np.nan), np.full(shape, np.nan), every)
    for i, j in np.ndindex(*shape[:2]):
        mine = (lanes.kind == i) & (lanes.seed == j)
        found.loss[i, j], found.calls[i, j] = losses[:, mine].mean(1), calls[:, mine].mean(1)
    return found


def _q(kind: Kind, state: object, k: int) -> float:
    return kind.q_at(k) if isinstance(kind, Candidate) else max(state[0], kind.q_min)  # type: ignore[index]


def _draw(made: Made, batch: int, chains: int, seeds: Sequence[int], k: int) -> tuple[Tasks, Tensor]:
    """Tasks of all streams, stacked, and uniform numbers, shape (streams, batch)."""
    n = batch * chains
    found = [Tasks.of(made.problem.sample(n, generator(seed, k, "tasks"))) for seed in seeds]
    tasks = Tasks(tuple(torch.cat(x) for x in zip(*(t.parts for t in found), strict=True)), found[0].form)
    uniform = [torch.rand(n, generator=generator(seed, k, "coins"), dtype=torch.float64) for seed in seeds]
    return tasks, torch.cat(uniform).view(-1, batch)


def _gradients(
    made: Made, thetas: Tensor, stream: Tensor, q: Tensor, batch: int, drawn: tuple[Tasks, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Coins, shape (runs, batch), proxy and exact gradients, (runs, batch, s); where a coin is 0, the proxy twice."""
    tasks, uniform = drawn
    runs = torch.arange(len(thetas)).repeat_interleave(batch)
    task = (stream[:, None] * batch + torch.arange(batch)).flatten()
    coins = uniform[stream] < q[:, None]
    shape = (len(thetas), batch, thetas.shape[1])
    if made.closed:
        proxy, exact, _ = made.closed(thetas[runs], tasks.take(task).stack)
        return coins, proxy.view(shape), exact.view(shape)
    return coins, *both_gradients(made.problem, thetas, tasks, task.view(coins.shape), coins, made.proxy)


def _converge(made: Made, thetas: Tensor, stream: Tensor, batch: int, drawn: tuple[Tasks, Tensor]) -> NDArray[np.bool_]:
    """Whether each run's inner loops on its tasks end at finite losses."""
    found = []
    for theta, i in zip(thetas, stream.tolist(), strict=True):
        tasks = drawn[0].take(slice(i * batch, (i + 1) * batch))
        found.append(bool(np.isfinite(_losses(made, theta[None], tasks)).all()))
    return np.array(found)


def _follow(
    rule: Kind,
    state: State,
    made: Made,
    theta: Tensor,
    tasks: Tasks,
    found: tuple[Tensor, Tensor, Tensor],
    charge: Charge,
) -> tuple[Tensor, State, float]:
    """The direction of an adaptive rule, its state after it, and the calls."""
    assert isinstance(rule, AdaptiveUFOM)
    spent = charge.batch * charge.first + int(found[0].sum()) * charge.more
    with count_calls() as calls:
        given = follow(rule, state, made.problem, theta, tasks, *found)
    return given.value, given.state, spent + calls.gradients + calls.hessian_vector_products


def mean_losses(made: Made, thetas: Tensor) -> Array:
    """M at each θ on the held tasks, less its minimum where that is known; ∞ where the inner loop diverges."""
    return _losses(made, thetas, made.held) - made.floor


@torch.no_grad()
def _losses(made: Made, thetas: Tensor, tasks: Tasks) -> Array:
    n, found, problem = len(tasks), [], made.problem
    for some in torch.split(thetas, max(1, _ROWS // n)):
        rows, each = some.repeat_interleave(n, 0), tasks.take(torch.arange(n).repeat(len(some)))
        loss = made.closed(rows, each.stack)[2] if made.closed else outer_losses(problem, rows, each)
        found.append(loss.double().reshape(-1, n).mean(1))
    return np.asarray(np.nan_to_num(torch.cat(found).numpy(), nan=np.inf, posinf=np.inf))
