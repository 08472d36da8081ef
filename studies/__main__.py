"""`python -m studies NAME --size SIZE`: measure, judge and draw, with the table, verdicts and figure written down.

`judge` and `draw` do their part again for every stored table, and `index` writes README.md; they measure nothing.
`run` and `retry` measure only, as on a cluster; `status` and `export` show the cells that a sweep has left.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pandas as pd
import typer
from matplotlib import rc_context
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from studies.engine import commands
from studies.engine.commands import CellMinutes, Gpus, Jobs, Kind, Minutes, Partition, Size
from studies.engine.configuration import read_config
from studies.engine.executors import Executor, executor
from studies.engine.sweep import Store
from ufom_runtime.command.style import SHEET
from ufom_theory import UfomError, Verdict

HERE = Path(__file__).parent
STUDIES = {  # a line for --help, which spares importing them all
    "divergence": "Theorem 2's problem, where FOM stalls (Fig. 1a-c).",
    "optimal_q": "Is the predicted q as fast as the best q of a grid? The synthetic pair over inner step sizes.",
    "readings": "The same under each reading of the paper; which exponent fits? (Fig. 1d-f)",
    "regret": "What running the predicted q loses on quadratics, hypercleaning and Omniglot.",
    "hypercleaning": "Data hypercleaning (Table 1, Fig. 3).",
    "few_shot": "Few-shot classification (Table 2, Fig. 2).",
    "landscape": "Bias, variance, time and memory of every method; which one for which problem?",
    "performance": "Time and memory of a hypergradient, ours and other libraries'; standard wants a quiet machine.",
}
app = typer.Typer(help="Compare what was predicted with what is measured.", no_args_is_help=True, add_completion=False)


def _command(name: str) -> Callable[..., None]:
    def command(
        size: Size = "quick",
        redraw: Annotated[bool, typer.Option(help="Judge and draw the stored table, measure nothing.")] = False,
        kind: Kind = None,
        jobs: Jobs = None,
        partition: Partition = None,
        minutes: Minutes = None,
        gpus: Gpus = None,
        cell_minutes: CellMinutes = None,
        config: Annotated[Path | None, typer.Option(help="TOML with other values; kept under the file's name.")] = None,
    ) -> None:
        study, results = _study(name, size)
        values = study.SIZES[size]
        if config:
            if config.stem.lower() in study.SIZES:  # a disk may not tell them apart
                raise UfomError(f"{config} is called as the size {config.stem!r} is: give the file another name")
            values, results = read_config(config, values), _folder("results", "quick") / f"{name}-{config.stem}.csv"
        if redraw and not results.is_file():
            raise UfomError(f"{results} is missing: run the study without --redraw first")
        if not redraw:
            _measure(study, values, results, executor(kind, jobs, partition, minutes, gpus, cell_minutes))
        verdicts = study.judge(_table(results))
        _write_verdicts(results, verdicts)
        figure = _draw(study, results)
        _show(verdicts)
        print(f"figure: {figure}   table: {results}")

    return command


for _name, _help in STUDIES.items():
    app.command(_name, help=_help)(_command(_name))


def _filler(retry: bool) -> Callable[..., None]:
    def command(
        name: Annotated[str, typer.Argument(help="A study.")],
        size: Size = "quick",
        kind: Kind = None,
        jobs: Jobs = None,
        partition: Partition = None,
        minutes: Minutes = None,
        gpus: Gpus = None,
        cell_minutes: CellMinutes = None,
    ) -> None:
        study, results = _study(name, size)
        _measure(study, study.SIZES[size], results, executor(kind, jobs, partition, minutes, gpus, cell_minutes), retry)
        print(f"table: {results}")

    return command


app.command("run", help="Run a study's cells that are not done and write its table; judge and draw nothing.")(
    _filler(retry=False)
)
app.command("retry", help="The same, and run the cells again that failed.")(_filler(retry=True))
app.command("status")(commands.status)
app.command("export")(commands.export)


def _study(name: str, size: str) -> tuple[ModuleType, Path]:
    """A study, and where its table of this size is."""
    if name not in STUDIES:
        raise UfomError(f"study {name!r} is unknown: use {', '.join(STUDIES)}")
    study = import_module(f"studies.{name}")
    if size not in study.SIZES:
        raise UfomError(f"size {size!r} is unknown: use {' or '.join(study.SIZES)}")
    return study, _folder("results", size) / f"{name}-{size}.csv"


@app.command("judge")
def judge() -> None:
    """Judge every stored table again; exit status 1 if a verdict comes out other than recorded."""
    changed = False
    for name, path in _stored():
        verdicts = import_module(f"studies.{name}").judge(_table(path))
        recorded = json.loads(path.with_suffix(".verdicts.json").read_text())
        counts = {kind: sum(v.agrees == kind for v in verdicts) for kind in ("yes", "no", "inconclusive")}
        print(f"{path.stem}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
        for verdict in verdicts:
            was = next((v for v in recorded if v["subject"] == verdict.subject), {"agrees": "not recorded"})
            if was["agrees"] != verdict.agrees:
                changed = True
                print(f"  {verdict.subject}: {verdict.agrees}, recorded: {was['agrees']}")
    if changed:
        raise typer.Exit(1)


@app.command("draw")
def draw() -> None:
    """Draw every stored table again."""
    for name, path in _stored():
        print(_draw(import_module(f"studies.{name}"), path))


@app.command("index")
def index() -> None:
    """Write README.md here: each study's question, answer, figure, verdicts, size, device, date and command.

    And docs/which-method.md, the landscape's guide.
    """
    (HERE / "README.md").write_text(_index())
    for name, path in _stored():
        if name == "landscape":
            page = import_module(f"studies.{name}").page(_table(path))
            (HERE.parent / "docs" / "which-method.md").write_text(page)


_STREAMS = (
    "Where the `.json` beside a table has no `streams`, the outer runs of hypercleaning, few_shot and regret drew "
    "tasks and coins from streams with seeds of 32 bits; a new run with the same seeds draws others."
)


def _index() -> str:
    parts = [f"# Studies\n\nWritten by `python -m studies index` from the stored tables. {_STREAMS}\n"]
    for name, path in _stored():
        study, table = import_module(f"studies.{name}"), _table(path)
        run = json.loads(path.with_suffix(".json").read_text())
        verdicts = study.judge(table)
        counts = [f"{sum(v.agrees == kind for v in verdicts)} {kind}" for kind in ("yes", "no", "inconclusive")]
        size = path.stem.removeprefix(f"{name}-")
        made = ", ".join(str(run[key]) for key in ("device", "date") if key in run)
        parts.append(
            f"## {name}\n\n**{study.question}** {study.answer(table)}\n\n![{name}](figures/{path.stem}.png)\n\n"
            f"{(HERE / 'figures' / f'{path.stem}.txt').read_text().strip()}\n\n"
            f"Verdicts: {', '.join(counts)} ([all](results/{path.stem}.verdicts.json)). {size}, {made}, "
            f"{run['seconds'] / 60:.0f} min: `python -m studies {name} --size {size}`\n"
        )
    return "\n".join(parts)


def _stored() -> Iterator[tuple[str, Path]]:
    """The studies that have a committed table, and the largest of each."""
    for name in STUDIES:
        for size in ("paper", "standard"):
            path = HERE / "results" / f"{name}-{size}.csv"
            if path.is_file():
                yield name, path
                break


def _folder(kind: str, size: str) -> Path:
    folder = HERE / kind / ("quick" if size == "quick" else "")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path)


def _measure(study: ModuleType, config: Any, path: Path, runner: Executor | None = None, retry: bool = False) -> None:
    """The table and what is to be known of the run, into `path` and beside it; its stem names the store."""
    keeps = "store" in signature(study.measure).parameters
    if not keeps and (runner or retry):
        name = study.__name__.removeprefix("studies.")
        raise UfomError(f"{name} keeps no cells: run it without --executor, as python -m studies {name}")
    console = Console(stderr=True)
    columns = (TextColumn("measuring"), BarColumn(), TimeRemainingColumn())
    begin = time.perf_counter()
    store = (Store(commands.CELLS / path.stem, runner, retry),) if keeps else ()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        table = study.measure(config, *store, progress=lambda share: bar.update(task, completed=share))
    table.to_csv(path, index=False)
    run = {"streams": "Philox", "seconds": round(time.perf_counter() - begin, 1),
           "date": time.strftime("%Y-%m-%d"), "device": "cpu",
           "machine": platform.machine(), "processor": _processor(), "cores": os.cpu_count()}  # fmt: skip
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "pandas", "torch")}
    path.with_suffix(".json").write_text(_json({"config": asdict(config), **run, "versions": versions}))


def _write_verdicts(path: Path, verdicts: list[Verdict]) -> None:
    path.with_suffix(".verdicts.json").write_text(_json([asdict(v) for v in verdicts]))


def _draw(study: ModuleType, path: Path) -> Path:
    """The figure in all formats and its caption, under figures/ as the table is under results/; the PNG's path."""
    table, figures = _table(path), _folder("figures", path.parent.name)
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with rc_context(SHEET):  # with its hash salt the same table draws the same bytes
        figure = study.draw(table)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # its solver's last digits differ from run to run
        for axes in figure.axes:
            axes.set_position([round(x, 6) for x in axes.get_position().bounds])
        for kind, metadata in undated.items():
            figure.savefig(figures / f"{path.stem}.{kind}", metadata=metadata)
    (figures / f"{path.stem}.txt").write_text(study.caption(table) + "\n")
    return figures / f"{path.stem}.png"


def _processor() -> str:
    """Its name; platform.processor() is empty on Linux."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def _json(value: Any) -> str:
    """JSON, null for nan and ±inf, which it does not know."""

    def known(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: known(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [known(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(known(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _show(verdicts: list[Verdict]) -> None:
    table = Table("claim", "predicted", "measured", "± 95 %", "agrees", box=None, pad_edge=False)
    for v in verdicts:
        table.add_row(v.subject, f"{v.relation} {v.predicted:.4g}", f"{v.measured:.4g}", f"{v.tolerance:.2g}", v.agrees)
    Console().print(table)


def main() -> None:
    """The command line; exit status 2 and one line for a `UfomError`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: processes and jobs end, what is done is kept
    try:
        app()
    except UfomError as error:
        print(f"studies: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
