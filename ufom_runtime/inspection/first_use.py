"""What is checked once about a problem, before its first gradient is handed out, so that none is silently wrong.

The truth is plain autograd on a single row: what it gives through the unrolled loop is the gradient, whatever the user
has detached on purpose. Held to it are three things.

1. A loss is a function. The derivatives of one row are taken twice at one point; they must be equal, and no global
   generator may move.
2. Rows never mix. The vmapped derivatives of a few rows, the first and the last among them, must be those of the rows
   alone. Where they are not, or where vmap fails, rows run in a plain loop from then on, and a warning says so once.
3. No derivative is hidden. torch's own operations are trusted. A custom `autograd.Function`, or activation
   checkpointing, is held to finite differences: where the gradient is that of the loss, the second derivative has to be
   that of the gradient. A Function whose gradient is not the loss's own (straight-through, reversal) is a surrogate by
   intention, and its second derivative is what autograd says.

All of it is done at a generic point near the one asked for: zeros, equal weights, and a module's own parameters are
special ones, where much that is wrong comes out right. On a GPU it is done without TF32, whose rounding would hide
what is wrong, and make what is right look wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ufom_runtime.derivatives import LOOPS, count_calls, start, watch_losses
from ufom_runtime.inspection.draws import REMEDY, generators, generators_put_back, moved
from ufom_runtime.inspection.hidden import refuse_hidden
from ufom_runtime.inspection.points import Found, Point, noise
from ufom_runtime.inspection.tf32 import switched_off
from ufom_runtime.problem import BilevelProblem, Tasks, all_finite, kept
from ufom_theory import UfomError

_AT_MOST = 4  # rows that are held to single ones
_POINTS = 3  # points at which vmap must be wrong before it is called so: rounding may cross a kink at one of them


def check_first_use(problem: BilevelProblem, theta: Tensor, tasks: Tasks, products: bool = True) -> None:
    """Run the checks above once for each problem, shape of a task, dtype and device; that of several rows apart.

    Args:
        problem: the problem.
        theta: one θ a row, shape (n, s).
        tasks: n stacked tasks.
        products: whether second derivatives will be asked for.

    Raises:
        UfomError: a loss or a start that is not a function, activations that are recomputed with other parameters, a
            second derivative that autograd does not see.
    """
    passed = kept(problem, "first use")
    like = tuple((t.shape[1:], t.dtype, t.device) for t in (theta, *tasks.parts))
    key, one = (len(theta) > 1, like), (False, like)
    if passed.get(key, -1) >= products:
        return
    alone_is_right = passed.get(one, -1) >= products
    with _aside(), switched_off() if theta.is_cuda else nullcontext():
        before = generators()
        rows = _few(problem, theta.detach(), tasks)
        why, same = "", problem.update is None and problem.inner_batch is None
        for j in (0,) if same else sorted({0, problem.r - 1}):  # else the steps need not be alike
            found = _alone(replace(rows, j=j), products)
            if found is None:  # not finite even where it was asked for: the sweep will say where
                return
            point, alone = found
            if not alone_is_right:
                _refuse_impure(point, alone[0], before, products)
                refuse_hidden(point, products)
            if len(alone) > 1 and not kept(problem, LOOPS) and (why := _vmap_is_wrong(point, alone, products)):
                kept(problem, LOOPS)["rows"] = True
    passed[key], passed[one] = products, max(products, passed.get(one, -1))
    if why:
        warnings.warn(f"the tasks of this problem run one after another, without vmap: {why}", stacklevel=2)


@contextmanager
def _aside() -> Iterator[None]:
    """Leave no trace: calls are not counted, bytes not metered, generators set back, warnings left to the real call."""
    with (
        generators_put_back(),
        count_calls(),
        watch_losses(None),
        torch.enable_grad(),
        _disable_current_modes(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _few(problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> Point:
    """A few rows, the first and the last among them, where they were asked for."""
    n = len(theta)
    index = torch.linspace(0, n - 1, min(n, _AT_MOST), dtype=torch.float64, device="cpu").round().long()
    theta, tasks = theta[index.to(theta.device)], tasks.take(index)
    ones = (slice(i, i + 1) for i in range(len(theta)))
    phi = torch.cat([start(problem, theta[one], tasks.take(one)).detach() for one in ones])
    return Point(problem, theta, phi, noise(phi, 0), tasks)


def _alone(point: Point, products: bool) -> tuple[Point, list[Found]] | None:
    """A generic point near the given one, or that one where no other is valid; and each row's derivatives there."""
    try:
        moved = point.moved(0)
        found = moved.by_row(products)
        if all(map(_finite, found)):
            return moved, found
    except UfomError:  # of the user's function, perhaps outside its domain
        pass
    found = point.by_row(products)
    return (point, found) if all(map(_finite, found)) else None


def _finite(found: Found) -> bool:
    return all(x is None or all_finite(x) for x in found.values())


def _refuse_impure(point: Point, first: Found, before: dict[str, Any], products: bool) -> None:
    """Take the derivatives of the first row again, and refuse what differs, or what drew from a global generator."""
    again = point.row(0).derivatives(products)
    drew = moved(before)
    errors = {name: _difference(x, again[name]) for name, x in first.items()}
    worst = max(errors, key=errors.__getitem__)
    error, eps = errors[worst], torch.finfo(point.phi.dtype).eps
    if error <= 100 * eps and not drew:
        return
    said = [f"{name} moved" for name in drew]
    if error > 100 * eps:
        said.append(f"{worst}, taken twice at one point, differs by {error:.2g} of its norm")
    changing = "what changes between calls (a counter, an iterator, a buffer, spectral norm) belongs there, too"
    remedy = f"{REMEDY}; {changing}"
    if point.phi.device.type == "cuda" and error <= 1e4 * eps and not drew:
        remedy = "CUDA's atomic operations differ by so little: use torch.use_deterministic_algorithms(True)"
    raise UfomError(f"a loss must be a function of (θ, φ, T), but {' and '.join(said)}: {remedy}")


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    """‖a − b‖ relative to the larger norm; None stands for zero."""
    if a is None or b is None:
        other = b if a is None else a
        return 0.0 if other is None else float(other.any())
    a, b = a.detach().double(), b.detach().double()
    size = float(torch.maximum(a.norm(), b.norm()))
    return float((a - b).norm()) / size if size else 0.0


def _vmap_is_wrong(point: Point, alone: list[Found], products: bool) -> str:
    """Why the rows cannot be vmapped, in words; empty where vmapped derivatives are those of the rows alone."""
    with _PaddingMode() as padding:
        point.row(0).derivatives(products=False)
    if padding.met:
        return "torch.vmap keeps the padding index of an embedding for the first task alone"
    why = ""
    for seed in range(_POINTS):
        if seed:  # rounding may have crossed a kink at the first point
            point = point.moved(seed)
            alone = point.by_row(products)
        try:
            together = point.derivatives(products)
        except UfomError as error:
            return f"vmap cannot run it ({' '.join(str(error).split())[:400]})"
        if not (why := _unlike(together, alone, torch.finfo(point.phi.dtype).eps ** 0.5)):
            return ""
    return why


def _unlike(together: Found, alone: list[Found], allowed: float) -> str:
    for i, found in enumerate(alone):
        for name, x in found.items():
            vmapped = together[name]
            error = _difference(None if vmapped is None else vmapped[i : i + 1], x)
            if not error <= allowed:
                return f"vmapped, {name} differs by {error:.2g} of its norm from that of the task alone"
    return ""


class _PaddingMode(TorchFunctionMode):
    """Sees embeddings with a padding index: a batch without padding would not show that vmap gets them wrong."""

    met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "embedding":
            index = kwargs.get("padding_idx", args[2] if len(args) > 2 else None)
            self.met |= isinstance(index, int) and index >= 0
        return func(*args, **kwargs)
