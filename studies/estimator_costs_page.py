"""The page of the site that shows what `studies.estimator_costs` stored: `python -m studies.estimator_costs_page`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studies.shared.drawing import markdown_rows
from ufom_theory.checks import bytes_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results" / "estimator_costs"
PAGE = ROOT / "docs" / "costs.md"
ABOUT = (
    "Written by `python -m studies.estimator_costs_page` from what `python -m studies.estimator_costs` stored. "
    "Times are CPU milliseconds of one thread, medians, on a machine of two cores (the forecasts: a busy one): they "
    "are good for ratios."
)
Row = dict[str, Any]


def stored(part: str) -> list[Row]:
    """The rows of one part; none where it was not run."""
    path = RESULTS / f"{part}.json"
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return rows


def _versions(rows: list[Row]) -> str:
    names = [name for name in rows[0] if name not in ("version", "tasks")]
    cells = [[name, *(f"{row[name]:.3g}" for n in (1, 16, 64) for row in rows if row["tasks"] == n)] for name in names]
    heads = [f"{row['version']}, {n}" for n in (1, 16, 64) for row in rows if row["tasks"] == n]
    return (
        "Digits MAML with a 64-32-5 net and r = 10, milliseconds a call on 1, 16 and 64 tasks. *Before* is the version "
        "in which the corrected tasks of a batch went forward apart from the others. The versions took turns, five of "
        "six rounds each; FOM and the exact gradient, which are not concerned, became up to a tenth slower.\n\n"
        + markdown_rows(["estimator", *heads], cells)
    )


def _batch(rows: list[Row]) -> str:
    cells = [[str(x["tasks"]), x["sweep"], f"{x['over one pass']:.2f}", f"{x['over two calls']:.2f}"] for x in rows]
    said = (
        "A quarter of the tasks is corrected. The time over that of FOM on all tasks and the backward sweep of the "
        "corrected ones alone; and over that of two calls, FOM on the others and the exact gradient of these. (The "
        "unrolled sweep goes forward apart for the corrected tasks, since its graph would hold every row: it is two "
        "calls.)"
    )
    return f"{said}\n\n{markdown_rows(['tasks', 'sweep', 'over one pass', 'over two calls'], cells)}"


def _forecast(rows: list[Row]) -> str:
    told = [x for x in rows if "refused" not in x]
    bad = [x for x in told if abs(x["time"] - 1) > 0.15 or abs(x["memory"] - 1) > 0.1]
    in_time = sum(abs(x["time"] - 1) <= 0.15 for x in told) / len(told)
    in_bytes = sum(abs(x["memory"] - 1) <= 0.1 for x in told) / len(told)
    said = (
        f"{len(rows)} of 120 calls were foreseen and measured: {len({x['problem'] for x in rows})} problems, "
        f"{len({x['estimator'] for x in rows})} estimators, up to {max(x['tasks'] for x in rows)} tasks. The time is "
        f"within 15 % in {in_time:.0%} of them, the bytes within 10 % in {in_bytes:.0%}"
    )
    refused = len(rows) - len(told)
    said += f"; {refused} were refused as unsure." if refused else "."
    if not bad:
        return said
    cells = [
        [x["problem"], x["estimator"], str(x["tasks"]), f"{x['ms']:.3g}", f"{x['measured ms']:.3g}",
         bytes_text(x["bytes"]), bytes_text(x["measured bytes"])] for x in bad
    ]  # fmt: skip
    heads = ["problem", "estimator", "tasks", "ms foreseen", "measured", "bytes foreseen", "measured"]
    return said + " The others:\n\n" + markdown_rows(heads, cells)


def _plan(rows: list[Row]) -> str:
    def line(x: Row) -> list[str]:
        if "refused" in x:
            return [x["problem"], x["memory"], "nothing fits", "", "", ""]
        q = ", ".join(f"{value:.2g}" for value in (x["q"] if isinstance(x["q"], list) else [x["q"]]))
        times = "; ".join(f"{float(f'{ms:.3g}'):g}" for ms in (x["ms"], x["measured ms"]))
        return [
            x["problem"], x["memory"], x["choice"], q, times,
            f"{bytes_text(x['bytes'])}; {bytes_text(x['measured bytes'])}",
        ]  # fmt: skip

    heads = ["problem", "memory", "choice", "q", "ms foreseen; measured", "bytes foreseen; measured"]
    return (
        "What `plan_estimators(..., outer=\"tuned\")` chooses: of hypercleaning on its one task, of the others on a "
        "batch.\n\n" + markdown_rows(heads, map(line, rows))
    )  # fmt: skip


def _compiled(rows: list[Row]) -> str:
    cells = [[x["way"], f"{x['ms']:.3g}", f"{x['first call, s']:.3g}" if x["first call, s"] else ""] for x in rows]
    return (
        "On a CPU compiled steps take one task at a time unless `chunk` is given, since every number of rows is "
        "compiled anew: with UFOM and `chunk=B` the powers of two up to B. First calls are without a cache, on two "
        "idle cores; the first of the table also loads torch's compiler, which takes 3 to 5 CPU seconds. Then the C++ "
        "compiler builds two files at the same time, in 5 to 7 s each, 5 of them to read torch's headers: one half of "
        "the inner step, and the other half with the outer step. A later process finds them in the cache, and spends "
        "most of its first call, 4.5 to 6 s, on loading torch's compiler.\n\n"
        + markdown_rows(["16 tasks, exact gradient", "ms", "first call, s"], cells)
    )


PARTS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "table": ("One forward pass", _versions),
    "batch": ("A batch over its parts", _batch),
    "compiled": ("Compiled steps", _compiled),
    "forecast": ("Forecasts", _forecast),
    "plan": ("Plans", _plan),
}


def page() -> str:
    """The page, from what is stored."""
    said = [
        "# What estimators cost, foreseen and measured",
        ABOUT,
    ]
    for part, (title, shown) in PARTS.items():
        if rows := stored(part):
            said += [f"## {title}", shown(rows)]
    said.append("Next: [time and memory](time-and-memory.md), [choose a sweep](choose-a-sweep.md).")
    return "\n\n".join(said) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
