"""`ufom plan`: the best proxy, sweep and q that fit in memory."""

from __future__ import annotations

from typing import Annotated

import typer

from ufom_runtime.command.options import ExponentOption, OuterOption
from ufom_runtime.command.plain import json_text
from ufom_theory import (
    Moments,
    Truncated,
    UfomError,
    plan,
)


def plan_command(
    moments: Annotated[list[str], typer.Option(help="K:D2:V2 of a proxy; repeat for each. K = 0 is FOM.")],
    memory: Annotated[int, typer.Option(help="Inner states that may be held; φ_0's copy counts as one.")] = 1,
    r: Annotated[int, typer.Option("-r", help="Inner steps.")] = 10,
    c1: Annotated[float, typer.Option(help="Cost of a gradient.")] = 1.0,
    c2: Annotated[float, typer.Option(help="Cost of a Hessian-vector product.")] = 1.0,
    m: ExponentOption = None,
    outer: OuterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The best proxy, sweep and q that fit in memory, and the others."""
    given = dict(map(_parse_proxy, moments))
    if len(given) < len(moments):
        raise UfomError("--moments names a proxy length K twice: give each once")
    rows = [
        {"proxy": c.proxy.steps, "sweep": str(c.sweep), "q": c.q, "states": c.states, "time": c.time,
         "slower": c.slower, "why": c.why}
        for c in plan(given, r, c1, c2, memory, m, outer)
    ]  # fmt: skip
    if as_json:
        print(json_text(rows))
    else:
        from ufom_runtime.command.printing import print_plan

        print_plan(rows)


def _parse_proxy(text: str) -> tuple[Truncated, Moments]:
    try:
        steps, d2, v2 = text.split(":")
        return Truncated(int(steps)), Moments(float(d2), float(v2))
    except UfomError:
        raise
    except ValueError as error:
        raise UfomError(f"--moments {text!r}: give K:D2:V2, for example 0:0.1:1") from error
