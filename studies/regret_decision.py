"""What `compare` says for a cell of the study of regret, before any run.

The search, the law, the intervals and the decision are those of `compare`, at moments and curvatures measured along its
pilot run. Only the candidates are restricted to what the study runs: FOM, the exact gradient, UFOM(q) with a coin a
task, and a switch from FOM to one of these, all with stored states. A step costs its calls, counted, so that nothing
depends on the machine; and, in a second decision, its seconds, by the parts that `compare` times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from studies.regret_cell import LEVELS, PILOT, Setting, run
from studies.regret_lanes import Charge, exact_run
from studies.regret_problems import Made
from ufom_runtime import Estimator, Switch
from ufom_runtime.measure.calls import CallCost, measure_calls
from ufom_runtime.measure.candidates import Search, Time, Way
from ufom_runtime.measure.chances import Key, Path, interval
from ufom_runtime.measure.moments import tasks_or_all
from ufom_runtime.measure.parts import Parts, measure_parts
from ufom_runtime.measure.path import CannotTell, Measuring
from ufom_runtime.measure.verdict import decide as decided
from ufom_runtime.measure.verdict import outcomes
from ufom_runtime.problem import Tasks, one_theta
from ufom_theory import Sweep, Truncated, UfomError
from ufom_theory.laws import Progress, parse_outer

Array = NDArray[np.float64]
MOMENTS, BATCH = 1_000_003, 1_000_004  # seeds
STORED = Sweep.stored()


def decide_and_run(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The decision, and then all runs: the columns of `run` beside what was predicted, said and timed."""
    said = pd.DataFrame(decide(cell))
    candidates = [(q, int(until)) for q, until in dict.fromkeys(zip(said.q, said.until, strict=True))]
    found = _joined(pd.DataFrame(run({**cell, "candidates": candidates, "rules": True})), said)
    return [{str(name): value for name, value in row.items()} for row in found.to_dict("records")]


def _joined(runs: pd.DataFrame, said: pd.DataFrame) -> pd.DataFrame:
    """The runs beside what was predicted of them, and their seconds by those of a step."""
    names = ("predicted", "low", "high", "said", "said_seconds", "doubt")
    for level in LEVELS:
        mine = said[said.level == level][["q", "until", *names]]
        runs = runs.merge(mine.rename(columns={x: f"{x}_{level}" for x in names}), on=["q", "until"], how="left")
        for x in (f"said_{level}", f"said_seconds_{level}"):
            runs[x] = runs[x].eq(True)
    step = said.drop_duplicates("q").set_index("q").seconds
    of_fom, of_rest = step[0.0], runs.q.map(step)
    for x in (*LEVELS, "most"):
        early = np.minimum(runs[f"steps_{x}"], runs.until)
        runs[f"seconds_{x}"] = early * of_fom + (runs[f"steps_{x}"] - early) * of_rest
    return runs


def decide(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each level and candidate: FOM, exact, the grid of q, and what is said where it is none of these.

    Columns: level, q, until; predicted, low, high, steps over the exact gradient's with a 95 % interval; said and
    said_seconds, whether it is what to run, where a step costs its calls or its seconds; seconds, of an outer step
    after the switch, timed, nan where the clock is unsure; doubt, why nothing can be told.
    """
    setting = Setting(**cell["setting"])
    made, found = setting.make(), []
    costs = [counted(made, setting.batch), timed(made, setting.batch)]
    clock = _clock(made, setting.batch)
    for level, horizon in zip(LEVELS, setting.horizons, strict=True):
        path, doubt = _path(setting, made, horizon)
        known = {(q, 0): _steps(path, q) for q in (0.0, 1.0, *cell["grid"])}
        said = [_said(setting, cost, path, doubt) for cost in costs]
        known = {**{key: steps for key, steps in said if steps is not None}, **known}
        for (q, until), steps in known.items():
            low, high = interval(steps)
            found.append(
                {"level": level, "q": q, "until": until, "predicted": float(steps[0]), "low": low, "high": high,
                 "said": (q, until) == said[0][0], "said_seconds": (q, until) == said[1][0],
                 "seconds": clock.expected(q) if clock else math.nan, "doubt": doubt}
            )  # fmt: skip
    return found


def _path(setting: Setting, made: Made, horizon: int) -> tuple[Path | None, str]:
    """What is measured along the pilot run, the study's proxy in FOM's place; or why nothing can be told."""
    problem, outer, proxy = made.problem, parse_outer(setting.outer), Truncated(setting.proxy)
    sampled = None if problem.tasks is not None else problem.sample(64, torch.Generator().manual_seed(MOMENTS))
    at = (0, horizon // 2, horizon // 2 * 2) if horizon > 1 else (0,)  # as `compare`'s pilot run
    measuring = Measuring(problem, tasks_or_all(problem, sampled)[0], outer, setting.batch)
    try:
        thetas = exact_run(made, outer, setting.batch, at, PILOT)
        path = measuring.path(thetas, at, horizon, [proxy], lambda path: [proxy])
    except CannotTell as reason:
        return None, str(reason)
    first: dict[Key, list[Progress]] = {Truncated(): path.progress[proxy]}
    return replace(path, progress=first, measured={Truncated(): path.measured[proxy]}), ""


def _said(setting: Setting, parts: Parts, path: Path | None, doubt: str) -> tuple[tuple[float, int], Array | None]:
    """q and the last step of FOM of what `compare` says, and its steps over the exact gradient's."""
    search = Search(parse_outer(setting.outer), setting.batch, None, parts, allowed=_is_run)
    rows = search.rows(path)
    search.times.update({way.method: Time(way.seconds, 0.0, "timed") for row in rows for way in row.ways})
    found = outcomes(search, path, rows)
    best, _ = decided(search, path, found, doubt)
    last = best.then if isinstance(best, Switch) else best
    assert isinstance(last, Estimator)
    row = next(o.row for o in found if o.method == best)
    return (last.q, best.until if isinstance(best, Switch) else 0), row.steps(path.weights) if path else None


def _is_run(way: Way) -> bool:
    """Whether the study runs it."""
    return way.sweep == "stored" and way.coin in ("", "task") and way.scale == 1 and way.name != "roulette"


def _steps(path: Path | None, q: float) -> Array:
    """Steps over the exact gradient's, as drawn; nan where they are not known."""
    if path is None:
        return np.full(2, 1.0 if q == 1 else np.nan)
    ratios = path.ufom(path.progress[Truncated()], q, "task") if q else path.fom()
    return np.asarray(np.asarray(path.weights) @ ratios)


def counted(made: Made, batch: int) -> Parts:
    """The parts of a step in calls, the study's proxy taken for FOM."""
    charge, one = Charge.of(made, batch), (1.0, float(batch))
    way = charge.first, batch * charge.first
    none = (0, 0, 0, 0, 0, 0)
    return Parts(int(charge.more), batch, way, one, one, (0.0, 0.0), way[1], charge.exact, *none)


def timed(made: Made, batch: int) -> Parts:
    """The parts of a step in seconds; for the script stands the exact gradient, since the study does not run it."""
    parts, k = measure_parts(made.problem, one_theta(made.problem), _batch(made, batch), seconds=0.3), made.proxy
    way = parts.forward[0] + k * parts.back[0], parts.forward[1] + k * parts.back[1]
    found = replace(parts, r=parts.r - k, forward=way, mixed=parts.mixed + k * parts.back[1])
    return replace(found, script=found.expected(1.0, Truncated(), STORED))


def _clock(made: Made, batch: int) -> CallCost | None:
    """Seconds of whole outer steps; None where the machine's clock is unsure."""
    both = Estimator(0.5, STORED, Truncated(made.proxy))
    with suppress(UfomError):
        return measure_calls(made.problem, one_theta(made.problem), _batch(made, batch), both, seconds=0.3)
    return None


def _batch(made: Made, batch: int) -> Tasks:
    return Tasks.of(made.problem.sample(batch, torch.Generator().manual_seed(BATCH)))
