"""The processes that torchrun started, as one: chunks of tasks are shared out, and their gradients gathered."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ufom_theory import UfomError

_PATIENCE = timedelta(minutes=10)  # for a process that is silent; one that died is noticed at once


@dataclass(frozen=True)
class Processes:
    """One of `size` processes that run the same program.

    Attributes:
        rank: which one, from 0; the first alone prints.
        size: how many there are.
    """

    rank: int
    size: int

    def map(
        self, like: Tensor, function: Callable[[Tensor], list[Tensor]], pieces: Sequence[Tensor]
    ) -> Iterator[list[Tensor]]:
        """`map(function, pieces)`, the same on every process: process k runs pieces k, k + size, …, and all get all.

        Args:
            like: a tensor of the dtype and on the device of the results.
            function: gives tensors of one shape, (rows, s).
            pieces: the same on every process.

        Raises:
            UfomError: what `function` raised, on every process; or a process is gone.
        """
        if self.size == 1:
            yield from map(function, pieces)
            return
        for first in range(0, len(pieces), self.size):
            mine, failure = like.new_empty(0, 0, 0), b""
            try:
                if first + self.rank < len(pieces):
                    mine = torch.stack(function(pieces[first + self.rank]))
            except UfomError as error:
                failure = str(error).encode()
            headers = [torch.empty(4, dtype=torch.int64, device="cpu") for _ in range(self.size)]
            with _all_there():
                dist.all_gather(headers, torch.tensor([*mine.shape, len(failure)], device="cpu"))
            for rank, header in enumerate(headers[: len(pieces) - first]):
                *shape, failed = header.tolist()
                if failed:
                    said = torch.tensor(
                        list(failure if rank == self.rank else bytes(failed)), dtype=torch.uint8, device="cpu"
                    )
                    self._broadcast(said, rank)
                    raise UfomError(bytes(said.tolist()).decode())
                found = mine if rank == self.rank else like.new_empty(shape)
                self._broadcast(found, rank)
                yield list(found)

    def _broadcast(self, tensor: Tensor, rank: int) -> None:
        with _all_there():
            dist.broadcast(tensor, rank)


@contextmanager
def join() -> Iterator[Processes]:
    """The group that torchrun's environment describes; without one, a process alone.

    Over gloo on the CPU, over nccl between GPUs, each process on the GPU of its local rank.

    Raises:
        UfomError: torch without the backend, more processes than GPUs on a machine that has some, or a group that does
            not form.
    """
    if "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1)
        return
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
    yield Processes(rank, size)
    dist.destroy_process_group()  # not after an error: it could wait for a process that is gone


@contextmanager
def _all_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UfomError(
            f"another process died, or was silent for {_PATIENCE}: run again, or torchrun --max-restarts=3"
        ) from error
