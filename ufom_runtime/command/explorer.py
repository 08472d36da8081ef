"""`ufom explore`: q*, its interval, the time curve and where UFOM pays, in one HTML file that needs no network.

The page's formulas are the derivations' own, printed as JavaScript; a test in a browser holds them to `optimal_q`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ufom_runtime.command.plain import json_text
from ufom_runtime.files import write_whole
from ufom_theory import UfomError
from ufom_theory.laws import parse_outer


@cache
def formulas() -> str:
    """The derivations' expressions as JavaScript functions, of one object of named arguments."""
    import sympy as sp

    from ufom_theory.derivations import complexity, one_step, optimum
    from ufom_theory.derivations.symbols import C1, C2, KAPPA, RHO, K

    extra = sp.Symbol("extra", nonnegative=True)  # inner steps that the sweep repeats
    c_det, c_rnd = complexity.c_det(), complexity.c_rnd().subs(C1, 0) + C1 * extra
    slope = {one_step.SLOPE: sp.Symbol("slope", positive=True)}  # D' is not a name in JavaScript
    by_rho, by_kappa = optimum.slopes()
    expressions = {
        "root": optimum.root(),
        "rootSmallExponent": optimum.root_small_exponent(),
        "speedup": optimum.speedup(),
        "condition": optimum.condition(),
        "exchange": sp.simplify(KAPPA * by_kappa / (RHO * by_rho)),  # ∂log q/∂log κ over ∂log q/∂log ρ
        "cDet": c_det,
        "cRnd": c_rnd,
        "logKappaSlope": sp.factor(C2 * sp.diff(sp.log(c_det / c_rnd), C2)),  # against log(C2/C1)
        "repeatedSteps": complexity.repeated_gradients().subs(K, 0),
        "binomialSteps": complexity.BINOMIAL,
        "quadraticProgress": one_step.quadratic(),
        "tunedProgress": one_step.tuned(),
        "normalisedProgress": one_step.normalised(),
        "fixedStepRoot": one_step.fixed_step_root().subs(slope),
        "belowOne": one_step.below_one().subs(slope),
    }
    return "\n".join(_function(name, expression) for name, expression in expressions.items())


def _function(name: str, expression: Any) -> str:
    import sympy as sp

    arguments = ", ".join(sorted(str(symbol) for symbol in expression.free_symbols))
    code = sp.jscode(expression, user_functions={"binomial": "binomial"})
    return f"function {name}({{{arguments}}}) {{ return {code}; }}"


def explorer_page(
    problem: str = "", report: Mapping[str, Any] | None = None, decision: Mapping[str, Any] | None = None
) -> str:
    """The page as text, opened at the measured point if there is one.

    Args:
        problem: the measured problem's name.
        report: what `ufom_runtime.command.report.measure` returned; None opens the page at an example.
        decision: what `compare` found, `why` and `rows`, to be shown above all.

    Raises:
        UfomError: a report with V² = 0, where D²/V² has no value.
    """
    measured: dict[str, Any] | None = None
    if report or decision:
        words, point = (_words(problem, report), _point(report)) if report else (f"Compared: {problem}.", {})
        measured = {"words": words, "point": point, "stateBytes": (report or {}).get("state_bytes")}
        if decision:
            measured["decision"] = decision
    embedded = json_text(measured).replace("<", r"\u003c")  # no "</script>"
    template = files("ufom_runtime.command").joinpath("explorer.html").read_text(encoding="utf-8")
    return template.replace("/*FORMULAS*/", formulas()).replace("/*MEASURED*/null", embedded)


def _point(report: Mapping[str, Any]) -> dict[str, Any]:
    if not report["v2"] > 0:
        raise UfomError("V² = 0: the exact gradient vanishes, D²/V² has no value to explore; measure at another θ")
    relative_d, relative_v = report["d2_sem"] / (report["d2"] or 1.0), report["v2_sem"] / report["v2"]
    together = report["cov_d2_v2"] / ((report["d2"] or 1.0) * report["v2"])
    rho_error = max(relative_d**2 + relative_v**2 - 2 * together, 0.0) ** 0.5  # of log D²/V², by the delta method
    ratio_error = ((report["c1_sem"] / report["c1"]) ** 2 + (report["c2_sem"] / report["c2"]) ** 2) ** 0.5
    point = {
        "rho": report["d2"] / report["v2"],
        "r": report["r"],
        "ratio": report["c2"] / report["c1"],
        "law": _law(report.get("outer")),
        "m": report["m"],
        "batch": report.get("batch", 1),
        "sweep": report.get("sweep", "recomputed"),
        "slots": report.get("slots", 3),
        "rhoError": 100 * rho_error,
        "ratioError": 100 * ratio_error,
    }
    return {**point, **_of_fom(report)} if report.get("mean_proxy_sq") is not None else point


def _law(outer: str | None) -> str:
    kind = parse_outer(outer).kind if outer else "own"
    return "own" if kind == "decay" else kind


def _of_fom(report: Mapping[str, Any]) -> dict[str, float]:
    """The means of FOM and of the exact gradient, each estimate kept within what it can be."""
    gradient_sq, cross, proxy_sq = (report[name] for name in ("mean_gradient_sq", "mean_cross", "mean_proxy_sq"))
    share = min(max(gradient_sq / report["v2"], 1e-9), 1.0)
    noise, norms = report["v2"] * (1 - share), max(gradient_sq, 0.0) ** 0.5 * max(proxy_sq, 0.0) ** 0.5
    found = {
        "share": share,
        "cosine": max(-1.0, min(cross / norms, 1.0)) if norms else 0.0,
        "length": (proxy_sq / gradient_sq) ** 0.5 if norms else 0.0,
        "noise": max(report["proxy_sq"] - proxy_sq, 0.0) / noise if noise else 0.0,
    }
    step = report.get("step")
    return found if step is None else {**found, "step": max(step, 1e-6)}


def _words(problem: str, report: Mapping[str, Any]) -> str:
    of = "exact sums over" if report["finite_tasks"] else "the mean of"

    def number(key: str, unit: float = 1.0) -> str:
        value, sem = unit * report[key], unit * report[f"{key}_sem"]
        return f"{value:.4g} ± {float(f'{sem:.2g}'):g}"

    return (
        f"Measured: {problem}, {of} {report['tasks']} task(s), {report['thetas']} θ, on {report['device']}. "
        f"D² = {number('d2')}, V² = {number('v2')}; a gradient takes {number('c1', 1e3)} ms, a Hessian-vector product "
        f"{number('c2', 1e3)} ms (± one standard error)."
    )


def write_explorer(
    path: Path,
    problem: str = "",
    report: Mapping[str, Any] | None = None,
    decision: Mapping[str, Any] | None = None,
) -> None:
    """Write `explorer_page` to a file.

    Raises:
        UfomError: a file that cannot be written, or what `explorer_page` raises.
    """
    write_whole(path, explorer_page(problem, report, decision).encode())
