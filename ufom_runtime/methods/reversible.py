"""Reversible dynamics (Maclaurin et al. 2015): momentum gradient descent run backwards exactly, from the bits it loses.

φ and the velocity v are fixed-point integers. The one step that loses information is v ← γ·v, and with γ = n/d what it
loses is log₂(d/n) bits of a number a step: these are kept, in an integer of 64 bits that is full after many steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Generator, Tensor

from ufom_runtime.algorithms import first_state
from ufom_runtime.derivatives import Calls, count_rows, hessian_vector_products, inner_gradient, pull_back
from ufom_runtime.methods.method import RowMethod, Rows
from ufom_runtime.problem import BilevelProblem, Tasks, refuse_update
from ufom_runtime.steps import Steps
from ufom_theory import UfomError
from ufom_theory.checks import integer, scalar

_WORD = 63  # bits of a word that may be used: it is signed


@dataclass(frozen=True)
class Reversible(RowMethod):
    """The exact gradient of *another* objective: the outer loss after r steps of momentum gradient descent, v_0 = 0,

        v_j = γ·v_{j−1} − (1 − γ)·∂L_in/∂φ(φ_{j−1}),  φ_j = φ_{j−1} + α_j·v_j,

    with φ and v rounded to `bits` binary places. It does not estimate ∇M^(r), which is of plain gradient descent. For
    each task `bits_stored` reports the bits of all words kept, v's and the lost bits', and `bits_naive` those of r
    stored states in φ's dtype.

    Attributes:
        momentum: γ, a fraction n/d in (0, 1) with d ≤ 2^16, or its text; the lost bits are log₂(d/n) a step and number.
        bits: binary places; |φ| and |v| must stay below 2^(62 − bits).

    Raises:
        UfomError: values outside these ranges; when it runs, a number beyond that size, or an inner gradient that is
            not the same number when it is computed again (φ_0 is then not met).
    """

    momentum: Fraction = Fraction(9, 10)
    bits: int = 40

    def __post_init__(self) -> None:
        try:
            gamma = Fraction(self.momentum)
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise UfomError(
                f"momentum = {self.momentum!r} is not a fraction: give one, Fraction(9, 10) or '9/10'"
            ) from error
        if not 0 < gamma < 1 or gamma.denominator > 2**16:
            raise UfomError(f"momentum = {gamma} must be a fraction n/d in (0, 1) with d ≤ 2^16, as '9/10'")
        object.__setattr__(self, "momentum", gamma)
        if scalar("bits", self.bits, integer, 1) > 52:
            raise UfomError(f"bits = {self.bits}: at most 52, or nothing is left before the point")

    @property
    def steps_a_word(self) -> int:
        """Steps whose lost bits fit into one word.

        A step takes x, the number in the word plus one, to ⌈x·d/n⌉ at most, and on the way to x·d: from x = 1 it is
        below (d/n)ᵏ·d/(d − n) after k steps.
        """
        n, d = self.momentum.as_integer_ratio()
        return 1 + int((_WORD - math.log2(d * d / (d - n)) - 1e-9) / math.log2(d / n))

    def words(self, r: int) -> int:
        """64-bit words kept a number of φ over r steps: v, and those of the lost bits."""
        return 1 + -(-r // self.steps_a_word)

    def calls(self, r: int, s: int = 1) -> Calls:
        """r gradients forwards, r backwards, one of the outer loss; r products."""
        return Calls(2 * r + 1, r)

    def states(self, r: int, s: int = 1) -> int:
        """As `words`."""
        return self.words(r)

    def rows(
        self, problem: BilevelProblem, theta: Tensor, tasks: Tasks, generator: Generator | None, compile: bool
    ) -> Rows:
        """As `RowMethod.rows`."""
        refuse_update(problem, "Reversible", "it takes its own momentum steps and undoes them; use Sweep.checkpointed")
        loop = Loop(self, problem, theta, tasks)
        first = loop.phi
        for j in range(problem.r):
            loop.forwards(j)
        b1, by_phi = Steps(problem, theta, tasks, compile=compile).outer(loop.state())
        by_v = torch.zeros_like(by_phi)
        stored = by_phi.new_full((len(theta),), loop.bits_stored())
        gamma = float(self.momentum)
        for j in range(problem.r - 1, -1, -1):
            loop.backwards(j)
            by_v = by_v + problem.alphas[j] * by_phi
            count_rows("hessian_vector_products", len(theta))
            h1, h2 = hessian_vector_products(problem, theta, loop.state(), tasks, by_v)
            if h1 is not None:
                b1 = (gamma - 1) * h1 if b1 is None else b1 + (gamma - 1) * h1
            by_phi = by_phi if h2 is None else by_phi + (gamma - 1) * h2
            by_v = gamma * by_v
        if not (torch.equal(loop.phi, first) and not loop.v.any()):
            raise UfomError(
                "φ_0 was not met on the way back: the inner gradient is not the same number when it is computed again; "
                "use deterministic operations"
            )
        naive = torch.full_like(stored, problem.r * first.shape[1] * 8 * by_phi.element_size())
        return pull_back(problem, theta, tasks, b1, by_phi), {"bits_stored": stored, "bits_naive": naive}


class Loop:
    """φ and v as integers, and the words of lost bits: a step forwards, and the same step undone."""

    def __init__(self, method: Reversible, problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> None:
        self.method, self.problem, self._theta, self._tasks = method, problem, theta, tasks
        start = first_state(problem, theta, tasks)
        self._dtype = start.dtype
        self.phi = self._fixed(start)
        self.v = torch.zeros_like(self.phi)
        self.lost: list[Tensor] = []

    def state(self) -> Tensor:
        """φ in θ's dtype, shape (n, p)."""
        return self._real(self.phi).to(self._dtype)

    def bits_stored(self) -> int:
        """Bits kept for one task, φ apart: v, and the words of lost bits."""
        return sum(8 * word[0].nbytes for word in (self.v, *self.lost))

    def forwards(self, j: int) -> None:
        """From (φ_j, v_j) to the next ones; j counts from 0."""
        n, d = self.method.momentum.as_integer_ratio()
        if j % self.method.steps_a_word == 0:
            self.lost.append(torch.zeros_like(self.v))
        self.v = self._times(n, d) - self._push()
        self.phi = self.phi + self._move(j)
        for x in (self.v, self.phi):
            self._refuse_beyond(x)

    def backwards(self, j: int) -> None:
        """From the next ones back to (φ_j, v_j)."""
        n, d = self.method.momentum.as_integer_ratio()
        self.phi = self.phi - self._move(j)
        self.v = self.v + self._push()
        self.v = self._times(d, n)
        if j % self.method.steps_a_word == 0:
            self.lost.pop()

    def _times(self, n: int, d: int) -> Tensor:
        """v·n/d without a loss: what the division by d leaves goes to the lost bits, which give v mod n back."""
        bits = self.lost[-1] * d + self.v.remainder(d)
        v = self.v.div(d, rounding_mode="floor") * n + bits.remainder(n)
        self.lost[-1] = bits.div(n, rounding_mode="floor")
        return v

    def _push(self) -> Tensor:
        count_rows("gradients", len(self.phi))
        g = inner_gradient(self.problem, self._theta, self.state(), self._tasks)
        return self._fixed((1 - float(self.method.momentum)) * g)

    def _move(self, j: int) -> Tensor:
        return self._fixed(self.problem.alphas[j] * self._real(self.v))

    def _fixed(self, x: Tensor) -> Tensor:
        scaled = (x.double() * 2.0**self.method.bits).round()
        self._refuse_beyond(scaled)
        return scaled.long()

    def _refuse_beyond(self, scaled: Tensor) -> None:
        """Numbers so large that the sum of two of them might not fit, and NaN."""
        if not (scaled.abs() < 2**62).all():
            size = self._real(scaled).abs().max().item()
            raise UfomError(
                f"the momentum loop has a number of size {size:.3g}, beyond 2^{62 - self.method.bits}: it diverged, or "
                "needs fewer bits"
            )

    def _real(self, x: Tensor) -> Tensor:
        return x.double() * 2.0**-self.method.bits
