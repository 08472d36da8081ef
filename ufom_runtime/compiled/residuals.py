"""A step and its backward step, traced together and cut apart where the fewest bytes pass from the one to the other.

The backward step needs of the step its state, or the residuals: what of its gradient is too dear to compute again. What
is cheap (elementwise, a view, a constant) is computed again, so that the least of the bytes is a minimum cut.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ufom_runtime.compiled.convolutions import value_of


def split(joint: GraphModule, most: float) -> tuple[GraphModule, GraphModule, bool]:
    """Cut a traced (*inputs, φ, α, b2) → (next φ, *what comes of b2) in two.

    Returns:
        (*inputs, φ, α) → (next φ, *residuals); (*inputs, α, b2, *residuals) → what comes of b2; and whether the
        residuals would take more bytes than `most`. Then the first gives none, and the second takes φ in their place.

    Raises:
        ValueError: an operation that writes into its input: what it is then used for is not seen.
    """
    for node in joint.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise ValueError(f"{node.target} writes into its input")
    *inputs, phi, alpha, b2 = joint.graph.find_nodes(op="placeholder")
    following, *backward = cast(tuple[Node, ...], joint.graph.output_node().args[0])
    residuals = _minimum_cut(joint.graph, _after(b2), {*inputs, alpha, *joint.graph.find_nodes(op="get_attr")})
    keeps_state = sum(value_of(n).nbytes for n in residuals) > most
    if keeps_state:
        residuals = []
    first = _extract(joint, [*inputs, phi, alpha], [following, *residuals], copy_views=True)
    second = _extract(joint, [*inputs, alpha, b2, *([phi] if keeps_state else residuals)], backward)
    return first, second, keeps_state


def _after(node: Node) -> set[Node]:
    """The node and all that is computed from it."""
    found = {node}
    for later in node.graph.nodes:
        if not found.isdisjoint(later.all_input_nodes):
            found.add(later)
    return found


def _minimum_cut(graph: Graph, late: set[Node], at_hand: set[Node]) -> list[Node]:
    """The nodes of fewest bytes from which, and from those at hand, all the late ones follow by cheap operations."""
    import networkx as nx  # here, since not everybody compiles

    network, early = nx.DiGraph(), [n for n in graph.nodes if n not in late and n.op != "output"]
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in early:
        i = place[node]
        network.add_edge((i, "in"), (i, "out"), capacity=0 if node in at_hand else _bytes(node))
        if not _cheap(node):
            network.add_edge("step", (i, "in"))  # without a capacity: without a limit
        for user in node.users:
            if user.op != "output":
                network.add_edge((i, "out"), "backward" if user in late else (place[user], "in"))
    _, (step, _) = nx.minimum_cut(network, "step", "backward")
    cut = (n for n in early if (place[n], "in") in step and (place[n], "out") not in step)
    return [n for n in cut if n not in at_hand]


def _cheap(node: Node) -> bool:
    if node.op != "call_function":
        return False
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    return node.target is operator.getitem or _is_view(node) or torch.Tag.pointwise in tags or not node.all_input_nodes


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(cast(Node, node.args[0]))
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None and not r.alias_info.is_write for r in node.target._schema.returns)


def _bytes(node: Node) -> float:
    """What it takes to keep a node's value; without limit for several values, and for a view of no less than all."""
    if not isinstance(node.meta.get("val"), Tensor):
        return math.inf
    viewed = node
    while _is_view(viewed):
        viewed = cast(Node, viewed.args[0])
    if viewed is not node and value_of(node).numel() >= value_of(viewed).numel():
        return math.inf
    return value_of(node).nbytes


def _extract(
    joint: GraphModule, given: Iterable[Node], wanted: Iterable[Node], copy_views: bool = False
) -> GraphModule:
    """What computes the wanted nodes from the given ones; with copies of views, lest all that they view be kept."""
    graph, copies = Graph(), {}
    for node in given:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in joint.graph.nodes:
        if node not in copies and node.op not in ("placeholder", "output") and copies.keys() >= {*node.all_input_nodes}:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    copy = torch.ops.aten.clone.default
    found = [copies[n] for n in wanted]
    graph.output([graph.call_function(copy, (c,)) if copy_views and _is_view(c) else c for c in found])
    graph.eliminate_dead_code()
    return GraphModule(joint, graph)
