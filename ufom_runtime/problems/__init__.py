"""Problems that are built in. Each carries what is known about it in closed form."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufom_theory import UfomError

if TYPE_CHECKING:
    from ufom_runtime.problem import BilevelProblem

BUILT_IN = {
    "synthetic": "ufom_runtime.problems.synthetic:synthetic",
    "quadratic": "ufom_runtime.problems.quadratic:quadratic",
    "digits-hypercleaning": "ufom_runtime.problems.hypercleaning:digits_hypercleaning",
    "mnist-hypercleaning": "ufom_runtime.problems.hypercleaning:mnist_hypercleaning",
    "digits-few-shot": "ufom_runtime.problems.few_shot:digits_few_shot",
    "omniglot": "ufom_runtime.problems.few_shot:omniglot_few_shot",
}


def load_problem(name: str, device: str | None = None) -> BilevelProblem:
    """A built-in problem by its name, or "module:object" from the path or the working directory.

    The object is a `BilevelProblem`, or a function that returns one; `device` is passed on to built-in ones.

    Raises:
        UfomError: a name that is neither, a module or object that is not found, or an object of another kind.
    """
    import torch

    from ufom_runtime.problem import BilevelProblem

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UfomError(f"device {device!r} is not to be had here: {str(error).splitlines()[0]}") from error
    path = BUILT_IN.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not (colon and module_name and attribute):
        raise UfomError(f"problem {name!r} is unknown: use {', '.join(BUILT_IN)}, or module:object of your own")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: BilevelProblem | Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise UfomError(f"problem {name!r}: no module named {error.name!r} here or on the path") from error
    except AttributeError as error:
        raise UfomError(f"problem {name!r}: {module_name} has no {attribute!r}") from error
    if not isinstance(found, BilevelProblem) and callable(found):
        found = found(device=device) if name in BUILT_IN and device else found()
    if not isinstance(found, BilevelProblem):
        raise UfomError(
            f"problem {name!r} is a {type(found).__name__}: give a BilevelProblem, or a function returning one"
        )
    return found
