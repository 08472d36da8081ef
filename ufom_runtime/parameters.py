"""nn.Module in and out of the flat vectors that the theory speaks of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from ufom_theory import UfomError

_SWAPPED = RLock()  # held while a module has other parameters than its own; one for all, since modules share submodules


class FlatModule:
    """A module as a function of a flat parameter vector; usable under vmap and any number of derivatives.

    The vector holds the parameters that are adapted: those that require a gradient, or those named in `adapt`. All
    others keep the values that they have in the module, and no gradient is taken with respect to them. A parameter
    with several names (tied weights, a submodule under two names) is in the vector once, and is replaced everywhere.

    Batch-norm layers must be in eval mode or use batch statistics: in training mode their running statistics would make
    the loss depend on its own history, so that it had no gradient in the sense of (3). Active dropout is refused for
    the same reason. Several threads may call one FlatModule, or several of the same module: their calls take turns.
    Meanwhile no thread may call the module itself.

    Gradient hooks on its parameters are ignored, with a warning.

    Attributes:
        module: the module; calls leave it as it was.
        names: names of the adapted parameters, in the order of the vector, which is the module's.

    >>> net = FlatModule(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), adapt=["2.weight", "2.bias"])
    >>> phi = net.vector()
    >>> phi.shape, net(phi, torch.zeros(5, 4)).shape
    (torch.Size([18]), torch.Size([5, 2]))

    Raises:
        UfomError: no adapted parameters, several devices or dtypes among them, parameters that have no shape yet (lazy
            layers), a frozen or unknown name in `adapt`, running statistics in training mode, active dropout.
    """

    def __init__(self, module: nn.Module, adapt: Iterable[str] | None = None) -> None:
        if not isinstance(module, nn.Module):
            raise UfomError(f"FlatModule takes an nn.Module, not a {type(module).__name__}")
        _refuse_hidden_state(module)
        adapted = _adapted(module, adapt)
        kinds = {(p.device, p.dtype) for p in adapted.values()}
        if len(kinds) > 1:
            raise UfomError(
                f"the module's parameters are of {sorted(map(str, kinds))}: move them to one device and dtype"
            )
        if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in adapted.values()):
            warnings.warn(
                "gradient hooks on the module's parameters are ignored: the derivatives are those of the flat vector; "
                "change the losses instead, or what hypergradient returns",
                stacklevel=2,
            )
        self.module = module
        self.names = list(adapted)
        self._parameters = list(adapted.values())
        self._sizes = [p.numel() for p in self._parameters]

    def vector(self) -> Tensor:
        """A copy of the adapted parameters as one vector, shape (p,)."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def index(self, names: Iterable[str]) -> Tensor:
        """Where the named parameters are in the vector; `UfomError` for a name that is not adapted.

        For methods that adapt a part of θ (ANIL): φ_0 is `theta[index]`, and `theta.scatter(0, index, phi)` is the
        whole vector with φ in its place.
        """
        wanted = _chosen(names, self.names)
        places = torch.split(torch.arange(sum(self._sizes), device="cpu"), self._sizes)
        found = [place for name, place in zip(self.names, places, strict=True) if name in wanted]
        return torch.cat(found).to(self._parameters[0].device)

    def __call__(self, vector: Tensor, /, *inputs: Any, **keywords: Any) -> Any:
        """The module's output on these inputs with its adapted parameters taken from `vector`, shape (p,).

        Raises:
            UfomError: a vector of another shape, or a module that has stopped being a function of its parameters: it
                was changed, or changes a buffer when it is called (spectral norm in training mode).
        """
        pieces = {id(p): piece for p, piece in zip(self._parameters, self._split(vector), strict=True)}
        with _SWAPPED:
            _refuse_hidden_state(self.module)
            layers = list(self.module.modules())
            places = [(x, name, p) for x in layers for name, p in x._parameters.items() if p is not None]
            if not pieces.keys() <= {id(p) for _, _, p in places}:
                raise UfomError("parameters of the module have been replaced since FlatModule(module): make it anew")
            buffers = _buffers(layers)
            try:
                for layer, name, p in places:
                    layer._parameters[name] = pieces.get(id(p), p.detach())  # type: ignore[assignment]
                found = self.module(*inputs, **keywords)
            finally:
                for layer, name, p in places:
                    layer._parameters[name] = p
                    if isinstance(layer, nn.RNNBase):  # which keeps a second list of them
                        setattr(layer, name, p)
        for layer, name, b, version in buffers:
            if b._version != version:
                raise UfomError(
                    f"layer {_name(self.module, layer)} changed its buffer {name!r} when it was called, so that it is "
                    "not a function of its parameters: call .eval() on it, or pass what changes in the task"
                )
        return found

    def write_grad(self, gradient: Tensor) -> None:
        """Set `.grad` of the adapted parameters to `gradient`, shape (p,), for your own optimizer; else `UfomError`."""
        for parameter, piece in zip(self._parameters, self._split(gradient), strict=True):
            parameter.grad = piece.detach().clone()

    def load(self, vector: Tensor) -> None:
        """Set the adapted parameters to `vector`, shape (p,); errors as a call's."""
        with torch.no_grad():
            for parameter, piece in zip(self._parameters, self._split(vector), strict=True):
                parameter.copy_(piece)

    def _split(self, vector: Tensor) -> list[Tensor]:
        p = sum(self._sizes)
        if not isinstance(vector, Tensor):
            raise UfomError(f"the vector is a {type(vector).__name__}: give a tensor, shape ({p},)")
        if vector.shape != (p,):
            raise UfomError(f"the vector has shape {tuple(vector.shape)}: the module has {p} parameters to adapt")
        pieces = torch.split(vector, self._sizes)
        return [piece.view(own.shape) for piece, own in zip(pieces, self._parameters, strict=True)]


def _adapted(module: nn.Module, adapt: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """The parameters of the vector, by their first names."""
    own = dict(module.named_parameters())
    lazy = [name for name, p in own.items() if nn.parameter.is_lazy(p)]
    if lazy:
        raise UfomError(f"parameter {lazy[0]!r} has no shape yet: call the module once on an example first")
    if adapt is None:
        found = {name: p for name, p in own.items() if p.requires_grad}
        if not found:
            why = "all are frozen (requires_grad=False)" if own else "it has none"
            raise UfomError(f"{type(module).__name__} has no parameters to adapt, {why}: nothing can be differentiated")
        return found
    every = dict(module.named_parameters(remove_duplicate=False))
    wanted = {id(every[name]): name for name in _chosen(adapt, list(every))}
    found = {name: p for name, p in own.items() if id(p) in wanted}
    frozen = [wanted[id(p)] for p in found.values() if not p.requires_grad]
    if frozen:
        raise UfomError(f"adapt names {frozen[0]!r}, which is frozen: call requires_grad_(True) on it, or leave it out")
    return found


def _chosen(names: Iterable[str], known: list[str]) -> set[str]:
    listed = [names] if isinstance(names, str) else list(names)
    if other := [name for name in listed if not isinstance(name, str)]:
        raise UfomError(f"a {type(other[0]).__name__} is not a name: give texts, as named_parameters() has them")
    chosen = set(listed)
    if not chosen:
        raise UfomError("no parameter is named: give at least one name, as named_parameters() has them")
    if chosen - set(known):
        raise UfomError(f"{sorted(chosen - set(known))} are not among the parameters {known}")
    return chosen


def _refuse_hidden_state(module: nn.Module) -> None:
    for layer in module.modules():
        if not layer.training:
            continue
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
            raise UfomError(
                f"layer {_name(module, layer)} updates running statistics in training mode: call .eval() on it, which "
                "keeps them fixed, or use batch statistics (which compute another function than eval mode): "
                "track_running_stats=False, or torch.func.replace_all_batch_norm_modules_(module) for a whole net"
            )
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise UfomError(f"layer {_name(module, layer)} drops units at random: call .eval() on it, or set p=0")


def _buffers(layers: list[nn.Module]) -> list[tuple[nn.Module, str, Tensor, int]]:
    """Layer, name, buffer and the number of its changes in place, where torch counts them."""
    every = [(x, name, b) for x in layers for name, b in x._buffers.items()]
    return [(x, name, b, b._version) for x, name, b in every if b is not None and not b.is_inference()]


def _name(module: nn.Module, layer: nn.Module) -> str:
    name = next(name for name, other in module.named_modules() if other is layer)
    return f"{name!r} ({type(layer).__name__})"
