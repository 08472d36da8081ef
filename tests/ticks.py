"""A clock that does not depend on the machine: a call takes a millisecond, and one more for every operation in it.

A function that made the same number of operations in two calls is not called again: the clock knows what it takes.
"""

from weakref import WeakKeyDictionary

from torch.utils._python_dispatch import TorchDispatchMode


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    @classmethod
    def _should_skip_dynamo(cls):  # as in ufom_runtime.memory
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


_COUNTED = WeakKeyDictionary()


def seconds(function, device=None):
    """What `ufom_runtime.measure.clock` and `studies.shared.timing` ask their clocks."""
    counted = _COUNTED.setdefault(function, [])
    if len(counted) < 2 or counted[-1] != counted[-2]:
        with _Operations() as operations:
            function()
        counted.append(operations.count)
    return 1e-3 * (1 + counted[-1])
