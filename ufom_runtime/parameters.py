"""nn.Module in and out of the flat vectors that the theory speaks of."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ufom_theory import UfomError


class FlatModule:
    """A module as a function of a flat parameter vector; usable under vmap and any number of derivatives.

    Batch-norm layers must use batch statistics: tracked running statistics would make the loss depend on its own
    history, so that it had no gradient in the sense of (3). Active dropout is refused for the same reason.

    Attributes:
        module: the module; its own parameters are never changed by calls.
        names: parameter names, in the order of the vector.

    Raises:
        UfomError: no parameters, parameters of several devices or dtypes, tracked running statistics, active dropout.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise UfomError(f"FlatModule takes an nn.Module, not a {type(module).__name__}")
        _refuse_hidden_state(module)
        parameters = dict(module.named_parameters())
        if not parameters:
            raise UfomError(f"{type(module).__name__} has no parameters: there is nothing to differentiate")
        kinds = {(p.device, p.dtype) for p in parameters.values()}
        if len(kinds) > 1:
            raise UfomError(
                f"the module's parameters are of {sorted(map(str, kinds))}: move them to one device and dtype"
            )
        self.module = module
        self.names = list(parameters)
        self._shapes = [p.shape for p in parameters.values()]
        self._sizes = [prod(shape) for shape in self._shapes]

    def vector(self) -> Tensor:
        """A copy of the module's parameters as one vector, shape (p,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.module.parameters()])

    def __call__(self, vector: Tensor, *inputs: Tensor) -> Any:
        """The module's output on `inputs` with its parameters taken from `vector`, shape (p,), else `UfomError`."""
        return torch.func.functional_call(self.module, self._split(vector), inputs)

    def write_grad(self, gradient: Tensor) -> None:
        """Set `.grad` of the parameters to `gradient`, shape (p,), for your own optimiser; else `UfomError`."""
        for parameter, piece in zip(self.module.parameters(), self._split(gradient).values(), strict=True):
            parameter.grad = piece.detach().clone()

    def load(self, vector: Tensor) -> None:
        """Set the module's parameters to `vector`, shape (p,); errors as a call's."""
        with torch.no_grad():
            for parameter, piece in zip(self.module.parameters(), self._split(vector).values(), strict=True):
                parameter.copy_(piece)

    def _split(self, vector: Tensor) -> dict[str, Tensor]:
        if not isinstance(vector, Tensor):
            raise UfomError(f"the vector is a {type(vector).__name__}: give a tensor, shape ({sum(self._sizes)},)")
        if vector.shape != (sum(self._sizes),):
            raise UfomError(f"the vector has shape {tuple(vector.shape)}: the module has {sum(self._sizes)} parameters")
        pieces = torch.split(vector, self._sizes)
        return {n: x.view(shape) for n, x, shape in zip(self.names, pieces, self._shapes, strict=True)}


def _refuse_hidden_state(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
            raise UfomError(
                f"layer {name!r} ({type(layer).__name__}) tracks running statistics: use batch statistics, either by "
                "track_running_stats=False or by torch.func.replace_all_batch_norm_modules_(module)"
            )
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p > 0:
            raise UfomError(f"layer {name!r} drops units at random: call .eval() on it, or set p=0")
