"""`python -m studies STUDY --size SIZE`: measure, judge and draw, with the table, verdicts and figure written down."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pandas as pd
import typer
from matplotlib import rc_context
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from studies import optimal_q as optimal_q_study
from ufom_theory import UfomError, Verdict

HERE = Path(__file__).parent
app = typer.Typer(help="Compare what was predicted with what is measured.", no_args_is_help=True, add_completion=False)


@app.callback()
def _commands() -> None:
    """Compare what was predicted with what is measured."""


@app.command("optimal_q")
def optimal_q(
    size: Annotated[str, typer.Option(help="quick (seconds; kept out of git) or standard (minutes).")] = "quick",
    redraw: Annotated[bool, typer.Option(help="Judge and draw the stored table, measure nothing.")] = False,
) -> None:
    """Is the predicted q as fast as the best q of a grid? The synthetic pair over inner step sizes."""
    if size not in optimal_q_study.SIZES:
        raise UfomError(f"size {size!r} is unknown: use {' or '.join(optimal_q_study.SIZES)}")
    _run(optimal_q_study, size, f"optimal_q-{size}", redraw)


@app.command("performance")
def performance(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny problems, a check of the harness.")] = False,
    redraw: Annotated[bool, typer.Option("--redraw", help="Judge and draw the stored table, measure nothing.")] = False,
) -> None:
    """Time and memory of a hypergradient, ours and other libraries', side by side; 15 minutes on a quiet machine."""
    from studies import performance as performance_study

    _run(performance_study, "quick" if quick else "standard", "performance", redraw)


def _run(study: ModuleType, size: str, stem: str, redraw: bool) -> None:
    """Measure (unless the stored table is to do), judge, draw, and store it all by the stem's name."""
    results, figures = (HERE / kind / ("quick" if size == "quick" else "") for kind in ("results", "figures"))
    results.mkdir(parents=True, exist_ok=True)
    figures.mkdir(parents=True, exist_ok=True)
    if redraw:
        if not (results / f"{stem}.csv").is_file():
            raise UfomError(f"{results / stem}.csv is missing: run the study without --redraw first")
    else:
        _measure(study, size, results / stem)
    table = pd.read_csv(results / f"{stem}.csv")
    verdicts = study.judge(table)
    (results / f"{stem}.verdicts.json").write_text(_json([asdict(v) for v in verdicts]))
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with rc_context({"svg.hashsalt": "ufom"}):  # the same table draws the same bytes
        figure = study.draw(table)
        for kind, metadata in undated.items():
            figure.savefig(figures / f"{stem}.{kind}", dpi=150, metadata=metadata)
    (figures / f"{stem}.txt").write_text(study.caption(table) + "\n")
    _show(verdicts)
    print(f"figure: {figures / stem}.png   table: {results / stem}.csv")


def _measure(study: ModuleType, size: str, stem: Path) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("measuring"), BarColumn(), TimeRemainingColumn())
    begin = time.perf_counter()
    config = study.SIZES[size]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        table = study.measure(config, lambda share: bar.update(task, completed=share))
    table.to_csv(stem.with_suffix(".csv"), index=False)
    run = {"seconds": round(time.perf_counter() - begin, 1), "date": time.strftime("%Y-%m-%d"), "device": "cpu",
           "machine": platform.machine(), "processor": _processor(), "cores": os.cpu_count()}  # fmt: skip
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "pandas", "torch")}
    stem.with_suffix(".json").write_text(_json({"config": asdict(config), **run, "versions": versions}))


def _processor() -> str:
    """Its name; platform.processor() is empty on Linux."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _show(verdicts: list[Verdict]) -> None:
    table = Table("claim", "predicted", "measured", "± 95 %", "agrees", box=None, pad_edge=False)
    for v in verdicts:
        table.add_row(v.subject, f"{v.relation} {v.predicted:.4g}", f"{v.measured:.4g}", f"{v.tolerance:.2g}", v.agrees)
    Console().print(table)


if __name__ == "__main__":
    import sys

    try:
        app()
    except UfomError as error:
        print(f"studies: {error}", file=sys.stderr)
        sys.exit(2)
