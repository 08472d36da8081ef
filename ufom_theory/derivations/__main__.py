"""Print what the derivations come to: `python -m ufom_theory.derivations [MODULE ...]`.

Every public function is named with the first line of its docstring, then what it returns: called without arguments, or
with the few in `EXAMPLES`. A function that needs others, a building block of the rest, is only named.
"""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import sympy as sp

from ufom_theory import derivations
from ufom_theory.checks import UfomError
from ufom_theory.derivations import chain_rule
from ufom_theory.derivations.symbols import ALPHA

NO_PROOFS = ("__main__", "derive")
MODULES = tuple(sorted(m.name for m in pkgutil.iter_modules(derivations.__path__) if m.name not in NO_PROOFS))
EXAMPLES: dict[str, Any] = {
    "r": 2,
    "slots": 1,
    "problem": chain_rule.polynomial_problem(),
    "alphas": (ALPHA,),  # one inner step
    "coin": 1,
    "m": sp.Integer(2),
    "s": sp.S.Half,
    "c": sp.Symbol("c", positive=True),
}


def _functions(module: ModuleType) -> Iterator[Callable[..., Any]]:
    for name, value in vars(module).items():
        own = inspect.unwrap(value).__module__ == module.__name__ if callable(value) else False
        if own and not name.startswith("_") and not inspect.isclass(value):
            yield value


def _shown(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty]
    if not set(needed) <= set(EXAMPLES):
        return f"{function.__name__}({', '.join(needed)})"
    value = function(*(EXAMPLES[name] for name in needed))
    value = tuple(value) if isinstance(value, tuple) else value.as_expr() if isinstance(value, sp.Poly) else value
    called = ", ".join(name if name == "problem" else f"{name} = {EXAMPLES[name]}" for name in needed)
    lines = str(sp.pretty(value, use_unicode=True, wrap_line=False)).splitlines()
    return "\n".join([f"{function.__name__}({called}) =", "", *(f"    {line}".rstrip() for line in lines)])


def text(name: str) -> str:
    """One module: what it proves, then its functions in the order of the proof.

    Raises:
        UfomError: no derivation has this name.
    """
    if name not in MODULES:
        raise UfomError(f"derivation {name!r} is unknown: there are {', '.join(MODULES)}")
    module = import_module(f"ufom_theory.derivations.{name}")
    parts = [f"{name}: {inspect.getdoc(module)}"]
    for function in _functions(module):
        parts.append((inspect.getdoc(function) or "").split("\n", 1)[0] + "\n\n" + _shown(function))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    try:
        for chosen in sys.argv[1:] or MODULES:
            print(text(chosen))
    except UfomError as error:
        sys.exit(f"error: {error}")
