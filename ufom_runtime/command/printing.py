"""What the commands print: tables and sentences for a terminal or a pipe, and how far a long job is."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ufom_theory.checks import bytes_text

_STATUS_COLOURS = {"proved": "green", "refuted": "red", "loose": "yellow", "not established": "dim"}


_MINUTE = 60.0


def console(stderr: bool = False) -> Console:
    """A console that colours nothing by itself."""
    return Console(stderr=stderr, highlight=False)


def show(what: RenderableType = "", **options: Any) -> None:
    """Print on stdout; a pipe or a file gets no blanks at the ends of lines."""
    out = console()
    if out.is_terminal:
        out.print(what, **options)
        return
    with out.capture() as captured:
        out.print(what, **options)
    print("\n".join(line.rstrip() for line in captured.get().removesuffix("\n").split("\n")))


@contextmanager
def progress(what: str, hidden: bool = False) -> Iterator[Callable[[float], object]]:
    """A function of the share that is done, which shows it on stderr: a bar in a terminal, else a line a minute."""
    shown = console(stderr=True)
    if hidden or shown.is_terminal:
        columns = (TextColumn(what), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=shown, transient=True, disable=hidden) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda share: bar.update(task, completed=share)
        return
    begun = said = time.monotonic()

    def say(share: float) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _MINUTE:
            said = now
            print(f"{what}: {share:.0%} after {(now - begun) / _MINUTE:.0f} min", file=sys.stderr, flush=True)

    yield say


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str] = (), title: str = ""
) -> None:
    """A table without lines; columns are right-aligned but for those named in `left`, which alone may wrap if last."""
    table = Table(title=f"\n{title}" if title else None, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        wraps = heading in left and heading == headings[-1]
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=not wraps)
    for row in rows:
        table.add_row(*row)
    show(table)


def print_pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, a line each."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    show(table)


def print_bold(text: str) -> None:
    """The answer, in words."""
    show(f"[bold]{text}[/bold]", soft_wrap=True)


def print_prediction(report: dict[str, Any]) -> None:
    """`ufom q`."""
    low, high = report["interval"]
    rows = [
        ("q*", f"{report['q']:.10g}"),
        *[("95 % interval", f"{low:.4g} … {high:.4g}")] * (high > low),
        ("speed-up over exact (q = 1)", f"{report['speedup_over_exact']:.4g}×"),
        ("cost of a step, FOM's = 1", f"{report['cost_over_fom']:.4g}"),
        ("condition (20)", "holds" if report["condition_20"] else "fails"),
        ("pays", report["pays"]),
        ("C_det, C_rnd", f"{report['c_det']:g}, {report['c_rnd']:g}  ({report['sweep']}, K = {report['proxy']})"),
        ("exponent m", f"{report['m']:.3g}" + (f": {report['law']}" if report["law"] else "")),
    ]
    rows += [(key, f"{report[key]:.10g}") for key in ("D_tight", "D_printed_15", "V_bound", "L_M") if key in report]
    print_pairs(rows)
    print_bold(report["why"])


def print_measurement(name: str, report: dict[str, Any]) -> None:
    """`ufom measure`."""
    averaged = f"exact sums over {report['tasks']} task(s)" if report["finite_tasks"] else f"{report['tasks']} tasks"
    sizes = f"s = {report['s']}, p = {report['p']}, r = {report['r']}"
    show(f"{name}: {sizes}; {averaged}, {report['thetas']} θ, {report['device']}", soft_wrap=True)
    print_pairs(
        [
            ("bias D²", f"{report['d2']:.5g} ± {report['d2_sem']:.2g}"),
            ("second moment V²", f"{report['v2']:.5g} ± {report['v2_sem']:.2g}"),
            ("‖∇M‖²", f"{report['mean_gradient_sq']:.5g}"),
            ("squared bias ‖E(G_FO − G)‖²", f"{report['bias_sq']:.4g} ± {report['bias_sq_sem']:.2g}"),
            ("cosine of FOM to the gradient", "undefined" if report["cosine"] is None else f"{report['cosine']:.4f}"),
            ("C1, a gradient", f"{1e3 * report['c1']:.4g} ± {1e3 * report['c1_sem']:.1g} ms"),
            ("C2, a Hessian-vector product", f"{1e3 * report['c2']:.4g} ± {1e3 * report['c2_sem']:.1g} ms"),
        ]
    )
    _print_predictions("FOM debiased, by sweep", ["sweep"], report["by_sweep"])
    _print_predictions("The recomputed sweep, by the length K of the proxy", ["K"], report["by_proxy"])
    _print_predictions(
        "The best proxy and sweep, by the inner states held",
        ["states", "K", "sweep"],
        report["by_memory"],
    )
    if report["bounds"]:
        rows = (
            [r["quantity"], *(_number(r[key]) for key in ("bound", "estimate", "observed"))] for r in report["bounds"]
        )
        title = "By Assumption 1 (known constants, estimated)"
        print_table(["quantity", "bound", "estimate", "observed"], rows, left=("quantity",), title=title)
    legend = (
        "cost: of one call, over FOM's; time: to a given precision, over that of q = 1 with the recomputed sweep; "
        "?: cannot tell"
    )
    show(legend, style="dim", soft_wrap=True)
    show()
    print_bold(report["why"])


def _print_predictions(title: str, keys: list[str], rows: list[dict[str, Any]]) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        low, high = row["interval"]
        return [
            *(str(row["proxy" if key == "K" else key]) for key in keys),
            f"{row['rho']:.3g}", f"{row['q']:.3g}", f"[{low:.3g}, {high:.3g}]", row["pays"].replace("cannot tell", "?"),
            f"{row['cost_over_fom']:.3g}", f"{row['relative_time']:.3g}",
        ]  # fmt: skip

    headings = [*keys, "D²/V²", "q*", "95 % interval", "pays", "cost", "time"]
    print_table(headings, map(cells, rows), left=("sweep", "pays"), title=title)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.5g}"


def print_plan(rows: list[dict[str, Any]]) -> None:
    """`ufom plan`: counted, in states or bytes; or measured, with the time of a step."""

    def cells(row: dict[str, Any]) -> list[str]:
        q = ", ".join(f"{x:.3g}" for x in (row["q"] if isinstance(row["q"], tuple | list) else [row["q"]]))
        ms = [f"{row['ms']:.3g}"] if "ms" in row else []
        return [f"{row['slower']:.4g}", q, *ms, bytes_text(row["bytes"]), row["label"]]

    headings = ["time, best = 1", "q*", *["ms"] * ("ms" in rows[0]), "held", "run"]
    print_table(headings, map(cells, rows), left=("run",))
    print_bold(rows[0]["why"])


def print_claims(found: Sequence[tuple[Any, str]]) -> None:
    """`ufom claims`: each claim with the status that was found, and the recorded one where it differs; its statement
    below."""
    for claim, status in found:
        shown = status if status == claim.status else f"{status}, recorded as {claim.status}"
        colour = _STATUS_COLOURS.get(status, "cyan")
        equation = "" if claim.equation == "ours" else f"  {claim.equation}"
        show(f"[bold]{claim.id}[/bold]{equation}  [{colour}]{shown}[/{colour}]")
        show(Padding(claim.statement.replace("[", r"\["), (0, 0, 0, 2)))
    show("\n" + ", ".join(f"{n} {status}" for status, n in Counter(status for _, status in found).items()))
