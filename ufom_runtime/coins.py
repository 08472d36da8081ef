"""The coins ξ of a batch: which of its tasks are corrected, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Generator, Tensor

from ufom_runtime.problem import cpu_generator
from ufom_theory import UfomError

Coin = Literal["task", "batch", "stratified"]
Draws = Generator | Tensor | None
"""Where a method's randomness comes from: a CPU generator, or the coins ξ themselves, boolean, shape (n,)."""


def debias(proxy: Tensor, exact: Tensor, q: float) -> Tensor:
    """(12)–(13) where ξ = 1: proxy + (exact − proxy)/q, arranged to be the exact gradient to the last bit at q = 1."""
    return exact / q + (1 - 1 / q) * proxy


Parts = Iterable[tuple[Tensor, Tensor, Tensor | None]]
"""Indices into the tasks of a batch, their proxy gradients, and the exact ones or None where the coin is 0."""


def estimate(parts: Parts, theta: Tensor, n: int, q: float, scale: float, per_task: bool) -> Tensor:
    """c·F + (ξ/q)·(G − c·F) of n tasks: their mean, shape (s,), or with `per_task` each, shape (n, s)."""
    result = theta.new_zeros((n, len(theta)) if per_task else (len(theta),))
    for index, proxy, exact in parts:
        scaled = proxy if scale == 1 else scale * proxy
        found = scaled if exact is None else debias(scaled, exact, q)
        if per_task:
            result[index.to(theta.device)] = found
        else:
            result.add_(found.sum(0), alpha=1 / n)
    return result


def weighed_as(coins: Tensor, q: float, coin: Coin) -> float:
    """The q by whose inverse a correction is weighed: k/n for k stratified corrections of n where qn ≥ 1, else q.

    Given that k of n tasks are corrected, each of them is with probability k/n; so either weight is unbiased, and k/n
    has the smaller second moment.
    """
    n, k = len(coins), int(coins.sum())
    return k / n if coin == "stratified" and k and q * n >= 1 else q


def draw_coins(n: int, q: float, generator: Generator, coin: Coin = "task") -> Tensor:
    """ξ_1 … ξ_n, a boolean tensor on the CPU, from a CPU generator of their own (Theorem 1), each 1 with probability q.

    "task": independent; "batch": one for all; "stratified": k of them are 1, k = ⌊qn⌋ + Bernoulli(qn − ⌊qn⌋).
    """
    draws = n if coin == "task" else 1
    u = torch.rand(draws, generator=generator, dtype=torch.float64, device="cpu")
    if coin != "stratified":
        return (u < q).expand(n)
    least = math.floor(q * n)
    coins = torch.zeros(n, dtype=torch.bool, device="cpu")
    coins[torch.randperm(n, generator=generator, device="cpu")[: least + int(u < q * n - least)]] = True
    return coins


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
    if coin == "stratified" and (k := int(coins.sum())) not in (math.floor(q * n), math.ceil(q * n)):
        either = " or ".join(map(str, sorted({math.floor(q * n), math.ceil(q * n)})))
        raise UfomError(f"coin = 'stratified' at q = {q:g} corrects {either} of {n} tasks, but the coins correct {k}")
    return coins.cpu()
