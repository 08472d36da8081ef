"""`python -m studies NAME --size SIZE`: measure, judge and draw, with the table, verdicts and figure written down.

`judge` and `draw` do their part again for every stored table, and `index` writes README.md; they measure nothing.
`run` and `retry` measure only, as on a cluster; `status` and `export` show the cells that a sweep has left.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from studies.engine import commands
from studies.engine.commands import CellMinutes, Gpus, Jobs, Kind, Minutes, Partition, Size
from studies.engine.executors import DAY, Executor, executor
from studies.engine.local import Local
from studies.engine.results import Results
from studies.engine.study import Study
from studies.engine.sweep import Store
from studies.shared.verdicts import Verdict
from ufom_runtime.command.printing import progress
from ufom_runtime.files import write_whole
from ufom_theory import UfomError

HERE = Path(__file__).parent
STUDIES = {  # a line for --help, which spares importing them all
    "divergence": "Does FOM stall where Theorem 2 says? Figures 1a to 1c",
    "optimal_q": "Is the predicted q as fast as the best q of a grid?",
    "readings": "Which reading of the optimal q does experiment support?",
    "regret": "Is what compare says the quickest, and its rule too?",
    "table_1": "Does UFOM pay in hypercleaning, however states are kept?",
    "table_2": "Does UFOM pay in few-shot learning, to convergence?",
    "landscape": "Every method's bias, variance, time and memory.",
    "performance": "Time and memory beside other libraries, on a quiet machine.",
    "gpu": "Time and memory on a GPU, by make gpu.",
    "sinusoid": "Sinusoid regression by MAML: exact, FOM, UFOM, the rules.",
    "template": "A study to copy: does averaging divide the variance?",
}
INTRODUCTION = "# Studies\n\nWritten by `python -m studies index` from the stored tables.\n"
app = typer.Typer(
    help="Compare what was predicted with what is measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
        partial: Annotated[bool, typer.Option(help="Run nothing: take the cells that are done.")] = False,
        config: Annotated[Path | None, typer.Option(help="TOML with other values; kept under the file's name.")] = None,
    ) -> None:
        study = load(name)
        values, results = _sized(study, name, size)
        if config:
            from studies.engine.configuration import read_config

            if config.stem.lower() in study.sizes:  # a disk may not tell them apart
                raise UfomError(f"{config} is called as the size {config.stem!r} is: give the file another name")
            values, results = read_config(config, values), _results(name, config.stem, "quick")
            results.refuse_another(values)
        if not redraw:
            runner = executor(kind, jobs, partition, minutes, gpus, cell_minutes)
            _measure(name, values, results, runner, partial=partial)
        table, values = results.read(study)
        verdicts = study.judge(table, values)
        results.write_verdicts(verdicts)
        figure = results.draw(study, table, values)
        _show(verdicts)
        print(f"figure: {figure}   table: {results.path}")

    return command


class _Explained(typer.core.TyperCommand):
    """A study's command; its help ends with the keys that `--config` may set."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The keys, and what they are at the size quick."""
        from studies.engine.configuration import keys

        with formatter.section("Keys of --config FILE.toml, as they are at the size quick"):
            for line in keys(load(str(self.name)).sizes["quick"]):
                formatter.write_text(line)


for _name, _help in STUDIES.items():
    app.command(_name, help=_help, cls=_Explained)(_command(_name))


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
        config, results = _sized(load(name), name, size)
        _measure(name, config, results, executor(kind, jobs, partition, minutes, gpus, cell_minutes), retry)
        print(f"table: {results.path}")

    return command


app.command("run", help="Run a study's cells that are not done, and write its table.")(_filler(retry=False))
app.command("retry", help="The same, and run the cells again that failed.")(_filler(retry=True))
app.command("status")(commands.status)
app.command("export")(commands.export)


def load(name: str) -> Study[Any]:
    """A study by its name."""
    if name not in STUDIES:
        raise UfomError(f"study {name!r} is unknown: use {', '.join(STUDIES)}")
    study: Study[Any] = import_module(f"studies.{name}").study
    return study


def _sized(study: Study[Any], name: str, size: str) -> tuple[Any, Results]:
    """A size's configuration, and where its results are."""
    if size not in study.sizes:
        raise UfomError(f"size {size!r} is unknown: use {' or '.join(study.sizes)}")
    return study.sizes[size], _results(name, size, size)


def _results(name: str, called: str, size: str) -> Results:
    return Results(HERE / "results" / ("quick" if size == "quick" else "") / f"{name}-{called}.csv")


@app.command("judge")
def judge() -> None:
    """Judge every stored table again.

    The exit status is 1 if a verdict comes out other than recorded.
    """
    changed = False
    for study, results in _stored():
        verdicts = study.judge(*results.read(study))
        recorded = {v["subject"]: v["agrees"] for v in results.verdicts()}
        print(f"{results.path.stem}: {_counts(verdicts)}")
        for verdict in verdicts:
            was = recorded.pop(verdict.subject, "not recorded")
            if was != verdict.agrees:
                changed = True
                print(f"  {verdict.subject}: {verdict.agrees}, recorded: {was}")
        for subject, was in recorded.items():
            changed = True
            print(f"  {subject}: judged no more, recorded: {was}")
    if changed:
        raise typer.Exit(1)


@app.command("draw")
def draw() -> None:
    """Draw every stored table again."""
    for study, results in _stored():
        print(results.draw(study, *results.read(study)))


@app.command("index")
def index() -> None:
    """Write README.md here, and two pages of the site.

    README.md has each study's question, answer, figure, tables, verdicts, size, device, date and command,
    docs/results.md the same without the tables, docs/which-method.md the landscape's guide.
    """
    from studies import landscape

    write_whole(HERE / "README.md", _index().encode())
    write_whole(HERE.parent / "docs" / "results.md", _results_page().encode())
    for study, results in _stored():
        if study is landscape.study:
            page = landscape.page(results.read(study)[0])
            write_whole(HERE.parent / "docs" / "which-method.md", page.encode())


def _index() -> str:
    parts = [INTRODUCTION]
    for study, results in _stored():
        (table, config), run, stem = results.read(study), results.run(), results.path.stem
        name, _, size = stem.rpartition("-")
        made = ", ".join(str(run[key]) for key in ("device", "date") if key in run)
        # a table that was put together from cells of an older version has their time nowhere
        took = f"{run['seconds'] / 60:.0f} min" if run["seconds"] >= 60 else "its time was not kept"
        caption = (results.figures / f"{stem}.txt").read_text().strip()
        parts.append(
            f"## {_title(name, size)}\n\n**{study.question}** {study.answer(table, config)}\n\n"
            f"![{name}](figures/{stem}.png)\n\n"
            f"{caption}\n\nVerdicts: {_counts(study.judge(table, config))} ([all](results/{stem}.verdicts.json)). "
            f"{size}, {made}, {took}: `python -m studies {name} --size {size}`\n"
        )
    return "\n".join([*parts, *_not_run()])


def _title(name: str, size: str) -> str:
    return {"standard": name, "paper": f"{name} at the paper's size"}.get(size, f"{name}, {size}")


def _not_run() -> Iterator[str]:
    """A line for each size that has no stored table, but for those that are quick and the study to copy."""
    for name in STUDIES:
        for size in load(name).sizes:
            if name != "template" and size != "quick" and not _results(name, size, size).path.is_file():
                yield f"Not yet run: `python -m studies {name} --size {size}`. {load(name).question}\n"


def _results_page() -> str:
    """The page of the site: answers, figures and verdicts; tables are files."""
    head = (
        "# Results\n\nEach study asks one question; its verdicts say yes, no, or that the data cannot tell. This page "
        "was written from stored tables by `python -m studies index`; the commands make them anew, in a checkout.\n"
    )
    parts = [head]
    for study, results in _stored():
        (table, config), stem = results.read(study), results.path.stem
        name, _, size = stem.rpartition("-")
        parts.append(
            f"## {_title(name, size)}\n\n**{study.question}** {study.answer(table, config)}\n\n"
            f"![{name}](../studies/figures/{stem}.png)\n\n{_counts(study.judge(table, config))}: "
            f"{{download}}`verdicts <../studies/results/{stem}.verdicts.json>`, "
            f"{{download}}`table <../studies/results/{stem}.csv>`, "
            f"{{download}}`caption and tables <../studies/figures/{stem}.txt>`; "
            f"`python -m studies {name} --size {size}`\n"
        )
    return "\n".join(parts)


def _counts(verdicts: list[Verdict]) -> str:
    return ", ".join(f"{sum(v.agrees == kind for v in verdicts)} {kind}" for kind in ("yes", "no", "inconclusive"))


def _stored() -> Iterator[tuple[Study[Any], Results]]:
    """The studies that have a committed table, at each size."""
    for name in STUDIES:
        for size in load(name).sizes:
            results = _results(name, size, size)
            if size != "quick" and results.path.is_file():
                yield load(name), results


def _measure(
    name: str, config: Any, results: Results, runner: Executor | None, retry: bool = False, partial: bool = False
) -> None:
    """The table and what is to be known of the run; the stem of the results names the store of the cells."""
    study = load(name)
    if not study.jobs and (runner or retry or partial):
        raise UfomError(f"{name} keeps no cells: run it without --executor and --partial, as python -m studies {name}")
    begin = time.perf_counter()
    store = Store(commands.CELLS / results.path.stem, runner or Local(study.jobs or 1, seconds=DAY), retry, partial)
    with progress("measuring") as done:
        table = study.measure(config, store, done)
    results.write(table, config, max(time.perf_counter() - begin, store.seconds()))


def _show(verdicts: list[Verdict]) -> None:
    for v in verdicts:
        print(
            f"{v.agrees}: {v.subject}: {v.measured:.4g} ± {v.tolerance:.2g}, predicted {v.relation} {v.predicted:.4g}"
        )


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
