"""The `ufom` command. Each command imports what it needs inside; bad input is one line on stderr and exit status 2."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ufom_runtime.command.compare import compare_command
from ufom_runtime.command.derive import derive_command
from ufom_runtime.command.plain import json_text
from ufom_theory import (
    AssumptionConstants,
    CostModel,
    Moments,
    Prediction,
    Sweep,
    Truncated,
    UfomError,
    bias_bound,
    bias_bound_printed,
    exponent,
    gradient_bound,
    optimal_q,
    plan,
    smoothness_bound,
)
from ufom_theory.checks import finite
from ufom_theory.laws import exponent_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from ufom_runtime.training.processes import Processes

app = typer.Typer(
    help="How much second-order work is worth paying for in bilevel optimisation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_LONGEST = 1_000_000  # inner steps of a bound from --constants
ExponentOption = Annotated[float | None, typer.Option(help="Exponent m of the time to precision; or --outer.")]
OuterOption = Annotated[
    str | None, typer.Option(help="How the outer steps are taken: tuned, decay:S, adam:RATE or paper (m = 2); or --m.")
]


app.command("derive")(derive_command)
app.command("compare")(compare_command)


@app.callback()
def _commands() -> None:
    """How much second-order work is worth paying for in bilevel optimisation."""


@app.command()
def q(
    d2: Annotated[float | None, typer.Option(help="Bias D² of the proxy (14).")] = None,
    v2: Annotated[float | None, typer.Option(help="Second moment V² of the exact gradient (16).")] = None,
    r: Annotated[int, typer.Option("-r", help="Inner steps.")] = 10,
    c1: Annotated[float, typer.Option(help="Cost of a gradient.")] = 1.0,
    c2: Annotated[float, typer.Option(help="Cost of a Hessian-vector product.")] = 1.0,
    sweep: Annotated[str, typer.Option(help="stored, recomputed, checkpointed:SLOTS or unrolled.")] = "recomputed",
    proxy: Annotated[int, typer.Option(help="Backward steps K that the proxy keeps; 0 is FOM.")] = 0,
    m: ExponentOption = None,
    outer: OuterOption = None,
    epsilon: Annotated[float | None, typer.Option(help="The paper's ε instead: m = 2/(1 − 2ε).")] = None,
    batch: Annotated[int, typer.Option(help="Tasks an outer step, each with its own coin.")] = 1,
    mean_gradient_sq: Annotated[float | None, typer.Option(help="‖∇M‖², needed for a batch.")] = None,
    constants: Annotated[str | None, typer.Option(help="M1,M2,L1,L2,L3 of Assumption 1, instead of D² and V².")] = None,
    alpha: Annotated[float | None, typer.Option(help="Inner step size, with --constants.")] = None,
    theta_in_losses: Annotated[
        bool, typer.Option(help="With --constants: whether a loss contains θ (in MAML none).")
    ] = True,
    d2_sem: Annotated[float, typer.Option(help="Standard error of D², for the interval.")] = 0.0,
    v2_sem: Annotated[float, typer.Option(help="Standard error of V², for the interval.")] = 0.0,
    plot: Annotated[Path | None, typer.Option(help="Draw the time curve into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The q that reaches a given precision soonest, from D² and V² or from the constants of Assumption 1."""
    if epsilon is not None:
        if m is not None or outer is not None:
            raise UfomError("--m, --outer and --epsilon each set the exponent: give one of them")
        m = exponent(epsilon)
    if mean_gradient_sq is not None and batch == 1:
        raise UfomError("--mean-gradient-sq is used for a batch alone: give --batch, or leave it out")
    bounds: dict[str, float] = {}
    if constants is not None and d2 is None and v2 is None:
        bounds = _bounds(constants, alpha, r, proxy, theta_in_losses)
        d2, v2 = bounds["D_tight"] ** 2, bounds["V_bound"] ** 2
    elif constants is not None or d2 is None or v2 is None:
        raise UfomError("give either --d2 and --v2, or --constants M1,M2,L1,L2,L3 with --alpha")
    elif alpha is not None or not theta_in_losses:
        raise UfomError("--alpha and --no-theta-in-losses go with --constants: leave them out")
    cost = CostModel(r=r, c1=c1, c2=c2, sweep=Sweep.parse(sweep), proxy=Truncated(proxy))
    for name, sem in (("--d2-sem", d2_sem), ("--v2-sem", v2_sem)):
        finite(name, sem, "≥ 0: it is a standard error", 0.0)
    cov = np.diag(np.square([d2_sem, v2_sem]))
    prediction = optimal_q(Moments(d2, v2, cov, mean_gradient_sq=mean_gradient_sq), cost, m, outer, batch)
    if plot is not None:
        from ufom_runtime.command.time_curve import save_time_curve

        save_time_curve(prediction, plot)
    report = {**as_dict(prediction), **bounds}
    if as_json:
        print(json_text(report))
    else:
        from ufom_runtime.command.printing import print_prediction

        print_prediction(report)


def as_dict(p: Prediction) -> dict[str, Any]:
    """A prediction of plain floats as a flat dictionary, the same in tables and in JSON."""
    return {
        "q": p.q,
        "interval": list(p.interval),
        "speedup_over_exact": p.speedup_over_exact,
        "cost_over_fom": p.cost_over_fom,
        "condition_20": bool(p.condition_margin > 0),
        "pays": p.pays,
        "why": p.why,
        "d2": p.moments.d2,
        "v2": p.moments.v2,
        "r": p.cost.r,
        "c_det": p.cost.c_det,
        "c_rnd": p.cost.c_rnd,
        "sweep": str(p.cost.sweep),
        "proxy": p.cost.proxy.steps,
        "m": p.m,
        "law": p.law,
        "dq_dd2": p.dq_dd2,
        "dq_dv2": p.dq_dv2,
    }


def _bounds(text: str, alpha: float | None, r: int, proxy: int, theta_in_losses: bool) -> dict[str, float]:
    try:
        values = [float(x) for x in text.split(",")]
    except ValueError as error:
        raise UfomError(f"--constants {text!r}: five numbers M1,M2,L1,L2,L3 with commas between") from error
    if len(values) != 5:
        raise UfomError(f"--constants {text!r} holds {len(values)} numbers: five are needed, M1,M2,L1,L2,L3")
    if alpha is None:
        raise UfomError("--constants needs the inner step size: give --alpha")
    if not 1 <= r <= _LONGEST:
        raise UfomError(
            f"r, the number of inner steps, = {r} must be at least 1 and, with --constants, at most {_LONGEST:,}: the "
            "bounds are products over all steps; give --d2 and --v2 for a longer loop"
        )
    assumed, steps = AssumptionConstants(*values), np.full(r, alpha)
    return {
        "D_tight": bias_bound(assumed, steps, Truncated(proxy), theta_in_losses),
        "D_printed_15": bias_bound_printed(assumed, steps),
        "V_bound": gradient_bound(assumed, steps, theta_in_losses),
        "L_M": smoothness_bound(assumed, steps, theta_in_losses),
    }


@app.command()
def measure(
    context: typer.Context,
    problem: Annotated[str, typer.Argument(help="A built-in problem (see below), or module:object of your own.")],
    tasks: Annotated[int, typer.Option(help="Tasks to draw, where the problem has no finite set of them.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the tasks.")] = 0,
    m: ExponentOption = None,
    outer: OuterOption = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, for built-in problems.")] = None,
    bounds: Annotated[bool, typer.Option("--bounds", help="Estimate Assumption 1's constants (slow).")] = False,
    chunk: Annotated[int | None, typer.Option(help="Tasks run together; 1 for losses that vmap cannot take.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Trace and compile the steps first.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page that explores the answer, as `explore`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure D², V², bias, C1 and C2 of a problem, and say which q to run.

    Built in: synthetic, quadratic, digits-hypercleaning, mnist-hypercleaning, digits-few-shot, omniglot, cifar100.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ufom_runtime.command.printing import console, print_measurement
    from ufom_runtime.command.report import measure as measure_problem
    from ufom_runtime.problems import load_problem

    columns = (TextColumn("measuring"), BarColumn(), TimeRemainingColumn())
    exponent_of(m, outer)  # refused before any data are read
    if html is not None:
        _refuse_folder(html)
    shown = console(stderr=True)
    with context.obj() if context.obj else nullcontext() as processes:
        loaded = load_problem(problem, device)
        hidden = not shown.is_terminal or (processes is not None and processes.rank > 0)
        with Progress(*columns, console=shown, transient=True, disable=hidden) as bar:
            task = bar.add_task("", total=1.0)
            report = measure_problem(
                loaded,
                tasks,
                seed,
                m,
                outer,
                bounds,
                chunk,
                lambda x: bar.update(task, completed=x),
                processes,
                compiled,
            )
    if not report:  # another process prints it
        return
    if as_json:
        print(json_text({"problem": problem, **report}))
    else:
        print_measurement(problem, report)
    if html is not None:  # last: a file that cannot be written costs no measurement
        from ufom_runtime.command.explorer import write_explorer

        write_explorer(html, problem, report)


@app.command("plan")
def plan_command(
    moments: Annotated[list[str], typer.Option(help="K:D2:V2 of a proxy; repeat for each. K = 0 is FOM.")],
    memory: Annotated[int, typer.Option(help="Inner states that may be held; φ_0's copy counts as one.")] = 1,
    r: Annotated[int, typer.Option("-r", help="Inner steps.")] = 10,
    c1: Annotated[float, typer.Option(help="Cost of a gradient.")] = 1.0,
    c2: Annotated[float, typer.Option(help="Cost of a Hessian-vector product.")] = 1.0,
    m: ExponentOption = None,
    outer: OuterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The best proxy, sweep and q that fit in a memory budget, with all that was compared."""
    given = dict(map(_parse_proxy, moments))
    if len(given) < len(moments):
        raise UfomError("--moments names a proxy length K twice: give each once")
    rows = [
        {"proxy": c.proxy.steps, "sweep": str(c.sweep), "q": c.q, "states": c.states, "time": c.time,
         "slower": c.slower, "why": c.why}
        for c in plan(given, r, c1, c2, memory, m, outer)
    ]  # fmt: skip
    if as_json:
        print(json_text(rows))
    else:
        from ufom_runtime.command.printing import print_plan

        print_plan(rows)


def _parse_proxy(text: str) -> tuple[Truncated, Moments]:
    try:
        steps, d2, v2 = text.split(":")
        return Truncated(int(steps)), Moments(float(d2), float(v2))
    except UfomError:
        raise
    except ValueError as error:
        raise UfomError(f"--moments {text!r}: give K:D2:V2, for example 0:0.1:1") from error


@app.command()
def explore(
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")],
) -> None:
    """Write a page that explores q*, the time curve and where UFOM pays: one file, no server and no network."""
    from ufom_runtime.command.explorer import write_explorer

    _refuse_folder(output)
    write_explorer(output)
    print(f"open {output} in a browser")


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise UfomError(f"{str(path)!r} is a folder, or empty: name the file to write, for example q.html")


@app.command("claims")
def claims_command(
    id: Annotated[str | None, typer.Argument(help="One claim; all of them if not given.")] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print the forms in LaTeX.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/equations.md, deciding nothing.")] = False,
) -> None:
    """Decide every numbered statement of the paper again; exit status 1 if one comes out other than recorded."""
    from ufom_runtime.verdicts import stored_verdicts
    from ufom_theory.derivations.report import chosen, decide, markdown

    if as_markdown:
        print(markdown(), end="")
        return
    claims = chosen(id)
    found = list(zip(claims, decide(claims, stored_verdicts()), strict=True))
    if as_json or latex:
        rows = [
            {"id": c.id, "equation": c.equation, "statement": c.statement,
             "printed": "" if c.printed is None else c.latex(c.printed),
             "derived": "" if c.form is None else c.latex(c.form),
             "recorded": c.status, "found": status, "agrees": status == c.status}
            for c, status in found
        ]  # fmt: skip
        if as_json:
            print(json_text(rows))
        else:
            print("\n".join(f"% {row['id']}: {row['found']}\n{row['printed']}\n{row['derived']}\n" for row in rows))
    else:
        from ufom_runtime.command.printing import print_claims

        print_claims(found)
    if any(status != claim.status for claim, status in found):
        raise typer.Exit(1)


_EXTRAS = {"torch": "runtime", "pandas": "runtime", "sklearn": "runtime", "PIL": "runtime", "matplotlib": "studies"}


def main(
    arguments: list[str] | None = None,
    join: Callable[[], AbstractContextManager[Processes]] | None = None,
    prints: bool = True,
) -> None:
    """Entry point: bad input, or an extra that is not installed, becomes one line on stderr and exit status 2.

    Args:
        arguments: those of the command line if not given.
        join: the processes that share the work of `measure`; this one alone if not given.
        prints: whether this process prints the line.
    """
    try:
        sys.exit(app(arguments, standalone_mode=False, obj=join) or 0)
    except UfomError as error:
        message = str(error)
    except typer.Abort:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        message = f"this needs {error.name}: pip install 'ufom[{_EXTRAS[error.name]}]'"
    except Exception as error:
        if not hasattr(
            error, "format_message"
        ):  # the command line's own errors: an unknown option, a word for a number
            raise
        message = error.format_message()
    if prints:
        print(f"ufom: {message}", file=sys.stderr)
    sys.exit(2)
