"""Inner updates: what an inner step makes of its gradient. Small, and composed by `chain`, in optax's manner.

An update is any object with two functions of flat vectors, written in torch as the losses are:

    init(theta, phi, task) -> state                                 the state before the first step
    update(theta, phi, state, grad, task, j) -> (phi, state)        step j = 1 … r

A state is a tensor of φ's dtype, or a tuple of such; `()` is none. It travels with φ through every sweep. The updates
here never use j: their states count the steps, so one compiled graph serves them all.

Every hyperparameter is a float; or a tensor of one value a step, shape (r,); or a function of θ, which makes it an
outer parameter. Such a function returns shape (), (r,), (p,), or (r, p), where r or p may be 1: learnt rates of each
step (LSLR of MAML++), of each parameter (Meta-SGD), or of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ufom_theory import UfomError
from ufom_theory.checks import scalar

State = Tensor | tuple[Any, ...]
Hyperparameter = float | Tensor | Callable[[Tensor], Tensor]
Direction = Callable[[Tensor, Tensor, State, Tensor], tuple[Tensor, State]]


class Update(Protocol):
    """What an inner step makes of its gradient; φ may be any differentiable function of the arguments."""

    def init(self, theta: Tensor, phi: Tensor, task: Any, /) -> State:
        """The state before the first step, from θ, φ_0 and the task."""

    def update(
        self, theta: Tensor, phi: Tensor, state: State, grad: Tensor, task: Any, j: int, /
    ) -> tuple[Tensor, State]:
        """φ_j and its state from φ_{j−1}, its state and ∂L_in/∂φ(θ, φ_{j−1}); j = 1 … r."""


@dataclass(frozen=True, eq=False)
class Transform:
    """An update that subtracts a direction: φ_j = φ_{j−1} − d_j; `chain` hands one's direction on as the next one's g.

    Attributes:
        start: the state before the first step, from φ_0.
        direction: (θ, φ, state, g) → (d, next state).
        hyperparameters: by name, for `check`.
        held_identity: whether neither φ_{j−1} nor θ reaches d once the gradients are held constant, so that the
            first-order proxies FOM and HELD are equal.
    """

    start: Callable[[Tensor], State]
    direction: Direction
    hyperparameters: Mapping[str, Hyperparameter]
    held_identity: bool = False

    def init(self, theta: Tensor, phi: Tensor, task: Any) -> State:
        """The state before the first step."""
        return self.start(phi)

    def update(self, theta: Tensor, phi: Tensor, state: State, grad: Tensor, task: Any, j: int) -> tuple[Tensor, State]:
        """φ − d, and the next state."""
        direction, state = self.direction(theta, phi, state, grad)
        return phi - direction, state

    def check(self, theta: Tensor, phi: Tensor, steps: int) -> None:
        """Refuse hyperparameters whose shape does not fit φ of shape (p,) and the number of steps r."""
        p = len(phi)
        if torch.finfo(phi.dtype).eps * steps > 1:
            raise UfomError(f"{steps} steps cannot be counted in {phi.dtype}: use a dtype of more digits")
        for name, value in self.hyperparameters.items():
            if isinstance(value, float):
                continue
            found = value(theta) if callable(value) else value
            if not isinstance(found, Tensor) or not found.is_floating_point():
                raise UfomError(f"{name}(theta) must be a floating-point tensor, not {_named(found)}")
            shape = tuple(found.shape)
            if callable(value) and shape == (p,) and p == steps > 1:
                raise UfomError(f"{name}(theta) has shape ({p},), and p = r: return (1, {p}) for one a parameter, or "
                                f"({p}, 1) for one a step")  # fmt: skip
            fits = (
                {(), (steps,), (p,), *((a, b) for a in (1, steps) for b in (1, p))} if callable(value) else {(steps,)}
            )
            if shape not in fits:
                allowed = f"(), ({steps},), ({p},) or ({steps}, {p})" if callable(value) else f"({steps},), one a step"
                raise UfomError(f"{name} has shape {shape}: for r = {steps} steps of p = {p} parameters give {allowed}")


def sgd(lr: Hyperparameter) -> Transform:
    """Gradient descent: φ − lr·g."""
    hyper = {"lr": _hyper("lr", lr, 0.0)}

    def direction(theta: Tensor, phi: Tensor, state: State, g: Tensor) -> tuple[Tensor, State]:
        count = _only(state)
        return _at(hyper["lr"], theta, phi, count) * g, _next(state)

    return Transform(lambda phi: _counter(hyper, phi), direction, hyper, _constant(hyper))


def momentum(lr: Hyperparameter, beta: Hyperparameter = 0.9, nesterov: bool = False) -> Transform:
    """Heavy ball, v ← β·v + g and φ − lr·v; with `nesterov`, φ − lr·(g + β·v)."""
    hyper = {"lr": _hyper("lr", lr, 0.0), "beta": _hyper("beta", beta, 0.0, 1.0)}

    def direction(theta: Tensor, phi: Tensor, state: State, g: Tensor) -> tuple[Tensor, State]:
        v, counter = state
        rate, b = (_at(hyper[name], theta, phi, _only(counter)) for name in ("lr", "beta"))
        v = b * v + g
        return rate * (g + b * v if nesterov else v), (v, _next(counter))

    return Transform(lambda phi: (torch.zeros_like(phi), _counter(hyper, phi)), direction, hyper, _constant(hyper))


def adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
) -> Transform:
    """Adam (Kingma and Ba 2015): φ − lr·m̂/(√v̂ + ε), with bias-corrected means m̂ of g and v̂ of g².

    Where v̂ = 0 exactly, as for a parameter whose gradient is always 0, √v̂ has the derivative 0 here, not NaN.

    >>> update = adam(lr=lambda theta: theta[-1].exp())  # a learnt rate
    >>> theta, phi = torch.tensor([0.1]).log(), torch.ones(2)
    >>> update.update(theta, phi, update.init(theta, phi, None), torch.ones(2), None, 1)[0]
    tensor([0.9000, 0.9000])
    """
    return adamw(lr, betas, eps, 0.0)


def adamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.01,
) -> Transform:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): φ − lr·(m̂/(√v̂ + ε) + weight_decay·φ)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise UfomError(f"betas = {betas!r}: give two, (β₁, β₂)")
    hyper = {
        "lr": _hyper("lr", lr, 0.0),
        "betas[0]": _hyper("betas[0]", betas[0], 0.0, 1.0),
        "betas[1]": _hyper("betas[1]", betas[1], 0.0, 1.0),
        "eps": _hyper("eps", eps, 0.0),
        "weight_decay": _hyper("weight_decay", weight_decay, 0.0),
    }

    decays = not isinstance(hyper["weight_decay"], float) or hyper["weight_decay"] > 0

    def direction(theta: Tensor, phi: Tensor, state: State, g: Tensor) -> tuple[Tensor, State]:
        m, v, count = state
        rate, b1, b2, e, decay = (_at(value, theta, phi, count) for value in hyper.values())
        count = count.detach() + 1
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        d = m / _weight(b1, count) / (_root(v / _weight(b2, count)) + e)
        return rate * (d + decay * phi if decays else d), (m, v, count)

    def start(phi: Tensor) -> State:
        return torch.zeros_like(phi), torch.zeros_like(phi), phi.new_zeros(())

    return Transform(start, direction, hyper, _constant(hyper) and not decays)


def clip_by_global_norm(max_norm: Hyperparameter) -> Transform:
    """g·min(1, max_norm/‖g‖), of the gradient of all parameters together."""
    hyper = {"max_norm": _hyper("max_norm", max_norm, 0.0)}

    def direction(theta: Tensor, phi: Tensor, state: State, g: Tensor) -> tuple[Tensor, State]:
        most, square = _at(hyper["max_norm"], theta, phi, _only(state)), g.square().sum()
        over = square > most**2
        return torch.where(over, most / torch.where(over, square, 1).sqrt(), 1) * g, _next(state)

    return Transform(lambda phi: _counter(hyper, phi), direction, hyper, _constant(hyper))


def chain(*transforms: Transform) -> Transform:
    """One after the other, each taking the direction of the one before for its g.

    >>> phi, update = torch.ones(2), chain(clip_by_global_norm(5.0), sgd(lr=0.1))
    >>> update.update(phi, phi, update.init(phi, phi, None), torch.tensor([30.0, 40.0]), None, 1)[0]
    tensor([0.7000, 0.6000])
    """
    if not transforms or not all(isinstance(t, Transform) for t in transforms):
        raise UfomError(
            f"chain takes updates of ufom_runtime.inner, one or more, not {[_named(t) for t in transforms]}"
        )

    def direction(theta: Tensor, phi: Tensor, state: State, g: Tensor) -> tuple[Tensor, State]:
        following = []
        for transform, own in zip(transforms, state, strict=True):
            g, own = transform.direction(theta, phi, own, g)
            following.append(own)
        return g, tuple(following)

    names = {f"{name} of part {i}": h for i, t in enumerate(transforms, 1) for name, h in t.hyperparameters.items()}
    identity = all(t.held_identity for t in transforms)
    return Transform(lambda phi: tuple(t.start(phi) for t in transforms), direction, names, identity)


def _hyper(name: str, value: Any, least: float, below: float = float("inf")) -> Hyperparameter:
    """A float or a tensor within [least, below), checked; a function of θ as it is."""
    if callable(value):
        return value  # type: ignore[no-any-return]
    several = isinstance(value, list | tuple) or getattr(value, "ndim", False)
    if several and not (isinstance(value, Tensor) and value.is_floating_point()):
        raise UfomError(f"{name} = {value!r:.100}: give one float, or one a step in a tensor of floats, shape (r,)")
    if not isinstance(value, Tensor) or not value.ndim:
        number = float(scalar(name, value.item() if isinstance(value, Tensor) else value))
        if not least <= number < below:
            raise UfomError(f"{name} = {number:g} must lie in [{least:g}, {below:g})")
        if isinstance(value, Tensor) and value.requires_grad:
            raise UfomError(_LEARN.format(name))
        return number
    if value.requires_grad:
        raise UfomError(_LEARN.format(name))
    bad = value[~((value >= least) & (value < below))]
    if len(bad):
        raise UfomError(f"{name} = {bad.flatten()[0].item():g} must lie in [{least:g}, {below:g})")
    return value.detach().clone()


_LEARN = "{0} requires grad, but only θ is differentiated: make it a part of θ, {0}=lambda theta: theta[-1].exp()"


def _at(value: Hyperparameter, theta: Tensor, phi: Tensor, count: Tensor | None) -> float | Tensor:
    """A hyperparameter at the step after `count` others."""
    if isinstance(value, float):
        return value
    found = value(theta) if callable(value) else value.to(phi)
    if not found.ndim or (callable(value) and found.shape == phi.shape):
        return found
    assert count is not None
    # not found[index]: an index of no dimensions is read as a number, which vmap and a trace cannot do
    step = found if found.ndim == 2 and len(found) == 1 else found.index_select(0, count.detach().long()[None])
    return step[0]


def _weight(beta: float | Tensor, count: Tensor) -> Tensor:
    """1 − β^count; of a float β without cancellation, which would cost half of float32's digits at β = 0.999."""
    if isinstance(beta, Tensor) or not beta:
        return 1 - beta**count
    return -torch.expm1(count * math.log(beta))


def _root(square: Tensor) -> Tensor:
    """√x, with the derivative 0 at x = 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


def _counter(hyper: Mapping[str, Hyperparameter], phi: Tensor) -> State:
    """A count of steps from 0, if a hyperparameter may need it; else no state."""
    return () if all(isinstance(value, float) for value in hyper.values()) else phi.new_zeros(())


def _constant(hyper: Mapping[str, Hyperparameter]) -> bool:
    """Whether no hyperparameter is a function of θ."""
    return not any(map(callable, hyper.values()))


def _only(counter: State) -> Tensor | None:
    return counter if isinstance(counter, Tensor) else None


def _next(counter: State) -> State:
    return counter.detach() + 1 if isinstance(counter, Tensor) else counter


def _named(value: object) -> str:
    return f"a {type(value).__name__}"
