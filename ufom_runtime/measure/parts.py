"""The parts of one outer step, timed and weighed on the device in use; every estimator's cost is a sum of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.coins import Coin
from ufom_runtime.estimators import FOM, HELD, Estimator, Method, hypergradient
from ufom_runtime.measure import clock
from ufom_runtime.measure.calls import corrected_tasks
from ufom_runtime.memory import peak_bytes
from ufom_runtime.methods.debiased import Proxy
from ufom_runtime.problem import BilevelProblem, Tasks, held_identity
from ufom_theory import Sweep, Truncated
from ufom_theory.planner import states_held

Array = NDArray[np.float64]
_LEAST, _MOST = 3, 30  # rounds of a timing
_SHORT = 20  # steps of a longer inner loop that are timed: another step takes as long


@torch.enable_grad()
def script_gradient(problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> Tensor:
    """∇M of a batch, shape (s,), as plain scripts compute it: autograd through the unrolled loop, task after task."""
    total = torch.zeros_like(theta)
    for i in range(len(tasks)):
        task, leaf = tasks.take(slice(i, i + 1)).one(), theta.detach().requires_grad_()
        phi = problem.start(leaf, task).clone()  # a start that is θ itself must not be θ's leaf
        phi = phi if phi.requires_grad else phi.requires_grad_()
        update = problem.update
        state = update.init(leaf, phi, task) if update else ()
        for j in range(problem.r):
            seen = problem.inner_batch(task, j + 1) if problem.inner_batch else task
            (slope,) = torch.autograd.grad(problem.inner_loss(leaf, phi, seen), phi, create_graph=True)
            if update:
                phi, state = update.update(leaf, phi, state, slope, seen, j + 1)
            else:
                phi = phi - problem.alphas[j] * slope
        (gradient,) = torch.autograd.grad(problem.outer_loss(leaf, phi, task), leaf, materialize_grads=True)
        total += gradient / len(tasks)
    return total


def alternated(functions: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> Array:
    """Seconds of each function in rounds, shape (rounds, functions), after one that does not count.

    It ends after `seconds`, but not before three rounds; once they have taken three times as long it ends in any case,
    and the first round counts where it is the only one.
    """
    found: list[list[float]] = []
    spent = 0.0
    while len(found) <= _LEAST or (len(found) <= _MOST and spent < seconds):
        found.append([clock.took(function, device) for function in functions])
        if (spent := spent + sum(found[-1])) > 3 * seconds:
            break
    return np.array(found[1:] or found)


@dataclass(frozen=True)
class Parts:
    """Seconds and bytes of what an outer step of `batch` tasks is made of.

    A pair (a, b) holds the seconds for one task and for the whole batch run together; between them they are taken as
    affine in the number of tasks.

    Attributes:
        r: inner steps.
        batch: B, tasks a step.
        forward: a step of the proxy with K = 0, FOM.
        back: one backward step.
        graph: one backward step of the unrolled sweep, with what its graph adds to the way there.
        held: the backward loop of HELD, 0 where it is FOM.
        mixed: the forward passes where some tasks of the batch are corrected and some are not.
        script: a step of `script_gradient`.
        bytes_script: the most that the script's tensors hold at once.
        bytes_forward: the same of FOM.
        bytes_back: the same with one state kept and one backward step.
        bytes_state: what one more state adds.
        bytes_held: the most that HELD holds at once.
        bytes_unrolled: the most that the unrolled sweep holds at once.
        others: seconds and bytes of a step of other methods, which may be debiased.
    """

    r: int
    batch: int
    forward: tuple[float, float]
    back: tuple[float, float]
    graph: tuple[float, float]
    held: tuple[float, float]
    mixed: float
    script: float
    bytes_script: int
    bytes_forward: int
    bytes_back: int
    bytes_state: int
    bytes_held: int
    bytes_unrolled: int
    others: Mapping[Proxy, tuple[float, int]] = field(default_factory=dict)

    def seconds(self, corrected: int, proxy: Truncated, sweep: Sweep) -> float:
        """One outer step of which `corrected` tasks are corrected."""
        k, rest = proxy.steps, self.batch - corrected
        # a corrected task takes its proxy's backward steps on the way, but for HELD, which has its own loop
        by_proxy = k * self._of(self.back, rest) + proxy.held * self._of(self.held, self.batch)
        if not corrected:
            return self.forward[1] + by_proxy
        back = self.graph if sweep.kind == "unrolled" else self.back
        repeated = int(sweep.extra_steps(self.r - k if rest else self.r, as_printed=False))
        way = (self.mixed if rest else self.forward[1]) + by_proxy
        again = repeated * self._of(self.forward, corrected) / (self.r + 1)
        return way + self.r * self._of(back, corrected) + again

    def expected(self, q: float, proxy: Truncated | Proxy, sweep: Sweep, coin: Coin = "task") -> float:
        """The mean over the coins of `seconds`."""
        chances = corrected_tasks(self.batch, q, coin)
        if isinstance(proxy, Truncated):
            return float(sum(p * self.seconds(k, proxy, sweep) for k, p in enumerate(chances) if p))
        corrected = sum(p * self.alone(k, sweep) for k, p in enumerate(chances) if p and k)
        return float(self.others[proxy][0] + corrected)

    def alone(self, tasks: int, sweep: Sweep) -> float:
        """The exact gradient of `tasks` tasks by themselves."""
        repeated = sweep.extra_steps(self.r, as_printed=False) / (self.r + 1)
        back = self.graph if sweep.kind == "unrolled" else self.back
        return float((1 + repeated) * self._of(self.forward, tasks) + self.r * self._of(back, tasks))

    def bytes(self, q: float, proxy: Truncated | Proxy, sweep: Sweep) -> int:
        """The most that the tensors of one outer step hold at once, all tasks corrected (if q > 0)."""
        if not isinstance(proxy, Truncated):
            return max(self.others[proxy][1], self.bytes(1.0, Truncated(), sweep))
        least = self.bytes_held if proxy.held and q < 1 else self.bytes_forward
        if not q and not proxy.steps:
            return least
        if q and sweep.kind == "unrolled":
            return max(least, self.bytes_unrolled)
        held = states_held(self.r, proxy if q < 1 else Truncated(), sweep) if q else proxy.steps
        return max(least, self.bytes_back + (held - 1) * self.bytes_state)

    def level_costs(self, levels: Sequence[int], sweep: Sweep) -> Array:
        """c_0 … c_n of one of the batch's tasks in a roulette with these levels, as `Roulette.costs`."""
        gradient, product = (self._of(pair, self.batch) / self.batch for pair in (self.forward, self.back))
        repeated = [int(sweep.extra_steps(k, as_printed=False)) for k in levels]
        runs = [product * k + gradient / (self.r + 1) * n for k, n in zip(levels, repeated, strict=True)]
        return np.array([gradient, *np.maximum(np.diff(runs), 1e-9 * gradient)])

    def roulette(self, levels: Sequence[int], survival: Sequence[float], sweep: Sweep) -> float:
        """The mean over the draws of a step of a roulette: way there, backward steps and repeated steps by level."""
        total = self.forward[1] if self.batch == 1 else self.mixed
        repeated = [int(sweep.extra_steps(k, as_printed=False)) / (self.r + 1) for k in levels]
        for i, q in enumerate(survival):
            chances = corrected_tasks(self.batch, q, "task")
            back, again = (sum(p * self._of(x, k) for k, p in enumerate(chances)) for x in (self.back, self.forward))
            total += (levels[i + 1] - levels[i]) * back + (repeated[i + 1] - repeated[i]) * again
        return float(total)

    def _of(self, pair: tuple[float, float], tasks: int) -> float:
        """The seconds of `tasks` tasks."""
        one, every = pair
        if not tasks or self.batch == 1:
            return one * tasks
        return one + (every - one) * (tasks - 1) / (self.batch - 1)


def measure_parts(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Tasks,
    memory: int | None = None,
    seconds: float = 10.0,
    *,
    methods: Sequence[Proxy] = (),
    chunk: int | None = None,
    compile: bool = False,
) -> Parts:
    """Time and weigh the parts of an outer step on a batch of tasks, alternately, for about `seconds`.

    Args:
        problem: the problem.
        theta: θ, shape (s,).
        tasks: the batch.
        memory: bytes that may be held; the backward steps are timed over no more states than fit, and over the first 20
            inner steps where there are more than 40.
        seconds: of timing, besides weighing.
        methods: others that are timed and weighed, too.
        chunk, compile: as in `hypergradient`.

    Raises:
        UfomError: as `hypergradient`.
    """
    run = partial(hypergradient, chunk=chunk, compile=compile)
    r, known = problem.r, (theta, *tasks.parts)
    if r <= 2 * _SHORT:
        return _parts(problem, theta, tasks, memory, seconds, methods, run)
    found = _parts(problem.cut(_SHORT), theta, tasks, memory, seconds / 2, (), run)
    batches = [tasks.take(slice(n)) for n in dict.fromkeys((1, len(tasks)))]
    calls = [partial(run, problem, theta, some, FOM) for some in batches]
    direct = [partial(run, problem, theta, tasks, method) for method in methods]
    times = np.median(alternated([*calls, *direct], theta.device, seconds / 2), axis=0).tolist()
    forward, others = (times[0], times[len(calls) - 1]), times[len(calls) :]
    longer, bare = r / _SHORT, found.bytes_forward
    held, unrolled = (bare + round(longer * (x - bare)) for x in (found.bytes_held, found.bytes_unrolled))
    return replace(
        found, r=r, forward=forward, held=(longer * found.held[0], longer * found.held[1]),
        mixed=found.mixed * forward[1] / found.forward[1], script=longer * found.script, bytes_held=held,
        bytes_script=round(longer * found.bytes_script), bytes_unrolled=unrolled,
        others={x: (spent, peak_bytes(call, known)) for x, spent, call in zip(methods, others, direct, strict=True)},
    )  # fmt: skip


def _parts(
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Tasks,
    memory: int | None,
    seconds: float,
    methods: Sequence[Proxy],
    gradient: Callable[..., Tensor],
) -> Parts:
    """`measure_parts` of whole inner loops."""
    r, batch, stored, unrolled = problem.r, len(tasks), Sweep.stored(), Sweep.unrolled()

    def run(n: int, estimator: Method, **options: Any) -> Callable[[], object]:
        some = tasks if n == batch else tasks.take(slice(n))
        return partial(gradient, problem, theta, some, estimator, **options)

    def weigh(sweep: Sweep, proxy: Truncated) -> int:
        call = run(batch, Estimator(0.0, sweep, proxy), compile=False)
        call()  # what is found out at first use is not weighed
        return peak_bytes(call, (theta, *tasks.parts))

    few = min(4, r)
    by_script = peak_bytes(lambda: script_gradient(problem, theta, tasks), (theta, *tasks.parts))
    bare, one = weigh(stored, Truncated()), weigh(stored, Truncated(1))
    state = weigh(stored, Truncated(2)) - one if r > 1 else one
    graph = weigh(unrolled, Truncated(few))
    by_graph = max(graph - weigh(unrolled, Truncated(few - 1)), 1) if few > 1 else graph
    other = not held_identity(problem)  # whether HELD is another proxy than FOM
    by_held = weigh(stored, HELD.proxy) if other else bare
    room = [r if memory is None else min(r, max(1, 1 + (memory - one) // max(1, x))) for x in (state, by_graph)]
    kept, graphed = (Truncated(k) for k in room)
    sizes = (1, batch) if batch > 1 else (1,)
    timed = [Estimator(0.0), Estimator(0.0, stored, kept), Estimator(0.0, unrolled, graphed), *[HELD] * other]
    calls = [run(n, estimator) for estimator in timed for n in sizes]
    sweep = stored if kept.steps == r else Sweep.recomputed()
    if batch > 1:
        calls.append(run(batch, Estimator(0.5, sweep), coins=torch.arange(batch, device="cpu") == 0))
    direct: list[Callable[[], object]] = [lambda: script_gradient(problem, theta, tasks)]
    direct += [run(batch, method) for method in methods]
    times = np.median(alternated([*calls, *direct], theta.device, seconds), axis=0).tolist()
    found, (script, *others) = times[: len(calls)], times[len(calls) :]
    held_by = [peak_bytes(call, (theta, *tasks.parts)) for call in direct[1:]]
    forward = found[0], found[len(sizes) - 1]

    def per_step(index: int, steps: int) -> tuple[float, float]:
        first, last = found[index * len(sizes)], found[(index + 1) * len(sizes) - 1]
        return max(first - forward[0], 0.0) / steps, max(last - forward[1], 0.0) / steps

    back = per_step(1, kept.steps)
    repeated = sweep.extra_steps(r, as_printed=False) * forward[0] / (r + 1)
    mixed = max(found[-1] - r * back[0] - repeated, forward[1]) if batch > 1 else forward[1]
    weights = by_script, bare, one, state, by_held, graph + (r - few) * by_graph
    held = per_step(3, 1) if other else (0.0, 0.0)
    by_method = dict(zip(methods, zip(others, held_by, strict=True), strict=True))
    return Parts(r, batch, forward, back, per_step(2, graphed.steps), held, mixed, script, *weights, by_method)
