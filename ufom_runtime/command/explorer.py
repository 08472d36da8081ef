"""`ufom explore`: q*, its interval, the time curve and where UFOM pays, in one HTML file that needs no network.

The page's formulas are the derivations' own, printed as JavaScript; a test in a browser holds them to `optimal_q`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ufom_runtime.files import write_whole
from ufom_theory import UfomError


def formulas() -> str:
    """The derivations' expressions as JavaScript functions at K = 0, of one object of named arguments."""
    import sympy as sp

    from ufom_theory.derivations import complexity, optimum
    from ufom_theory.derivations.symbols import C1, C2, KAPPA, RHO, K

    extra = sp.Symbol("extra", nonnegative=True)  # inner steps that the sweep repeats
    c_det = complexity.c_det().subs(K, 0)
    c_rnd = complexity.c_rnd().subs(K, 0).subs(C1, 0) + C1 * extra
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
    }
    return "\n".join(_function(name, expression) for name, expression in expressions.items())


def _function(name: str, expression: Any) -> str:
    import sympy as sp

    arguments = ", ".join(sorted(str(symbol) for symbol in expression.free_symbols))
    code = sp.jscode(expression, user_functions={"binomial": "binomial"})
    return f"function {name}({{{arguments}}}) {{ return {code}; }}"


def explorer_page(problem: str = "", report: Mapping[str, Any] | None = None) -> str:
    """The page as text, opened at the measured point if there is one.

    Args:
        problem: the measured problem's name.
        report: what `ufom_runtime.command.report.measure` returned; None opens the page at an example.

    Raises:
        UfomError: a report with V² = 0, where D²/V² has no value.
    """
    measured = None if report is None else {"words": _words(problem, report), "point": _point(report)}
    embedded = json.dumps(measured, ensure_ascii=False, allow_nan=False).replace("<", r"\u003c")  # no "</script>"
    template = files("ufom_runtime.command").joinpath("explorer.html").read_text(encoding="utf-8")
    return template.replace("/*FORMULAS*/", formulas()).replace("/*MEASURED*/null", embedded)


def _point(report: Mapping[str, Any]) -> dict[str, float]:
    if not report["v2"] > 0:
        raise UfomError("V² = 0: the exact gradient vanishes, D²/V² has no value to explore; measure at another θ")
    relative_d, relative_v = report["d2_sem"] / (report["d2"] or 1.0), report["v2_sem"] / report["v2"]
    together = report["cov_d2_v2"] / ((report["d2"] or 1.0) * report["v2"])
    rho_error = max(relative_d**2 + relative_v**2 - 2 * together, 0.0) ** 0.5  # of log D²/V², by the delta method
    ratio_error = ((report["c1_sem"] / report["c1"]) ** 2 + (report["c2_sem"] / report["c2"]) ** 2) ** 0.5
    return {
        "rho": report["d2"] / report["v2"],
        "r": report["r"],
        "ratio": report["c2"] / report["c1"],
        "m": report["m"],
        "rhoError": 100 * rho_error,
        "ratioError": 100 * ratio_error,
    }


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


def write_explorer(path: Path, problem: str = "", report: Mapping[str, Any] | None = None) -> None:
    """Write `explorer_page` to a file.

    Raises:
        UfomError: a file that cannot be written, or what `explorer_page` raises.
    """
    write_whole(path, explorer_page(problem, report).encode())
