"""What `landscape` says of its table: the figure, the tables in its caption, and the guide "which method for which"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.landscape_problems import BACKWARD, IMPLICIT, PLANNED, memory
from studies.shared.drawing import SIZE, markdown, new_figure
from ufom_runtime.command.style import GREY, LOOKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOK = {"exact": "exact", "unbiased": "UFOM", "biased": "FOM", "other objective": "evolution"}  # by kind, in LOOKS
SHOWN = 100  # r of the figure's panels, or the longest below it
WINS = 1.1  # a gain smaller than this factor is none
NAMES = {PLANNED: "planned UFOM", IMPLICIT: "UFOM on implicit", BACKWARD: "backward roulette"}


def draw(table: pd.DataFrame) -> Figure:
    """A panel a problem, a row a method, the quickest at the top: its effort by calls and by seconds."""
    panels = list(_panels(table))
    tall = len(panels) // 2 + 1
    figure = new_figure(3.3 * tall)
    several = figure.subplots(tall, 2, squeeze=False, sharex=True).ravel()
    for axes, (name, r, rows) in zip(several, panels, strict=False):
        _rows(axes, rows)
        axes.set(title=f"{name}, r = {r}", xlabel="effort over exact with all states")
        axes.tick_params(labelbottom=True)
    for axes in several[len(panels) :]:
        axes.axis("off")
    _legend(several[len(panels)])
    return figure


def _panels(table: pd.DataFrame) -> Iterator[tuple[str, int, pd.DataFrame]]:
    ran = _ran(table)
    for name, rows in ran[ran.effort.notna()].groupby("name", sort=False):
        r = int(rows.r[rows.r <= SHOWN].max())
        rows = rows[rows.r == r]
        unsure = _undecided(rows)
        yield str(name), r, rows.iloc[np.lexsort((rows.states, rows.bias_sq, rows.effort.mask(unsure, np.inf), unsure))]


def _undecided(rows: Any) -> Any:
    """A sampled method of which it is not known whether, or when, it gets there: its errors are too large."""
    unsure = (rows.effort == np.inf) & (rows.bias_sq < 2 * rows.bias_sq_sem)
    return unsure | (rows.effort < np.inf) & (rows.effort_sem > rows.effort)


def _rows(axes: Axes, rows: pd.DataFrame) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    names = []
    for at, row in enumerate(rows.itertuples()):
        color = LOOKS[LOOK[row.kind]]["color"]
        names.append(f"{NAMES.get(row.method, row.method)}, {row.states:.0f}")
        unsure = _undecided(row)
        if row.effort < np.inf and not unsure:
            axes.plot([row.effort, row.effort_seconds], [at, at], color=color, lw=0.8)
            axes.plot(row.effort_seconds, at, "o", mfc="white", mew=1, color=color, ms=5)
            axes.plot(row.effort, at, "o", color=color, ms=5)
        else:
            said = "too noisy to tell" if unsure else f"never: off by {_percent(row.bias_sq)}"
            axes.annotate(
                said, (1, at), xycoords=("axes fraction", "data"), xytext=(-3, 0), textcoords="offset points",
                ha="right", va="center", color=color, fontsize=SIZE,
            )  # fmt: skip
    axes.axvline(1, color=GREY, lw=1, zorder=0)
    axes.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), names, fontsize=SIZE)
    for label, kind in zip(axes.get_yticklabels(), rows.kind, strict=True):
        label.set_color(LOOKS[LOOK[kind]]["color"])
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", length=0)


def _legend(axes: Axes) -> None:
    from matplotlib.lines import Line2D

    dot: dict[str, Any] = {"marker": "o", "ls": "", "ms": 5}
    handles = [Line2D([], [], color=LOOKS[look]["color"], label=kind, **dot) for kind, look in LOOK.items()]
    handles += [
        Line2D([], [], color=GREY, label="counted in function calls", **dot),
        Line2D([], [], color=GREY, mfc="white", mew=1, label="in CPU seconds, one thread", **dot),
        Line2D([], [], color=GREY, lw=1, label="exact, all states stored"),
    ]
    axes.legend(
        handles=handles, loc="center", labelspacing=0.9, alignment="left",
        title="What a gradient with 10 % error costs.\nLeft of the line: less than the exact one.\n"
        "After each name: inner states held.",
    )  # fmt: skip


def _ran(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table.part == "method") & table.refused.isna()].astype({"r": int})


def _methods(rows: pd.DataFrame) -> pd.DataFrame:
    """The table of one problem and r, as strings."""
    shown = {}
    for row in rows.itertuples():
        if isinstance(row.refused, str):
            shown[row.method] = {"kind": row.kind, "bias": row.refused.replace("|", "¦")}
            continue
        shown[row.method] = {
            "kind": row.kind,
            "bias": _bias(row.bias_sq, row.bias_sq_sem),
            "variance": _number(row.variance, row.variance_sem),
            "own": _number(row.own, row.own_sem),
            "q": _number(row.q, 0.0),
            "calls": f"{row.calls:.5g}",
            "states": f"{row.states:.0f}",
            "kB": _number(row.bytes / 1000, 0.0),
            "ms": _number(1000 * row.seconds, 1000 * row.seconds_sem),
            "effort": _number(row.effort, row.effort_sem),
            "by seconds": _number(row.effort_seconds, 0.0),
            "tail": _number(row.tail, 0.0),
        }
    return pd.DataFrame.from_dict(shown, orient="index").fillna("").rename_axis("method")


def _bias(square: float, sem: float) -> str:
    """The root of a squared bias; where that is within two standard errors of zero, a bound."""
    if square != square:
        return "–"
    if sem > 0 and square < 2 * sem:
        return f"< {(max(square, 0.0) + 2 * sem) ** 0.5:.2g}"
    bias = max(square, 0.0) ** 0.5
    return f"{bias:.2g}" + (f" ± {sem / (2 * bias):.1g}" if sem > 0 else "")


def _number(value: float, sem: float) -> str:
    if not value < np.inf:
        return "never" if value == np.inf else "–"
    return f"{0.0 if abs(value) < 1e-12 else value:.3g}" + (f" ± {sem:.1g}" if sem > 0 else "")


def _family(table: pd.DataFrame) -> pd.DataFrame:
    shown = {}
    for row in table[table.part == "family"].itertuples():
        shown[f"{row.name}, r = {row.r:.0f}, {row.memory:.0f} states"] = {
            "K": f"{row.proxy:.0f}", "sweep": row.sweep, "q": f"{row.q:.3g}",
            "over the paper's UFOM": f"{row.gain_paper:.3g}×", "over exact": f"{row.gain_exact:.3g}×",
        }  # fmt: skip
    return pd.DataFrame.from_dict(shown, orient="index").rename_axis("problem and memory")


def guide(table: pd.DataFrame) -> str:
    """Which method for which problem, a row a problem and r, each with its effort; Markdown."""
    shown = {
        f"{name}, r = {r}": dict(zip(COLUMNS, _cells(r, rows), strict=True))
        for (name, r), rows in _ran(table).groupby(["name", "r"], sort=False)
    }
    return markdown(pd.DataFrame.from_dict(shown, orient="index").rename_axis("problem"))


COLUMNS = ("all r states fit", "about √r states fit", "one state fits", "a biased method")


def _cells(r: int, rows: pd.DataFrame) -> list[str]:
    """The unbiased method of the least effort that holds r, about √r and one state; and the biased one, any number."""
    true, biased = rows[rows.kind.isin(("exact", "unbiased"))], rows[(rows.kind == "biased") & rows.effort.notna()]
    best = [_best(true[true.states <= most]) for most in (r, memory(r), 1)]
    return [*best, f"{_best(biased)} (FOM is off by {_percent(rows[rows.method == 'fom'].bias_sq.iloc[0])})"]


def _best(rows: pd.DataFrame) -> str:
    """The method of the least effort; of those that tie, the one of the fewest states."""
    if not len(rows):
        return "none"
    best = _quickest(rows)
    return "never" if best.effort == np.inf else f"{NAMES.get(best.method, best.method)}, {best.effort:.3g}×"


def _quickest(rows: pd.DataFrame) -> pd.Series:
    return rows[rows.effort <= rows.effort.min() * (1 + 1e-6)].sort_values("states", kind="stable").iloc[0]


def _percent(bias_sq: float) -> str:
    percent = 100 * max(bias_sq, 0.0) ** 0.5
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def page(table: pd.DataFrame) -> str:
    """A page of the documentation, one screen: the quickest method on each problem, by the memory."""
    shown = {}
    for name, problem in _ran(table).groupby("name", sort=False):
        lengths = [(int(r), rows) for r, rows in problem.groupby("r")]
        cells = zip(*(_cells(r, rows) for r, rows in lengths), strict=True)
        shown[name] = {"r": "; ".join(f"{r}" for r, _ in lengths)} | dict(
            zip(COLUMNS, map("; ".join, cells), strict=True)
        )
    return (
        "# Which method for which problem\n\n"
        "For your own problem, ask [`compare`](start.md#from-a-script-to-a-decision); "
        f"it times and measures what is there. Here are {len(shown)} problems that were measured: what it costs to "
        "know ∇M to 10 %, in function calls, over the exact gradient with all r states. An estimate is averaged over N "
        "tasks and coins until its variance over N and its squared bias come to 0.01·‖∇M‖². The first three columns "
        "name the *unbiased* method of the least effort that fits the memory.\n\n"
        f"{markdown(pd.DataFrame.from_dict(shown, orient='index').rename_axis('problem'))}\n\n"
        "- *stored*, *recomputed* and *checkpointed-root* are exact, by three [sweeps](choose-a-sweep.md).\n"
        "- *ufom* is the paper's; *planned UFOM* has the proxy, sweep and q that [`plan`](choose-a-sweep.md) chooses. "
        "*backward roulette* draws how many backward steps a task takes.\n"
        "- *roulette* and *single-sample* cut the loop at random lengths, and hold r states when it is run whole.\n"
        "- Hypercleaning has one task: its exact gradient has no noise, so that no coin can pay (q = 1).\n"
        "- A biased method may still be the best to begin with: [one step of your own run]"
        "(understand.md#one-step-of-your-own-run).\n\n"
        "[Methods](methods.md) has every name, its cost and when it is valid; [the results](results.md) the table. "
        "`python -m studies index` wrote this page from the stored table of the study `landscape`.\n"
    )


_READING = (
    "Effort is what it costs to know ∇M to 10 %: N·calls, N = max(1, variance/(η − bias²)), η = 0.01, over that of the "
    "exact gradient with all states stored; a method whose bias² is above η never gets there. The first three columns "
    "name the *unbiased* method of the least effort that holds no more than these states; the last one the biased "
    "method of the least effort. q, K, slots and the probabilities of roulettes and the single sample are the best by "
    "variances measured there, which is not charged; on one task the exact gradient has no noise, and q is 1. The "
    "telescopes (roulette, single-sample) rarely run the whole loop, but hold r states when they do. Forward "
    "differentiation holds as many vectors as θ has parameters, and evolution strategies and implicit differentiation "
    "none."
)


def caption(table: pd.DataFrame) -> str:
    """What the figure shows, the guide, the whole table, and the debiased family within a memory."""
    skipped = "".join(f" {row.name}, r = {row.r:.0f} was left out: {row.skipped}." for row in _skipped(table))
    methods = table[table.part == "method"]
    tables = "\n\n".join(
        f"{name}, r = {r:.0f} (s = {rows.s.iloc[0]:.0f}, {rows.tasks.iloc[0]:.0f} tasks)\n\n{markdown(_methods(rows))}"
        for (name, r), rows in methods.groupby(["name", "r"], sort=False)
    )
    return (
        "What an averaged gradient with 10 % error costs by each method, over the exact gradient with all inner states "
        "stored (line), in function calls (filled) and in CPU seconds (hollow). Left of the line it is less. What is "
        "biased by more than 10 % never gets there. After each name: the inner states (or tangents) held. float64, one "
        f"thread, CPU.{skipped}\n\n{_READING}\n\n{guide(table)}\n\n"
        "bias, variance and own (the part of the variance that is the method's) are relative to ‖∇M‖ and ‖∇M‖², exact "
        "sums over the tasks and a method's randomness, ± standard errors where it was sampled (<: a bias that may be "
        "none, two standard errors above); calls are counted, kB is the peak of live tensors, ms the median of one "
        "task's CPU time; effort by calls and by seconds as above; tail, where the minimiser θ* is known, is the time "
        "of outer SGD to a fine precision, E‖Ĝ(θ*)‖² times calls, (19) with m = 1, over the same.\n\n"
        f"{tables}\n\nThe debiased family: the best proxy K, sweep and q in a memory, and the effort of the paper's "
        f"UFOM (K = 0, recomputed) and of the exact gradient with the checkpoints that fit, over its.\n\n"
        f"{markdown(_family(table))}"
    )


def answer(table: pd.DataFrame) -> str:
    """The answer in a few sentences: where the generalised UFOM wins in the memory of √r checkpoints, and where not."""
    cases = list(_ran(table).groupby(["name", "r"], sort=False))
    quickest = [_quickest(rows[rows.kind.isin(("exact", "unbiased"))]).method for _, rows in cases]
    counts = pd.Series(quickest).value_counts()
    far = sum(rows[rows.method == "fom"].effort.iloc[0] == np.inf for _, rows in cases)
    rows = planned(table)
    where = rows["name"] + ", r = " + rows.r.astype(int).astype(str)
    won = [f"{at} ({gain:.2g}×)" for at, gain in zip(where, rows.gain_exact, strict=True) if gain >= WINS]
    lost = [at for at, gain in zip(where, rows.gain_exact, strict=True) if gain < WINS]
    paper = rows.gain_paper
    skipped = ", ".join(f"{row.name}, r = {row.r:.0f}" for row in _skipped(table))
    return (
        "To know ∇M to 10 % with room for all r states, the unbiased method of the least effort is "
        + ", ".join(f"{NAMES.get(name, name)} on {n}" for name, n in counts.items())
        + f" of {len(cases)} cases; FOM never gets there on {far}. In the memory of √r checkpoints, the paper's UFOM "
        f"takes {paper.min():.3g} to {paper.max():.3g} times what the planned member of its family takes. Over the "
        f"exact gradient with those checkpoints that wins by 10 % or more on {'; '.join(won) or 'none'}; it does not "
        f"on {'; '.join(lost) or 'none'}." + (f" Left out: {skipped}." if skipped else "")
    )


def planned(table: pd.DataFrame) -> pd.DataFrame:
    """The debiased family's rows in the memory of √r checkpoints."""
    rows = table[table.part == "family"]
    return rows[[slots == memory(r) for slots, r in zip(rows.memory, rows.r.astype(int), strict=True)]]


def _skipped(table: pd.DataFrame) -> list[Any]:
    return list(table[table.part == "skipped"].itertuples())
