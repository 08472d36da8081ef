"""The `ufom` command. Each command imports what it needs inside; bad input is one line on stderr and exit status 2."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ufom_runtime.command.claims import claims_command
from ufom_runtime.command.compare import compare_command
from ufom_runtime.command.data import data_command
from ufom_runtime.command.derive import derive_command
from ufom_runtime.command.measuring import measure_command
from ufom_runtime.command.page import explore_command
from ufom_runtime.command.planning import plan_command
from ufom_runtime.command.q import q_command
from ufom_theory import UfomError

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
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"ufom {version('ufom')}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """How much second-order work is worth paying for in bilevel optimisation."""


for _name, _command in (
    ("q", q_command),
    ("measure", measure_command),
    ("compare", compare_command),
    ("plan", plan_command),
    ("derive", derive_command),
    ("claims", claims_command),
    ("explore", explore_command),
    ("data", data_command),
):
    app.command(_name)(_command)

_IN_RUNTIME = {"torch", "pandas", "sklearn", "PIL", "pooch", "safetensors", "networkx", "matplotlib"}


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
        if error.name not in _IN_RUNTIME:
            raise
        message = f"this needs {error.name}: pip install '.[runtime]' from a checkout of ufom"
    except Exception as error:
        if not hasattr(
            error, "format_message"
        ):  # the command line's own errors: an unknown option, a word for a number
            raise
        message = error.format_message()
    if prints:
        print(f"ufom: {message}", file=sys.stderr)
    sys.exit(2)
