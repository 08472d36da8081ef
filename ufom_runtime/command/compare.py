"""`ufom compare`: what to run, FOM, UFOM or exact, for one's own outer steps, memory and machine."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ufom_runtime.command.options import HtmlOption, ThetaOption, read_theta, refuse_folder
from ufom_runtime.command.plain import json_text
from ufom_theory.checks import positive, scalar
from ufom_theory.laws import parse_outer

if TYPE_CHECKING:
    from torch import Tensor

    from ufom_runtime.problem import BilevelProblem

_FEWEST, _DOUBLINGS = 64, 4  # tasks that are drawn
_SHOWN = 10  # rows, besides the script, FOM and the exact gradients


def compare_command(
    problem: Annotated[str, typer.Argument(help="A built-in problem, as for measure, or module:object of your own.")],
    outer: Annotated[str, typer.Option(help="Outer steps: adam:1e-3, sgd:0.05, tuned, decay:0.5:1 or paper.")],
    batch: Annotated[int, typer.Option(help="Tasks an outer step.")] = 4,
    memory: Annotated[str | None, typer.Option(help="Bytes that a step may hold, as 50MB or 1GiB; else any.")] = None,
    theta: ThetaOption = None,
    steps: Annotated[int | None, typer.Option(help="Look this many outer steps ahead; else one.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Look this many seconds of the script ahead.")] = None,
    pilot: Annotated[int | None, typer.Option(help="Steps of the pilot run, by which it looks ahead.")] = None,
    tasks: Annotated[
        int | None,
        typer.Option(help="Tasks to measure on, without a finite set; else 64 to 1024, by their time."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the tasks and of the pilot run.")] = 0,
    budget: Annotated[float, typer.Option(help="Seconds for the timing and the pilot run.")] = 40.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, for built-in problems.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tasks run together; 1 for losses that vmap cannot take.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Trace and compile the steps first.")] = False,
    html: HtmlOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what to run, FOM, UFOM or exact, and how much sooner it is.

    Sooner than your script, which is taken to be autograd through the unrolled loop, task after task.
    """
    from ufom_runtime.measure.compare import compare
    from ufom_runtime.problems import load_problem
    from ufom_runtime.training.seeds import seeded

    parse_outer(outer)  # refused before any data are read
    budget = scalar("budget, the seconds of timing,", budget, positive)
    if html is not None:
        refuse_folder(html)
    loaded = load_problem(problem, device)
    at = read_theta(theta, loaded)
    drawn = None
    if loaded.tasks is None:
        n = tasks if tasks is not None else _affordable(loaded, at, seed, budget / 2, chunk, compiled)
        drawn = loaded.sample(n, seeded(seed))
    found = compare(
        loaded, at, drawn, outer, batch, memory, steps=steps, seconds=seconds, pilot=pilot, budget=budget, seed=seed,
        chunk=chunk, compile=compiled,
    )  # fmt: skip
    rows: list[dict[str, Any]] = found.table.to_dict("records")
    if as_json:
        print(json_text({
            "problem": problem, "outer": outer, "best": repr(found.best), "why": found.why, "rows": rows,
            "along": found.along.to_dict("records"),
        }))  # fmt: skip
    else:
        _print(rows, found.along.to_dict("records"), found.why)
    if html is not None:  # last: a file that cannot be written costs no measurement
        from ufom_runtime.command.explorer import write_explorer

        write_explorer(html, problem, found.measured, {"why": found.why, "rows": rows})


def _affordable(
    problem: BilevelProblem, theta: Tensor, seed: int, seconds: float, chunk: int | None, compiled: bool
) -> int:
    """How many tasks to draw: the power of two from 64 to 1,024 whose moments take about `seconds` of CPU time.

    It is chosen by the time of 64 tasks, and not by what they say, so the intervals are those of a fixed number.
    """
    from ufom_runtime.measure.moments import measure_moments
    from ufom_runtime.training.seeds import seeded

    first, drawn = theta if theta.ndim == 1 else theta[0], problem.sample(_FEWEST, seeded(seed))
    for _ in range(2):  # what is found out at first use does not count
        begin = time.process_time()
        measure_moments(problem, first, drawn, chunk=chunk, compile=compiled)
    doublings = math.log2(seconds / max(time.process_time() - begin, 1e-6))
    return int(_FEWEST * 2 ** min(max(math.floor(doublings), 0), _DOUBLINGS))


def _print(rows: list[dict[str, Any]], along: list[dict[str, Any]], why: str) -> None:
    from ufom_runtime.command.printing import print_bold, print_table, show

    def cells(row: dict[str, Any]) -> list[str]:
        method = "FOM→" + row["method"].split()[-1] if " " in row["method"] else row["method"]
        mixed, predicted = row["method"].endswith("UFOM"), row["clock"] != "timed"
        sweep = row["sweep"].replace("checkpointed", "slots").replace("recomputed", "recomp.")
        proxy, coin = row["proxy"].replace("FOM", "0"), row["coin"].replace("stratified", "strat.")
        if proxy.count("-") > 2:  # a roulette's levels
            proxy = f"{proxy.split('-')[0]}…{proxy.split('-')[-1]}"
        ratios = [_short(row[name]) for name in ("steps_over_exact", "time_over_plain", "low", "high")]
        return [
            method, f"{row['q']:g}" * mixed, proxy, coin, sweep, "~" * predicted + _short(row["ms"], 3),
            _size(row["bytes"]), *ratios[:2], "-".join(ratios[2:]),
        ]  # fmt: skip

    kept = [row for i, row in enumerate(rows) if i < _SHOWN or row["method"] in ("script", "FOM", "exact")]
    headings = ["method", "q", "K", "coin", "sweep", "ms", "bytes", "steps", "time", "95 %"]
    print_table(headings, map(cells, kept), left=("method", "coin", "sweep"))
    legend = (
        "ms: of an outer step, ~ predicted; steps: over exact's for the same progress; time: over that of the script, "
        "autograd through the unrolled loop, task after task; 0.5·K: the proxy is scaled; 0…K: levels of a roulette"
    )
    if len(kept) < len(rows):
        legend = f"{len(rows) - len(kept)} more rows, slower than those shown: --json and --html have all. {legend}"
    if len(along) > 1:
        shown = [[str(row["step"]), *(_short(x, 3) for name, x in row.items() if name != "step")] for row in along]
        print_table(["step", "D²", "V²", "D²/V²", "‖∇M‖²", "cosine", "c*"], shown, title="FOM along the run")
    show(legend, style="dim", soft_wrap=True)
    show()
    print_bold(why.replace("[", r"\["))


def _short(x: float, digits: int = 2) -> str:
    if math.isnan(x):
        return "?"
    return "∞" if math.isinf(x) else f"{x:.{digits}g}" if x < 10**digits else f"{x:.0f}"


def _size(count: int) -> str:
    """Bytes in three digits and a unit."""
    units = ("B", "kB", "MB", "GB")
    power = min(max(len(str(count)) - 1, 0) // 3, 3)
    return f"{count / 1000**power:.3g}{units[power]}"
