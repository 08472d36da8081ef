"""Hypergradients of one task by the libraries people use, each as its users write it, as functions to be timed.

An adapter takes (problem, θ, task) and returns the gradient as a flat vector; those that need a separate set-up
return the function that does. Each imports its library inside, so that a missing one fails alone. The inner parameters
are one flat vector to all of them, which spares a library the loop over a net's parameters.

The extra `peers` of pyproject.toml holds what current pip and numpy let stand beside this package. Of the others,
hypertorch is on GitHub alone (github.com/prolearner/hypertorch, imported as `hypergrad`; both names on PyPI are other
projects'), betty-ml and boat-torch declare requirements that are out of date (`pip install --no-deps`), and
learn2learn has to be compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad

from ufom_runtime.derivatives import leaf
from ufom_runtime.problem import BilevelProblem, Task

Call = Callable[[], Tensor]


class Vector(nn.Module):
    """A flat vector as a module, for the libraries that differentiate modules only."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.vector = nn.Parameter(values.detach().clone())

    def forward(self) -> Tensor:
        """The vector itself."""
        return self.vector


def _start(problem: BilevelProblem, theta: Tensor, task: Task) -> Tensor:
    """φ_0 with its graph, as a leaf if it has none."""
    phi = problem.start(theta, task)
    return phi if phi.requires_grad else leaf(phi)


def _total(problem: BilevelProblem, theta: Tensor, task: Task, by_theta: Tensor | None, by_start: Tensor) -> Tensor:
    """The gradient from its parts: θ's own, and what comes through the start."""
    total = torch.zeros_like(theta) if by_theta is None else by_theta
    phi = problem.start(theta, task)
    return total + grad(phi, theta, by_start)[0] if phi.requires_grad else total


def by_hand(problem: BilevelProblem, theta: Tensor, task: Task, second_order: bool = True) -> Tensor:
    """The loop unrolled in plain torch; to this, all others are compared."""
    theta = leaf(theta)
    phi = _start(problem, theta, task)
    for alpha in problem.alphas:
        phi = phi - alpha * grad(problem.inner_loss(theta, phi, task), phi, create_graph=second_order)[0]
    (g,) = grad(problem.outer_loss(theta, phi, task), theta, allow_unused=True)
    return torch.zeros_like(theta) if g is None else g


def higher(problem: BilevelProblem, theta: Tensor, task: Task, second_order: bool = True) -> Tensor:
    """`innerloop_ctx` around a module and an optimiser."""
    from higher import innerloop_ctx

    theta = leaf(theta)
    module = Vector(problem.start(theta, task))
    optimiser = torch.optim.SGD(module.parameters(), lr=problem.alphas[0])
    options = {"copy_initial_weights": False, "track_higher_grads": second_order}
    with innerloop_ctx(module, optimiser, **options) as (inner, steps):
        for _ in range(problem.r):
            steps.step(problem.inner_loss(theta, inner(), task))
        phi = inner()
        last = module.vector if second_order else phi  # untracked, φ_r is a leaf and stands for φ_0
        parts = grad(problem.outer_loss(theta, phi, task), (theta, last), allow_unused=True)
        return _total(problem, theta, task, *parts)


def torchopt(problem: BilevelProblem, theta: Tensor, task: Task) -> Tensor:
    """`MetaSGD` on a module."""
    import torchopt

    theta = leaf(theta)
    module = Vector(problem.start(theta, task))
    first = module.vector
    optimiser = torchopt.MetaSGD(module, lr=problem.alphas[0])
    for _ in range(problem.r):
        optimiser.step(problem.inner_loss(theta, module(), task))
    parts = grad(problem.outer_loss(theta, module(), task), (theta, first), allow_unused=True)
    return _total(problem, theta, task, *parts)


def torchopt_first_order(problem: BilevelProblem, theta: Tensor, task: Task) -> Tensor:
    """The functional `sgd` on gradients without a graph; `MetaSGD` has no first-order mode."""
    import torchopt

    theta = leaf(theta)
    optimiser = torchopt.sgd(lr=problem.alphas[0])
    phi = (_start(problem, theta, task),)
    state = optimiser.init(phi)
    for _ in range(problem.r):
        gradients = grad(problem.inner_loss(theta, phi[0], task), phi)
        updates, state = optimiser.update(gradients, state, params=phi, inplace=False)
        phi = torchopt.apply_updates(phi, updates, inplace=False)
    (g,) = grad(problem.outer_loss(theta, phi[0], task), theta, allow_unused=True)
    return torch.zeros_like(theta) if g is None else g


def learn2learn(problem: BilevelProblem, theta: Tensor, task: Task, second_order: bool = True) -> Tensor:
    """`MAML` around a module."""
    from learn2learn.algorithms.maml import MAML

    theta = leaf(theta)
    maml = MAML(Vector(problem.start(theta, task)), lr=problem.alphas[0], first_order=not second_order)
    learner = maml.clone()
    for _ in range(problem.r):
        learner.adapt(problem.inner_loss(theta, learner(), task))
    parts = grad(problem.outer_loss(theta, learner(), task), (theta, maml.module.vector), allow_unused=True)
    return _total(problem, theta, task, *parts)


def hypertorch(problem: BilevelProblem, theta: Tensor, task: Task, stored: bool) -> Tensor:
    """`reverse` from stored states, or `reverse_unroll`."""
    from hypergrad.hypergradients import reverse, reverse_unroll

    alpha, hparams = problem.alphas[0], [leaf(theta)]

    def step(params: list[Tensor], hparams: list[Tensor], create_graph: bool = True) -> list[Tensor]:
        (g,) = grad(problem.inner_loss(hparams[0], params[0], task), params, create_graph=create_graph)
        return [params[0] - alpha * g]

    def begin(params: list[Tensor], hparams: list[Tensor], create_graph: bool = True) -> list[Tensor]:
        return [problem.start(hparams[0], task) + 0 * params[0]]

    def outer(params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        return problem.outer_loss(hparams[0], params[0], task)

    first = problem.start(hparams[0], task)
    if not stored:
        params = [_start(problem, hparams[0], task)]
        for _ in range(problem.r):
            params = step(params, hparams)
        unrolled: Tensor = reverse_unroll(params, hparams, outer, set_grad=False)[0]
        return unrolled
    # `reverse` takes the first state for a constant: a start that is not comes in as a map before the steps
    maps = [begin] * first.requires_grad + [step] * problem.r
    history = [[leaf(first)]]
    for each in maps:
        history.append([leaf(w) for w in each(history[-1], hparams, create_graph=False)])
    found: Tensor = reverse(history, hparams, maps, outer, set_grad=False)[0]
    return found


def betty(problem: BilevelProblem, theta: Tensor, task: Task) -> Call:
    """An `Engine` of two problems, the lower one unrolled; r of its steps are one hypergradient."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import HigherIterativeProblem, ImplicitProblem

    first = problem.start(leaf(theta), task)
    if first.requires_grad:
        raise NotImplementedError("Betty's lower problem starts from a constant: MAML's start cannot be written")
    found: list[Tensor] = []

    class Lower(HigherIterativeProblem):  # type: ignore[misc]
        def training_step(self, batch: object) -> Tensor:
            return problem.inner_loss(self.upper.module(), self.module(), task)

        def get_batch(self) -> object:
            return None

        def on_inner_loop_start(self) -> None:
            self.module.load_state_dict({"vector": first})

    class Upper(ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: object) -> Tensor:
            return problem.outer_loss(self.module(), self.lower.module(), task)

        def get_batch(self) -> object:
            return None

        def param_callback(self, params: list[Tensor]) -> None:
            assert params[0].grad is not None
            found.append(params[0].grad)

    modules = {"lower": Vector(first), "upper": Vector(theta)}
    rates = {"lower": problem.alphas[0], "upper": 0.0}  # θ stays where it is
    configs = {"lower": Config(unroll_steps=problem.r), "upper": Config(first_order=False)}
    kinds = {"lower": Lower, "upper": Upper}
    lower, upper = (
        kinds[name](
            name=name,
            config=configs[name],
            module=modules[name],
            optimizer=torch.optim.SGD(modules[name].parameters(), lr=rates[name]),
            device="cpu",
        )
        for name in kinds
    )
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    engine = Engine([lower, upper], EngineConfig(logger_type="none"), dependencies)
    engine.train()

    def call() -> Tensor:
        for _ in range(problem.r):
            engine.train_step()
        return found.pop()

    return call


def boat_inner(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **_: object) -> Tensor:
    """The inner loss, where BOAT looks for it: by its dotted name."""
    loss: Tensor = feed["problem"].inner_loss(upper(), lower(), feed["task"])
    return loss


def boat_outer(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **_: object) -> Tensor:
    """The outer loss."""
    loss: Tensor = feed["problem"].outer_loss(upper(), lower(), feed["task"])
    return loss


def boat(problem: BilevelProblem, theta: Tensor, task: Task, second_order: bool = True) -> Call:
    """A `Problem` with the operations NGD, and IAD (for MAML) or RAD; it evaluates both losses again to log them."""
    from boat_torch import Problem

    first = problem.start(leaf(theta), task)
    lower, upper = Vector(first), Vector(theta)
    operations = ["IAD" if first.requires_grad else "RAD"] + ["FOA"] * (not second_order)
    config = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": operations,
        "lower_level_model": lower,
        "upper_level_model": upper,
        "lower_level_var": list(lower.parameters()),
        "upper_level_var": list(upper.parameters()),
        "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=problem.alphas[0]),
        "upper_level_opt": torch.optim.SGD(upper.parameters(), lr=0.0),
        "lower_iters": problem.r,
        "device": "cpu",
        "accumulate_grad": False,
        "copy_last_param": False,
        "return_grad": True,
        "loss_log_path": os.devnull,
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
        "RGT": {"truncate_iter": 0},
    }
    losses = {"lower_level_loss": {"function": f"{__name__}.boat_inner"}}
    losses["upper_level_loss"] = {"function": f"{__name__}.boat_outer"}
    solver = Problem(config, losses)
    solver.build_ll_solver()
    solver.build_ul_solver()
    feed = {"problem": problem, "task": task}

    def call() -> Tensor:
        upper.vector.grad = None
        gradient: Tensor = solver.run_iter(feed, feed, 0)[0][0]
        return gradient

    return call
