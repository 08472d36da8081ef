"""Live bytes of tensors: what a call holds at its peak, and how many tasks fit a budget."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ufom_theory import UfomError


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors made inside the block and not yet freed; `.peak` is the most there were at once.

    It sits beneath autograd and vmap, so it sees every tensor, also the detached and the saved ones, once for each
    storage. Storages of `known` tensors (the inputs) are left out.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Without it torch imports its compiler, for seconds, where a mode is first entered."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_bytes(function: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Peak bytes of the tensors that one call makes.

    Args:
        function: called once, without arguments.
        known: tensors that it is given, and that do not count.

    Raises:
        UfomError: something else than tensors in `known`.
    """
    tensors = list(known)
    if other := [x for x in tensors if not isinstance(x, Tensor)]:
        raise UfomError(f"known holds a {type(other[0]).__name__}: give the tensors that the function is given")
    with LiveBytes(tensors) as meter:
        function()
    return int(meter.peak)


def budget(device: torch.device) -> int:
    """Bytes that one batch may take: half of the free memory on CUDA, 512 MiB elsewhere."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, though not to others
        return (int(torch.cuda.mem_get_info(device)[0]) + cached) // 2
    return 512 * 2**20
