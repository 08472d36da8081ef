"""Convolutions of a traced Hessian-vector product, written in the way that the kernels are quick at.

The compiler takes a convolution as it finds it. Two forms that autograd leaves behind are dear: a backward convolution
that also makes the derivative nobody asked for, and a derivative by the weights that is spelled as a convolution with
an image for its kernel.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_aten = torch.ops.aten


def rewrite_convolutions(traced: GraphModule) -> None:
    """Change the graph in place; its values stay the same up to rounding."""
    graph = traced.graph
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=_aten.convolution.default):
        _as_weight_gradient(node)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=_aten.convolution_backward.default):
        *inputs, asked = node.args
        used = {user.args[1] for user in node.users}
        node.args = (*inputs, [asks and i in used for i, asks in enumerate(cast(list[bool], asked))])
    traced.recompile()


def _as_weight_gradient(node: Node) -> None:
    """conv(xᵀ, gᵀ)ᵀ, cut to the kernel's size, is the derivative by the weights for input x and output's derivative g.

    ᵀ swaps batch and channels; stride and dilation change places.
    """
    image, kernel, bias, stride, padding, dilation, transposed, _, groups = node.args
    if bias is not None or transposed or groups != 1:
        return
    if not all(isinstance(n, Node) and _swaps(n) for n in (image, kernel)):
        return
    x, g = (cast(Node, cast(Node, n).args[0]) for n in (image, kernel))
    last, swapped = node, False
    while len(last.users) == 1 and (_swaps(user := next(iter(last.users))) or _cuts(user)):
        last, swapped = user, swapped != _swaps(user)
    weights = value_of(last)
    # what is their convolution by such weights must have g's size
    sizes = zip(value_of(x).shape[2:], weights.shape[2:], dilation, padding, stride, strict=True)  # type: ignore[arg-type]
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    if not swapped or out != list(value_of(g).shape[2:]):
        return
    with node.graph.inserting_before(last):
        shape_only = node.graph.call_function(_aten.new_empty.default, (g, list(weights.shape)))
        arguments = (g, x, shape_only, None, dilation, padding, stride, False, [0] * len(out), 1, [False, True, False])
        backward = node.graph.call_function(_aten.convolution_backward.default, arguments)
        last.replace_all_uses_with(node.graph.call_function(operator.getitem, (backward, 1)))


def value_of(node: Node) -> Tensor:
    """What the trace knows of a node's tensor: its shape and type."""
    return cast(Tensor, node.meta["val"])


def _swaps(node: Node) -> bool:
    return bool(node.target is _aten.transpose.int and node.args[1:] == (0, 1))


def _cuts(node: Node) -> bool:
    """Whether it keeps the first elements along an axis of the kernel."""
    return bool(
        node.target is _aten.slice.Tensor and len(node.args) == 4 and node.args[1] in (2, 3, 4) and node.args[2] == 0
    )
