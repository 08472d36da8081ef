"""What the study of a GPU times: one group of methods on one workload, in its own process.

W1 is few-shot learning by MAML: 20 ways, one image each, the net of 64 filters, r = 10, a batch of 32 tasks. W2 is data
hypercleaning at the paper's size: 5,000 weighted images, 5,000 for validation, r = 100, one task.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from studies import peers
from studies.jax_peer import scanned
from studies.methods import METHODS
from studies.performance_problems import Config as Images
from studies.performance_problems import build
from studies.shared.timing import alternate, spread
from ufom_runtime import EXACT, FOM, RECOMPUTED, UFOM, Estimator, hypergradient
from ufom_runtime.measure.clock import took
from ufom_runtime.memory import peak_bytes
from ufom_runtime.problem import BilevelProblem, Tasks, one_theta
from ufom_theory import Sweep

OURS = {
    "first-order": FOM,
    "UFOM(0.1)": UFOM(0.1, Sweep.stored(), coin="stratified"),
    "exact, stored": EXACT,
    "exact, unrolled": Estimator(1.0, Sweep.unrolled()),
    "exact, 3 checkpoints": Estimator(1.0, Sweep.checkpointed(3)),
    "exact, recomputed": RECOMPUTED,
}
PEERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "torch": {"exact, by hand": peers.by_hand, "first-order, by hand": partial(peers.by_hand, second_order=False)},
    "higher": {"exact, unrolled": peers.higher},
    "torchopt": {"exact, unrolled": peers.torchopt},
    "learn2learn": {"exact, unrolled": peers.learn2learn},
}
GROUPS = ("ours", "stored, compiled", "others", "unrolled, compiled", "first-order, compiled")


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        device: "cuda", or "cpu" to try it out.
        images: of the two workloads, as the study of performance has them.
        tasks: W1's batch.
        lengths: r of W1 and of W2.
        groups: of methods, in the order in which they are measured.
        rounds: turns of all methods of a group;
        patience: but, after the first 3, no more once they took this many seconds.
        minutes: after which no further group is begun.
    """

    device: str
    images: Images
    tasks: int
    lengths: tuple[int, int]
    groups: tuple[str, ...] = GROUPS
    rounds: int = 20
    patience: float = 8.0
    minutes: float = 4.0


def run_cell(cell: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Memory of each method, then the times, in turns; what fails has a row that says why."""
    problem, theta, tasks = _problem(cell, double=False)
    same = differences(cell) if cell["group"] in ("ours", "others") else {}
    hypergradient(problem, theta, tasks, FOM)  # the libraries' work spaces, which stay, are no method's
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for key, make in _methods(cell["group"]).items():
        rows[key] = {"method": key[1], "library": key[0], "version": _version(key[0]), **same.get(key, {})}
        try:
            call, base = make(problem, theta, tasks), torch.cuda.memory_allocated() if theta.is_cuda else 0
            rows[key]["first"] = took(call, theta.device)
            rows[key]["bytes"] = _bytes(call, theta, tasks, base) if key[0] != "jax" else None
            calls[key] = call
        except Exception as error:  # of another's library, or of its compiler: whatever it raises, the row says it
            rows[key]["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    times = alternate(
        [*calls.values()], cell["rounds"], cell["patience"], least=3, took=lambda call: took(call, theta.device)
    )
    for key, taken in zip(calls, times.T, strict=True):
        found = spread(taken)
        rows[key] |= {"seconds": found["ratio"], "low": found["low"], "high": found["high"], "turns": len(taken)}
    yield from rows.values()


def _problem(cell: Mapping[str, Any], double: bool) -> tuple[BilevelProblem, Tensor, Tasks]:
    """The workload on its device; in float64, a smaller one to compare gradients on: 2 tasks, 4 steps."""
    r, n = (min(cell["r"], 4), 2) if double else (cell["r"], cell["tasks"])
    images = Images(**{**cell["images"], "lengths": tuple(cell["images"]["lengths"]), "long": (1, 1)})
    made, _, given = build(images, cell["workload"], r, double, device=cell["device"], tasks=n)
    return made, one_theta(made), Tasks.of(given)


def _methods(group: str) -> dict[tuple[str, str], Callable[..., Callable[[], Tensor]]]:
    """By library and name: (problem, θ, tasks) → the call to be timed."""
    if group == "others":
        found = {
            (library, name): partial(_one_by_one, f) for library, all_ in PEERS.items() for name, f in all_.items()
        }
        return {**found, ("jax", "exact, scan, vmapped"): _jax}
    if group == "ours":
        return {("ufom", name): partial(_ours, name, False) for name in OURS}
    name = group.partition(",")[0]
    name = name if name in OURS else f"exact, {name}"
    return {("ufom", name): partial(_ours, name, False), ("ufom", f"{name}, compiled"): partial(_ours, name, True)}


def _ours(name: str, compiled: bool, problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> Callable[[], Tensor]:
    """All tasks together; the coins are the same at every call."""

    def call() -> Tensor:
        coins = torch.Generator().manual_seed(0)
        return hypergradient(problem, theta, tasks, OURS[name], generator=coins, chunk=len(tasks), compile=compiled)

    return call


def _one_by_one(
    function: Callable[..., Tensor], problem: BilevelProblem, theta: Tensor, tasks: Tasks
) -> Callable[[], Tensor]:
    """The mean of a library's gradients, task by task, as its users write it."""
    each = [tasks.take(slice(i, i + 1)).one() for i in range(len(tasks))]
    return lambda: torch.stack([function(problem, theta, task) for task in each]).mean(0)


def _jax(problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> Callable[[], Tensor]:
    """All tasks by `jax.vmap`, compiled."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # it would take most of the memory
    return scanned(problem, theta, tasks.stack, batched=True)


def differences(cell: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Of each exact (or first-order) gradient from plain autograd by hand, relative, in float64."""
    problem, theta, tasks = _problem(cell, double=True)
    exact, first = (_one_by_one(f, problem, theta, tasks)() for f in PEERS["torch"].values())
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for key, make in _methods(cell["group"]).items():
        if key[1].startswith("UFOM"):
            continue
        wanted = first if key[1].startswith("first") else exact
        with suppress(Exception):  # its own row says why
            gap = (make(problem, theta, tasks)().to(wanted.device) - wanted).norm()
            found[key] = {"difference": float(gap / max(wanted.norm(), exact.norm()))}
    return found


def _bytes(call: Callable[[], Tensor], theta: Tensor, tasks: Tasks, base: int) -> float:
    """The most that is held during a call: of the device's memory above `base`, on the CPU by the tensors made."""
    if not theta.is_cuda:
        return float(peak_bytes(call, (theta, *tasks.parts)))
    torch.cuda.reset_peak_memory_stats()
    call()
    return float(torch.cuda.max_memory_allocated() - base)


def _version(library: str) -> str:
    """Of a library that is installed; else empty."""
    return next((m.version for m in METHODS.values() if m.library == library), "")
