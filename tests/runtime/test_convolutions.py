"""Rewritten convolutions: the same Hessian-vector products as autograd's, for less."""

import pytest
import torch
from torch.autograd import grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from ufom_runtime.compiled.convolutions import rewrite_convolutions

ATEN = torch.ops.aten
CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def hvp(axes, **options):
    """Of two layers, so that both the kernel's and the image's derivative are differentiated again."""

    def loss(w, image):
        hidden = torch.tanh(CONV[axes](image, w[0], **options))
        return (CONV[axes](hidden, w[1], **options) ** 3).sum()

    def product(image, v, *w):
        w = [x.detach().requires_grad_() for x in w]
        return grad(grad(loss(w, image), w, create_graph=True), w, grad_outputs=(v, 2 * v))

    return product


def rewritten(product, *arguments):
    traced = make_fx(product)(*arguments)
    rewrite_convolutions(traced)
    return traced


def targets(traced, target):
    return traced.graph.find_nodes(op="call_function", target=target)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (2, 0, 1), (1, 2, 2), (3, 1, 1)])
def test_products_stay_the_same_and_no_image_is_a_kernel(axes, stride, padding, dilation):
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 2, *(14,) * axes), *[(2, 2, *(3,) * axes)] * 3
    arguments = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    product = hvp(axes, stride=stride, padding=padding, dilation=dilation)
    traced = rewritten(product, *arguments)
    for found, expected in zip(traced(*arguments), product(*arguments), strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()
    for node in targets(traced, ATEN.convolution.default):
        assert node.args[1].meta["val"].shape[2:] == (3,) * axes
    masks = [node.args[-1] for node in targets(traced, ATEN.convolution_backward.default)]
    assert [True, False, False] in masks  # the inner gradient itself is not wanted, only the product with b2


@pytest.mark.parametrize("convolve", [functional.conv2d, functional.conv_transpose2d])
def test_grouped_and_transposed_convolutions_are_right_too(convolve):
    def product(image, v, w):
        w = w.detach().requires_grad_()
        loss = (convolve(torch.tanh(convolve(image, w, stride=2, groups=2)), w, padding=1, groups=2) ** 3).sum()
        return grad(grad(loss, w, create_graph=True), w, grad_outputs=v)

    generator = torch.Generator().manual_seed(0)
    image, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4, 9, 9), (4, 2, 3, 3)))
    (found,), (expected,) = rewritten(product, image, v, v)(image, v, v), product(image, v, v)
    assert (found - expected).norm() <= 1e-12 * expected.norm()
