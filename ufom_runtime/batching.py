"""Many rows of one problem, run together in chunks that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ufom_runtime.algorithms import sweep_gradients
from ufom_runtime.derivatives import Losses, count_calls, count_rows, watch_losses
from ufom_runtime.inspection.draws import refuse_draws
from ufom_runtime.inspection.non_finite import refuse_non_finite
from ufom_runtime.memory import budget, peak_bytes
from ufom_runtime.problem import BilevelProblem, Tasks, all_finite, kept
from ufom_theory import Sweep, UfomError
from ufom_theory.checks import integer

Each = Callable[[Callable[[Tensor], list[Tensor]], Sequence[Tensor]], Iterable[list[Tensor]]]
"""Runs a function of every chunk, and gives what comes of it in their order, as `map` does."""
_SHARES, _SHARED_BYTES = 8, 512 * 2**20  # of a batch that processes share: chunks at least, and bytes of one at most
_each: ContextVar[Each | None] = ContextVar("each", default=None)


@contextmanager
def shared_by(each: Each | None) -> Iterator[None]:
    """Inside the block chunks are run by `each`, such as several processes together; None: by this one."""
    token = _each.set(each)
    try:
        yield
    finally:
        _each.reset(token)


def is_shared() -> bool:
    """Whether chunks are run by other processes, too."""
    return _each.get() is not None


def run_each(function: Callable[[Tensor], list[Tensor]], pieces: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """`map(function, pieces)`, by whoever shares them."""
    return (_each.get() or map)(function, pieces)


def cut(n: int, chunk: int | None) -> tuple[Tensor, ...]:
    """0 … n − 1 in pieces of `chunk`; None: one piece, or where they are shared an eighth each."""
    whole = -(-n // _SHARES) if is_shared() else n
    size = whole if chunk is None else int(integer("chunk, the tasks run together,", chunk, 1))
    return torch.split(torch.arange(n, device="cpu"), size)


def refuse_divergence(gradient: Tensor) -> Tensor:
    """The gradient itself, if finite; else a `UfomError`."""
    if not all_finite(gradient):
        raise UfomError(
            "the hypergradient is not finite, though each task's is: numbers overflow in the mean or in the weight "
            "1/q; scale the outer loss down, or take float64"
        )
    return gradient


def in_chunks(
    problem: BilevelProblem,
    thetas: Tensor,
    tasks: Tasks,
    pairs: Tensor,
    lengths: tuple[int, ...],
    sweep: Sweep,
    chunk: int | None = None,
    ring: int = 0,
    compile: bool = False,
    stops: Tensor | None = None,
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """`sweep_gradients` of (θ, task) pairs, in chunks that fit the memory budget.

    The pairs are cut into chunks in their order, and a chunk goes forward once, whatever the stops of its rows.
    Compiled steps are for one number of rows, so there the rows of each stop have chunks of their own.

    Args:
        problem: the problem.
        thetas: shape (k, s).
        tasks: n stacked tasks.
        pairs: indices into the thetas and into the tasks, shape (2, rows), on the CPU.
        lengths: truncation lengths, ascending.
        sweep: how the states are recovered.
        chunk: rows run together; None: as many as the budget holds, by the measured bytes of one row; compiled
            steps run one on the CPU, and as many as there are tasks at most elsewhere. Where processes share the
            chunks, an eighth of the rows at most, and no more than fit into 512 MiB.
        ring: last states kept from the forward loop, the proxy's length.
        compile: as in `hypergradient`.
        stops: how many backward steps each pair takes, shape (rows,), on the CPU; the longest length if not given.

    Yields:
        (the pairs of this chunk, for each length one tensor (rows that go so far, s)).
    """

    def run(columns: Tensor) -> list[Tensor]:
        piece = pairs[:, columns]
        rows, chosen = _rows(thetas, tasks, piece)
        ends = None if stops is None else stops[columns]
        try:
            with watch_losses(seen := Losses()), refuse_draws():
                found = sweep_gradients(problem, rows, chosen, lengths, sweep, ring, compile, ends)
        except torch.OutOfMemoryError as error:
            said = f"{len(rows)} tasks at once do not fit into memory: pass a smaller chunk ({error})"
            raise UfomError(said) from error
        refuse_non_finite(problem, rows, chosen, [f for f in found if len(f)], seen, piece[1].tolist())
        return found

    def run_filled(columns: Tensor) -> list[Tensor]:
        """The last row is repeated until the rows are a power of two, or a chunk: each number is compiled anew."""
        rows = len(columns)
        filled = min(size, 1 << (rows - 1).bit_length())
        with count_calls() as calls:
            found = run(columns[torch.arange(filled, device="cpu").clamp(max=rows - 1)])
        for kind, counted in vars(calls).items():
            count_rows(kind, counted * rows // filled)
        return [f[:rows] for f in found]

    if not pairs.shape[1]:
        return
    size = rows_together(problem, thetas, tasks, pairs, lengths, sweep, chunk, ring, compile)
    columns = torch.arange(pairs.shape[1], device="cpu")
    apart = [columns] if stops is None or not compile else [columns[stops == k] for k in sorted(set(stops.tolist()))]
    pieces = [piece for group in apart for piece in torch.split(group, size)]
    found = run_each(run_filled if compile else run, pieces)
    yield from zip((pairs[:, piece] for piece in pieces), found, strict=True)


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
    size = max(1, (_SHARED_BYTES if is_shared() else budget(thetas.device)) // max(1, known[key]))
    if is_shared():
        size = min(size, -(-pairs.shape[1] // _SHARES))
    return min(size, n) if compile else size


def _rows(thetas: Tensor, tasks: Tasks, pairs: Tensor) -> tuple[Tensor, Tasks]:
    """The θ and the tasks at the pairs of indices."""
    n, size = len(tasks), pairs.shape[1]
    rows = thetas.expand(size, -1) if len(thetas) == 1 else thetas[pairs[0].to(thetas.device)]
    if n == 1:  # one task for every θ: seen many times, held once
        return rows, tasks.repeat(size)
    return rows, tasks if torch.equal(pairs[1], torch.arange(n, device="cpu")) else tasks.take(pairs[1])
