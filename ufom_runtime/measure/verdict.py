"""The table of a comparison, and what it says in a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ufom_runtime.estimators import Estimator, Method
from ufom_runtime.measure.candidates import SCRIPT, UNSURE, Row, Search, Way, time_of
from ufom_runtime.measure.chances import DRAWS, Path, interval
from ufom_runtime.methods.switch import Switch
from ufom_theory import Sweep, Truncated
from ufom_theory.coins import best_scale
from ufom_theory.laws import Progress
from ufom_theory.optimum import NOISELESS
from ufom_theory.scores import takes_fixed_steps

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
    def arrives(self) -> bool:
        """Whether it makes progress."""
        return math.isfinite(self.over[0])

    @property
    def last(self) -> Way:
        """What is run, for a switch the second."""
        return self.row.ways[-1]

    @property
    def name(self) -> str:
        """FOM, exact, UFOM, roulette or script, or a switch in words."""
        return f"FOM until {self.until}, then {self.last.name}" if self.until else self.last.name

    @property
    def method(self) -> Method:
        """What `train` runs."""
        first, last = (way.method or Estimator(1.0, Sweep.unrolled()) for way in (self.row.ways[0], self.last))
        return Switch(first, self.until, last) if self.until else last

    @property
    def written(self) -> str:
        """The method in short, as UFOM(0.05, stored)."""
        return f"FOM until about step {self.until}, then {self.last.written}" if self.until else self.last.written


def outcomes(search: Search, path: Path | None, rows: list[Row]) -> list[Outcome]:
    """Every row with its times, the soonest first; the errors of the clock are drawn, too."""
    rng, plain = np.random.default_rng(1), time_of(search.script, search.times)
    weights, found = path.weights if path else (1.0,), []
    for row in rows:
        times = [time_of(way, search.times) for way in row.ways]
        error = 0.0 if row.ways == (search.script,) else max(t.error for t in times)
        noise = error * rng.standard_normal(DRAWS)
        spent, steps = row.time(weights, search.times), float(row.steps(weights)[0])
        over = spent / plain.seconds * np.exp(np.append(0.0, noise))
        until = 0
        if path and len(row.ways) == 2:
            first = row.by_point.index(row.ways[1])
            until = max(1, round(path.horizon * float(np.asarray(path.weights[:first]) @ row.ratios[:first, 0])))
        ms = 1e3 * (times[0].seconds if len(times) == 1 else float(spent[0]) / steps)
        timed = all(t.clock == "timed" for t in times)
        found.append(Outcome(row, until, steps, ms, over, timed, error))
    return sorted(found, key=lambda o: (np.nan_to_num(o.over[0], nan=np.inf), o.ms))


def table_of(found: list[Outcome]) -> pd.DataFrame:
    """The table of `Comparison`."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for o in found:
        way, (low, high) = o.last, interval(o.over)
        proxy = way.proxy if way.scale == 1 else f"{way.scale:g}·{way.proxy or 'FOM'}"
        rows.append(
            {"method": o.name, "q": way.q, "sweep": way.sweep, "proxy": proxy, "coin": way.coin, "ms": o.ms,
             "clock": "timed" if o.timed else "predicted", "bytes": max(x.bytes for x in o.row.ways),
             "steps_over_exact": o.steps, "time_over_plain": float(o.over[0]), "low": low, "high": high}
        )  # fmt: skip
    return pd.DataFrame(rows)


def along(path: Path | None) -> pd.DataFrame:
    """How the moments of FOM change along the run, as `Comparison` has it."""
    import pandas as pd

    rows: list[dict[str, float]] = []
    for step, p in zip(path.steps, path.measured[Truncated()], strict=True) if path else ():
        at = {name: float(np.ravel(value)[0]) for name, value in vars(p).items() if value is not None}
        v2 = at["variance"] + at["gradient_sq"]
        norms = math.sqrt(max(at["gradient_sq"], 0.0) * max(at["proxy_mean_sq"], 0.0))
        rows.append(
            {"step": step, "d2": at["d2"], "v2": v2, "rho": at["d2"] / v2, "mean_gradient_sq": at["gradient_sq"],
             "cosine": at["cross"] / norms if norms else math.nan, "scale": float(best_scale(Progress(**at)))}
        )  # fmt: skip
    return pd.DataFrame(rows, columns=["step", "d2", "v2", "rho", "mean_gradient_sq", "cosine", "scale"])


def decide(search: Search, path: Path | None, found: list[Outcome], doubt: str) -> tuple[Method, str]:
    """What to run, and why; only what was timed is ever recommended."""
    timed = [o for o in found if o.timed]
    script = next(o for o in timed if o.name == SCRIPT)
    exact = min((o for o in timed if o.name == "exact"), key=lambda o: o.ms, default=script)
    if not path:
        return exact.method, f"cannot tell: {doubt}. {_whatever(exact, script)}."
    best = min(timed, key=lambda o: float(o.over[0]))
    reach = "for the next step" if path.horizon == 1 else f"over the next {path.horizon} steps"
    if path.steps[-1] < path.horizon and path.horizon > 1:
        reach += f", measured up to step {path.steps[-1]}"
    law = f"({reach}; '{search.outer}', a {search.outer.law})"
    notes = _notes(search, path, best)
    if best is script:
        return exact.method, f"keep your script: nothing that was timed is sooner {law}{notes}."
    low, high = interval(best.over)
    if high >= 1:
        gains = f"{1 / best.over[0]:.2g}× [{1 / high:.2g}, {1 / low:.2g}]"
        what = "a larger budget" if 2 * best.noise > abs(math.log(best.over[0])) else "more tasks"
        said = f"cannot tell whether {best.written} is sooner than your script, {gains} {law}: {what} would tell"
        return exact.method, f"{said}{notes}." if best is exact else f"{said}. {_whatever(exact, script)}{notes}."
    others = [o for o in timed if o.name == "FOM" != best.name] + ([exact] if exact not in (best, script) else [])
    ahead = [f"{_times(1 / best.over)} sooner than your script", *(_against(best, o) for o in others if o.arrives)]
    still = [o for o in others if not o.arrives and not (o.name == "FOM" and path.vanishes)]
    stuck = "".join(f"; {o.name} makes no progress" for o in still)
    return best.method, f"run {best.written}: {', '.join(ahead)} {law}{stuck}{notes}."


def _notes(search: Search, path: Path, best: Outcome) -> str:
    """What has to be known besides."""
    said = []
    if best.name == "FOM" and path.horizon == 1:
        said.append("FOM stalls where ‖∇M‖² falls to its squared bias, so look ahead with steps= or seconds=")
    if path.noiseless and not takes_fixed_steps(search.outer) and 0 < best.last.q < 1:
        said.append(NOISELESS)
    if path.vanishes:
        said.append("FOM is identically zero here: neither the start nor the outer loss contains θ")
    return "".join(f"; {x}" for x in said)


def opened_at(search: Search, path: Path, theta: Tensor, exact_sums: bool) -> dict[str, Any]:
    """What the explorer's page opens at: moments of FOM at the first θ, and costs of a task."""
    moments, parts, outer = path.first, search.parts, search.outer
    assert moments is not None
    c1, c2 = parts.forward[1] / (parts.batch * (parts.r + 1)), max(parts.back[1], 1e-12) / parts.batch
    sweep = "recomputed" if all(way.sweep == "recomputed" for way in search.exact()) else "stored"
    names = ("d2", "v2", "d2_sem", "v2_sem", "mean_gradient_sq", "mean_cross", "mean_proxy_sq", "proxy_sq")
    found = {name: float(getattr(moments, name)) for name in names}
    by_d = path.progress[Truncated()][0].curvature_correction
    step = None if by_d is None else outer.rate_at(1) * float(np.ravel(by_d)[0])
    return {
        **found, "cov_d2_v2": float(moments.covariance("d2", "v2")[0, 1]), "tasks": moments.n, "thetas": 1,
        "finite_tasks": exact_sums, "device": str(theta.device), "r": parts.r, "batch": search.batch,
        "sweep": sweep, "slots": 3, "outer": str(outer), "m": 1.0 if outer.kind == "sgd" else outer.exponent,
        "step": step,
        "c1": c1, "c2": c2, "c1_sem": UNSURE * c1, "c2_sem": UNSURE * c2,
        "state_bytes": parts.bytes_state // parts.batch,
    }  # fmt: skip


def _times(gains: Array) -> str:
    low, high = interval(gains)
    return f"{gains[0]:.3g}× [{low:.3g}, {high:.3g}]"


def _against(best: Outcome, other: Outcome) -> str:
    with np.errstate(invalid="ignore"):
        gains = np.nan_to_num(other.over / best.over, nan=np.inf)
    return f"{_times(gains)} than {other.name}"


def _whatever(exact: Outcome, script: Outcome) -> str:
    gain = script.ms / exact.ms
    if exact is script or gain <= 1:
        return "Meanwhile keep your script"
    return f"Meanwhile run {exact.written}, the same gradient as your script's, {gain:.2g}× sooner"
