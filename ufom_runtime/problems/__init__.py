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
    "sinusoid": "ufom_runtime.problems.sinusoid:sinusoid",
    "digits-hypercleaning": "ufom_runtime.problems.hypercleaning:digits_hypercleaning",
    "mnist-hypercleaning": "ufom_runtime.problems.hypercleaning:mnist_hypercleaning",
    "digits-few-shot": "ufom_runtime.problems.few_shot:digits_few_shot",
    "omniglot": "ufom_runtime.problems.few_shot:omniglot_few_shot",
    "cifar100": "ufom_runtime.problems.few_shot:cifar100_few_shot",
}


def load_problem(name: str, device: str | None = None) -> BilevelProblem:
    """A built-in problem by its name, or "module:object" from the path or the working directory.

    The object is a `BilevelProblem`, or a function that returns one; `device` is passed on to built-in ones.

    Raises:
        UfomError: a name that is neither, a module or object that is not found, or an object of another kind.
    """
    import torch

    from ufom_runtime.problem import BilevelProblem

    if device and name not in BUILT_IN:
        raise UfomError(f"device = {device!r} is for built-in problems: {name!r} lives where its own tensors do")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UfomError(f"device {device!r} is not available here: {str(error).splitlines()[0]}") from error
    path = BUILT_IN.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not (colon and module_name and attribute):
        raise UfomError(f"problem {name!r} is unknown: use {', '.join(BUILT_IN)}, or module:object of your own")
    if name not in BUILT_IN and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: a file here never stands in for an installed module
    try:
        module = importlib.import_module(module_name)
        if not hasattr(module, attribute):
            raise UfomError(f"problem {name!r}: {module_name} has no {attribute!r}")
        found: BilevelProblem | Callable[..., Any] = getattr(module, attribute)
        if not isinstance(found, BilevelProblem) and callable(found):
            found = found(device=device) if device else found()
    except (UfomError, MemoryError):
        raise
    except ModuleNotFoundError as error:
        if error.name in ("sklearn", "PIL"):
            raise
        raise UfomError(f"problem {name!r}: no module named {error.name!r} here or on the path") from error
    except Exception as error:  # it is the user's module: whatever it raises, say where
        raise UfomError(f"problem {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(found, BilevelProblem):
        raise UfomError(
            f"problem {name!r} is a {type(found).__name__}: give a BilevelProblem, or a function returning one"
        )
    return found
