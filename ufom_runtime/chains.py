"""Outer SGD on pairs of two tasks (`TwoTaskProblem`) with many problems, q and chains at once, in float64.

An outer step is one elementwise expression, the same on all three pieces of the losses. It is written in torch, and
once more in `chains.cpp`, which runs many times faster on a CPU and gives the same numbers.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ufom_runtime.memory import budget
from ufom_theory import UfomError
from ufom_theory.checks import finite, instance, integer, positive, scalar
from ufom_theory.two_tasks import TwoTaskProblem

Array = NDArray[np.float64]
Kernels = tuple[Callable[..., Any], Callable[..., Any]]
BLOCK = 1000  # chains that draw from one generator
_HELD = 32  # outer steps whose random numbers are held


@dataclass(frozen=True, eq=False)
class Curves:
    """E‖∇M(θ_k)‖² over the chains of each seed.

    Attributes:
        steps: the recorded k, shape (n_k,).
        gradient_sq: means over the chains, shape (problems, n_q, seeds, n_k).
        sem: their standard errors, nan of a single chain. All problems and q share a seed's random numbers.
    """

    steps: NDArray[np.int64]
    gradient_sq: Array
    sem: Array


def simulate(
    pairs: TwoTaskProblem | Sequence[TwoTaskProblem],
    q: ArrayLike,
    theta0: ArrayLike,
    step_sizes: Callable[[int], float] | Sequence[float],
    steps: int,
    *,
    seeds: Sequence[int] = (0,),
    chains: int = BLOCK,
    every: int = 1,
    device: str | torch.device = "cpu",
    chunk: int | None = None,
    compiled: bool = True,
) -> Curves:
    """Run θ_k = θ_{k−1} − γ_k·G on independent chains: one task and one coin a step, weight 1/q on the correction.

    A chain's random numbers depend on its seed and its place among that seed's chains alone: all problems and q share
    them, and `chunk` changes no bit of the result.

    Args:
        pairs: one problem or several, all of one r.
        q: probabilities of the exact correction, 0 for FOM; shape (n_q,), or (problems, n_q).
        theta0: θ_0, or (low, high) to draw it uniformly for every chain.
        step_sizes: γ_k as a function of k = 1, 2, …, or a sequence of at least `steps` of them.
        steps: outer steps.
        seeds: different integers ≥ 0, each an independent repetition.
        chains: of every seed; at most `BLOCK`, or a multiple of it.
        every: k is recorded every so many steps, and for the last one.
        device: where to run; the random numbers are drawn on the CPU.
        chunk: chains run together, at least a block; None: as suits the device.
        compiled: on a CPU, build and run `chains.cpp`, on as many threads as torch has. If False, or where no C++
            compiler is found (a warning says so), plain torch computes the same numbers, more slowly.

    Returns:
        Means and standard errors by problem, q, seed and step.

    Raises:
        UfomError: problems of different r, q outside [0, 1] or of another shape, counts that are no integers ≥ 1,
            chains that are no whole blocks, seeds that repeat, too few step sizes or one that is not a finite number
            > 0, or gradients that are no longer finite.
    """
    cells, shape, r = _cells(pairs, q)
    start = np.asarray(finite("θ_0", theta0))
    if start.shape not in ((), (2,)):
        raise UfomError(f"θ_0 has shape {start.shape}: give one number, or (low, high)")
    for name, value in (("steps", steps), ("every", every), ("chains", chains)):
        scalar(name, value, integer, 1)
    if chains > BLOCK and chains % BLOCK:
        raise UfomError(f"chains = {chains} is above {BLOCK} and no multiple of it: they draw in blocks of {BLOCK}")
    names = np.atleast_1d(integer("seeds", seeds, 0)).tolist()
    if len(set(names)) < len(names):
        raise UfomError(f"seeds = {seeds!r} repeat, but each is a repetition of its own: give different ones")
    if not callable(step_sizes) and len(step_sizes) < steps:
        raise UfomError(f"step_sizes has {len(step_sizes)} entries for {steps} steps: give one a step, or a function")
    sizes = positive("γ_k", [step_sizes(k + 1) if callable(step_sizes) else step_sizes[k] for k in range(steps)])
    recorded = np.union1d(np.arange(every, steps + 1, every), steps)

    device = torch.device(device)
    kernels = (_library() if compiled and device.type == "cpu" else None) or (_advance, _gradient_sq)
    width, workers = min(chains, BLOCK), torch.get_num_threads() if device.type == "cpu" else 1
    if chunk is None:  # plain torch makes a pass for every operation: over many chains, if the cache holds them
        chunk = 2**22 if device.type == "cuda" else 2**13 if kernels[0] is _advance else BLOCK
    together = max(1, scalar("chunk", chunk, integer, 1) // width)
    most = max(1, (budget(device) // workers // (8 * together * width) - 2 * _HELD) // 4)  # cells: θ, ‖∇M‖², its square
    streams = list(product(range(len(names)), range(chains // width)))
    cells, gammas = cells.to(device), torch.as_tensor(sizes, dtype=torch.float64, device=device)

    def run(part: tuple[int, int]) -> Array:
        generators = [np.random.default_rng([names[s], block]) for s, block in streams[part[1] : part[1] + together]]
        rows = cells[part[0] : part[0] + most]
        return _moments(kernels, rows, r, np.broadcast_to(start, 2).tolist(), generators, width, gammas, recorded)

    parts = list(product(range(0, len(cells), most), range(0, len(streams), together)))
    sums = np.zeros((2, len(cells), len(names), len(recorded)))
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(parts), 16 * workers):  # few at a time, for their results are held
            batch = parts[first : first + 16 * workers]
            for (i, j), found in zip(batch, pool.map(run, batch), strict=True):
                for (s, _), block in zip(streams[j : j + together], found, strict=True):
                    sums[:, i : i + most, s] += block  # one by one and in order: so `chunk` changes no rounding
    if not np.isfinite(sums).all():
        raise UfomError("‖∇M‖² is no longer finite: a step size is far too large; take smaller ones")
    mean, square = sums.reshape(2, *shape, len(names), len(recorded)) / chains
    variance = np.maximum(square - mean**2, 0) if chains > 1 else np.full_like(mean, np.nan)
    return Curves(recorded, mean, np.sqrt(variance / max(chains - 1, 1)))


def _cells(pairs: TwoTaskProblem | Sequence[TwoTaskProblem], q: ArrayLike) -> tuple[Tensor, tuple[int, int], int]:
    """What the kernels need of each problem and q, shape (problems·n_q, 8); (problems, n_q); r."""
    pairs = [pairs] if isinstance(pairs, TwoTaskProblem) else list(pairs)
    for pair in pairs:
        instance("pairs", pair, TwoTaskProblem, "give one, or a list of them")
    lengths = {pair.r for pair in pairs}
    if len(lengths) != 1:
        raise UfomError(f"pairs have r = {sorted(lengths)}: give at least one problem, and call once for each r")
    q = np.asarray(finite("q", q, "in [0, 1]", 0.0))
    if (q > 1).any():
        raise UfomError(f"q = {q.max():g} must lie in [0, 1]: it is a probability")
    if q.ndim > 2 or (q.ndim == 2 and len(q) != len(pairs)):
        raise UfomError(f"q has shape {q.shape} for {len(pairs)} problem(s): give (n_q,) or (problems, n_q)")
    q = np.broadcast_to(q, (len(pairs), q.shape[-1] if q.ndim else 1))
    rows = [
        (pair.alpha, pair.A, *pair.a, *(b / a for a, b in zip(pair.a, pair.b, strict=True)), x, 1 / x if x else 0.0)
        for pair, row in zip(pairs, q.tolist(), strict=True)
        for x in row
    ]
    return torch.tensor(rows, dtype=torch.float64), (len(pairs), q.shape[1]), lengths.pop()


def _moments(
    kernels: Kernels,
    cells: Tensor,
    r: int,
    start: tuple[float, float],
    generators: list[np.random.Generator],
    width: int,
    gammas: Tensor,
    recorded: NDArray[np.int64],
) -> Array:
    """Σ‖∇M(θ_k)‖² and Σ‖∇M(θ_k)‖⁴ over the chains of each generator, shape (generators, 2, cells, recorded)."""
    advance, gradient_sq = kernels
    theta0 = torch.from_numpy(np.stack([g.uniform(*start, width) for g in generators]))
    theta = theta0.flatten().to(gammas.device).repeat(len(cells), 1)
    draws = np.empty((len(generators), _HELD, width))
    found = np.empty((len(recorded), 2, len(cells), len(generators)))
    i, kept = 0, set(recorded.tolist())
    for begin in range(0, len(gammas), _HELD):
        last, end = begin, min(begin + _HELD, len(gammas))
        for generator, out in zip(generators, draws[:, : end - begin], strict=True):
            generator.random(out=out)
        drawn = torch.from_numpy(draws).transpose(0, 1).flatten(1).to(gammas.device)
        for k in range(begin + 1, end + 1):
            if k == end or k in kept:
                advance(theta, drawn[last - begin : k - begin], gammas[last:k], cells, r)
                last = k
            if k in kept:
                norms = gradient_sq(theta, cells, r).view(len(cells), -1, width)
                found[i] = torch.stack((norms.sum(2), norms.square().sum(2))).cpu()
                i += 1
    return found.transpose(3, 1, 2, 0)


def _derivatives(u: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """f'/a and f''/a at a distance u from the minimum, on any of the three pieces."""
    z = u.abs()
    t = (z - A).clamp(0, 1)
    return torch.copysign(torch.minimum(z, A) + t - t * t / 2, u), 1 - t


def _gradients(theta: Tensor, a: Tensor, centre: Tensor, alpha: Tensor, A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """G_FO, and G over G_FO.

    On the line the r Hessian-vector products of the backward sweep only multiply, so they commute: the product is taken
    on the way forward, where each f''(φ_j) is at hand, and no state need be stored.
    """
    u, rate, contraction = theta - centre, alpha * a, torch.ones_like(theta)
    for _ in range(r):
        slope, bend = _derivatives(u, A)
        u, contraction = u - rate * slope, contraction * (1 - rate * bend)
    return a * _derivatives(u, A)[0], contraction


def _advance(theta: Tensor, draws: Tensor, gammas: Tensor, cells: Tensor, r: int) -> None:
    """Outer steps in place, θ (cells, n), draws (steps, n): a number's first bit is the task, the others the coin."""
    for row, cell in zip(theta, cells, strict=True):
        alpha, A, a1, a2, c1, c2, q, weight = cell.unbind()
        for draw, gamma in zip(draws, gammas, strict=True):
            second = draw >= 0.5
            coin = torch.where(second, 2 * draw - 1, 2 * draw)
            a, centre = torch.where(second, a2, a1), torch.where(second, c2, c1)
            first_order, contraction = _gradients(row, a, centre, alpha, A, r)
            row -= gamma * first_order * (1 + torch.where(coin < q, weight, 0.0) * (contraction - 1))


def _gradient_sq(theta: Tensor, cells: Tensor, r: int) -> Tensor:
    """‖∇M‖², the mean over both tasks, squared; shape (cells, n)."""
    found = []
    for row, cell in zip(theta, cells, strict=True):
        alpha, A, a1, a2, c1, c2, _, _ = cell.unbind()
        (g1, s1), (g2, s2) = (_gradients(row, a, c, alpha, A, r) for a, c in ((a1, c1), (a2, c2)))
        found.append(((g1 * s1 + g2 * s2) / 2).square())
    return torch.stack(found)


@cache
def _library() -> Kernels | None:
    """`chains.cpp` built for this machine (no file stays behind); None, with a warning, where that fails."""
    compiler = os.environ.get("CXX", "c++")
    flags = "-O3 -march=native -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-signed-zeros -shared -fPIC"
    with TemporaryDirectory() as folder:
        built = Path(folder) / "chains.so"
        try:
            subprocess.run([compiler, *flags.split(), Path(__file__).with_suffix(".cpp"), "-o", built], check=True)
            library = ctypes.CDLL(str(built))
        except (OSError, subprocess.CalledProcessError) as error:
            warnings.warn(f"no C++ compiler ({error}): plain torch is used, which is slower", stacklevel=3)
            return None

    def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
        return [ctypes.c_void_p(t.data_ptr()) for t in tensors]

    def integers(*values: int) -> list[ctypes.c_int64]:
        return [ctypes.c_int64(value) for value in values]

    def advance(theta: Tensor, draws: Tensor, gammas: Tensor, cells: Tensor, r: int) -> None:
        library.advance(*pointers(theta, draws, gammas, cells), *integers(r, len(gammas), *theta.shape))

    def gradient_sq(theta: Tensor, cells: Tensor, r: int) -> Tensor:
        out = torch.empty_like(theta)
        library.gradient_sq(*pointers(out, theta, cells), *integers(r, *theta.shape))
        return out

    return advance, gradient_sq
