"""Derivatives that autograd does not see: custom Functions and activation checkpointing, held to finite differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, disable_saved_tensors_hooks

from ufom_runtime.derivatives import (
    HIDDEN_CURVATURE,
    derivative,
    gradient_and_products,
    inner_gradient,
    inner_tasks,
    layout_of,
    leaf,
    row_losses,
    start,
    updated,
)
from ufom_runtime.inspection.points import Point, noise, scale
from ufom_theory import UfomError

_STEPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # of finite differences, relative to the root mean square
_DIRECTIONS = 3  # of finite differences
_LOSSES = ("inner_loss", "outer_loss")
_HOOKS = "ufom forbids saved-tensor hooks while it looks for them"

Scalar = Callable[[Tensor, Tensor], Tensor]  # of θ and φ
Slopes = tuple[Tensor | None, ...]  # in θ and in φ

CHECKPOINTED = (
    "{} checkpoints activations (torch.utils.checkpoint), and its gradient is not its own: the backward pass "
    "computes them again with the module's own parameters, not with φ. Switch it off, "
    "model.gradient_checkpointing_disable(); to save memory take fewer tasks together (chunk) or a sweep that keeps "
    "fewer states, Sweep.checkpointed(slots)"
)


def refuse_hidden(point: Point, products: bool) -> None:
    """Hold custom Functions and activation checkpointing to finite differences, for one row, wherever they stand."""
    if torch.finfo(point.phi.dtype).eps > 1e-4:  # too coarse for any difference
        return
    updates = ["the inner update"] * (point.problem.update is not None)
    for name in ("inner_loss", "outer_loss", "start", *updates):
        one = point.row(0).of_loss(name) if name in _LOSSES else point.row(0)
        checkpointed, custom = _suspects(name, one)
        if not (checkpointed or custom):
            continue
        # what is computed again with a module's own parameters is right near them: look far from them, too
        points = [one.moved(1, by) for by in (3.0, 1.0, 0.3)] if checkpointed else []
        right = all(_agrees(point, *_first_order(name, point)) for point in [one, *points])
        if right and products and name == "inner_loss" and not _agrees(one, *_second_order(one)):
            raise UfomError(CHECKPOINTED.format(name) if checkpointed else HIDDEN_CURVATURE)
        if checkpointed and not right:
            raise UfomError(CHECKPOINTED.format(name))


def _value(name: str, one: Point, theta: Tensor, phi: Tensor) -> Tensor:
    """A loss; or the start, or what the inner update makes of φ (whole states) and a gradient, along a direction."""
    if name in _LOSSES:
        return row_losses(one.problem, name, theta, phi, one.tasks)
    if name == "start":
        x = start(one.problem, theta, one.tasks)
        return (x * noise(x, 30)).sum()
    layout = layout_of(one.problem, theta, one.tasks)
    assert layout is not None
    seen = inner_tasks(one.problem, one.tasks, one.j)
    x = updated(one.problem, layout, theta, phi, noise(phi[:, : layout.p], 31), seen, one.j)
    return (x * noise(x, 30)).sum()


def _suspects(name: str, one: Point) -> tuple[bool, bool]:
    """Whether a function checkpoints activations, and whether it holds a custom Function."""
    theta, phi, hooked = leaf(one.theta), leaf(one.phi), False
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            with disable_saved_tensors_hooks(_HOOKS):
                value = _value(name, one, theta, phi)
        except UfomError as error:
            if _HOOKS not in str(error):
                raise
            hooked, value = True, _value(name, one, theta, phi)
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


def _first_order(name: str, one: Point) -> tuple[list[Scalar], list[Slopes], list[float]]:
    """The loss, once for each direction; its derivatives in θ and in φ; its size."""
    theta, phi = leaf(one.theta), leaf(one.phi)
    value = _value(name, one, theta, phi)
    slopes = derivative(name, value, (theta, phi))
    functions: list[Scalar] = [lambda theta, phi: _value(name, one, theta, phi)] * _DIRECTIONS
    return functions, [slopes] * _DIRECTIONS, [float(value.abs())] * _DIRECTIONS


def _second_order(one: Point) -> tuple[list[Scalar], list[Slopes], list[float]]:
    """b·∂L_in/∂φ for a b for each direction; its derivatives in θ and in φ; its size."""
    functions: list[Scalar] = []
    slopes: list[Slopes] = []
    sizes = []
    for k in range(_DIRECTIONS):
        b = noise(one.phi, 10 + k)

        def along(theta: Tensor, phi: Tensor, b: Tensor = b) -> Tensor:
            return (inner_gradient(one.problem, theta, phi, one.tasks) * b).sum()

        g, *products = gradient_and_products(one.problem, one.theta, one.phi, one.tasks, b)
        functions.append(along)
        slopes.append(tuple(products))
        sizes.append(float(g.norm() * b.norm()))
    return functions, slopes, sizes


def _agrees(one: Point, functions: list[Scalar], slopes: list[Slopes], sizes: list[float]) -> bool:
    """Whether central differences along random directions give what the slopes say, at one step length at least."""
    eps = torch.finfo(one.phi.dtype).eps
    clear = 0.01 if eps < 1e-12 else 0.1
    moves = [
        tuple(scale(x) * noise(x, 20 + 2 * k + i) for i, x in enumerate((one.theta, one.phi)))
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
        size = max(np.linalg.norm(found), np.linalg.norm(expected))
        rounding = 100 * eps * np.linalg.norm(sizes) / h
        if rounding > clear * size:  # the step is too short to say anything
            continue
        judged = True
        if np.linalg.norm(found - expected) <= clear * size + rounding:
            return True
    return not judged
