"""`ufom measure`: D², V², bias, C1 and C2 of a problem, and which q to run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated

import typer

from ufom_runtime.command.options import ExponentOption, HtmlOption, OuterOption, ThetaOption, read_theta, refuse_folder
from ufom_runtime.command.plain import json_text
from ufom_theory.laws import exponent_of


def measure_command(
    context: typer.Context,
    problem: Annotated[str, typer.Argument(help="A built-in problem (see below), or module:object of your own.")],
    tasks: Annotated[int, typer.Option(help="Tasks to draw, where the problem has no finite set of them.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the tasks.")] = 0,
    theta: ThetaOption = None,
    m: ExponentOption = None,
    outer: OuterOption = None,
    batch: Annotated[int, typer.Option(help="Tasks an outer step, each with its own coin.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, for built-in problems.")] = None,
    bounds: Annotated[bool, typer.Option("--bounds", help="Estimate Assumption 1's constants (slow).")] = False,
    chunk: Annotated[int | None, typer.Option(help="Tasks run together; 1 for losses that vmap cannot take.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Trace and compile the steps first.")] = False,
    html: HtmlOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure D², V², bias and costs; say which q to run.

    Built in: synthetic, quadratic, sinusoid, digits-hypercleaning, mnist-hypercleaning, digits-few-shot, omniglot and
    cifar100.
    """
    from ufom_runtime.command.printing import print_measurement, progress
    from ufom_runtime.command.report import measure as measure_problem
    from ufom_runtime.problems import load_problem

    exponent_of(m, outer)  # refused before any data are read
    if html is not None:
        refuse_folder(html)
    with context.obj() if context.obj else nullcontext() as processes:
        loaded = load_problem(problem, device)
        if theta is not None:
            loaded = replace(loaded, initial=read_theta(theta, loaded))
        with progress("measuring", hidden=processes is not None and processes.rank > 0) as done:
            report = measure_problem(
                loaded, tasks, seed, m, outer, bounds, chunk, done, processes, compiled, batch
            )  # fmt: skip
    if not report:  # another process prints it
        return
    if as_json:
        print(json_text({"problem": problem, **report}))
    else:
        print_measurement(problem, report)
    if html is not None:  # last: a file that cannot be written costs no measurement
        from ufom_runtime.command.explorer import write_explorer

        write_explorer(html, problem, report)
