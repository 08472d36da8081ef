"""`ufom plan`: what to run within a memory, by given moments and counted calls, or measured on a problem."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ufom_runtime.command.options import ExponentOption, OuterOption
from ufom_runtime.command.plain import json_text
from ufom_theory import Moments, Truncated, UfomError, counted_candidates, plan
from ufom_theory.checks import byte_count


def plan_command(
    context: typer.Context,
    problem: Annotated[
        str | None, typer.Argument(help="A built-in problem, or module:object of your own: all is measured on it.")
    ] = None,
    moments: Annotated[
        list[str] | None, typer.Option(help="K:D2:V2 of a proxy; repeat for each. K = 0 is FOM.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What may be held: bytes, as 50MB; with --moments also states.  [default: 1GB, or 1 state]"),
    ] = None,
    state_bytes: Annotated[int | None, typer.Option(help="Bytes of an inner state; else memory is in states.")] = None,
    r: Annotated[int, typer.Option("-r", help="Inner steps.")] = 10,
    c1: Annotated[float, typer.Option(help="Cost of a gradient.")] = 1.0,
    c2: Annotated[float, typer.Option(help="Cost of a Hessian-vector product.")] = 1.0,
    m: ExponentOption = None,
    outer: OuterOption = None,
    batch: Annotated[int, typer.Option(help="Tasks an outer step, of a problem.")] = 4,
    tasks: Annotated[int, typer.Option(help="Tasks to measure on, where the problem has no finite set.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the tasks.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What to run within a memory, the soonest first.

    Soonest to a given precision, by moments and costs that are given, or measured on a problem.
    """
    if (problem is None) == (not moments):
        raise UfomError("give a problem, on which all is measured, or --moments K:D2:V2")
    _refuse_unused(context, problem)
    if problem is not None:
        rows = _measured(problem, memory or "1GB", m, outer, batch, tasks, seed)
    else:
        rows = _counted(moments or [], memory or "1", state_bytes, r, c1, c2, m, outer)
    if as_json:
        print(json_text(rows))
    else:
        from ufom_runtime.command.printing import print_plan

        print_plan(rows)


def _refuse_unused(context: typer.Context, problem: str | None) -> None:
    """`UfomError` for options that would change nothing here."""
    unused = {"batch": "--batch", "tasks": "--tasks", "seed": "--seed"}
    if problem is not None:
        unused = {"state_bytes": "--state-bytes", "r": "-r", "c1": "--c1", "c2": "--c2"}
    told = [option for name, option in unused.items() if context.get_parameter_source(name).name != "DEFAULT"]  # type: ignore[union-attr]
    if told:
        where = "--moments, which are of one task" if problem is None else f"{problem}, on which all is measured"
        raise UfomError(f"{', '.join(told)} would change nothing with {where}: leave it out")


def _counted(
    moments: list[str],
    memory: str,
    state_bytes: int | None,
    r: int,
    c1: float,
    c2: float,
    m: float | None,
    outer: str | None,
) -> list[dict[str, Any]]:
    if state_bytes is None and not memory.strip().lstrip("+-").isdecimal():
        raise UfomError(f"--memory {memory} is in bytes: say how many a state has by --state-bytes, or give states")
    given = dict(map(_parse_proxy, moments))
    if len(given) < len(moments):
        raise UfomError("--moments names a proxy length K twice: give each once")
    every = counted_candidates(given, r, c1, c2, memory, state_bytes or 1)
    return [
        {"proxy": c.label.proxy and c.label.proxy.steps, "sweep": str(c.label.sweep), "label": str(c.label), "q": c.q,
         "bytes": c.bytes, "slower": c.slower, "why": c.why}
        for c in plan(every, memory, m, outer)
    ]  # fmt: skip


def _measured(
    name: str, memory: str, m: float | None, outer: str | None, batch: int, tasks: int, seed: int
) -> list[dict[str, Any]]:
    from ufom_runtime.measure.planning import plan_estimators
    from ufom_runtime.problem import one_theta
    from ufom_runtime.problems import load_problem
    from ufom_runtime.training.seeds import seeded

    byte_count("memory", memory)  # refused before any data are read
    problem = load_problem(name)
    theta = one_theta(problem)
    drawn = None if problem.tasks is not None else problem.sample(tasks, seeded(seed))
    found = plan_estimators(problem, theta, drawn, memory, m=m, outer=outer, batch=batch)
    return [
        {"label": x.label, "q": x.q, "ms": 1e3 * x.seconds, "bytes": x.bytes, "slower": x.slower, "why": x.why}
        for x in found
    ]


def _parse_proxy(text: str) -> tuple[Truncated, Moments]:
    try:
        steps, d2, v2 = text.split(":")
        return Truncated(int(steps)), Moments(float(d2), float(v2))
    except UfomError:
        raise
    except ValueError as error:
        raise UfomError(f"--moments {text!r}: give K:D2:V2, for example 0:0.1:1") from error
