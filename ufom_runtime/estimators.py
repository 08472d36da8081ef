"""The stateless cases of the protocol: FOM, EXACT, UFOM; and `hypergradient`, which runs what keeps no state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, overload

import torch
from torch import Generator, Tensor

from ufom_runtime.algorithms import HELD as HELD_LENGTH
from ufom_runtime.batching import in_chunks
from ufom_runtime.coins import Coin, Draws, Parts, estimate, toss, weighed_as
from ufom_runtime.derivatives import Calls
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check, held_identity
from ufom_runtime.protocol import Direction as Direction
from ufom_runtime.protocol import Method as Method
from ufom_runtime.protocol import State as State
from ufom_runtime.protocol import is_method as is_method
from ufom_runtime.protocol import refuse_other as refuse_other
from ufom_theory import CostModel, Sweep, Truncated, UfomError
from ufom_theory.checks import finite, plain, scalar, typed
from ufom_theory.planner import states_held

if TYPE_CHECKING:
    from ufom_runtime.methods.debiased import Debiased, Proxy
    from ufom_runtime.methods.followed import FollowedScale


def _number(q: object) -> float:
    """A Python, numpy or 0-d torch number as a float."""
    value = q if getattr(q, "requires_grad", False) else plain(q)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UfomError(f"q = {q!r} is a {type(q).__name__}: give one real number, a probability without a gradient")
    try:
        return float(value)
    except OverflowError as error:
        raise UfomError(f"q = {value!r:.50}… must lie in [0, 1]: it is a probability") from error


class Coined(ABC):
    """What estimators with coins share: c·F + (ξ/q)·(G − c·F), from the F and G that `parts` gives; without a state."""

    q: float
    scale: float
    coin: Coin
    gradient: ClassVar[bool] = True

    @abstractmethod
    def parts(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, coins: Tensor, chunk: int | None, compile: bool
    ) -> tuple[Parts, Mapping[str, float]]:
        """The proxy and exact gradients that the estimate is made of, as `gradients` yields them, and columns."""

    def begin(self) -> State:
        """The empty state."""
        return ()

    def direction(
        self,
        problem: BilevelProblem,
        theta: Tensor,
        tasks: Task | Tasks,
        state: State = (),
        draws: Draws = None,
        *,
        per_task: bool = False,
        chunk: int | None = None,
        compile: bool = False,
    ) -> Direction:
        """As `Method.direction`: the estimate (12)–(13)."""
        tasks = check(problem, theta, tasks)
        coins = toss(len(tasks), self.q, draws, self.coin)
        parts, columns = self.parts(problem, theta, tasks, coins, chunk, compile)
        found = estimate(parts, theta, len(tasks), weighed_as(coins, self.q, self.coin), self.scale, per_task)
        return Direction.of(found, int(coins.sum()), columns=columns)


@dataclass(frozen=True)
class Estimator(Coined):
    """A hypergradient estimator (12)–(13): c·F + (ξ/q)·(G − c·F) with ξ ~ Bernoulli(q), F the proxy, G exact.

    Attributes:
        q: probability of the exact correction; 0 leaves the proxy alone, 1 the exact gradient.
        sweep: how the exact gradient recovers its states.
        proxy: what is debiased.
        scale: c, fixed before the coins; c* = E⟨G, F⟩/E‖F‖² gives the least second moment.
        coin: "task", a coin for each task of a batch; "batch", one for all of them: D² and V² are then those of the
            batch mean; or "stratified": k = ⌊qB⌋ + Bernoulli(qB − ⌊qB⌋) of the B tasks are corrected, with weight B/k
            where qB ≥ 1, else 1/q: D² − ‖E(G − c·F)‖² then stands in the place of D².

    Raises:
        UfomError: q outside [0, 1], a scale that is not finite, a sweep, a proxy or a coin of another kind.
    """

    q: float
    sweep: Sweep = field(default_factory=Sweep.recomputed)
    proxy: Truncated = field(default_factory=Truncated)
    scale: float = 1.0
    coin: Coin = "task"

    def __post_init__(self) -> None:
        object.__setattr__(self, "q", _number(self.q))
        if not 0 <= self.q <= 1:
            raise UfomError(f"q = {self.q!r} must lie in [0, 1]: it is a probability")
        if not isinstance(self.sweep, Sweep) or not isinstance(self.proxy, Truncated):
            raise UfomError(f"sweep = {self.sweep!r}, proxy = {self.proxy!r}: give a Sweep and a Truncated")
        object.__setattr__(self, "scale", float(scalar("scale", self.scale, finite)))
        if not isinstance(self.coin, str) or self.coin not in ("task", "batch", "stratified"):
            raise UfomError(
                f"coin = {self.coin!r} must be 'task', one a task, 'batch', one for all of them, or 'stratified'"
            )

    def calls(self, r: int, s: int = 1) -> Calls:
        """Expected calls for one task and r inner steps, as they are made; s does not matter."""
        cost, proxy = CostModel(r=r, sweep=self.sweep, proxy=self.proxy, as_printed=False), self.proxy.calls(r)
        products = proxy.hessian_vector_products + self.q * cost.backward_steps
        return Calls(proxy.gradients + self.q * cost.extra_steps, products)

    def states(self, r: int, s: int = 1) -> int:
        """The most inner states held for one task with r inner steps; s does not matter."""
        return states_held(r, self.proxy, self.sweep) if self.q else self.proxy.states(r)

    def parts(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, coins: Tensor, chunk: int | None, compile: bool
    ) -> tuple[Parts, Mapping[str, float]]:
        """As `Coined.parts`; there are no columns."""
        return gradients(problem, theta, tasks, coins, self, chunk, compile), {}


FOM = Estimator(0.0)
"""First-order method, Algorithm 3."""
HELD = Estimator(0.0, proxy=Truncated(held=True))
"""The first-order gradient of other libraries: the inner update is differentiated, ∂L_in/∂φ in it held constant.

For gradient descent with fixed step sizes it is FOM. Otherwise it needs the r states and inner gradients of the loop.
"""
EXACT = Estimator(1.0, Sweep.stored())
"""Exact gradient with stored states, Algorithm 2."""
RECOMPUTED = Estimator(1.0, Sweep.recomputed())
"""Exact gradient in O(1) memory, Algorithm 4 at q = 1."""


@overload
def UFOM(  # type: ignore[overload-overlap]  # an Estimator is a Proxy, too
    q: float,
    sweep: Sweep | None = None,
    proxy: Truncated | Estimator | None = None,
    scale: float = 1.0,
    coin: Coin = "task",
) -> Estimator: ...
@overload
def UFOM(
    q: float, sweep: Sweep | None = None, *, proxy: Proxy, scale: float = 1.0, coin: Coin = "task"
) -> Debiased: ...
@overload
def UFOM(
    q: float,
    sweep: Sweep | None = None,
    proxy: Truncated | Estimator | Proxy | None = None,
    *,
    scale: Literal["followed"],
    coin: Coin = "task",
) -> FollowedScale: ...
@typed
def UFOM(
    q: float,
    sweep: Sweep | None = None,
    proxy: Truncated | Estimator | Proxy | None = None,
    scale: float | Literal["followed"] = 1.0,
    coin: Coin = "task",
) -> Estimator | Debiased | FollowedScale:
    """Unbiased first-order method, Algorithm 4, with any sweep and any proxy.

    Args:
        q: probability of the exact correction, in (0, 1].
        sweep: recomputed (the paper's) if not given.
        proxy: FOM (the paper's) if not given; HELD, Truncated(K), or another stateless method, such as Implicit().
        scale: c, a factor of the proxy, as in `Estimator`; "followed": the best one by earlier steps, for `train`.
        coin: "task" (the paper's), "batch" or "stratified", as in `Estimator`.

    >>> UFOM(0.2, Sweep.checkpointed(3), HELD).calls(10)
    Calls(gradients=12.0, hessian_vector_products=2.0)

    Raises:
        UfomError: q outside (0, 1], or a proxy that is not one.
    """
    q = _number(q)
    if not 0 < q <= 1:
        raise UfomError(f"q = {q!r} must lie in (0, 1]: it is a probability, and 1/q a weight; for q → 0 use FOM")
    if isinstance(scale, str) and scale == "followed":
        from ufom_runtime.methods.followed import FollowedScale

        return FollowedScale(UFOM(q, sweep, proxy, coin=coin))  # type: ignore[arg-type]  # any of the proxies
    if proxy is not None and not isinstance(proxy, Estimator | Truncated) and is_method(type(proxy)):
        from ufom_runtime.methods.debiased import Debiased  # it is built on this file

        return Debiased(q, proxy, sweep or Sweep.recomputed(), scale, coin)
    return Estimator(q, sweep or Sweep.recomputed(), as_proxy(proxy), scale, coin)


def gradients(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Tasks,
    coins: Tensor,
    estimator: Estimator,
    chunk: int | None = None,
    compile: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Proxy and exact gradients for given coins, chunk by chunk.

    All tasks of a chunk go forward together; those with coin 0 stop at the proxy, and the others go on from there.

    Args:
        problem: the problem.
        theta: outer parameters, shape (s,).
        tasks: n stacked tasks.
        coins: ξ, boolean, shape (n,).
        estimator: its proxy and sweep are used; at q = 1 the proxy is not needed, and the exact gradient stands for it.
        chunk, compile: as in `hypergradient`.

    Yields:
        (indices into the tasks, proxy gradients, exact gradients or None where the coin is 0).
    """
    proxy, r = estimator.proxy, problem.r
    proxy.refuse_beyond(r)
    pairs = torch.stack([torch.zeros_like(coins, dtype=torch.int64), torch.arange(len(coins), device="cpu")])
    lengths = {proxy_length(problem, proxy)} if estimator.q < 1 else set()
    lengths |= {r} if estimator.q > 0 else set()
    stops = torch.where(coins, r, proxy.steps)
    args = (tuple(sorted(lengths)), estimator.sweep, chunk, proxy.steps)
    for (_, index), found in in_chunks(problem, theta[None], tasks, pairs, *args, compile=compile, stops=stops):
        for coin in (False, True):
            mine = coins[index] == coin
            if mine.any():
                some = found[0] if mine.all() else found[0][mine.to(theta.device)]
                yield index[mine], some, (found[1] if len(found) > 1 else some) if coin else None


def proxy_length(problem: BilevelProblem, proxy: Truncated) -> int:
    """What `sweep_gradients` is asked for: held gradients are FOM where the update's own Jacobian is the identity."""
    return HELD_LENGTH if proxy.held and not held_identity(problem) else proxy.steps


def as_proxy(proxy: object) -> Truncated:
    """A proxy as it is, or that of an estimator with q = 0; FOM for None; else `UfomError`."""
    found = Truncated() if proxy is None else proxy
    if isinstance(found, Estimator) and found.q == 0:
        found = found.proxy
    if not isinstance(found, Truncated):
        raise UfomError(f"proxy = {proxy!r}: give FOM, HELD, or Truncated(K) for the last K backward steps")
    return found


@typed
def hypergradient(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Task | Tasks,
    estimator: Method,
    *,
    coins: Tensor | None = None,
    generator: Generator | None = None,
    per_task: bool = False,
    chunk: int | None = None,
    compile: bool = False,
) -> Tensor:
    """Estimate ∇M at θ from a batch of tasks.

    Args:
        problem: the problem.
        theta: outer parameters, shape (s,); computed on its device and in its dtype.
        tasks: n tasks, stacked in the leading dimension.
        estimator: FOM, EXACT, RECOMPUTED, UFOM(q, sweep, proxy), or a method of `ufom_runtime.methods`.
        coins: ξ of each task, boolean, shape (n,); for 0 < q < 1 give these or a generator.
        generator: a CPU generator that draws the coins, or what else a method draws; not the one that draws the tasks
            (Theorem 1).
        per_task: return every task's estimate instead of their mean.
        chunk: tasks run together by vmap; None: as many as the memory budget holds (a rival: all); 1: a plain loop.
        compile: trace the steps where they are first used, and compile them: quicker, after seconds to a minute of
            waiting for each shape of a task. A stored sweep then keeps a step's state, or the residuals of its gradient
            if they are fewer bytes; an unrolled one always keeps the residuals. Where no compiler is found, a warning
            says so and the plain steps are used.

    Returns:
        The mean over the batch, shape (s,), or with `per_task` shape (n, s).

    >>> from ufom_runtime.problems.quadratic import quadratic
    >>> problem = quadratic()
    >>> tasks = problem.sample(3, Generator().manual_seed(0))
    >>> hypergradient(problem, problem.initial, tasks, EXACT).shape
    torch.Size([5])

    Raises:
        UfomError: wrong shapes or devices, NaN, a loss that ignores φ, missing coins, an inner loop that diverged, or a
            method that keeps a state or whose direction is not a gradient.
    """
    refuse_other(estimator)
    if estimator.begin():
        raise UfomError(
            f"{estimator!r} keeps a state between outer steps, which hypergradient does not hold: use train"
        )
    if not estimator.gradient:
        raise UfomError(f"{estimator!r} gives a direction that is not a gradient, so not an estimate of ∇M: use train")
    if coins is not None and not isinstance(coins, Tensor):
        raise UfomError(f"coins are a {type(coins).__name__}: give a bool tensor, one entry a task")
    draws = generator if coins is None else coins
    found = estimator.direction(problem, theta, tasks, (), draws, per_task=per_task, chunk=chunk, compile=compile)
    return found.per_task if per_task and found.per_task is not None else found.value
