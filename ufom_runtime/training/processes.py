"""The processes that torchrun started, as one: chunks of tasks are shared out, and what they give is gathered."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ufom_runtime.batching import shared_by
from ufom_runtime.derivatives import count_calls, count_rows
from ufom_theory import UfomError

_PATIENCE = timedelta(minutes=10)  # for a process that is silent; one that died is noticed at once
_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


class ProcessLost(UfomError):
    """Another process of the group died, or did not answer in time."""


@dataclass(frozen=True)
class Processes:
    """One of `size` processes that run the same program; `join` makes it.

    Attributes:
        rank: which one, from 0; the first alone prints and saves.
        size: how many there are.
    """

    rank: int
    size: int

    def sharing(self) -> AbstractContextManager[None]:
        """Inside the block the chunks of every method are run by `map`; without `chunk=` they are an eighth of a batch.

        The chunk then depends on the problem, the batch and the method alone: not on `size`, nor on free memory.
        """
        return shared_by(self.map)

    def map(self, function: Callable[[Tensor], list[Tensor]], pieces: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """`map(function, pieces)`, the same on every process: process k runs pieces k, k + size, …, and all get all.

        The calls that `function` counts are counted on every process, too.

        Args:
            function: gives tensors of any shapes and dtypes, all on one device.
            pieces: the same on every process.

        Raises:
            UfomError: what `function` raised, on every process; pieces that differ in number.
            ProcessLost: a process is gone.
        """
        if self.size == 1:
            yield from map(partial(_by_itself, function), pieces)
            return
        n = len(pieces)
        for first in range(0, n, self.size):
            mine, own = {"pieces": n}, _NOTHING
            if first + self.rank < n:
                header, own = _packed(function, pieces[first + self.rank])
                mine |= header
            for _, (header, body) in zip(pieces[first:], self._exchange(mine, own), strict=False):
                if header["pieces"] != n:
                    raise UfomError(
                        f"one process cut the tasks into {header['pieces']} chunks, another into {n}: give all the "
                        "same arguments"
                    )
                yield _unpacked(header, body)

    def first(self, function: Callable[[], Any]) -> Any:
        """What `function` gives on process 0 (plain data, sent as JSON), on every process; so is its `UfomError`."""
        if self.size == 1:
            return function()
        said: dict[str, Any] = {}
        if self.rank == 0:
            try:
                said = {"value": function()}
            except UfomError as error:
                said = {"error": str(error)}
        content = _bytes(said)
        (length, *_), *_ = self._gather([len(content)])
        with _all_there():
            dist.broadcast(content := content if self.rank == 0 else content.new_empty(length), 0)
        found = json.loads(content.numpy().tobytes())
        if "error" in found:
            raise UfomError(found["error"])
        return found["value"]

    def agree(self, values: dict[str, Any]) -> None:
        """Refuse values, as JSON, that are not the same on every process; all come here before one goes on.

        Raises:
            UfomError: a value that differs, on every process.
        """
        if self.size == 1:
            return
        every = [header for header, _ in self._exchange(values, _NOTHING)]
        for rank, found in enumerate(every):
            for name in {**every[0], **found}:
                if found.get(name) != every[0].get(name):
                    raise UfomError(
                        f"process {rank} has another {name} than process 0, {found.get(name)} and "
                        f"{every[0].get(name)}: all must run the same script with the same arguments and data"
                    )

    def _exchange(self, header: dict[str, Any], body: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Every process's header and bytes, in the order of the ranks; a header with an error is raised."""
        content = _bytes(header)
        sizes = self._gather([len(content), len(body), int(body.is_cuda)])
        for rank, (head, rest, on_gpu) in enumerate(sizes):
            if rank == self.rank:
                message = torch.cat([content.to(body.device), body])
            else:
                message = torch.empty(head + rest, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
            with _all_there():
                dist.broadcast(message, rank)
            found = json.loads(message[:head].cpu().numpy().tobytes())
            if "error" in found:
                raise UfomError(found["error"])
            yield found, message[head:]

    def _gather(self, numbers: list[int]) -> list[list[int]]:
        """The numbers of every process, equally many on each."""
        mine = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with _all_there():
            dist.all_gather(every, mine)
        return [found.tolist() for found in every]


def _by_itself(function: Callable[[Tensor], list[Tensor]], piece: Tensor) -> list[Tensor]:
    with shared_by(None):
        return function(piece)


def _packed(function: Callable[[Tensor], list[Tensor]], piece: Tensor) -> tuple[dict[str, Any], Tensor]:
    """What `function` gives, as a header and bytes; its `UfomError` as a header."""
    try:
        with count_calls() as calls:
            found = [t.detach().contiguous() for t in _by_itself(function, piece)]
    except UfomError as error:
        return {"error": str(error)}, _NOTHING
    kinds = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in found]
    return {"tensors": kinds, "calls": vars(calls)}, torch.cat([t.view(-1).view(torch.uint8) for t in found])


def _unpacked(header: dict[str, Any], body: Tensor) -> list[Tensor]:
    """The tensors that were packed; their calls are counted."""
    for kind, rows in header["calls"].items():
        count_rows(kind, rows)
    found, at = [], 0
    for name, shape in header["tensors"]:
        like = torch.empty(shape, dtype=getattr(torch, name), device=body.device)
        like.view(-1).view(torch.uint8).copy_(body[at : at + like.nbytes])
        found.append(like)
        at += like.nbytes
    return found


def _bytes(header: dict[str, Any]) -> Tensor:
    try:
        return torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    except (TypeError, ValueError) as error:
        raise UfomError(
            f"{header!r:.200} cannot be sent to the other processes: {error}; give plain numbers and strings"
        ) from error


@contextmanager
def join() -> Iterator[Processes]:
    """The group that torchrun's environment describes; without one, a process alone. Each runs on one thread.

    Over gloo on the CPU, over nccl between GPUs, each process on the GPU of its local rank.

    Raises:
        UfomError: torch without the backend, more processes than GPUs on a machine that has some, or a group that does
            not form.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums on more threads are other sums
    try:
        if "WORLD_SIZE" not in os.environ:
            yield Processes(0, 1)
            return
        yield _formed()
        dist.destroy_process_group()  # not after an error: it could wait for a process that is gone
    finally:
        torch.set_num_threads(threads)


def _formed() -> Processes:
    if not (dist.is_available() and dist.is_gloo_available()):
        raise UfomError("this torch has no gloo, over which processes talk: run one process, without torchrun")
    backend = "gloo"
    if torch.cuda.is_available():
        if not dist.is_nccl_available():
            raise UfomError("this torch has no nccl, over which GPUs talk: run one process, without torchrun")
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus:
            raise UfomError(f"{here} processes for {gpus} GPU(s): start one a GPU, or hide them, CUDA_VISIBLE_DEVICES=")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        # torchrun keeps its store when it starts the processes anew: what those before left there must not be read
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UfomError(
            f"the {os.environ['WORLD_SIZE']} processes form no group: {str(error).partition(chr(10))[0]}"
        ) from error
    return Processes(rank, size)


@contextmanager
def _all_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"another process died, or was silent for {_PATIENCE}: run again, or torchrun --max-restarts=3"
        ) from error
