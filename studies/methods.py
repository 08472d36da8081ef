"""What `performance` measures: our estimators and the peers, each as a function that computes one hypergradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from studies import peers
from studies.jax_peer import scanned
from ufom_runtime import EXACT, FOM, RECOMPUTED, UFOM, Estimator, hypergradient
from ufom_runtime.derivatives import leaf
from ufom_runtime.problem import BilevelProblem, Task
from ufom_theory import Sweep

Q = 0.1
STREAM = (1,) + (0,) * 9  # the coins of UFOM(Q)'s ten calls: their mean is Q, so their mean gradient is the exact one


@dataclass(frozen=True)
class Method:
    """One way to a hypergradient.

    Attributes:
        name: what it computes, and how.
        library: the distribution that does it.
        make: (problem, θ, one task) → the function to be timed.
        weight: its gradient is weight·exact + (1 − weight)·first-order; None for the floor, which computes none.
        calls: hypergradients in one call of that function.
        eager: whether every tensor is one of this interpreter's, so that `LiveBytes` sees it.
    """

    name: str
    library: str
    make: Callable[[BilevelProblem, Tensor, Task], peers.Call]
    weight: float | None
    calls: int = 1
    eager: bool = True

    @property
    def label(self) -> str:
        """Unique among the methods."""
        return f"{self.library}: {self.name}"

    @property
    def compiled(self) -> bool:
        """Whether it is one of ours that is compiled first."""
        return self.name.endswith(", compiled")

    @property
    def workloads(self) -> tuple[str, ...]:
        """Where it is measured: in hypercleaning the first-order gradient is zero, and only ours is timed for it."""
        trivial = self.weight == 0 and self.library != "ufom"
        return ("few-shot",) if trivial else ("few-shot", "hypercleaning")

    @property
    def version(self) -> str:
        """Of the library, empty where it is not installed."""
        try:
            return version(self.library)
        except PackageNotFoundError:
            return ""


def _floor(problem: BilevelProblem, theta: Tensor, task: Task) -> Tensor:
    """r + 1 bare gradients of the inner loss: what any hypergradient costs at least."""
    phi = leaf(problem.start(theta, task))
    for _ in range(problem.r + 1):
        (g,) = grad(problem.inner_loss(theta, phi, task), phi)
    return g


def _plain(function: Callable[..., Tensor], **options: Any) -> Callable[..., peers.Call]:
    return lambda problem, theta, task: partial(function, problem, theta, task, **options)


def _ours(estimator: Estimator, coins: tuple[int, ...] = (), compiled: bool = False) -> Callable[..., peers.Call]:
    """A call of `hypergradient`, or one for each coin and their mean."""

    def make(problem: BilevelProblem, theta: Tensor, task: Task) -> peers.Call:
        tasks = tuple(t[None] for t in task)
        once = partial(hypergradient, problem, theta, tasks, estimator, compile=compiled)
        tossed = [torch.tensor([coin == 1]) for coin in coins]

        def mean() -> Tensor:
            total: Any = sum(once(coins=coin) for coin in tossed)
            found: Tensor = total / len(tossed)
            return found

        return mean if tossed else once

    return make


def _exact(sweep: Sweep) -> Estimator:
    return Estimator(1.0, sweep)


def _all() -> list[Method]:
    ours = {
        "first-order": FOM,
        "exact, stored": EXACT,
        "exact, unrolled": _exact(Sweep.unrolled()),
        "exact, recomputed": RECOMPUTED,
        "exact, 3 checkpoints": _exact(Sweep.checkpointed(3)),
        "exact, 9 checkpoints": _exact(Sweep.checkpointed(9)),
    }
    compiled = ("first-order", "exact, stored", "exact, unrolled", "exact, recomputed", "exact, 3 checkpoints")
    first, by_hand, jax = {"second_order": False}, peers.by_hand, scanned
    return [
        Method("floor", "torch", _plain(_floor), None),
        *(Method(name, "ufom", _ours(e), e.q) for name, e in ours.items()),
        Method(f"UFOM({Q}), coin 0", "ufom", _ours(UFOM(Q), (0,)), 0.0),
        Method(f"UFOM({Q}), coin 1", "ufom", _ours(UFOM(Q), (1,)), 1 / Q),
        Method(f"UFOM({Q})", "ufom", _ours(UFOM(Q), STREAM), 1.0, calls=len(STREAM)),
        *(Method(f"{n}, compiled", "ufom", _ours(ours[n], compiled=True), ours[n].q, eager=False) for n in compiled),
        Method("first-order, by hand", "torch", _plain(by_hand, **first), 0.0),
        Method("exact, by hand", "torch", _plain(by_hand), 1.0),
        Method("first-order", "higher", _plain(peers.higher, **first), 0.0),
        Method("exact, unrolled", "higher", _plain(peers.higher), 1.0),
        Method("first-order", "torchopt", _plain(peers.torchopt_first_order), 0.0),
        Method("exact, unrolled", "torchopt", _plain(peers.torchopt), 1.0),
        Method("first-order", "learn2learn", _plain(peers.learn2learn, **first), 0.0),
        Method("exact, unrolled", "learn2learn", _plain(peers.learn2learn), 1.0),
        Method("exact, reverse", "hypergrad", _plain(peers.hypertorch, stored=True), 1.0),
        Method("exact, reverse_unroll", "hypergrad", _plain(peers.hypertorch, stored=False), 1.0),
        Method("exact, unrolled", "betty-ml", peers.betty, 1.0),
        Method("first-order", "boat-torch", partial(peers.boat, second_order=False), 0.0),
        Method("exact, unrolled", "boat-torch", peers.boat, 1.0),
        Method("first-order, scan by tens", "jax", partial(jax, second_order=False, unroll=10), 0.0, eager=False),
        Method("exact, scan", "jax", jax, 1.0, eager=False),
        Method("exact, scan by tens", "jax", partial(jax, unroll=10), 1.0, eager=False),
        Method("exact, scan with checkpoint", "jax", partial(jax, checkpoint=True), 1.0, eager=False),
    ]


METHODS = {method.label: method for method in _all()}
