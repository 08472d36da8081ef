"""`python -m studies STUDY --size SIZE`: measure, judge and draw, with the table, verdicts and figure written down."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
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
    study = optimal_q_study
    if size not in study.SIZES:
        raise UfomError(f"size {size!r} is unknown: use {' or '.join(study.SIZES)}")
    results, figures = (HERE / kind / ("quick" if size == "quick" else "") for kind in ("results", "figures"))
    results.mkdir(parents=True, exist_ok=True)
    figures.mkdir(parents=True, exist_ok=True)
    stem = f"optimal_q-{size}"
    if redraw:
        if not (results / f"{stem}.csv").is_file():
            raise UfomError(f"{results / stem}.csv is missing: run the study without --redraw first")
    else:
        _measure(size, results / stem)
    table = pd.read_csv(results / f"{stem}.csv")
    verdicts = study.judge(table)
    (results / f"{stem}.verdicts.json").write_text(_json([asdict(v) for v in verdicts]))
    figure = study.draw(table)
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with rc_context({"svg.hashsalt": "ufom"}):  # the same table draws the same bytes
        for kind, metadata in undated.items():
            figure.savefig(figures / f"{stem}.{kind}", dpi=150, metadata=metadata)
    (figures / f"{stem}.txt").write_text(study.caption(table) + "\n")
    _show(verdicts)
    print(f"figure: {figures / stem}.png   table: {results / stem}.csv")


@app.command("performance")
def performance() -> None:
    """Seconds of what a user waits for, side by side; the table goes to results/performance.csv."""
    from studies.performance import measure

    found = measure()
    found.to_csv(HERE / "results" / "performance.csv", index=False, float_format="%.4g")
    table = Table("", "median s", "quartiles", "ratio", box=None, pad_edge=False)
    for row in found.itertuples():
        table.add_row(row.what, f"{row.seconds:.4f}", row.quartiles, f"{row.ratio:.2f}")
    Console().print(table)


def _measure(size: str, stem: Path) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("measuring"), BarColumn(), TimeRemainingColumn())
    begin = time.perf_counter()
    config = optimal_q_study.SIZES[size]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        table = optimal_q_study.measure(config, lambda share: bar.update(task, completed=share))
    table.to_csv(stem.with_suffix(".csv"), index=False)
    run = {"seconds": round(time.perf_counter() - begin, 1), "device": "cpu", "machine": platform.machine()}
    versions = {"python": platform.python_version(), "numpy": np.__version__, "pandas": pd.__version__}
    stem.with_suffix(".json").write_text(_json({"config": asdict(config), **run, "versions": versions}))


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
