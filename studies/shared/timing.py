"""Seconds and bytes of a call, as the studies measure them."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# glibc's allocator gives every block of 64 KiB or more back to the system as soon as it is freed, so that resident
# memory is what is in use; and a common state of it for timing, which its defaults reach after some large blocks
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
KEEPING = {-3: 2**25, -1: 2**26, -2: 2**17}  # mallopt's numbers of the same three


def alternate(
    calls: Sequence[Callable[[], object]],
    rounds: int,
    patience: float = math.inf,
    least: int = 5,
    took: Callable[[Callable[[], object]], float] | None = None,
) -> NDArray[np.float64]:
    """Seconds of all, in turns, shape (rounds, calls), after a call of each that is not counted.

    Fewer rounds, but at least `least`, once they took longer than `patience` seconds. `took` times one call, `seconds`
    if it is not given.
    """
    for call in calls:
        call()
    found: list[list[float]] = []
    while len(found) < rounds and (len(found) < least or sum(map(sum, found)) < patience):
        found.append([(took or seconds)(call) for call in calls])
    return np.array(found)


def spread(ratios: NDArray[np.float64]) -> dict[str, float]:
    """The median and the quartiles, as a row has them."""
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {"ratio": ratio, "low": low, "high": high}


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call, by a clock."""
    begin = clock()
    function()
    return clock() - begin


def resident_bytes(call: Callable[[], object]) -> float:
    """By how much a call raises the process's resident memory at most; the median of three, nan but on Linux.

    To be trusted in a process that was started with `RETURNING`. The call runs in a thread, which has a heap of its
    own: in the process's own one it would reuse, unseen, what was freed before. The kernel counts to a few 100 KiB.
    """
    growths = []
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(call).result()
        gc.collect()
        try:
            for _ in range(3):
                time.sleep(0.1)  # jax frees memory in its own threads, after the call
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
                before = _resident("VmRSS")
                thread.submit(call).result()
                growths.append(_resident("VmHWM") - before)
        except (OSError, AttributeError):
            return math.nan
    return float(statistics.median(growths))


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
