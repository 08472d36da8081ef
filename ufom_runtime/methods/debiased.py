"""UFOM around a proxy of any kind: nothing in (12)–(21) asks how the proxy is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ufom_runtime.batching import in_chunks
from ufom_runtime.coins import Coin, Parts
from ufom_runtime.derivatives import Calls
from ufom_runtime.estimators import Coined, Estimator, Method, refuse_other
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_theory import Sweep, UfomError


class Proxy(Method, Protocol):
    """A method whose price is known."""

    def calls(self, r: int, s: int = 1) -> Calls:
        """Expected calls for one task, r inner steps and s outer parameters."""

    def states(self, r: int, s: int = 1) -> int:
        """The most inner states held for one task."""


@dataclass(frozen=True)
class Debiased(Coined):
    """c·F + (ξ/q)·(G − c·F), where F is given by another stateless method, such as `Implicit`; UFOM makes it.

    The method goes forward by itself, and the corrected tasks do so once more for the exact gradient G.

    Attributes:
        q: probability of the exact correction, in (0, 1].
        proxy: the method that gives F; it tosses no coins and keeps no state.
        sweep: how the exact gradient recovers its states.
        scale: c.
        coin: as in `Estimator`.

    Raises:
        UfomError: as `Estimator`; a proxy that is not a method, keeps a state, or whose direction is not a gradient.
    """

    q: float
    proxy: Proxy
    sweep: Sweep = field(default_factory=Sweep.recomputed)
    scale: float = 1.0
    coin: Coin = "task"

    def __post_init__(self) -> None:
        plain = Estimator(self.q, self.sweep, scale=self.scale, coin=self.coin)  # refuses the rest
        object.__setattr__(self, "q", plain.q)
        object.__setattr__(self, "scale", plain.scale)
        refuse_other(self.proxy)
        if isinstance(self.proxy, Estimator) or self.proxy.begin() or not self.proxy.gradient:
            raise UfomError(
                f"proxy = {self.proxy!r}: give FOM, HELD, Truncated(K), or a stateless gradient, Implicit()"
            )

    def calls(self, r: int, s: int = 1) -> Calls:
        """Expected calls for one task: the proxy's, unless q = 1, and with probability q the exact gradient's."""
        exact = Estimator(1.0, self.sweep).calls(r, s)
        if self.q == 1:
            return exact
        proxy = self.proxy.calls(r, s)
        products = proxy.hessian_vector_products + self.q * exact.hessian_vector_products
        return Calls(proxy.gradients + self.q * exact.gradients, products)

    def states(self, r: int, s: int = 1) -> int:
        """The larger of the proxy's and the sweep's: they run one after the other."""
        return max(self.proxy.states(r, s), self.sweep.states_held(r))

    def parts(
        self,
        problem: BilevelProblem,
        theta: torch.Tensor,
        tasks: Tasks,
        coins: torch.Tensor,
        chunk: int | None,
        compile: bool,
    ) -> tuple[Parts, Mapping[str, float]]:
        """As `Coined.parts`, with the columns of the proxy."""
        first = theta.new_zeros(len(tasks), len(theta))
        columns: Mapping[str, float] = {}
        if self.q < 1:
            found = self.proxy.direction(problem, theta, tasks, per_task=True, chunk=chunk, compile=compile)
            assert found.per_task is not None
            first, columns = found.per_task, found.columns

        def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
            rest, index = torch.nonzero(~coins)[:, 0], torch.nonzero(coins)[:, 0]
            yield rest, first[rest.to(theta.device)], None
            pairs = torch.stack([torch.zeros_like(index), index])
            rows = in_chunks(problem, theta[None], tasks, pairs, (problem.r,), self.sweep, chunk, compile=compile)
            for (_, at), (exact,) in rows:
                yield at, first[at.to(theta.device)], exact

        return parts(), columns
