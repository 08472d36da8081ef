"""The table of a comparison, and what it says in a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ufom_runtime.estimators import Estimator, Method
from ufom_runtime.measure.candidates import Row, Search
from ufom_runtime.measure.chances import DRAWS, Path, interval
from ufom_runtime.methods.switch import Switch
from ufom_theory import Sweep

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One row of the table.

    Attributes:
        row: what is run.
        until: the last step of FOM where a switch is run, else 0.
        steps: outer steps over exact's.
        ms: of an outer step, on average.
        over: the time over the script's, entry 0 as measured, then draws; shape (draws + 1,).
        timed: whether all of its times were timed, and none predicted.
        noise: relative error of its times.
    """

    row: Row
    until: int
    steps: float
    ms: float
    over: Array
    timed: bool
    noise: float

    @property
    def last(self) -> Estimator | None:
        """The estimator, for a switch the second; None is the script."""
        return self.row.kinds[-1]

    @property
    def name(self) -> str:
        """FOM, exact, UFOM or script, or a switch in words."""
        last = "script" if self.last is None else {0.0: "FOM", 1.0: "exact"}.get(self.last.q, "UFOM")
        return f"FOM until {self.until}, then {last}" if self.until else last

    @property
    def method(self) -> Method:
        """What `train` runs."""
        first, last = self.row.kinds[0], self.last or Estimator(1.0, Sweep.unrolled())
        return Switch(first or last, self.until, last) if self.until else last

    @property
    def written(self) -> str:
        """The method in short, as UFOM(0.05, stored)."""
        e = self.last
        if e is None or not e.q:
            return self.name
        proxy, coin = proxy_name(e), "one coin a batch" if e.coin == "batch" else ""
        parts = (
            [f"{e.q:g}", str(e.sweep), f"K = {proxy}" if e.proxy.steps else proxy, coin] if e.q < 1 else [str(e.sweep)]
        )
        return f"{self.name}({', '.join(filter(None, parts))})"


def proxy_name(e: Estimator) -> str:
    """ "" for FOM, "held" or the K of what is debiased."""
    return "held" if e.proxy.held else str(e.proxy.steps or "")


def outcomes(search: Search, path: Path | None, rows: list[Row]) -> list[Outcome]:
    """Every row with its times, the soonest first; the errors of the clock are drawn, too."""
    rng, plain, weights = np.random.default_rng(1), search.times[None], path.weights if path else (1.0,)
    found = []
    for row in rows:
        times = [search.times[kind] for kind in row.kinds]
        error = 0.0 if row.kinds == (None,) else max(t.error for t in times)
        noise = error * rng.standard_normal(DRAWS)
        spent, steps = row.time(weights, search.times), float(row.steps(weights)[0])
        over = spent / plain.seconds * np.exp(np.append(0.0, noise))
        until = 0
        if path and len(row.kinds) == 2:
            first = row.by_point.index(row.kinds[1])
            until = max(1, round(path.horizon * float(np.asarray(path.weights[:first]) @ row.ratios[:first, 0])))
        ms = 1e3 * (times[0].seconds if len(times) == 1 else float(spent[0]) / steps)
        timed = all(t.clock == "timed" for t in times)
        found.append(Outcome(row, until, steps, ms, over, timed, error))
    return sorted(found, key=lambda o: (np.nan_to_num(o.over[0], nan=np.inf), o.ms))


def table_of(search: Search, found: list[Outcome]) -> pd.DataFrame:
    """The table of `Comparison`."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for o in found:
        e, (low, high) = o.last, interval(o.over)
        mixed, held = e is not None and 0 < e.q < 1, []
        for kind in o.row.kinds:
            by_kind = search.parts.bytes_script if kind is None else search.parts.bytes(kind.q, kind.proxy, kind.sweep)
            held.append(by_kind)
        rows.append(
            {"method": o.name, "q": e.q if e else math.nan, "sweep": str(e.sweep) if e and e.q else "",
             "proxy": proxy_name(e) if e and mixed else "", "coin": e.coin if e and mixed else "",
             "ms": o.ms, "clock": "timed" if o.timed else "predicted", "bytes": max(held),
             "steps_over_exact": o.steps, "time_over_plain": float(o.over[0]), "low": low, "high": high}
        )  # fmt: skip
    return pd.DataFrame(rows)


def decide(search: Search, path: Path | None, found: list[Outcome], doubt: str) -> tuple[Method, str]:
    """What to run, and why; only what was timed is ever recommended."""
    timed = [o for o in found if o.timed]
    script = next(o for o in timed if o.last is None)
    exact = min((o for o in timed if o.name == "exact"), key=lambda o: o.ms, default=script)
    if not path:
        return exact.method, f"cannot tell: {doubt}. {_whatever(exact, script)}"
    best = min(timed, key=lambda o: float(o.over[0]))
    reach = "for the next step" if path.horizon == 1 else f"over the next {path.horizon} steps"
    if path.steps[-1] < path.horizon and path.horizon > 1:
        reach += f", measured up to step {path.steps[-1]}"
    law = f"({reach}; '{search.outer}', a {search.outer.law})"
    if best is script:
        return exact.method, f"keep your script: nothing that was timed is sooner {law}"
    low, high = interval(best.over)
    if high >= 1:
        gains = f"{1 / best.over[0]:.2g}× [{1 / high:.2g}, {1 / low:.2g}]"
        what = "a larger budget" if 2 * best.noise > abs(math.log(best.over[0])) else "more tasks"
        said = f"cannot tell whether {best.written} is sooner than your script, {gains} {law}: {what} would tell"
        return exact.method, said if best is exact else f"{said}. {_whatever(exact, script)}"
    gain = f"{_times(1 / best.over)} sooner than your script"
    others = [_against(best, o) for o in timed if o.name == "FOM" != best.name]
    others += [_against(best, exact)] if exact not in (best, script) else []
    said = f"run {best.written}: {', '.join([gain, *others])} {law}"
    if best.name == "FOM" and path.horizon == 1:
        said += "; FOM stalls where ‖∇M‖² falls to its squared bias, so look ahead with steps= or seconds="
    return best.method, said


def _times(gains: Array) -> str:
    low, high = interval(gains)
    return f"{gains[0]:.3g}× [{low:.3g}, {high:.3g}]"


def _against(best: Outcome, other: Outcome) -> str:
    if not math.isfinite(other.over[0]):
        return f"and {other.name} makes no progress"
    with np.errstate(invalid="ignore"):
        gains = np.nan_to_num(other.over / best.over, nan=np.inf)
    return f"{_times(gains)} than {other.name}"


def _whatever(exact: Outcome, script: Outcome) -> str:
    gain = script.ms / exact.ms
    if exact is script or gain <= 1:
        return "Meanwhile keep your script"
    return f"Meanwhile run {exact.written}, the same gradient as your script's, {gain:.2g}× sooner"
