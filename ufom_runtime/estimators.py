"""The one protocol for what gives an outer direction, and its stateless cases: FOM, EXACT and UFOM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import ClassVar, Literal, Protocol

import torch
from torch import Generator, Tensor

from ufom_runtime.algorithms import HELD as HELD_LENGTH
from ufom_runtime.algorithms import sweep_gradients
from ufom_runtime.derivatives import Calls, Losses, count_calls, count_rows, watch_losses
from ufom_runtime.inspection.non_finite import refuse_non_finite
from ufom_runtime.kept import kept
from ufom_runtime.memory import budget, peak_bytes
from ufom_runtime.problem import BilevelProblem, Task, Tasks, all_finite, check, cpu_generator, held_identity
from ufom_theory import CostModel, Sweep, Truncated, UfomError
from ufom_theory.checks import integer, plain
from ufom_theory.planner import states_held

Coin = Literal["task", "batch"]
Each = Callable[[Callable[[Tensor], list[Tensor]], Sequence[Tensor]], Iterable[list[Tensor]]]
"""Runs a function of every chunk, and gives what comes of it in their order: `map`, or several processes together."""


State = tuple[float, ...]
"""What a method remembers between outer steps: plain numbers, so that a checkpoint can hold them."""
Draws = Generator | Tensor | None
"""Where a method's randomness comes from: a CPU generator, or the coins ξ themselves, boolean, shape (n,)."""


@dataclass(frozen=True, eq=False)
class Direction:
    """What a method gives at one θ for one batch of tasks.

    Attributes:
        value: the mean over the batch, shape (s,), finite.
        per_task: each task's own direction, shape (n, s); None where it was not asked for.
        corrected: tasks whose coin ξ was 1.
        state: what the method remembers for its next step; empty for a stateless one.
        columns: what else it reports, for the log of a run.
    """

    value: Tensor
    per_task: Tensor | None = None
    corrected: int = 0
    state: State = ()
    columns: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_divergence(self.value if self.per_task is None else self.per_task)


class Method(Protocol):
    """Whatever gives an outer direction; `train` runs any of them.

    FOM, EXACT, UFOM(q) and the methods of `ufom_runtime.rivals` are stateless; AdaptiveUFOM keeps a state.
    """

    gradient: ClassVar[bool]
    """Whether the direction stands for a gradient, of M or of another objective; Reptile's does not."""

    def begin(self) -> State:
        """The state before the first step; empty for a stateless method."""

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
        """The direction at θ, shape (s,), for n stacked tasks.

        `draws` must not be the generator that drew the tasks (Theorem 1).

        Raises:
            UfomError: as `hypergradient`, or a problem for which the method is not valid.
        """


def _number(q: object) -> float:
    """A Python, numpy or 0-d torch number as a float."""
    value = q.item() if isinstance(q, Tensor) and q.ndim == 0 and not q.requires_grad else plain(q)
    if not isinstance(value, int | float):
        raise UfomError(f"q = {q!r} is a {type(q).__name__}: give one real number, a probability without a gradient")
    return float(value)


@dataclass(frozen=True)
class Estimator:
    """A hypergradient estimator (12)–(13): proxy + (ξ/q)·(exact − proxy) with ξ ~ Bernoulli(q).

    Attributes:
        q: probability of the exact correction; 0 leaves the proxy alone, 1 the exact gradient.
        sweep: how the exact gradient comes by its states.
        proxy: what is debiased.
        coin: "task", a coin for each task of a batch, or "batch", one for all of them: D² and V² are then those of the
            batch mean, which pays where a few exact tasks cost as much as the whole batch.

    Raises:
        UfomError: q outside [0, 1], a sweep, a proxy or a coin of another kind.
    """

    q: float
    sweep: Sweep = field(default_factory=Sweep.recomputed)
    proxy: Truncated = field(default_factory=Truncated)
    coin: Coin = "task"
    gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "q", _number(self.q))
        if not 0 <= self.q <= 1:
            raise UfomError(f"q = {self.q!r} must lie in [0, 1]: it is a probability")
        if not isinstance(self.sweep, Sweep) or not isinstance(self.proxy, Truncated):
            raise UfomError(f"sweep = {self.sweep!r}, proxy = {self.proxy!r}: give a Sweep and a Truncated")
        if not isinstance(self.coin, str) or self.coin not in ("task", "batch"):
            raise UfomError(f"coin = {self.coin!r} must be 'task', one a task, or 'batch', one for all of them")

    def calls(self, r: int, s: int = 1) -> Calls:
        """Expected calls for one task and r inner steps, by Proposition 1; s does not matter."""
        cost, k = CostModel(r=r, sweep=self.sweep, proxy=self.proxy), self.proxy.steps
        return Calls(r + 1 + self.q * cost.extra_steps, k + self.q * (r - k))

    def states(self, r: int, s: int = 1) -> int:
        """The most inner states held for one task with r inner steps; s does not matter."""
        return states_held(r, self.proxy, self.sweep) if self.q else r * self.proxy.held + self.proxy.steps

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
        n = len(tasks)
        coins = toss(n, self.q, draws, self.coin)
        result = theta.new_zeros((n, len(theta)) if per_task else (len(theta),))
        for index, proxy, exact in gradients(problem, theta, tasks, coins, self, chunk, compile):
            estimate = proxy if exact is None else debias(proxy, exact, self.q)
            if per_task:
                result[index.to(theta.device)] = estimate
            else:
                result.add_(estimate.sum(0), alpha=1 / n)
        corrected = int(coins.sum())
        return Direction(result.mean(0), result, corrected) if per_task else Direction(result, corrected=corrected)


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


def UFOM(
    q: float, sweep: Sweep | None = None, proxy: Truncated | Estimator | None = None, coin: Coin = "task"
) -> Estimator:
    """Unbiased first-order method, Algorithm 4, with any sweep and any truncated proxy.

    Args:
        q: probability of the exact correction, in (0, 1].
        sweep: recomputed (the paper's) if not given.
        proxy: FOM (the paper's) if not given; HELD, or Truncated(K).
        coin: "task" (the paper's) or "batch", as in `Estimator`.

    Raises:
        UfomError: q outside (0, 1].
    """
    q = _number(q)
    if not 0 < q <= 1:
        raise UfomError(f"q = {q!r} must lie in (0, 1]: it is a probability, and 1/q a weight; for q → 0 use FOM")
    return Estimator(q, sweep or Sweep.recomputed(), as_proxy(proxy), coin)


def debias(proxy: Tensor, exact: Tensor, q: float) -> Tensor:
    """(12)–(13) where ξ = 1: proxy + (exact − proxy)/q, arranged to be the exact gradient to the last bit at q = 1."""
    return exact / q + (1 - 1 / q) * proxy


def draw_coins(n: int, q: float, generator: Generator, coin: Coin = "task") -> Tensor:
    """ξ_1 … ξ_n ~ Bernoulli(q), a boolean tensor on the CPU, from a CPU generator of their own (Theorem 1)."""
    draws = n if coin == "task" else 1
    return (torch.rand(draws, generator=generator, dtype=torch.float64, device="cpu") < q).expand(n)


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

    Tasks with coin 0 run the proxy alone and never pay for the exact sweep; with coin 1, one sweep yields both.

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
    estimator.proxy.refuse_beyond(problem.r)
    k, length = estimator.proxy.steps, proxy_length(problem, estimator.proxy)
    exact_lengths = (problem.r,) if estimator.q == 1 else tuple(sorted({length, problem.r}))
    for coin, lengths in ((False, (length,)), (True, exact_lengths)):
        index = torch.nonzero(coins == coin)[:, 0]
        pairs = torch.stack([torch.zeros_like(index), index])
        rows = in_chunks(problem, theta[None], tasks, pairs, lengths, estimator.sweep, chunk, k, compile=compile)
        for piece, found in rows:
            yield piece[1], found[0], found[-1] if coin else None


def proxy_length(problem: BilevelProblem, proxy: Truncated) -> int:
    """What `sweep_gradients` is asked for: held gradients are FOM where the update's own Jacobian is the identity."""
    return HELD_LENGTH if proxy.held and not held_identity(problem) else proxy.steps


def as_proxy(proxy: Truncated | Estimator | None) -> Truncated:
    """A proxy as it is, or that of an estimator with q = 0; FOM for None; else `UfomError`."""
    found = proxy.proxy if isinstance(proxy, Estimator) and proxy.q == 0 else proxy or Truncated()
    if not isinstance(found, Truncated):
        raise UfomError(f"proxy = {proxy!r}: give FOM, HELD, or Truncated(K) for the last K backward steps")
    return found


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


_INSTEAD = {
    str: "is a name, and not the method itself",
    Sweep: "is a sweep, how the exact gradient recovers its states (Estimator(1.0, sweep) is that gradient)",
    Truncated: "is a proxy, which an estimator debiases (Estimator(0.0, proxy=proxy) is the proxy alone)",
    int | float: "is a number, and q goes into an estimator",
    FunctionType: "is a function that makes a method, and has to be called",
}


def refuse_other(method: object) -> None:
    """`UfomError` for what is not a `Method`."""
    if isinstance(method, type):
        raise UfomError(f"{method.__name__} is a class: make a method of it, {method.__name__}(...)")
    if _is_method(type(method)):  # type: ignore[arg-type]
        return
    why = next((said for kind, said in _INSTEAD.items() if isinstance(method, kind)), "is not a method")
    shown = getattr(method, "__name__", repr(method))
    raise UfomError(f"{shown} {why}: give FOM, EXACT, UFOM(q, sweep, proxy), or METHODS[name].make(r)")


@cache
def _is_method(kind: type) -> bool:
    """Whether objects of this type follow `Method`; `isinstance` with a protocol takes longer than a small gradient."""
    return hasattr(kind, "gradient") and all(callable(getattr(kind, name, None)) for name in ("begin", "direction"))


def refuse_divergence(gradient: Tensor) -> Tensor:
    """The gradient itself, if finite; else a `UfomError`."""
    if not all_finite(gradient):
        raise UfomError(
            "the hypergradient is not finite, though each task's is: numbers overflow in the mean or in the weight "
            "1/q; scale the outer loss down, or take float64"
        )
    return gradient


def toss(n: int, q: float, draws: Draws, coin: Coin = "task") -> Tensor:
    """ξ_1 … ξ_n, a boolean tensor on the CPU: those given, or drawn; where q is 0 or 1 nothing is drawn.

    Raises:
        UfomError: coins of another type or shape, or that q and `coin` rule out; no generator where one is needed.
    """
    if isinstance(draws, Tensor):
        return _given(n, q, draws, coin)
    if q in (0.0, 1.0):
        return torch.full((n,), q == 1.0, device="cpu")
    if draws is None:
        raise UfomError(f"q = {q:g} needs coins: pass coins, or a CPU generator that draws them")
    cpu_generator(draws)
    return draw_coins(n, q, draws, coin)


def _given(n: int, q: float, coins: Tensor, coin: Coin) -> Tensor:
    if coins.dtype != torch.bool or coins.shape != (n,):
        raise UfomError(f"coins are {coins.dtype} of shape {tuple(coins.shape)}: give bool, shape ({n},)")
    if q == 0 and coins.any():
        raise UfomError("q = 0 leaves the proxy alone, but a coin is 1, and 1/q its weight: use UFOM(q)")
    if q == 1 and not coins.all():
        raise UfomError("q = 1 corrects always, but a coin is 0: use UFOM(q) with q < 1")
    if coin == "batch" and coins.any() != coins.all():
        raise UfomError("coin = 'batch' is one coin for all tasks, but the coins differ: give equal ones")
    return coins.cpu()


def in_chunks(
    problem: BilevelProblem,
    thetas: Tensor,
    tasks: Tasks,
    pairs: Tensor,
    lengths: tuple[int, ...],
    sweep: Sweep,
    chunk: int | None = None,
    ring: int = 0,
    each: Each = map,
    compile: bool = False,
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """`sweep_gradients` of (θ, task) pairs, in chunks that fit the memory budget.

    Args:
        problem: the problem.
        thetas: shape (k, s).
        tasks: n stacked tasks.
        pairs: indices into the thetas and into the tasks, shape (2, rows), on the CPU.
        lengths: truncation lengths, ascending.
        sweep: how the states are come by.
        chunk: rows run together; None: as many as the budget holds, by the measured bytes of one row; compiled
            steps run one on the CPU, and as many as there are tasks at most elsewhere.
        ring: last states kept from the forward loop, the proxy's length.
        each: runs the chunks.
        compile: as in `hypergradient`.

    Yields:
        (the pairs of this chunk, one tensor (rows, s) a length).
    """

    def run(piece: Tensor) -> list[Tensor]:
        rows, chosen = _rows(thetas, tasks, piece)
        try:
            with watch_losses(seen := Losses()):
                found = sweep_gradients(problem, rows, chosen, lengths, sweep, ring, compile)
        except torch.OutOfMemoryError as error:
            said = f"{len(rows)} tasks at once do not fit into memory: pass a smaller chunk ({error})"
            raise UfomError(said) from error
        refuse_non_finite(problem, rows, chosen, found, seen, piece[1].tolist())
        return found

    def run_filled(piece: Tensor, chunk: int) -> list[Tensor]:
        """Every chunk as long as the first, the last row repeated: each length would be compiled anew."""
        size = piece.shape[1]
        with count_calls() as calls:
            found = run(piece[:, torch.arange(chunk, device="cpu").clamp(max=size - 1)])
        for kind, rows in vars(calls).items():
            count_rows(kind, rows * size // chunk)
        return [f[:size] for f in found]

    if not pairs.shape[1]:
        return
    size = rows_together(problem, thetas, tasks, pairs, lengths, sweep, chunk, ring, compile)
    pieces = torch.split(pairs, size, dim=1)
    found = each(lambda piece: run_filled(piece, size) if compile else run(piece), pieces)
    yield from zip(pieces, found, strict=True)


def rows_together(
    problem: BilevelProblem,
    thetas: Tensor,
    tasks: Tasks,
    pairs: Tensor,
    lengths: tuple[int, ...],
    sweep: Sweep,
    chunk: int | None,
    ring: int = 0,
    compile: bool = False,
) -> int:
    """How many rows `in_chunks` runs together, for the same arguments."""
    n = len(tasks)
    if chunk is not None:
        return int(integer("chunk, the tasks run together,", chunk, 1))
    if pairs.shape[1] == 1 or (compile and thetas.device.type == "cpu"):
        return 1
    key = (lengths[0], lengths[-1], sweep, ring, thetas.dtype, thetas.device, *(t.shape[1:] for t in tasks.parts))
    known: dict[object, int] = kept(problem, "bytes of a row")
    if key not in known:
        rows, one = _rows(thetas, tasks, pairs[:, :1])
        with count_calls():  # the probe is not counted
            known[key] = peak_bytes(lambda: sweep_gradients(problem, rows, one, lengths, sweep, ring), tasks.parts)
        if n > 1:
            known[key] += sum(t[0].nbytes for t in tasks.parts)  # the rows of a chunk are copies
    size = max(1, budget(thetas.device) // max(1, known[key]))
    return min(size, n) if compile else size


def _rows(thetas: Tensor, tasks: Tasks, pairs: Tensor) -> tuple[Tensor, Tasks]:
    """The θ and the tasks at the pairs of indices."""
    n, size = len(tasks), pairs.shape[1]
    rows = thetas.expand(size, -1) if len(thetas) == 1 else thetas[pairs[0].to(thetas.device)]
    if n == 1:  # one task for every θ: seen many times, held once
        return rows, tasks.repeat(size)
    return rows, tasks if torch.equal(pairs[1], torch.arange(n, device="cpu")) else tasks.take(pairs[1])
