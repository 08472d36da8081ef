"""What the store costs a cell, and what local workers lose: `python -m studies.sweep_benchmark`; wants a quiet machine.

Two workers of one thread each, as `--executor local --jobs 2` starts them, against two bare processes that import the
same and compute the same cells without a store; in turns, so that whatever else runs slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from studies.engine.local import Local
from studies.engine.sweep import Store


def work(cell: Mapping[str, Any]) -> list[dict[str, float]]:
    """Products of small matrices, of one thread: nothing but CPU."""
    matrix = np.random.default_rng(cell["seed"]).standard_normal((64, 64)) / 8
    for _ in range(cell["products"]):
        matrix = np.tanh(matrix @ matrix)
    return [{"trace": float(np.trace(matrix))}]


def cells(count: int, products: int) -> list[dict[str, Any]]:
    """So many cells, all alike."""
    return [{"study": "benchmark", "seed": seed, "products": products} for seed in range(count)]


def overhead(count: int) -> tuple[float, float, float]:
    """Milliseconds that the store adds to a cell, CPU time of these, and what two bare fsyncs take beside them."""
    wanted = cells(count, 0)
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        Store(Path(folder)).run(wanted, work)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        with open(Path(folder) / "bare", "wb") as stream:
            begin = time.perf_counter()
            for _ in range(2 * count):
                stream.write(bytes(2000))
                stream.flush()
                os.fsync(stream.fileno())
            bare = time.perf_counter() - begin
    begin = time.perf_counter()
    for cell in wanted:
        work(cell)
    computed = time.perf_counter() - begin
    return 1e3 * (wall - computed) / count, 1e3 * (cpu - computed) / count, 1e3 * bare / count


def local(count: int, products: int) -> float:
    """Seconds of two local workers."""
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        begin = time.perf_counter()
        Store(Path(folder), Local(2)).run(cells(count, products), work)
        return time.perf_counter() - begin


def bare(count: int, products: int) -> float:
    """Seconds of two bare processes with every other cell each."""
    code = f"from studies import sweep_benchmark as b\nfor cell in b.cells({count}, {products})[{{}}::2]: b.work(cell)"
    environment = {"OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    processes = [
        subprocess.Popen([sys.executable, "-c", code.format(k)], cwd=Path(__file__).parents[1], env=environment)
        for k in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    return time.perf_counter() - begin


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(prog="python -m studies.sweep_benchmark", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.5, help="a cell takes, about")
    options = parser.parse_args()
    costs = [overhead(100) for _ in range(options.rounds)]
    wall, cpu, bare_fsyncs = (statistics.median(kind) for kind in zip(*costs, strict=True))
    print(f"store: {wall:.2f} ms a cell (least {min(costs)[0]:.2f}; goal: at most 5), {cpu:.2f} ms of CPU time")
    print(f"two bare fsyncs in the same seconds: {bare_fsyncs:.2f} ms")
    begin = time.perf_counter()
    work(cells(1, 2000)[0])
    products = int(2000 * options.seconds / (time.perf_counter() - begin))
    ratios = []
    for i in range(options.rounds):
        calls = (bare, local) if i % 2 else (local, bare)
        seconds = {call: call(options.cells, products) for call in calls}
        ratios.append(seconds[bare] / seconds[local])
        print(f"two local workers {seconds[local]:.1f} s, two bare processes {seconds[bare]:.1f} s: {ratios[-1]:.3f}")
    print(f"efficiency: {statistics.median(ratios):.3f} (median; goal: at least 0.9)")


if __name__ == "__main__":
    main()
