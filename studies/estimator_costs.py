"""What estimators cost on this machine: `python -m studies.estimator_costs table|batch|compiled|forecast|plan`.

All times are CPU seconds of one thread, so that a busy machine does not show, and medians of calls made in turns. Each
part prints its rows as JSON, one a line; with `--out FILE` they are written there, too. `table` and `batch` also run on
an older version of the package, as far as it has the sweeps, so that two versions can be compared row by row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from studies.shared.timing import alternate, seconds
from ufom_runtime import EXACT, FOM, RECOMPUTED, UFOM, BilevelProblem, Estimator, FlatModule, hypergradient
from ufom_runtime.problem import Tasks, one_theta
from ufom_theory import Sweep, Truncated, UfomError

Row = dict[str, Any]
SIZES = (1, 16, 64)
UNROLLED = Estimator(1.0, Sweep.unrolled())
SWEEPS = (Sweep.stored(), Sweep.unrolled(), Sweep.recomputed(), Sweep.checkpointed(3))


def digits_maml() -> BilevelProblem:
    """Digits MAML with a net of 64-32-5 units, r = 10."""
    from ufom_runtime.problems.few_shot import digits_few_shot

    torch.manual_seed(0)
    net = FlatModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5)))
    return BilevelProblem(
        inner_loss=lambda theta, phi, task: cross_entropy(net(phi, task[0]), task[1]),
        outer_loss=lambda theta, phi, task: cross_entropy(net(phi, task[2]), task[3]),
        start=lambda theta, task: theta,
        step_sizes=[0.1] * 10,
        sample_tasks=digits_few_shot().sample_tasks,
        initial=net.vector(),
    )


def problems() -> dict[str, Callable[[], BilevelProblem]]:
    """Five problems for the forecasts, small enough to be called thousands of times."""
    from ufom_runtime.problems.few_shot import digits_few_shot
    from ufom_runtime.problems.hypercleaning import digits_hypercleaning
    from ufom_runtime.problems.quadratic import quadratic
    from ufom_runtime.problems.synthetic import synthetic

    return {
        "synthetic": synthetic,
        "quadratic": lambda: quadratic(dim=20, r=10),
        "digits MAML": digits_maml,
        "digits few-shot": lambda: digits_few_shot(filters=4, r=5),
        "digits hypercleaning": lambda: digits_hypercleaning(n_train=200, n_validation=200, r=10),
    }


def batch_of(problem: BilevelProblem, n: int) -> Tasks:
    """n tasks; those of a finite Ω are repeated."""
    if problem.tasks is None:
        return Tasks.of(problem.sample(n, torch.Generator().manual_seed(0)))
    every = Tasks.of(problem.tasks)
    return every.take(torch.arange(n) % len(every))


def cpu(function: Callable[[], object], device: object = None) -> float:
    """CPU seconds of one call in this thread."""
    return seconds(function, time.thread_time)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU milliseconds of each, in turns, after one call that does not count."""
    times = alternate([*calls.values()], rounds, took=cpu)
    return {name: round(1e3 * float(x), 3) for name, x in zip(calls, np.median(times, axis=0), strict=True)}


def table(rounds: int) -> Iterator[Row]:
    """Ten estimators on digits MAML, r = 10, milliseconds a call by the number of tasks."""
    problem = digits_maml()
    theta = one_theta(problem)
    for n in SIZES:
        run = partial(hypergradient, problem, theta, batch_of(problem, n), generator=torch.Generator().manual_seed(0))
        named = {
            "FOM": FOM, "unrolled": UNROLLED, "EXACT": EXACT, "UFOM(.05, stored)": UFOM(0.05, Sweep.stored()),
            "the same, one coin": UFOM(0.05, Sweep.stored(), coin="batch"), "UFOM(.25, recomputed)": UFOM(0.25),
            "UFOM(.25, stored)": UFOM(0.25, Sweep.stored()), "UFOM(.25, unrolled)": UFOM(0.25, Sweep.unrolled()),
            "UFOM(.25, 3 slots)": UFOM(0.25, Sweep.checkpointed(3)), "RECOMPUTED": RECOMPUTED,
        }  # fmt: skip
        yield {"tasks": n, **medians({name: partial(run, e) for name, e in named.items()}, rounds)}


def batch(rounds: int) -> Iterator[Row]:
    """UFOM(.25) of B tasks, k = B/4 of them corrected, over FOM(B) with the backward sweep of k, FOM(B − k) with k."""
    problem = digits_maml()
    theta = one_theta(problem)
    for n in SIZES[-2:]:
        tasks, k = batch_of(problem, n), n // 4
        few, rest, coins = tasks.take(slice(k)), tasks.take(slice(k, n)), torch.arange(n) < k
        for sweep in SWEEPS:
            ufom, exact = UFOM(0.25, sweep), Estimator(1.0, sweep)
            calls: dict[str, Callable[[], object]] = {
                "ufom": partial(hypergradient, problem, theta, tasks, ufom, coins=coins),
                "fom": partial(hypergradient, problem, theta, tasks, FOM),
                "exact of k": partial(hypergradient, problem, theta, few, exact),
                "fom of k": partial(hypergradient, problem, theta, few, FOM),
                "fom of the rest": partial(hypergradient, problem, theta, rest, FOM),
            }
            x = medians(calls, rounds)
            yield {
                "tasks": n, "sweep": str(sweep), **x,
                "over one pass": round(x["ufom"] / (x["fom"] + x["exact of k"] - x["fom of k"]), 3),
                "over two calls": round(x["ufom"] / (x["fom of the rest"] + x["exact of k"]), 3),
            }  # fmt: skip


def forecasts(rounds: int, sizes: Sequence[int] = (1, 4, 16, 64)) -> Iterator[Row]:
    """`forecast` and calls in turns, and the largest bytes of a call: five problems, six estimators, four B."""
    from ufom_runtime.measure import clock

    clock.took = cpu
    estimators = {
        "FOM": FOM, "exact, stored": EXACT, "exact, recomputed": RECOMPUTED, "exact, unrolled": UNROLLED,
        "UFOM(.25), 3 slots": UFOM(0.25, Sweep.checkpointed(3)),
        "UFOM(.1) on K = 1, stored, one coin": UFOM(0.1, Sweep.stored(), Truncated(1), coin="batch"),
    }  # fmt: skip
    made = {name: make() for name, make in problems().items()}
    for n in sizes:
        for name, problem in made.items():
            theta = one_theta(problem)
            for label, estimator in estimators.items():
                row: Row = {"problem": name, "estimator": label, "tasks": n}
                yield row | _foreseen(problem, theta, batch_of(problem, n), estimator, rounds)


def _foreseen(problem: BilevelProblem, theta: torch.Tensor, tasks: Tasks, e: Estimator, rounds: int) -> Row:
    """Forecasts beside what is measured right after each, "time" the median of their quotients."""
    from ufom_runtime import forecast, peak_bytes

    pairs = []
    try:
        for _ in range(rounds):  # in turns: the speed of a machine drifts
            foreseen = forecast(problem, theta, tasks, e)
            pairs.append((foreseen.seconds, _measured(problem, theta, tasks, e, 3)))
    except UfomError as error:
        return {"refused": str(error)}
    known = (theta, *tasks.parts)
    held = max(
        peak_bytes(partial(hypergradient, problem, theta, tasks, e, coins=coins), known)
        for coins in _coins(len(tasks), e)
    )
    seconds, measured = (statistics.median(x) for x in zip(*pairs, strict=True))
    return {
        "ms": round(1e3 * seconds, 3), "measured ms": round(1e3 * measured, 3), "bytes": foreseen.bytes,
        "measured bytes": held, "time": round(statistics.median(x / y for x, y in pairs), 3),
        "memory": round(foreseen.bytes / held, 3),
    }  # fmt: skip


def _coins(n: int, e: Estimator) -> list[torch.Tensor]:
    """One pattern for each number of corrected tasks that matters."""
    if e.q in (0.0, 1.0):
        return [torch.full((n,), e.q == 1.0)]
    counts = (0, n) if e.coin == "batch" else (0, max(1, round(e.q * n)), n - 1, n)
    return [torch.arange(n) < k for k in counts]


def _measured(problem: BilevelProblem, theta: torch.Tensor, tasks: Tasks, e: Estimator, rounds: int) -> float:
    """Mean CPU seconds over the coins: medians at all numbers of corrected tasks, or at three of equal weight."""
    from ufom_runtime.measure.calls import corrected_tasks

    n = len(tasks)
    chances = corrected_tasks(n, e.q, e.coin)
    weights = {k: float(p) for k, p in enumerate(chances) if p > 0}
    if len(weights) > 5:
        weights = {int(np.searchsorted(np.cumsum(chances), x)): 1 / 3 for x in (1 / 6, 1 / 2, 5 / 6)}
    calls: dict[str, Callable[[], object]] = {
        str(k): partial(hypergradient, problem, theta, tasks, e, coins=torch.arange(n) < k) for k in weights
    }
    found = medians(calls, rounds)
    return sum(p * found[str(k)] for k, p in weights.items()) / sum(weights.values()) / 1e3


def plans(rounds: int, chosen: Sequence[str] = ()) -> Iterator[Row]:
    """What `plan_estimators` chooses in 1, 10 and 100 MB, its time and bytes foreseen and measured."""
    from ufom_runtime import peak_bytes, plan_estimators
    from ufom_runtime.measure import clock
    from ufom_runtime.problems.few_shot import omniglot_few_shot
    from ufom_runtime.problems.hypercleaning import digits_hypercleaning, mnist_hypercleaning

    clock.took = cpu
    cases: dict[str, tuple[Callable[[], BilevelProblem], int]] = {
        "digits MAML, r = 10": (digits_maml, 4),
        "digits hypercleaning, 200 images, r = 20": (
            lambda: digits_hypercleaning(n_train=200, n_validation=200, r=20), 1,
        ),
        "MNIST hypercleaning, 200 images, r = 10": (
            lambda: mnist_hypercleaning(n_train=200, n_validation=200, hidden=16, r=10), 1,
        ),
        "MNIST hypercleaning, 5000 images, r = 100": (mnist_hypercleaning, 1),
        "Omniglot, 5-way, 8 filters, r = 3": (lambda: omniglot_few_shot(ways=5, filters=8, r=3), 4),
    }  # fmt: skip
    for name in chosen or cases:
        make, n = cases[name]
        problem = make()
        theta = one_theta(problem)
        drawn = None if problem.tasks is not None else problem.sample(8, torch.Generator().manual_seed(1))
        tasks = batch_of(problem, n)
        for memory in ("1MB", "10MB", "100MB"):
            row: Row = {"problem": name, "memory": memory, "tasks": n}
            try:
                best = plan_estimators(problem, theta, drawn, memory, outer="tuned", batch=n, seconds=0.1)[0]
            except UfomError as error:
                yield {**row, "refused": str(error)}
                continue

            run = partial(_drawn, problem, theta, tasks, best.estimator)
            taken = [cpu(partial(run, seed)) for seed in range(rounds)]
            held = max(peak_bytes(partial(run, seed), (theta, *tasks.parts)) for seed in range(min(rounds, 6)))
            yield {
                **row, "choice": best.label, "q": best.q, "ms": round(1e3 * best.seconds, 2),
                "measured ms": round(1e3 * statistics.mean(taken), 2), "bytes": best.bytes, "measured bytes": held,
                "why": best.why,
            }  # fmt: skip


def _drawn(problem: BilevelProblem, theta: torch.Tensor, tasks: Tasks, method: Any, seed: int) -> object:
    """One call with the coins of a seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hypergradient(problem, theta, tasks, method, generator=torch.Generator().manual_seed(seed))


def compiled(rounds: int) -> Iterator[Row]:
    """The exact gradient of 16 tasks with compiled steps, by the rows that run together, and plain; and first calls."""
    problem = digits_maml()
    run = partial(hypergradient, problem, one_theta(problem), batch_of(problem, 16), EXACT)
    ways: dict[str, Callable[[], object]] = {
        "compiled, one at a time": partial(run, compile=True),
        "compiled, 16 together": partial(run, compile=True, chunk=16),
        "plain, 16 together": run,
    }
    first = {name: round(seconds(way), 1) for name, way in ways.items()}
    found = medians(ways, rounds)
    yield from ({"way": name, "first call, s": first[name], "ms": found[name]} for name in ways)


PARTS = {"compiled": compiled, "table": table, "batch": batch, "forecast": forecasts, "plan": plans}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(prog="python -m studies.estimator_costs", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in PARTS[options.part](options.rounds):
        print(json.dumps(row, ensure_ascii=False), flush=True)
        found.append(row)
    if options.out:
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in found)
        options.out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
