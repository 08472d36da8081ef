"""What is said of TF32: torch's switches can be read and set where there is no GPU."""

import pytest
import torch

from ufom_runtime.compiled.trace import trace
from ufom_runtime.inspection import tf32


@pytest.fixture
def graphs():
    image, weight = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)
    convolution = trace(lambda x, w: (torch.conv2d(x, w),), (image, weight))
    product = trace(lambda x: (x @ x,), (torch.ones(2, 2),))
    return convolution, product


@pytest.fixture(params=["highest", "high"])
def products(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param == "high"
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("convolutions", [True, False])
def test_it_is_known_whether_a_graph_uses_it(graphs, products, convolutions, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolutions)
    assert [tf32.used_by(graph) for graph in graphs] == [convolutions or products, products]


def test_it_is_switched_off_and_on_again(graphs, products):
    before = [tf32.used_by(graph) for graph in graphs]
    with tf32.switched_off():
        assert not any(tf32.used_by(graph) for graph in graphs)
    assert [tf32.used_by(graph) for graph in graphs] == before == [True, products]
    assert torch.get_float32_matmul_precision() == ("high" if products else "highest")
    assert torch.backends.cudnn.allow_tf32
