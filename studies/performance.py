"""How long does a hypergradient take and how much memory, by our estimators and by the libraries people use?

Time is given over the floor, r + 1 bare gradients of the inner loss, which is timed alternately with the method in one
process; a fresh process for every row. The floor is noisy, so in rows of a second kind all methods of one
gradient take turns in one process, over plain autograd by hand. What computes another gradient is not timed. Memory is
the most that one call holds besides what was there before, by two meters: the tensors' bytes, where all tensors are
this interpreter's; and for every method the growth of resident memory, which also counts a kernel's inner buffers. Run
it on a quiet machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from studies.engine.study import Study, of_table
from studies.performance_figure import caption as caption
from studies.performance_figure import draw as draw
from studies.performance_problems import SIZES, Config, build, images
from studies.performance_verdicts import SAME
from studies.performance_verdicts import judge as judge
from studies.shared.timing import KEEPING, RETURNING, alternate, resident_bytes, seconds, spread

ROOT = Path(__file__).parents[1]
COLUMNS = (
    "group", "workload", "r", "method", "library", "version", "seconds", "ratio", "low", "high",
    "live_bytes", "resident_bytes", "difference", "note",
)  # fmt: skip


def measure(config: Config, progress: Callable[[float], object] = lambda share: None) -> pd.DataFrame:
    """One row for each thing measured; a method that fails or is not installed has a row that says why.

    Columns: group (theory, hypergradients, in turns or promises), workload, r, method, library, version; seconds of one
    call; ratio, low and high, the median and quartiles of its time over the floor (of theory calls: over the first; in
    turns: over plain autograd by hand; of promises: of measured over predicted); live_bytes and resident_bytes, the
    peak of one call; difference, from the gradient by plain autograd in float64 at r ≤ 10, relative; note.
    """
    jobs = [*_jobs(config)]
    rows = theory_calls(config.rounds)
    for i, job in enumerate(jobs, 1):
        rows += _in_process(config, job)
        progress(i / len(jobs))
    return pd.DataFrame(rows, columns=COLUMNS)


def _jobs(config: Config) -> Iterator[dict[str, Any]]:
    from studies.methods import METHODS
    from studies.promises import PROMISES

    for workload, lengths in (("few-shot", (config.steps,)), ("hypercleaning", config.lengths)):
        for r in lengths:
            chosen = [x for x, m in METHODS.items() if workload in m.workloads and (config.compiled or not m.compiled)]
            yield from ({"workload": workload, "r": r, "method": label} for label in chosen)
            yield {"workload": workload, "r": r, "turns": "exact"}
    yield {"workload": "few-shot", "r": config.steps, "turns": "first-order"}
    yield from ({"promise": name} for name in PROMISES)


def _in_process(config: Config, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Do a job in a fresh interpreter; a crash is a row, too."""
    command = [sys.executable, "-m", "studies.performance", json.dumps(asdict(config)), json.dumps(job)]
    settings = {"OMP_NUM_THREADS": str(config.threads), "MKL_NUM_THREADS": str(config.threads), **RETURNING}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=config.limit, env={**os.environ, **settings}
        )
    except subprocess.TimeoutExpired:
        return _failed(job, f"given up after {config.limit:g} s")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [""]
        return _failed(job, f"exit code {done.returncode}: {said[-1]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def work(config: Config, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Do a job here."""
    from studies.promises import PROMISES

    try:
        if "promise" in job:
            return [{"group": "promises", **row} for row in PROMISES[job["promise"]](config)]
        if "turns" in job:
            return in_turns(config, **job)
        return [{**_identity(job), **hypergradient_row(config, **job)}]
    except Exception as error:  # of another's library: whatever it raises, the row says it
        return _failed(job, _said(error))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _failed(job: dict[str, Any], why: str) -> list[dict[str, Any]]:
    if "promise" in job:
        return [{"group": "promises", "method": job["promise"], "note": why}]
    job = {"method": f"torch: {job.get('turns')}, by hand", **job}  # turns that fail as a whole
    return [{**_identity(job), "note": why}]


def _identity(job: dict[str, Any]) -> dict[str, Any]:
    from studies.methods import METHODS

    method = METHODS[job["method"]]
    group = "in turns" if "turns" in job else "hypergradients"
    return {"group": group, "workload": f"{job['workload']}, {images(job['workload'])}", "r": job["r"],
            "method": method.name, "library": method.library, "version": method.version}  # fmt: skip


def hypergradient_row(config: Config, workload: str, r: int, method: str) -> dict[str, Any]:
    """Memory first, while the heap is clean; then the comparison in float64, and only then the time, in float32."""
    from studies.methods import METHODS
    from ufom_runtime.memory import peak_bytes
    from ufom_runtime.problem import Tasks

    chosen = METHODS[method]
    problem, theta, tasks = build(config, workload, r)
    task = Tasks.of(tasks).take(slice(1)).one()
    call = chosen.make(problem, theta, task)
    memory = {"resident_bytes": resident_bytes(call)}
    if chosen.eager:
        memory["live_bytes"] = peak_bytes(call, (theta, *task, problem.start(theta, task)))
    compared = {}
    if chosen.weight is not None:
        compared["difference"] = difference(config, workload, min(r, 10), method)
        if not compared["difference"] <= SAME:
            return {**compared, "note": "computes another gradient: not timed"}
    _keep_memory()
    floor = METHODS["torch: floor"].make(problem, theta, task)
    pairs = alternate([floor, call], config.rounds, config.patience) / (1, chosen.calls)
    note = {"note": f"{len(pairs)} alternations"} if len(pairs) < config.rounds else {}
    times = {"seconds": float(np.median(pairs[:, 1])), **spread(pairs[:, 1] / pairs[:, 0])}
    return {**compared, **memory, **times, **note}


def in_turns(config: Config, workload: str, r: int, turns: str) -> list[dict[str, Any]]:
    """One row for every method of the exact (or first-order) gradient that repeats no step and can be called."""
    from studies.methods import METHODS
    from ufom_runtime.problem import Tasks

    _keep_memory()
    problem, theta, tasks = build(config, workload, r)
    task = Tasks.of(tasks).take(slice(1)).one()
    job = {"workload": workload, "r": r, "turns": turns}
    rows, calls = [], dict[str, Callable[[], object]]()
    for label, method in METHODS.items():
        slow = any(word in method.name for word in ("checkpoint", "recomputed"))
        if method.name.startswith(turns) and not slow and (config.compiled or not method.compiled):
            try:
                call = method.make(problem, theta, task)
                call()
            except Exception as error:  # of another's library: whatever it raises, its row says it
                rows += _failed({**job, "method": label}, _said(error))
            else:
                calls[label] = call
    times = alternate([*calls.values()], config.rounds, config.patience * len(calls))
    taken = dict(zip(calls, times.T, strict=True))
    for label, one in taken.items():
        found = {"seconds": float(np.median(one)), **spread(one / taken[f"torch: {turns}, by hand"])}
        rows.append({**_identity({**job, "method": label}), **found, "note": f"{len(times)} turns"})
    return rows


def _keep_memory() -> None:
    with suppress(OSError, AttributeError):
        for parameter, value in KEEPING.items():
            ctypes.CDLL(None).mallopt(parameter, value)


def difference(config: Config, workload: str, r: int, method: str) -> float:
    """Of a method's gradient from plain autograd's, relative, in float64; the second call is taken.

    Few steps: over many, the kinks of the ReLU amplify rounding to per cents.
    """
    from studies.methods import METHODS
    from studies.peers import by_hand
    from ufom_runtime.problem import Tasks

    problem, theta, tasks = build(config, workload, r, double=True)
    task, weight = Tasks.of(tasks).take(slice(1)).one(), METHODS[method].weight
    assert weight is not None
    exact, first_order = by_hand(problem, theta, task), by_hand(problem, theta, task, second_order=False)
    wanted = weight * exact + (1 - weight) * first_order
    call = METHODS[method].make(problem, theta, task)
    call()
    return float((call() - wanted).norm() / max(wanted.norm(), exact.norm()))


_IMPORT_NUMPY = "import numpy"
_FIRST_Q = "from ufom_theory import *; optimal_q(Moments(d2=.02, v2=.9), CostModel(r=10), m=2).q"
_COMMAND = (
    "import sys; sys.argv = 'ufom q --d2 0.02 --v2 0.9 --m 2'.split();from ufom_runtime.command.cli import main; main()"
)


def theory_calls(rounds: int) -> list[dict[str, Any]]:
    """Seconds of what a user of the theory waits for; the ratio is to the first of a workload."""
    from ufom_theory import CostModel, Moments, optimal_q

    d2 = np.random.default_rng(0).random(10**6)

    def python(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    workloads: dict[str, dict[str, Callable[[], object]]] = {
        "a new process": {
            "import numpy": python(_IMPORT_NUMPY),
            "import ufom_theory and one optimal_q": python(_FIRST_Q),
            "ufom q": python(_COMMAND),
        },
        "in one process": {"a million q* in one call": lambda: optimal_q(Moments(d2, 1.0), CostModel(r=10), m=2).q},
    }
    rows = []
    for workload, things in workloads.items():
        times = np.array([[seconds(run) for run in things.values()] for _ in range(rounds)])
        base = np.median(times[:, 0])
        for name, taken in zip(things, times.T, strict=True):
            found = {"seconds": float(np.median(taken)), **spread(taken / base)}
            rows.append({"group": "theory", "workload": workload, "method": name, **found})
    return rows


question = "How close to r + 1 bare gradients is a hypergradient, ours and the libraries', in time and memory?"


def answer(table: pd.DataFrame) -> str:
    """The answer in a sentence: the quickest of ours and of the others, and the memory they take."""
    said = []
    measured = table[(table.group == "hypergradients") & table.method.str.startswith("exact") & table.ratio.notna()]
    for workload, rows in measured[measured.r == measured.groupby("workload").r.transform("max")].groupby("workload"):
        best = [side.loc[side.ratio.idxmin()] for _, side in rows.groupby(rows.library != "ufom")]
        each = (f"{b.library} ({b.method}) {b.ratio:.2f}× in {b.resident_bytes / 1e6:.0f} MB" for b in best)
        said.append(f"{workload}, r = {rows.r.iloc[0]:g}: " + "; ".join(each))
    return "The quickest exact gradients, ours first. " + ". ".join(said) + "."


study = Study(
    question, SIZES, lambda config, store, progress: measure(config, progress),
    of_table(judge), of_table(draw), of_table(caption), of_table(answer), jobs=0,
)  # fmt: skip


if __name__ == "__main__":
    config, job = Config(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
    if hasattr(os, "sched_setaffinity"):  # jax takes all the cores it sees
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.threads])
    import torch

    torch.set_num_threads(config.threads)
    print("\n" + json.dumps(work(config, job)))
