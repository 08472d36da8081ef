"""The sizes of `performance`, and the problems that its methods are measured on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ufom_runtime import BilevelProblem
    from ufom_runtime.problem import Task


@dataclass(frozen=True)
class Config:
    """Sizes of the study.

    Attributes:
        ways: classes of the few-shot task, one image each.
        filters: of its net.
        steps: inner steps of the few-shot task.
        images: hypercleaning's training images, the length of θ, and as many for validation.
        hidden: units of its net.
        lengths: its inner steps.
        long: two more lengths, at which the memory of equally many checkpoints is compared.
        rounds: alternations of the floor and a method;
        patience: but, after the first 5, no more once they took this many seconds.
        outer_steps: over which the growth of live memory is watched.
        threads: cores a measurement may use.
        limit: seconds after which a measurement is given up.
        compiled: whether the compiled paths are measured, which are waited for.
    """

    ways: int = 20
    filters: int = 64
    steps: int = 10
    images: int = 500
    hidden: int = 64
    lengths: tuple[int, ...] = (10, 50, 100)
    long: tuple[int, int] = (50, 400)
    rounds: int = 15
    patience: float = 5.0
    outer_steps: int = 200
    threads: int = 2
    limit: float = 600.0
    compiled: bool = True


QUICK: dict[str, Any] = {
    "ways": 3,
    "filters": 4,
    "steps": 3,
    "images": 20,
    "hidden": 5,
    "lengths": (6,),
    "long": (12, 24),
}
SIZES = {
    "quick": Config(**QUICK, rounds=3, outer_steps=20, threads=1, compiled=False),
    "standard": Config(),
}


def images(workload: str) -> str:
    """Omniglot's and MNIST's where UFOM_DATA names their folder, else random ones of the same size."""
    real = {"few-shot": "Omniglot", "hypercleaning": "MNIST"}
    return real[workload] if "UFOM_DATA" in os.environ else "random images"


def build(
    config: Config, workload: str, r: int, double: bool = False, device: str = "cpu", tasks: int = 8
) -> tuple[BilevelProblem, Tensor, Task]:
    """A workload's problem, its θ, and stacked few-shot tasks or hypercleaning's one."""
    import torch

    from ufom_runtime.problems.few_shot import _few_shot, omniglot_few_shot
    from ufom_runtime.problems.hypercleaning import _hypercleaning, mnist_hypercleaning

    problem: BilevelProblem
    dtype, n, generator = torch.float64 if double else torch.float32, config.images, torch.Generator().manual_seed(0)
    if workload == "few-shot":
        if images(workload) == "Omniglot":
            problem = omniglot_few_shot(config.ways, r=r, filters=config.filters, device=device, dtype=dtype)
        else:
            drawn = torch.rand(2 * config.ways, 2, 1, 28, 28, generator=generator).to(device, dtype)
            problem = _few_shot(drawn, drawn, config.ways, 1, r, 0.005, config.filters, 0, dtype)
        assert problem.initial is not None
        return problem, problem.initial, problem.sample(tasks, generator)
    if images(workload) == "MNIST":
        problem = mnist_hypercleaning(n, n, config.hidden, r, device=device, dtype=dtype)
    else:
        drawn, labels = torch.rand(2 * n + 1, 784, generator=generator), torch.arange(2 * n + 1) % 10
        problem = _hypercleaning(drawn, labels, n, n, config.hidden, r, 1.0, 0, device, dtype)
    assert problem.initial is not None
    assert problem.tasks is not None
    return problem, problem.initial, problem.tasks
