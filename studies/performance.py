"""How long do the things take that a user waits for? Runs that alternate in one go; a benchmark, not a test."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

_IMPORT_NUMPY = "import numpy"
_FIRST_Q = "from ufom_theory import *; optimal_q(Moments(d2=.02, v2=.9), CostModel(r=10)).q"
_COMMAND = "import sys; sys.argv = 'ufom q --d2 0.02 --v2 0.9'.split(); from ufom_runtime.cli import main; main()"


def measure(rounds: int = 15) -> pd.DataFrame:
    """Median seconds and quartiles of each thing, and its ratio to the first of its group."""
    from ufom_theory import CostModel, Moments, optimal_q

    d2 = np.random.default_rng(0).random(10**6)

    def python(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    groups: dict[str, dict[str, Callable[[], object]]] = {
        "a new process": {
            "import numpy": python(_IMPORT_NUMPY),
            "import ufom_theory and one optimal_q": python(_FIRST_Q),
            "ufom q": python(_COMMAND),
        },
        "in one process": {"a million q* in one call": lambda: optimal_q(Moments(d2, 1.0), CostModel(r=10)).q},
    }
    rows = []
    for group, things in groups.items():
        seconds: dict[str, list[float]] = {name: [] for name in things}
        for _ in range(rounds):
            for name, run in things.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
        base = statistics.median(next(iter(seconds.values())))
        for name, values in seconds.items():
            low, median, high = statistics.quantiles(values, n=4)
            rows.append({"group": group, "what": name, "seconds": median, "quartiles": f"{low:.4f} … {high:.4f}",
                         "ratio": median / base})  # fmt: skip
    return pd.DataFrame(rows)
