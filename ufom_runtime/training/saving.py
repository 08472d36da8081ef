"""An outer run and its checkpoint: what is stored after a step, and how a run goes on from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ufom_runtime.problem import finite_theta
from ufom_runtime.training.identity import Identity
from ufom_runtime.training.log import Now, Row
from ufom_runtime.training.optimizers import gamma_at
from ufom_runtime.training.resume import Checkpoint, describe, pack, same_form, unpack
from ufom_runtime.training.seeds import generator
from ufom_theory import UfomError

if TYPE_CHECKING:
    from ufom_runtime.training.train import Loop


def asked(loop: Loop, theta: Tensor) -> dict[str, Any]:
    """What a run was asked for, as JSON."""
    drawn, best = loop.problem.sample(loop.batch, generator(loop.seed, 1, "tasks")), loop.rows.best
    return {
        "seed": loop.seed, "batch": loop.batch, "log_every": loop.rows.every, "estimator": repr(loop.estimator),
        "column": None if best is None else str(best.column), "outer steps": loop.outer.describe(),
        "warm start": loop.warm is not None,
        **describe(loop.problem, theta, drawn),
    }  # fmt: skip


def folder_of(checkpoint: Any) -> Path:
    """The folder that `checkpoint=` names; `UfomError` for what is not a path, and for "", the current folder."""
    if not checkpoint or not isinstance(checkpoint, str | os.PathLike):
        raise UfomError(f"checkpoint = {checkpoint!r} must be the path of a folder")
    return Path(checkpoint)


@dataclass(frozen=True, eq=False)
class Kept:
    """The checkpoint of a run, and what it takes to store a `Now` and to find it again."""

    store: Checkpoint
    identity: Identity
    rates: list[list[float]]  # k and γ_k at 64 steps at most, where γ_k is a function of k

    @classmethod
    def of(cls, folder: Any, loop: Loop, theta: Tensor, first: Any) -> Kept:
        path = folder_of(folder)
        loop.keeps = True
        steps, rate = loop.rows.steps, loop.outer.rate
        config = asked(loop, theta)
        identity = Identity.of(loop.problem, theta, first)
        held = sum(t.nbytes for t in identity.tensors().values())
        if loop.warm:
            held += len(loop.warm.known) * (identity.start.nbytes + 1)
        spread = sorted({1 + i * (steps - 1) // 63 for i in range(64)}) if rate else []
        rates = [[k, gamma_at(rate, k)] for k in spread] if rate else []
        return cls(Checkpoint(path, config, most_bytes=2**20 + 64 * theta.nbytes + held), identity, rates)

    def save(self, now: Now, rows: list[Row]) -> None:
        """Store the run after a whole step, and append its new rows to the log."""
        tensors = {"theta": now.theta, **self.identity.tensors()}
        if now.warm:
            tensors["warm.states"], tensors["warm.seen"] = now.warm
        best = None
        if now.best:
            tensors["best"], best = now.best[2], list(now.best[:2])
        values = {
            "step": now.step, "state": pack(list(now.state), tensors, "state"), "calls": dict(now.calls),
            "seconds": now.seconds, "last": now.last, "best": best, "γ": self.rates,
            "outer": pack(now.outer, tensors, "outer"),
        }  # fmt: skip
        self.store.save(tensors, values, rows[self.store.log.rows : now.logged])

    def load(self, new: Now, loop: Loop) -> Now:
        """The stored run, of which `loop` is brought up to date; `new` where nothing is stored."""
        found = self.store.load()
        if not found:
            return new
        tensors, values = found
        folder, steps = self.store.folder, loop.rows.steps
        try:
            now = self._restore(tensors, values, new, loop)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, UfomError):
                raise
            said = f"{type(error).__name__}: {error}"
            raise UfomError(f"{folder} is damaged: it holds no such state ({said}); remove it") from error
        if now.step > steps:
            raise UfomError(f"{folder} holds a run of {now.step} steps already: ask for as many, or for more")
        return now if now.step == steps else replace(now, last=None)

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any], new: Now, loop: Loop) -> Now:
        outer, calls = unpack(values["outer"], tensors), values["calls"]
        state = unpack(values["state"], tensors)
        found = {**values, "theta": tensors["theta"], "state": _numbers(state)}
        expected = {
            "theta": new.theta, "step": 1, "state": _numbers(new.state), "calls": vars(loop.calls), "seconds": 0.0
        }  # fmt: skip
        for name, value in expected.items():
            same_form(name, found[name], value)
        finite_theta("θ", tensors["theta"], (1,))
        self.identity.refuse_other(tensors, str(self.store.folder))
        step = values["step"]
        for k, gamma in values["γ"]:
            if loop.outer.rate and k <= step and gamma_at(loop.outer.rate, k) != gamma:
                raise UfomError(
                    f"{self.store.folder} is of another run: its outer steps have γ_{k} = {gamma:g}, not "
                    f"{gamma_at(loop.outer.rate, k):g}; give checkpoint= another folder, or remove this one"
                )
        rows, last = self.store.log.read(values["log"]), values["last"]
        if step < 1 or not all(isinstance(row, dict) for row in [*rows, last or {}]):
            raise ValueError("a step < 1, or rows of another kind")
        warm = None
        if new.warm:
            warm = tensors["warm.states"].to(new.theta.device), tensors["warm.seen"].to(new.theta.device)
            same_form("warm", warm, new.warm)
        theta = tensors["theta"].to(new.theta.device)
        loop.outer.load(theta, outer, step)
        vars(loop.calls).update(calls)
        loop.rows.regular = rows
        best = None
        if values["best"]:
            best = (int(values["best"][0]), float(values["best"][1]), tensors["best"].to(new.theta.device))
        return Now(
            theta, step, tuple(state), values["seconds"], tuple(calls.items()), loop.outer.state(),
            len(rows), last, warm, best,
        )  # fmt: skip


def _numbers(state: Sequence[float | Tensor]) -> list[float | None]:
    """A method's state with None for its tensors, which may grow at its first step: the method checks their shapes."""
    return [None if isinstance(x, Tensor) else x for x in state]
