"""What `landscape` says of its table: the figure, the tables in its caption, and the guide "which method for which"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies.landscape_problems import PLANNED, memory
from studies.shared.drawing import markdown, new_figure, place_labels, plain_ticks
from ufom_runtime.command.style import GREY, LOOKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOK = {  # the name in LOOKS of each method
    "fom": "FOM",
    "truncated": "truncated",
    "implicit-cg": "implicit-cg",
    "implicit-neumann": "implicit-neumann",
    "es": "evolution",
    "guided-es": "guided evolution",
    "forward": "forward",
    "reversible": "reversible",
    "recomputed": "exact",
    "checkpointed": "exact, checkpoints",
    "checkpointed-root": "exact, checkpoints",
    "stored": "exact, all states",
    "unrolled": "exact, all states",
    "ufom": "UFOM",
    PLANNED: "UFOM",
    "adaptive-ufom": "adaptive",
    "roulette": "telescoping",
    "single-sample": "telescoping",
    "reptile": "Reptile",
}
KINDS = {"exact": "exact", "unbiased": "UFOM", "biased": "FOM", "other objective": "evolution"}  # with that colour
SHOWN = 100  # r of the figure's panels, or the longest below it
WINS = 1.1  # a gain smaller than this factor is none
BEARABLE = 0.1  # a relative bias that the guide calls small
NAMES = {PLANNED: "planned UFOM"}


def draw(table: pd.DataFrame) -> Figure:
    """A panel a problem: the error that equal calls leave, over the calls of one estimate; the area says the memory."""
    panels = list(_panels(table))
    tall = len(panels) // 2 + 1
    figure = new_figure(3.6 * tall)
    several = figure.subplots(tall, 2, squeeze=False).ravel()
    for axes, (name, r, rows) in zip(several, panels, strict=False):
        _points(axes, rows)
        axes.set(title=f"{name}, r = {r}", xlabel="function calls of one estimate")
        axes.set_ylabel("relative error at equal calls")
    for axes in several[len(panels) :]:
        axes.axis("off")
    _legend(several[len(panels)])
    figure.draw_without_rendering()  # the labels are placed in the final layout
    for axes, (_, _, rows) in zip(several, panels, strict=False):
        points, texts, colours, radii = [], [], [], []
        for (calls, error), same in rows.groupby(["at", "error"], sort=True):
            points.append((calls, error))
            texts.append(",\n".join(NAMES.get(m, m) for m in same.method))
            colours.append(LOOKS[LOOK[same.method.iloc[0]]]["color"])
            radii.append(_area(same.states.max()) ** 0.5 / 2)
        place_labels(axes, np.array(points), texts, colours, np.array(radii))
    return figure


def _panels(table: pd.DataFrame) -> Iterator[tuple[str, int, pd.DataFrame]]:
    ran = _ran(table)
    for name, rows in ran[ran.error.notna()].groupby("name", sort=False):
        r = int(rows.r[rows.r <= SHOWN].max())
        rows = rows[rows.r == r]
        # methods of the same calls and error share a label; their last digits are rounding's
        at, error = rows.calls.map(lambda x: float(f"{x:.6g}")), rows.error.map(lambda x: float(f"{x:.4g}"))
        yield str(name), r, rows.assign(at=at, error=error)


def _area(states: Any) -> Any:
    return 30 * (1 + np.sqrt(states))


def _points(axes: Axes, rows: pd.DataFrame) -> None:
    for row in rows.sort_values("states", ascending=False).itertuples():
        look = LOOKS[LOOK[row.method]] | {"ls": ""}
        axes.plot(row.at, row.error, **look, ms=4)
        axes.plot(row.at, row.error, "o", mfc="none", mew=0.8, color=look["color"], ms=_area(row.states) ** 0.5)
    axes.axhline(0.1, color=GREY, lw=0.6, ls=(0, (4, 6)), zorder=0)
    axes.set(xscale="log", yscale="log")
    axes.margins(0.2)
    plain_ticks(axes)


def _legend(axes: Axes) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=LOOKS[name]["color"], label=kind) for kind, name in KINDS.items()]
    handles += [
        Line2D([], [], marker="o", ls="", color=GREY, mfc="none", mew=0.8, ms=_area(n) ** 0.5, label=f"{n} states held")
        for n in (0, 10, 100)
    ]
    handles.append(Line2D([], [], color=GREY, lw=0.6, ls=(0, (4, 6)), label="exact gradient, all states stored"))
    axes.legend(handles=handles, loc="center", labelspacing=1.1, title="lower, left and smaller is better")


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
            "calls": f"{row.calls:.5g}",
            "states": f"{row.states:.0f}",
            "kB": f"{row.bytes / 1000:.4g}",
            "ms": _number(1000 * row.seconds, 1000 * row.seconds_sem),
            "time": "–" if row.time != row.time else f"{row.time:.3g}",
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
    if value != value:
        return "–"
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
    """Which method for which problem, a row a problem and r, each with the number that speaks for it; Markdown."""
    shown = {}
    for (name, r), rows in _ran(table).groupby(["name", "r"], sort=False):
        true, biased = rows[rows.time.notna()], rows[(rows.kind == "biased") & rows.bias_sq.notna()]
        some = memory(r)
        small = biased[np.sqrt(biased.bias_sq.clip(lower=0)) <= BEARABLE]
        shown[f"{name}, r = {r}"] = {
            "all r states fit": _best(true[true.states <= r]),
            "√r checkpoints fit": f"{_best(true[true.states <= some])}; {some} states",
            "one state fits": _best(true[true.states <= 1]),
            f"a bias of {100 * BEARABLE:g} % is bearable": _cheapest(small, rows),
        }
    return markdown(pd.DataFrame.from_dict(shown, orient="index").rename_axis("problem"))


def _best(rows: pd.DataFrame) -> str:
    """The unbiased method of the least time; of those that tie, the one of the fewest states."""
    if not len(rows):
        return "none"
    best = _quickest(rows)
    return f"{NAMES.get(best.method, best.method)}, {best.time:.3g}×"


def _quickest(rows: pd.DataFrame) -> pd.Series:
    return rows[rows.time <= rows.time.min() * (1 + 1e-6)].sort_values("states", kind="stable").iloc[0]


def _cheapest(small: pd.DataFrame, rows: pd.DataFrame) -> str:
    stored = float(rows[rows.method == "stored"].calls.iloc[0])
    if not len(small):
        return "none"
    row = small.loc[small.calls.idxmin()]
    if row.calls >= stored:
        return f"none that is cheaper than exact ({row.method}: {row.calls:.4g} calls)"
    return f"{row.method}: {row.calls:.4g} calls, not {stored:.4g}; bias {100 * max(row.bias_sq, 0) ** 0.5:.2g} %"


def page(table: pd.DataFrame) -> str:
    """A page of the documentation, one screen: the quickest unbiased method on each problem, by the memory."""
    shown = {}
    for name, problem in _ran(table[table.time.notna()]).groupby("name", sort=False):
        lengths = [(r, rows) for r, rows in problem.groupby("r")]
        shown[name] = {"r": "; ".join(f"{r:.0f}" for r, _ in lengths)} | {
            words: "; ".join(_best(rows[rows.states <= most(int(r))]) for r, rows in lengths)
            for words, most in (
                ("all r states fit", int),
                ("about √r states fit", memory),
                ("one state fits", lambda r: 1),
            )
        }
    return (
        "# Which method for which problem\n\n"
        "For your own problem, ask [`compare`](start.md#from-a-script-to-a-decision); "
        "it times and measures what is there, and FOM too. Here are five problems that were measured: the quickest "
        "*unbiased* gradient that fits the memory, and its time to a given precision over that of the exact gradient "
        "with all r states (second moment times function calls, m = 1).\n\n"
        f"{markdown(pd.DataFrame.from_dict(shown, orient='index').rename_axis('problem'))}\n\n"
        "- *stored*, *recomputed* and *checkpointed-root* are exact, by three [sweeps](choose-a-sweep.md).\n"
        "- *ufom* is the paper's; *planned UFOM* has the proxy, sweep and q that [`plan`](choose-a-sweep.md) chooses.\n"
        "- *roulette* and *single-sample* cut the loop at random lengths, and hold r states when it is run whole.\n"
        "- A bias that you can bear? FOM first, then UFOM, is often sooner: [one step of your own run]"
        "(understand.md#one-step-of-your-own-run).\n\n"
        "[Methods](methods.md) has every name, its cost and when it is valid; [the results](results.md) the table. "
        "`python -m studies index` wrote this page from the stored table of the study `landscape`.\n"
    )


_READING = (
    "Times are to a given precision of outer SGD, in function calls, over that of the exact gradient with all states "
    "stored: second moment times calls, (19) with m = 1. The first three columns name the quickest *unbiased* method "
    "that holds no more than these states; the last one the cheapest biased method whose bias at the θ measured is "
    "small, where it takes fewer calls than the exact gradient. q, K, slots and the telescopes' probabilities "
    "(roulette, single-sample) are the best by moments measured there, which is not charged; a telescope rarely runs "
    "the whole loop but holds r states when it does. Forward differentiation holds as many vectors as θ has "
    "parameters, and evolution strategies and implicit differentiation none."
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
        "Every method spends the same function calls, those with which the exact gradient with stored states comes to "
        "a relative error of 0.1 (dashed): error² = bias² + A·calls/budget, A the second moment. The area of a circle "
        "around a mark says how many inner states (or tangents) are held. What is unbiased and below the dashed line "
        "is quicker than the exact gradient; what is biased stops at its bias. float64, one thread, CPU."
        f"{skipped}\n\n{_READING}\n\n{guide(table)}\n\n"
        "bias, variance and own (the part of the variance that is the method's) are relative to ‖∇M‖ and ‖∇M‖², exact "
        "sums over the tasks and a method's randomness, ± standard errors where it was sampled (<: a bias that may be "
        "none, two standard errors above); calls are counted, kB is the peak of live tensors, ms the median of one "
        "task's time; time as above.\n\n"
        f"{tables}\n\nThe debiased family: the best proxy K, sweep and q in a memory, by how much sooner it is than "
        f"the paper's UFOM (K = 0, recomputed) and than the exact gradient with the checkpoints that fit.\n\n"
        f"{markdown(_family(table))}"
    )


def answer(table: pd.DataFrame) -> str:
    """The answer in a few sentences: where the generalised UFOM wins in the memory of √r checkpoints, and where not."""
    quickest = [_quickest(rows[rows.time.notna()]).method for _, rows in _ran(table).groupby(["name", "r"], sort=False)]
    counts = pd.Series(quickest).value_counts()
    rows = planned(table)
    where = rows["name"] + ", r = " + rows.r.astype(int).astype(str)
    won = [f"{at} ({gain:.2g}×)" for at, gain in zip(where, rows.gain_exact, strict=True) if gain >= WINS]
    lost = [at for at, gain in zip(where, rows.gain_exact, strict=True) if gain < WINS]
    paper = rows.gain_paper
    skipped = ", ".join(f"{row.name}, r = {row.r:.0f}" for row in _skipped(table))
    return (
        "With room for all r states, the quickest unbiased method is "
        + ", ".join(f"{NAMES.get(name, name)} on {n}" for name, n in counts.items())
        + f" of {len(quickest)} cases. In the memory of √r checkpoints, debiasing the planned proxy with the planned q "
        f"is {paper.min():.3g} to {paper.max():.3g} times as quick as the paper's UFOM. Over the exact gradient with "
        f"those checkpoints it wins by 10 % or more on {'; '.join(won) or 'none'}; it does not on "
        f"{'; '.join(lost) or 'none'}." + (f" Left out: {skipped}." if skipped else "")
    )


def planned(table: pd.DataFrame) -> pd.DataFrame:
    """The debiased family's rows in the memory of √r checkpoints."""
    rows = table[table.part == "family"]
    return rows[[slots == memory(r) for slots, r in zip(rows.memory, rows.r.astype(int), strict=True)]]


def _skipped(table: pd.DataFrame) -> list[Any]:
    return list(table[table.part == "skipped"].itertuples())
