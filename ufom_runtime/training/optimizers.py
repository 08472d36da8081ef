"""Who takes the outer steps: plain ones of Algorithm 1 or a torch optimizer, with clipping and a scheduler."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ufom_runtime.files import digest
from ufom_runtime.training.resume import same_form
from ufom_theory import UfomError
from ufom_theory.checks import positive, scalar
from ufom_theory.laws import parse_outer

Factory = Callable[[list[Tensor]], Optimizer]
Rate = Callable[[int], float]
_REMEDY = "'sgd:0.05', 'adam:1e-3', a float rate, or a factory of parameters, lambda p: torch.optim.Adam(p, lr=1e-3)"


class PlainSteps(Optimizer):
    """θ ← θ − γ·G with the γ of its group, as Algorithm 1 has it."""

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; a closure is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(parameter - group["lr"] * parameter.grad)


@dataclass(eq=False)
class OuterSteps:
    """The outer steps of one run. `leaf` holds θ and is changed in place.

    Attributes:
        leaf: θ, shape (s,).
        optimizer: takes the steps.
        rate: γ_k as a function of k = 1, 2, …, which is set before step k; None: the optimizer's own.
        scheduler: is stepped after every step.
        clip: the largest norm of a gradient that is handed to the optimizer.
        forms: an optimizer's state after one step: what a stored one must look like.
    """

    leaf: Tensor
    optimizer: Optimizer
    rate: Rate | None
    scheduler: LRScheduler | None
    clip: float | None
    forms: dict[str, Any]

    @classmethod
    def of(
        cls,
        theta: Tensor,
        optimizer: str | float | Factory | None,
        step_sizes: Rate | Sequence[float] | None,
        steps: int,
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        clip: float | None,
    ) -> OuterSteps:
        """From the arguments of `train`; `UfomError` for what they cannot be."""
        if (step_sizes is None) == (optimizer is None):
            raise UfomError("give either step_sizes or an optimizer: one of them takes the outer steps")
        leaf = torch.nn.Parameter(theta.clone())
        if optimizer is not None:
            made, rate = _named_or_made(optimizer, leaf)
        else:
            made, rate = PlainSteps([leaf], 0.0), _function_of_k(step_sizes, steps)
        if rate and scheduler:
            raise UfomError("step_sizes and decay:s:γ₁ give every γ_k: leave scheduler out, or give an optimizer")
        if clip is not None:
            clip = scalar("clip, the largest norm of an outer gradient,", clip, positive)
        after = _after_one_step(made)
        scheduled = _scheduler(scheduler, made)  # adds to the groups
        forms = {**made.state_dict(), "state": after["state"]}
        return cls(leaf, made, rate, scheduled, clip, forms)

    def gamma(self, k: int) -> float:
        """γ_k, set as the optimizer's rate where it is a function of k; else the rate in force."""
        if self.rate:
            for group in self.optimizer.param_groups:
                group["lr"] = gamma_at(self.rate, k)
        return float(self.optimizer.param_groups[0]["lr"])

    def take(self, gradient: Tensor) -> Tensor:
        """θ after a step along `gradient`, in a new tensor."""
        if self.clip is not None:
            gradient = gradient * (self.clip / gradient.norm()).clamp(max=1.0)
        self.leaf.grad = gradient
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        return self.leaf.detach().clone()

    def state(self) -> dict[str, Any]:
        """The optimizer's and the scheduler's state, copied: steps change it in place."""
        scheduled = self.scheduler.state_dict() if self.scheduler else {}
        return copy.deepcopy({"optimizer": self.optimizer.state_dict(), "scheduler": scheduled})

    def load(self, theta: Tensor, state: dict[str, Any], step: int) -> None:
        """Go on after a step from a stored θ and what `state` gave; the bits and dtypes are those stored.

        Raises:
            UfomError: a scheduler that comes to other rates, such as a `LambdaLR` of another function.
            ValueError, KeyError, TypeError, AttributeError, RuntimeError: a state of another form.
        """
        stored = state["optimizer"]
        same_form("outer['optimizer']", stored, self.forms)
        if self.scheduler:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the optimizer takes no step meanwhile
                for _ in range(step):
                    self.scheduler.step()
            rates = self.scheduler.get_last_lr()
            self.scheduler.load_state_dict(state["scheduler"])
            if (last := self.scheduler.get_last_lr()) != rates:
                raise UfomError(
                    f"this run's scheduler gives the rates {rates} after step {step}, and the stored run had {last}: "
                    "give checkpoint= another folder, or remove this one"
                )
        self.leaf.data.copy_(theta)
        self.optimizer.load_state_dict(copy.deepcopy(stored))
        for found, values in zip(self.optimizer.state.values(), stored["state"].values(), strict=True):
            for name, value in values.items():  # load_state_dict casts all but `step` to θ's dtype
                if isinstance(value, Tensor):
                    found[name] = value.to(found[name].device, copy=True)

    def describe(self) -> str:
        """What tells these steps from others before the first of them, but for γ_k as a function of k."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        scheduled = (type(self.scheduler).__name__, self.scheduler.state_dict()) if self.scheduler else ()
        return f"{type(self.optimizer).__name__} {digest(repr((groups, scheduled, self.clip)))[:16]}"


def gamma_at(rate: Rate, k: int) -> float:
    """γ_k > 0 as a float; else `UfomError`."""
    return float(scalar(f"γ_k at k = {k}", rate(k), positive))


def _function_of_k(step_sizes: Any, steps: int) -> Rate:
    if callable(step_sizes):
        return step_sizes  # type: ignore[no-any-return]
    if not isinstance(step_sizes, Sequence) or isinstance(step_sizes, str) or len(step_sizes) < steps:
        raise UfomError(f"step_sizes = {step_sizes!r:.200} for {steps} steps: give one a step, or a function of k")
    return lambda k: step_sizes[k - 1]


def _named_or_made(optimizer: Any, leaf: Tensor) -> tuple[Optimizer, Rate | None]:
    """The optimizer that a text, a rate or a factory means, and γ_k where that is a function of k."""
    if isinstance(optimizer, Optimizer):
        raise UfomError(
            f"this {type(optimizer).__name__} is bound to other tensors than θ: give the factory that makes it, "
            f"lambda p: torch.optim.{type(optimizer).__name__}(p, lr=...)"
        )
    if callable(optimizer):
        return _made(optimizer, leaf), None
    if not isinstance(optimizer, str):
        return PlainSteps([leaf], scalar(f"optimizer (give {_REMEDY})", optimizer, positive)), None
    outer = parse_outer(optimizer)
    gamma = outer.rate
    if gamma is None:
        raise UfomError(
            f"optimizer = {optimizer!r} has no rate to train with: give one, as in {_REMEDY} or 'decay:0.5:1'"
        )
    if outer.kind == "adam":
        return torch.optim.Adam([leaf], lr=gamma), None
    if outer.power is None:
        return PlainSteps([leaf], gamma), None
    power = outer.power
    return PlainSteps([leaf], 0.0), lambda k: gamma * float(k) ** -power


def _made(factory: Factory, leaf: Tensor) -> Optimizer:
    try:
        made = factory([leaf])
    except Exception as error:  # it is the user's function
        said = f"{type(error).__name__}: {error}"
        raise UfomError(
            f"the optimizer's factory failed on a list of one parameter ({said}): give {_REMEDY}"
        ) from error
    if not isinstance(made, Optimizer):
        raise UfomError(f"the optimizer's factory returned a {type(made).__name__}: give {_REMEDY}")
    if not any(parameter is leaf for group in made.param_groups for parameter in group["params"]):
        raise UfomError("the optimizer's factory left out the parameter it was given: θ would never move")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UfomError(
            f"{type(made).__name__} evaluates the loss within a step, which a hypergradient does not give: use SGD or "
            "Adam"
        )
    return made


def _after_one_step(optimizer: Optimizer) -> dict[str, Any]:
    """The state of a copy after one step along zero: an optimizer makes its tensors at its first step."""
    trial = copy.deepcopy(optimizer)
    for parameter in (x for group in trial.param_groups for x in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    try:
        trial.step()
    except (RuntimeError, TypeError, ValueError) as error:
        raise UfomError(
            f"{type(optimizer).__name__} cannot take a step along a dense gradient ({error}): give another optimizer"
        ) from error
    return dict(trial.state_dict())


def _scheduler(make: Callable[[Optimizer], LRScheduler] | None, optimizer: Optimizer) -> LRScheduler | None:
    if make is None:
        return None
    made = make(optimizer) if callable(make) else make
    if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau) or made.optimizer is not optimizer:
        raise UfomError(
            f"scheduler gave a {type(made).__name__}: give a function of the optimizer that returns a scheduler of it "
            "which needs no metric, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 1000)"
        )
    return made
