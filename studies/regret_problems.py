"""The problems of the study `regret`, small enough for hundreds of runs each, and what is known of their minimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

from ufom_runtime import BilevelProblem, FlatModule
from ufom_runtime.inner import momentum
from ufom_runtime.problem import Task, Tasks
from ufom_runtime.problems.data import OMNIGLOT_TRAIN, digits, mnist, omniglot
from ufom_runtime.problems.few_shot import digits_few_shot, sample_episodes
from ufom_runtime.problems.hypercleaning import digits_hypercleaning
from ufom_runtime.problems.sinusoid import sinusoid
from ufom_runtime.problems.synthetic import synthetic

F64 = torch.float64
Closed = Callable[[Tensor, Task], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Made:
    """A problem as it is run.

    Attributes:
        problem: the problem.
        held: tasks on which M is evaluated: all, or 32 that are drawn once.
        proxy: K of the proxy, which is called FOM whatever its K.
        floor: min M, where it is known.
        closed: FOM's gradient, the exact one and the loss in closed form, of each θ and task; None: by the runtime.
    """

    problem: BilevelProblem
    held: Tasks
    proxy: int = 0
    floor: float = 0.0
    closed: Closed | None = None


def make(name: str, arguments: Mapping[str, Any], proxy: int = 0) -> Made:
    """A problem by its name in `MAKERS`."""
    problem: BilevelProblem = MAKERS[name](**arguments)
    held = Tasks.of(problem.tasks if problem.tasks is not None else problem.sample(32, Generator().manual_seed(_HELD)))
    if name not in ("quadratic", "pair"):
        return Made(problem, held, proxy)
    alpha, r = problem.alphas[0], problem.r

    def closed(theta: Tensor, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        curvature, centre = (x.view(len(x), -1) for x in (task if isinstance(task, tuple) else task.T))
        left = (1 - alpha * curvature) ** r
        first = curvature * left * (theta - centre)
        return first, left * first, (curvature * (left * (theta - centre)) ** 2).sum(1) / 2

    a, c = (x.view(len(held), -1) for x in (held.parts if len(held.parts) == 2 else held.parts[0].T))
    weight = a * (1 - alpha * a) ** (2 * r)
    best = (weight * c).sum(0) / weight.sum(0)
    return Made(problem, held, proxy, float((weight * (best - c) ** 2).sum(1).mean() / 2), closed)


def quadratic(alpha: float = 0.1, r: int = 10, spread: float = 0.0, dim: int = 10, n: int = 8) -> BilevelProblem:
    """n tasks ½Σ_i a_i·(φ_i − c_i)²; `spread` is the deviation of log a from task to task.

    Without a spread all tasks share a, and FOM's stationary point is M's.
    """
    drawing = Generator().manual_seed(0)
    shape = (n, dim)
    base = torch.linspace(0.2, 1.5, dim, dtype=F64)
    curvature = base * (spread * torch.randn(shape, generator=drawing, dtype=F64)).exp()
    centre = torch.randn(shape, generator=drawing, dtype=F64)
    initial = 2 * torch.randn(dim, generator=drawing, dtype=F64)

    def loss(theta: Tensor, phi: Tensor, task: Task) -> Tensor:
        return (task[0] * (phi - task[1]) ** 2).sum() / 2

    return BilevelProblem(
        loss, loss, start=lambda theta, task: theta, step_sizes=[alpha] * r, tasks=(curvature, centre), initial=initial
    )


def pair(alpha: float = 0.1, r: int = 10) -> BilevelProblem:
    """The paper's synthetic pair, from one start."""
    return replace(synthetic(alpha, r), initial=torch.tensor([-20.0], dtype=F64))


@cache
def _net(inputs: int, hidden: int, outputs: int) -> FlatModule:
    torch.manual_seed(0)
    return FlatModule(nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)))


def _maml(
    sample: Callable[[int, Generator], Task], inputs: int, ways: int, hidden: int, alpha: float, r: int
) -> BilevelProblem:
    net = _net(inputs, hidden, ways)
    return BilevelProblem(
        inner_loss=lambda theta, phi, task: cross_entropy(net(phi, task[0]), task[1]),
        outer_loss=lambda theta, phi, task: cross_entropy(net(phi, task[2]), task[3]),
        start=lambda theta, task: theta,
        step_sizes=[alpha] * r,
        sample_tasks=sample,
        initial=net.vector(),
    )


def digits_maml(ways: int = 3, hidden: int = 8, alpha: float = 0.3, r: int = 5) -> BilevelProblem:
    """One-shot classification of scikit-learn's digits at 4 × 4 pixels, by a net of one hidden layer of tanh."""
    whole = digits_few_shot(ways=ways)

    def sample(n: int, g: Generator) -> Task:
        train, labels, test, test_labels = whole.sample(n, g)
        return _small(train), labels, _small(test), test_labels

    return _maml(sample, 16, ways, hidden, alpha, r)


def _small(images: Tensor) -> Tensor:
    return avg_pool2d(images.flatten(0, 1), 2).view(*images.shape[:2], -1)


def omniglot_maml(ways: int = 3, hidden: int = 8, alpha: float = 0.5, r: int = 5) -> BilevelProblem:
    """The same on Omniglot's characters, at 7 × 7 pixels."""
    images = omniglot()[:OMNIGLOT_TRAIN]
    small = avg_pool2d(images.float().flatten(0, 1), 4).view(*images.shape[:2], 1, 7, 7)
    return _maml(lambda n, g: sample_episodes(small, n, ways, 1, g), 49, ways, hidden, alpha, r)


def mnist_hypercleaning(n: int = 50, hidden: int = 6, alpha: float = 1.0, r: int = 10) -> BilevelProblem:
    """Hypercleaning on n training and n validation images of MNIST, at 8 × 8 pixels."""
    alike = digits_hypercleaning(n, n, hidden, r, alpha)
    images, labels, _, _ = mnist()
    small = avg_pool2d(pad(images[: 2 * n].view(-1, 1, 28, 28), (2, 2, 2, 2)), 4).flatten(1)
    shift = torch.randint(1, 10, (n,), generator=Generator().manual_seed(0))
    given = torch.where(alike.corrupted, (labels[:n] + shift) % 10, labels[:n])
    tasks = (small[:n], given, small[n:], labels[n : 2 * n])
    return replace(alike, tasks=tuple(t[None] for t in tasks))


def _tensor(task: Task) -> Tensor:
    assert isinstance(task, Tensor)
    return task


def rates(hidden: int = 5, r: int = 8) -> BilevelProblem:
    """Hyperparameters of an optimizer: the rate, the momentum and the weight decay of a net's training on digits."""
    x, y = digits()
    net = _net(64, hidden, 10)

    def training(theta: Tensor, phi: Tensor, task: Task) -> Tensor:
        return cross_entropy(net(phi, x[:30]), y[:30]) + theta[2].exp() * phi.square().sum() / 2

    return BilevelProblem(
        inner_loss=training,
        outer_loss=lambda theta, phi, task: cross_entropy(net(phi, x[30:70]), y[30:70]),
        start=lambda theta, task: _tensor(task),
        update=momentum(lr=lambda theta: theta[0].exp(), beta=lambda theta: theta[1].sigmoid()),
        steps=r,
        sample_tasks=lambda n, g: net.vector() + 0.1 * torch.randn(n, len(net.vector()), generator=g),
        initial=torch.tensor([-3.0, 0.0, -5.0]),
    )


MAKERS: dict[str, Callable[..., BilevelProblem]] = {
    "quadratic": quadratic,
    "pair": pair,
    "sinusoid": sinusoid,
    "digits-maml": digits_maml,
    "omniglot-maml": omniglot_maml,
    "digits-hypercleaning": digits_hypercleaning,
    "mnist-hypercleaning": mnist_hypercleaning,
    "rates": rates,
}
_HELD = 1_000_002  # seed of the tasks of the evaluation
