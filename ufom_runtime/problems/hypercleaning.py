"""Data hypercleaning (section 5.2): one weight σ(θ_i) a training image, half of the labels corrupted.

φ is a two-layer ReLU net trained from a fixed start on the weighted images; the outer loss is its cross entropy on
clean images. Neither the start nor the outer loss contains θ, so the first-order gradient is identically zero. The
inner loss is the mean over the images: the paper's sum diverges at α = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from ufom_runtime.problem import BilevelProblem, Task
from ufom_runtime.problems.data import digits, mnist
from ufom_runtime.training.seeds import seeded
from ufom_theory import UfomError


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class HypercleaningProblem(BilevelProblem):
    """Hypercleaning; the one task is (train images, given labels, validation images, validation labels).

    Attributes:
        sizes: units of the input, hidden and output layers.
        corrupted: which training labels were replaced, boolean, shape (s,).
        test_images: held-out images, shape (n, inputs).
        test_labels: their labels, shape (n,).
    """

    sizes: tuple[int, int, int]
    corrupted: Tensor
    test_images: Tensor
    test_labels: Tensor

    def logits(self, phi: Tensor, images: Tensor) -> Tensor:
        """The net's outputs, shape (n, 10), for parameters φ, shape (p,), and images, shape (n, inputs)."""
        return _logits(phi, images, self.sizes)


def digits_hypercleaning(
    n_train: int = 500, n_validation: int = 500, hidden: int = 32, r: int = 100, alpha: float = 1.0, seed: int = 0,
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
) -> HypercleaningProblem:  # fmt: skip
    """Hypercleaning on scikit-learn's 8×8 digits, which need no download."""
    images, labels = digits()
    return _hypercleaning(images, labels, n_train, n_validation, hidden, r, alpha, seed, device, dtype)


def mnist_hypercleaning(
    n_train: int = 5000, n_validation: int = 5000, hidden: int = 64, r: int = 100, alpha: float = 1.0, seed: int = 0,
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
) -> HypercleaningProblem:  # fmt: skip
    """Hypercleaning on MNIST at the paper's size; training and validation images from its 60,000."""
    images, labels, test_images, test_labels = mnist()
    return _hypercleaning(
        images, labels, n_train, n_validation, hidden, r, alpha, seed, device, dtype, (test_images, test_labels)
    )


def _logits(phi: Tensor, images: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    inputs, hidden, outputs = sizes
    w1, b1, w2, b2 = torch.split(phi, [inputs * hidden, hidden, hidden * outputs, outputs])
    out: Tensor = torch.relu(images @ w1.view(inputs, hidden) + b1) @ w2.view(hidden, outputs) + b2
    return out


def _hypercleaning(
    images: Tensor,
    labels: Tensor,
    n_train: int,
    n_validation: int,
    hidden: int,
    r: int,
    alpha: float,
    seed: int,
    device: str | torch.device,
    dtype: torch.dtype,
    test: tuple[Tensor, Tensor] | None = None,
) -> HypercleaningProblem:
    if min(n_train, n_validation, hidden, r) < 1 or n_train + n_validation > len(images) - (test is None):
        raise UfomError(
            f"n_train = {n_train}, n_validation = {n_validation}, hidden = {hidden}, r = {r}: each at least 1, and "
            f"the images no more than the {len(images)} there are"
        )
    generator = seeded(seed)
    order = torch.randperm(len(images), generator=generator, device="cpu")
    train, validation = order[:n_train], order[n_train : n_train + n_validation]
    rest = order[n_train + n_validation :]
    test_images, test_labels = test or (images[rest], labels[rest])
    given = labels[train].clone()
    corrupted = torch.zeros(n_train, dtype=torch.bool, device="cpu")
    corrupted[torch.randperm(n_train, generator=generator, device="cpu")[: n_train // 2]] = True
    shift = torch.randint(1, 10, (n_train,), generator=generator, device="cpu")  # another label, each equally likely
    given[corrupted] = (given + shift)[corrupted] % 10
    sizes = (images.shape[1], hidden, 10)
    first = _initial_net(sizes, generator).to(device, dtype)

    def inner_loss(theta: Tensor, phi: Tensor, task: Task) -> Tensor:
        losses = cross_entropy(_logits(phi, task[0], sizes), task[1], reduction="none")
        return (torch.sigmoid(theta) * losses).mean()

    def outer_loss(theta: Tensor, phi: Tensor, task: Task) -> Tensor:
        return cross_entropy(_logits(phi, task[2], sizes), task[3])

    return HypercleaningProblem(
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        start=lambda theta, task: first,
        step_sizes=torch.full((r,), alpha, dtype=torch.float64, device="cpu"),
        tasks=tuple(
            t[None].to(device, dtype if t.is_floating_point() else None)
            for t in (images[train], given, images[validation], labels[validation])
        ),
        initial=torch.zeros(n_train, dtype=dtype, device=device),
        sizes=sizes,
        corrupted=corrupted,
        test_images=test_images.to(device, dtype),
        test_labels=test_labels.to(device),
    )


def _initial_net(sizes: tuple[int, int, int], generator: Generator) -> Tensor:
    """He's initial weights and zero biases, flat."""
    inputs, hidden, outputs = sizes
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    w1 = torch.randn(inputs * hidden, generator=generator, **kind) * (2 / inputs) ** 0.5
    w2 = torch.randn(hidden * outputs, generator=generator, **kind) * (2 / hidden) ** 0.5
    return torch.cat([w1, torch.zeros(hidden, **kind), w2, torch.zeros(outputs, **kind)])
