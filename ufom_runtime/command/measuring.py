"""`ufom measure`: D², V², bias, C1 and C2 of a problem, and which q to run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ufom_runtime.command.options import ExponentOption, OuterOption, refuse_folder
from ufom_runtime.command.plain import json_text
from ufom_theory.laws import exponent_of


def measure_command(
    context: typer.Context,
    problem: Annotated[str, typer.Argument(help="A built-in problem (see below), or module:object of your own.")],
    tasks: Annotated[int, typer.Option(help="Tasks to draw, where the problem has no finite set of them.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the tasks.")] = 0,
    m: ExponentOption = None,
    outer: OuterOption = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, for built-in problems.")] = None,
    bounds: Annotated[bool, typer.Option("--bounds", help="Estimate Assumption 1's constants (slow).")] = False,
    chunk: Annotated[int | None, typer.Option(help="Tasks run together; 1 for losses that vmap cannot take.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Trace and compile the steps first.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page that explores the answer, as `explore`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure D², V², bias, C1 and C2 of a problem, and say which q to run.

    Built in: synthetic, quadratic, sinusoid, digits-hypercleaning, mnist-hypercleaning, digits-few-shot, omniglot and
    cifar100.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ufom_runtime.command.printing import console, print_measurement
    from ufom_runtime.command.report import measure as measure_problem
    from ufom_runtime.problems import load_problem

    columns = (TextColumn("measuring"), BarColumn(), TimeRemainingColumn())
    exponent_of(m, outer)  # refused before any data are read
    if html is not None:
        refuse_folder(html)
    shown = console(stderr=True)
    with context.obj() if context.obj else nullcontext() as processes:
        loaded = load_problem(problem, device)
        hidden = not shown.is_terminal or (processes is not None and processes.rank > 0)
        with Progress(*columns, console=shown, transient=True, disable=hidden) as bar:
            task = bar.add_task("", total=1.0)
            report = measure_problem(
                loaded,
                tasks,
                seed,
                m,
                outer,
                bounds,
                chunk,
                lambda x: bar.update(task, completed=x),
                processes,
                compiled,
            )
    if not report:  # another process prints it
        return
    if as_json:
        print(json_text({"problem": problem, **report}))
    else:
        print_measurement(problem, report)
    if html is not None:  # last: a file that cannot be written costs no measurement
        from ufom_runtime.command.explorer import write_explorer

        write_explorer(html, problem, report)
