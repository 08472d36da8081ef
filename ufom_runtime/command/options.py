"""What several commands share: options, θ from a file, and a check of the file to write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ufom_theory import UfomError

if TYPE_CHECKING:
    from torch import Tensor

    from ufom_runtime.problem import BilevelProblem

_LARGEST = 2**32  # bytes of a file with θ

ExponentOption = Annotated[float | None, typer.Option(help="Exponent m of the time to precision; or --outer.")]
OuterOption = Annotated[
    str | None, typer.Option(help="How the outer steps are taken: tuned, decay:S, adam:RATE or paper (m = 2); or --m.")
]
ThetaOption = Annotated[
    Path | None, typer.Option(help="A .npy file with θ, shape (s,), or (k, s) along a run; else the problem's.")
]
HtmlOption = Annotated[Path | None, typer.Option(help="Also write a page that explores the answer: one file.")]


def refuse_folder(path: Path) -> None:
    """Raise a `UfomError` where a folder, or nothing, is named as the file to write."""
    if path.is_dir():
        raise UfomError(f"{str(path)!r} is a folder, or empty: name the file to write, for example q.html")


def read_theta(path: Path | None, problem: BilevelProblem) -> Tensor:
    """θ from a .npy file, shape (s,), or (k, s) along a run; else the problem's own, of several the first.

    Raises:
        UfomError: a file that is missing or holds no array of numbers, or none where the problem names no θ.
    """
    import io

    import numpy as np
    import torch

    from ufom_runtime.files import read_whole
    from ufom_runtime.problem import one_theta

    if path is None:
        if problem.initial is None:
            raise UfomError("the problem names no θ: give BilevelProblem(initial=...), or --theta FILE")
        return one_theta(problem)
    try:
        array = np.load(io.BytesIO(read_whole(path, _LARGEST)), allow_pickle=False)
        values = torch.from_numpy(array)
    except UfomError:
        raise
    except (ValueError, TypeError, EOFError) as error:
        raise UfomError(f"{path} holds no array of numbers: write it by numpy.save({path.name!r}, theta)") from error
    like = problem.initial
    return values if like is None else values.to(like.device, like.dtype)
