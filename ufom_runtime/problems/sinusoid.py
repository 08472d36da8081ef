"""Sinusoid regression by MAML (Finn et al., 2017, section 5.1): V(θ) = θ, mean squared error on K points of a wave.

A task is a wave y = A·sin(x − φ) with A uniform on [0.1, 5] and φ on [0, π]. The inner loop sees it at K points x
uniform on [−5, 5], the outer loss at K others. The net has two hidden layers of 40 ReLU units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from ufom_runtime.parameters import FlatModule
from ufom_runtime.problem import BilevelProblem, Task
from ufom_runtime.training.seeds import seeded
from ufom_theory.checks import integer, positive, scalar


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SinusoidProblem(BilevelProblem):
    """Sinusoid regression; a task is (training points, their values, test points, their values), each of shape (K, 1).

    Attributes:
        net: the regressor, as a function of flat parameters.
        shots: K.
    """

    net: FlatModule
    shots: int


def sample_waves(n: int, shots: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n waves at 2K points each: x and y for training, x and y for the test, each (n, K, 1) in float64 on the CPU."""
    drawn = torch.rand(n, 2 + 2 * shots, dtype=torch.float64, generator=generator, device="cpu")
    amplitude, phase, x = torch.split(drawn, [1, 1, 2 * shots], dim=1)
    x = 10 * x - 5
    y = (0.1 + 4.9 * amplitude) * torch.sin(x - math.pi * phase)
    return x[:, :shots, None], y[:, :shots, None], x[:, shots:, None], y[:, shots:, None]


def sinusoid(
    shots: int = 10, r: int = 5, alpha: float = 0.01, width: int = 40, seed: int = 0,
    device: str | torch.device = "cpu",
) -> SinusoidProblem:  # fmt: skip
    """Sinusoid regression in float64 with nets 1 – `width` – `width` – 1; `seed` is that of the initial weights.

    The weights start as torch's own do, uniform on ± 1/√(inputs of the layer).

    Args:
        shots: K, training points of a task, and as many test points.
        r: inner steps.
        alpha: inner step size; 0.01 is the source's.
        width: units of each hidden layer; 40 is the source's.
        seed: of the initial weights.
        device: where the net and the tasks live.

    Raises:
        UfomError: shots, r or width no integer ≥ 1, or alpha not > 0.

    >>> sinusoid(shots=5, r=1)
    SinusoidProblem(r = 1, s = 1761, tasks drawn by sample_tasks)
    """
    shots, r, width = (
        scalar(name, value, integer, 1) for name, value in (("shots", shots), ("r", r), ("width", width))
    )
    alpha = float(scalar("alpha", alpha, positive))
    sizes = ((1, width), (width, width), (width, 1))
    layers = [nn.Linear(*size, dtype=torch.float64, device="cpu") for size in sizes]
    generator = seeded(seed)
    for layer in layers:
        bound = layer.in_features**-0.5
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    first, second, last = layers
    net = FlatModule(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).to(device))

    def sample_tasks(n: int, generator: Generator) -> Task:
        return tuple(part.to(device) for part in sample_waves(n, shots, generator))

    return SinusoidProblem(
        inner_loss=lambda theta, phi, task: mse_loss(net(phi, task[0]), task[1]),
        outer_loss=lambda theta, phi, task: mse_loss(net(phi, task[2]), task[3]),
        start=lambda theta, task: theta,
        step_sizes=torch.full((r,), alpha, dtype=torch.float64, device="cpu"),
        sample_tasks=sample_tasks,
        initial=net.vector(),
        net=net,
        shots=shots,
    )
