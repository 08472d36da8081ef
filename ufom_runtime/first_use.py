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
special ones, where much that is wrong comes out right.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, disable_saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from ufom_runtime.derivatives import (
    HIDDEN_CURVATURE,
    LOOPS,
    count_calls,
    derivative,
    gradient_and_products,
    inner_gradient,
    inner_tasks,
    layout_of,
    leaf,
    next_state,
    outer_gradients,
    phi_of,
    pull_back,
    pulled_back,
    row_losses,
    start,
    watch_losses,
)
from ufom_runtime.kept import kept
from ufom_runtime.problem import BilevelProblem, Tasks, all_finite
from ufom_theory import UfomError

_AT_MOST = 4  # rows that are held to single ones
_POINTS = 3  # points at which vmap must be wrong before it is called so: rounding may cross a kink at one of them
_STEPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # of finite differences, relative to the root mean square
_DIRECTIONS = 3  # of finite differences
_HOOKS = "ufom forbids saved-tensor hooks while it looks for them"

Found = dict[str, Tensor | None]  # derivatives by name
Scalar = Callable[[Tensor, Tensor], Tensor]  # of θ and φ
Slopes = tuple[Tensor | None, ...]  # in θ and in φ

CHECKPOINTED = (
    "{} checkpoints activations (torch.utils.checkpoint), and its gradient is not that of the loss: the backward pass "
    "computes them again with the module's own parameters, not with φ. Switch it off, "
    "model.gradient_checkpointing_disable(); to save memory take fewer tasks together (chunk) or a sweep that keeps "
    "fewer states, Sweep.checkpointed(slots)"
)


@dataclass(frozen=True)
class _Point:
    """Rows of θ, shape (n, s), of φ (or whole states x), shape (n, p), and of b2, shape (n, p), with their tasks."""

    problem: BilevelProblem
    theta: Tensor
    phi: Tensor
    b2: Tensor
    tasks: Tasks

    def row(self, i: int) -> _Point:
        """One row of them."""
        one = slice(i, i + 1)
        return replace(self, theta=self.theta[one], phi=self.phi[one], b2=self.b2[one], tasks=self.tasks.take(one))

    def moved(self, seed: int, by: float = 1e-3) -> _Point:
        """A generic point near this one."""
        theta, phi = (
            x + by * (x.abs() + _scale(x)) * _noise(x, 2 * seed + k) for k, x in enumerate((self.theta, self.phi))
        )
        return replace(self, theta=theta, phi=phi)

    def by_row(self, products: bool) -> list[Found]:
        """The derivatives of each row alone."""
        return [self.row(i).derivatives(products) for i in range(len(self.theta))]

    def derivatives(self, products: bool) -> Found:
        """All that a sweep is made of, by the very functions that it calls."""
        problem = self.problem
        outer1, outer2 = outer_gradients(problem, self.theta, self.phi, self.tasks)
        found: Found = {
            "start": start(problem, self.theta, self.tasks),
            "the derivative of start": pull_back(problem, self.theta, self.tasks, None, self.b2),
            "∂L_out/∂θ": outer1,
            "∂L_out/∂φ": outer2,
        }
        layout, seen = layout_of(problem, self.theta, self.tasks), inner_tasks(problem, self.tasks, 0)
        theta, x = leaf(self.theta), leaf(self.phi)
        following, g = next_state(problem, layout, theta, x, seen, 0, 1.0, graph=products)
        found["the gradient of inner_loss"] = g.detach()
        if layout is not None:
            found["the inner update"] = following.detach()
        if products and layout is None:
            _, mixed, second = gradient_and_products(problem, self.theta, self.phi, seen, self.b2)
            found |= {"∂²L_in/∂θ∂φ": mixed, "∂²L_in/∂φ²": second}
        elif products:
            by_theta, by_x = pulled_back(following, theta, x, self.b2)
            found |= {"the inner step's derivative by θ": by_theta, "the inner step's derivative by φ": by_x}
        return found

    def of_loss(self, name: str) -> _Point:
        """The point as a loss sees it: φ without the update's state, and of the tasks what the first step sees."""
        phi = phi_of(self.problem, self.theta, self.phi, self.tasks)
        tasks = inner_tasks(self.problem, self.tasks, 0) if name == "inner_loss" else self.tasks
        return replace(self, phi=phi, b2=self.b2[:, : phi.shape[1]], tasks=tasks)


def check_first_use(problem: BilevelProblem, theta: Tensor, tasks: Tasks, products: bool = True) -> None:
    """Run the checks above once for each problem, shape of a task, dtype and device, and for one row and for several.

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
    key = (len(theta) > 1, *((t.shape[1:], t.dtype, t.device) for t in (theta, *tasks.parts)))
    if passed.get(key, -1) >= products:
        return
    with _aside():
        before = _generators()
        rows = _few(problem, theta.detach(), tasks)
        found = _alone(rows, products)
        if found is None:  # not finite even where it was asked for: the sweep will say where
            return
        point, alone = found
        _refuse_impure(point, alone[0], before, products)
        _refuse_hidden(point, products)
        why = _vmap_is_wrong(point, alone, products) if len(alone) > 1 and not kept(problem, LOOPS) else ""
        if why:
            kept(problem, LOOPS)["rows"] = True
    passed[key] = products
    if why:
        warnings.warn(f"the tasks of this problem run one after another, without vmap: {why}", stacklevel=2)


@contextmanager
def _aside() -> Iterator[None]:
    """Leave no trace: calls are not counted, bytes not metered, generators set back, warnings left to the real call."""
    before = _generators()
    try:
        with (
            count_calls(),
            watch_losses(None),
            torch.enable_grad(),
            _disable_current_modes(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in _moved(before):
            _SETTERS[name](before[name])


def _generators() -> dict[str, Any]:
    """The states of the global generators."""
    states = {
        "torch's generator": torch.get_rng_state(),
        "numpy's generator": np.random.get_state(),  # noqa: NPY002
        "Python's generator": random.getstate(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["CUDA's generator"] = torch.cuda.get_rng_state_all()
    return states


_SETTERS: dict[str, Callable[[Any], None]] = {
    "torch's generator": torch.set_rng_state,
    "numpy's generator": np.random.set_state,
    "Python's generator": random.setstate,
    "CUDA's generator": torch.cuda.set_rng_state_all,
}


def _moved(before: dict[str, Any]) -> list[str]:
    """The generators that are no longer as they were."""
    now = _generators()
    return [name for name, state in before.items() if _plain(state) != _plain(now[name])]


def _plain(state: Any) -> Any:
    if isinstance(state, Tensor | np.ndarray):
        return bytes(np.asarray(state))
    return tuple(map(_plain, state)) if isinstance(state, tuple | list) else state


def _few(problem: BilevelProblem, theta: Tensor, tasks: Tasks) -> _Point:
    """A few rows, the first and the last among them, where they were asked for."""
    n = len(theta)
    index = torch.linspace(0, n - 1, min(n, _AT_MOST), dtype=torch.float64, device="cpu").round().long()
    theta, tasks = theta[index.to(theta.device)], tasks.take(index)
    ones = (slice(i, i + 1) for i in range(len(theta)))
    phi = torch.cat([start(problem, theta[one], tasks.take(one)).detach() for one in ones])
    return _Point(problem, theta, phi, _noise(phi, 0), tasks)


def _alone(point: _Point, products: bool) -> tuple[_Point, list[Found]] | None:
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


def _noise(like: Tensor, seed: int) -> Tensor:
    """Standard normal numbers that draw from no global generator."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)


def _scale(x: Tensor) -> Tensor:
    """The root mean square of all numbers, 1 where all are zero."""
    size = x.square().mean().sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))


def _refuse_impure(point: _Point, first: Found, before: dict[str, Any], products: bool) -> None:
    """Take the derivatives of the first row again, and refuse what differs, or what drew from a global generator."""
    again = point.row(0).derivatives(products)
    drew = _moved(before)
    errors = {name: _difference(x, again[name]) for name, x in first.items()}
    worst = max(errors, key=errors.__getitem__)
    error, eps = errors[worst], torch.finfo(point.phi.dtype).eps
    if error <= 100 * eps and not drew:
        return
    said = [f"{name} moved" for name in drew]
    if error > 100 * eps:
        said.append(f"{worst}, taken twice at one point, differs by {error:.2g} of its norm")
    remedy = (
        "draw what is random in sample_tasks and pass it in the task, T = (x, y, noise), or switch it off (.eval(), "
        "dropout=0); what changes between calls (a counter, an iterator, a buffer, spectral norm) belongs there, too"
    )
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


def _vmap_is_wrong(point: _Point, alone: list[Found], products: bool) -> str:
    """Why the rows cannot be vmapped, in words; empty where vmapped derivatives are those of the rows alone."""
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


def _refuse_hidden(point: _Point, products: bool) -> None:
    """Hold the custom Functions and the activation checkpointing of the losses to finite differences, for one row."""
    if torch.finfo(point.phi.dtype).eps > 1e-4:  # too coarse for any difference
        return
    for name in ("inner_loss", "outer_loss"):
        one = point.row(0).of_loss(name)
        checkpointed, custom = _suspects(name, one)
        if not (checkpointed or custom):
            continue
        # what is computed again with a module's own parameters is right near them: look far from them, too
        points = [one.moved(1, by) for by in (0.3, 0.03)] if checkpointed else []
        right = all(_agrees(point, *_first_order(name, point)) for point in [one, *points])
        if right and products and name == "inner_loss" and not _agrees(one, *_second_order(one)):
            raise UfomError(CHECKPOINTED.format(name) if checkpointed else HIDDEN_CURVATURE)
        if checkpointed and not right:
            raise UfomError(CHECKPOINTED.format(name))


def _loss(name: str, one: _Point, theta: Tensor, phi: Tensor) -> Tensor:
    return row_losses(one.problem, name, theta, phi, one.tasks)


def _suspects(name: str, one: _Point) -> tuple[bool, bool]:
    """Whether a loss checkpoints activations, and whether it holds a custom Function."""
    theta, phi, hooked = leaf(one.theta), leaf(one.phi), False
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            with disable_saved_tensors_hooks(_HOOKS):
                value = _loss(name, one, theta, phi)
        except UfomError as error:
            if _HOOKS not in str(error):
                raise
            hooked, value = True, _loss(name, one, theta, phi)
    # the reentrant kind cuts the graph where no input requires grad, and says no more than this
    cut = any("None of the inputs have requires_grad=True" in str(w.message) for w in heard)
    custom = [node.name() for node in _nodes(value.grad_fn) if isinstance(node, BackwardCFunction)]
    return hooked or cut or any("Checkpoint" in name for name in custom), bool(custom)


def _nodes(root: Node | None) -> Iterator[Node]:
    """Every node of an autograd graph."""
    met, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in met:
            met.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def _first_order(name: str, one: _Point) -> tuple[list[Scalar], list[Slopes], list[float]]:
    """The loss, once for each direction; its derivatives in θ and in φ; its size."""
    theta, phi = leaf(one.theta), leaf(one.phi)
    value = _loss(name, one, theta, phi)
    slopes = derivative(name, value, (theta, phi))
    functions: list[Scalar] = [lambda theta, phi: _loss(name, one, theta, phi)] * _DIRECTIONS
    return functions, [slopes] * _DIRECTIONS, [float(value.abs())] * _DIRECTIONS


def _second_order(one: _Point) -> tuple[list[Scalar], list[Slopes], list[float]]:
    """b·∂L_in/∂φ for a b for each direction; its derivatives in θ and in φ; its size."""
    functions: list[Scalar] = []
    slopes: list[Slopes] = []
    sizes = []
    for k in range(_DIRECTIONS):
        b = _noise(one.phi, 10 + k)

        def along(theta: Tensor, phi: Tensor, b: Tensor = b) -> Tensor:
            return (inner_gradient(one.problem, theta, phi, one.tasks) * b).sum()

        g, *products = gradient_and_products(one.problem, one.theta, one.phi, one.tasks, b)
        functions.append(along)
        slopes.append(tuple(products))
        sizes.append(float(g.norm() * b.norm()))
    return functions, slopes, sizes


def _agrees(one: _Point, functions: list[Scalar], slopes: list[Slopes], sizes: list[float]) -> bool:
    """Whether central differences along random directions give what the slopes say, at one step length at least."""
    eps = torch.finfo(one.phi.dtype).eps
    clear = 0.01 if eps < 1e-12 else 0.1
    moves = [
        tuple(_scale(x) * _noise(x, 20 + 2 * k + i) for i, x in enumerate((one.theta, one.phi)))
        for k in range(len(functions))
    ]
    expected = np.array(
        [
            sum(float((s * d).sum()) for s, d in zip(slope, move, strict=True) if s is not None)
            for slope, move in zip(slopes, moves, strict=True)
        ]
    )
    judged = False
    for h in _STEPS:
        found = np.array(
            [
                float(f(one.theta + h * w, one.phi + h * v) - f(one.theta - h * w, one.phi - h * v)) / (2 * h)
                for f, (w, v) in zip(functions, moves, strict=True)
            ]
        )
        if not np.isfinite(found).all():
            continue
        judged = True
        size = max(np.linalg.norm(found), np.linalg.norm(expected))
        if np.linalg.norm(found - expected) <= clear * size + 100 * eps * np.linalg.norm(sizes) / h:
            return True
    return not judged
