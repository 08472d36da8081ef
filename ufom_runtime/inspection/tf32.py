"""TF32: float32 with 10 of its 23 bits. A GPU convolves in it by torch's default, and multiplies in it if asked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.fx import GraphModule

EPS = 2.0**-10


def used_by(traced: GraphModule) -> bool:
    """Whether a graph on a GPU computes in TF32 as torch is set now."""
    convolutions, products = (getattr(*switch) == on for switch, on, _ in _switches())
    convolves = any("convolution" in str(node.target) for node in traced.graph.nodes)
    return products or (convolutions and convolves)


@contextmanager
def switched_off() -> Iterator[None]:
    """Within it, all of float32's bits are used."""
    was = [(switch, getattr(*switch)) for switch, _, _ in _switches()]
    for switch, _, off in _switches():
        setattr(*switch, off)
    try:
        yield
    finally:
        for switch, value in was:
            setattr(*switch, value)


def _switches() -> list[tuple[tuple[object, str], object, object]]:
    """Of convolutions and of products: where it is, and its values on and off."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):  # torch 2.9, where the old names cannot always be read
        return [((place, "fp32_precision"), "tf32", "ieee") for place in (cudnn.conv, matmul)]
    return [((place, "allow_tf32"), True, False) for place in (cudnn, matmul)]
