"""Few-shot classification by MAML (section 5.3): V(θ) = θ, cross entropy on a task's training and test shots.

The net is the one of Finn et al. (2017) with strided convolutions: four 3×3 layers of stride 2, each with batch-norm on
batch statistics and ReLU, then a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from ufom_runtime.parameters import FlatModule
from ufom_runtime.problem import BilevelProblem, Task
from ufom_runtime.problems.data import CIFAR100_CLASSES, OMNIGLOT_TRAIN, cifar100, digits, omniglot
from ufom_runtime.training.seeds import seeded
from ufom_theory import UfomError


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FewShotProblem(BilevelProblem):
    """Few-shot classification; a task is (training images, labels, test images, labels).

    Attributes:
        net: the classifier, as a function of flat parameters.
        images: all training classes, shape (classes, drawings, channels, height, width); floats, or bytes that become
            floats in [0, 1] in a task.
        test_images: the held-out classes, for `sample_episodes`; the training classes where none are held out.
        ways: classes in a task.
        shots: training images a class.
    """

    net: FlatModule
    images: Tensor
    test_images: Tensor
    ways: int
    shots: int

    def sample_test_tasks(self, n: int, generator: Generator) -> Task:
        """n tasks from the held-out classes."""
        return _floats(sample_episodes(self.test_images, n, self.ways, self.shots, generator), self.net.vector().dtype)


def conv_net(ways: int, filters: int = 64, side: int = 28, seed: int = 0, channels: int = 1) -> nn.Sequential:
    """Four strided 3×3 convolutions with batch-norm and ReLU, and a linear layer, for channels × side × side images."""
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
    layers: list[nn.Module] = []
    for inputs in (channels, filters, filters, filters):
        layers += [
            nn.Conv2d(inputs, filters, 3, stride=2, padding=1, **kind),
            nn.BatchNorm2d(filters, track_running_stats=False, **kind),
            nn.ReLU(),
        ]
        side = (side + 1) // 2
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * side * side, ways, **kind))
    generator = seeded(seed)
    for module in net:
        if isinstance(module, nn.Conv2d | nn.Linear):  # torch's own rule, from a generator of our own
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return net


def sample_episodes(images: Tensor, n: int, ways: int, shots: int, generator: Generator) -> Task:
    """n tasks of `ways` random classes, `shots` training images and one test image a class, all different.

    Args:
        images: (classes, drawings, channels, height, width).
        n, ways, shots: sizes.
        generator: a CPU generator.

    Returns:
        (n, ways·shots, channels, h, w), (n, ways·shots), (n, ways, channels, h, w), (n, ways).
    """
    classes, drawings = images.shape[:2]
    chosen = torch.stack([torch.randperm(classes, generator=generator, device="cpu")[:ways] for _ in range(n)])
    shown = torch.rand(n, ways, drawings, generator=generator, dtype=torch.float32, device="cpu")
    shown = shown.argsort(-1)[..., : shots + 1]
    episodes = images[
        chosen[..., None].to(images.device), shown.to(images.device)
    ]  # (n, ways, shots + 1, channels, h, w)
    labels = torch.arange(ways, device=images.device).expand(n, ways)
    return (
        episodes[:, :, :shots].flatten(1, 2),
        labels.repeat_interleave(shots, dim=1),
        episodes[:, :, shots],
        labels.contiguous(),
    )


def omniglot_few_shot(
    ways: int = 20, shots: int = 1, r: int = 10, alpha: float = 0.005, filters: int = 64, seed: int = 0,
    rotations: bool = False, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
) -> FewShotProblem:  # fmt: skip
    """Omniglot from the folder that UFOM_DATA names: 182 characters for training, 60 held out.

    With `rotations`, a training character turned by 90°, 180° and 270° makes three more classes, 728 in all.
    """
    images = omniglot().to(device, dtype)
    train = images[:OMNIGLOT_TRAIN]
    if rotations:
        train = torch.cat([train.rot90(turns, (-2, -1)) for turns in range(4)])
    return _few_shot(train, images[OMNIGLOT_TRAIN:], ways, shots, r, alpha, filters, seed, dtype)


def cifar100_few_shot(
    ways: int = 20, shots: int = 1, r: int = 10, alpha: float = 0.005, filters: int = 64, seed: int = 0,
    held_out: int = 20, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
) -> FewShotProblem:  # fmt: skip
    """CIFAR-100 from the folder that UFOM_DATA names, 600 colour images a class: 80 classes for training, 20 held out.

    So the authors' code splits it. More than 20 ways need more classes held out: 30 of 20 cannot be drawn, and where
    that code tests in 30 ways, it draws 20 classes and counts the 10 that are not there as errors.
    """
    if not isinstance(held_out, int) or not 2 <= held_out <= CIFAR100_CLASSES - 2:
        raise UfomError(f"held_out = {held_out!r}: give 2 to {CIFAR100_CLASSES - 2} of the {CIFAR100_CLASSES} classes")
    images = cifar100().to(device)
    return _few_shot(images[:-held_out], images[-held_out:], ways, shots, r, alpha, filters, seed, dtype)


def digits_few_shot(
    ways: int = 5, shots: int = 1, r: int = 10, alpha: float = 0.005, filters: int = 16, seed: int = 0,
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
) -> FewShotProblem:  # fmt: skip
    """scikit-learn's 8×8 digits, which need no download; ten classes only, so none is held out but drawings are."""
    images, labels = digits()
    least = int(labels.bincount().min())
    stacked = torch.stack([images[labels == c][:least] for c in range(10)]).view(10, least, 1, 8, 8).to(device, dtype)
    half = least // 2
    return _few_shot(stacked[:, :half], stacked[:, half:], ways, shots, r, alpha, filters, seed, dtype)


def _floats(episodes: Task, dtype: torch.dtype) -> Task:
    """Tasks whose bytes have become floats in [0, 1]: a data set of bytes takes a quarter of the memory."""
    train, labels, test, test_labels = episodes
    if train.dtype != torch.uint8:
        return episodes
    return train.to(dtype) / 255, labels, test.to(dtype) / 255, test_labels


def _few_shot(
    train: Tensor,
    test: Tensor,
    ways: int,
    shots: int,
    r: int,
    alpha: float,
    filters: int,
    seed: int,
    dtype: torch.dtype,
) -> FewShotProblem:
    if not 2 <= ways <= min(len(train), len(test)):
        raise UfomError(f"ways = {ways}: give 2 to {min(len(train), len(test))}, the number of classes there are")
    if not 1 <= shots < train.shape[1] or min(r, filters) < 1:
        raise UfomError(f"shots = {shots}, r = {r}, filters = {filters}: at least 1 each, shots < {train.shape[1]}")
    channels, side = train.shape[2], train.shape[-1]
    net = FlatModule(conv_net(ways, filters, side, seed, channels).to(train.device, dtype))
    return FewShotProblem(
        inner_loss=lambda theta, phi, task: cross_entropy(net(phi, task[0]), task[1]),
        outer_loss=lambda theta, phi, task: cross_entropy(net(phi, task[2]), task[3]),
        start=lambda theta, task: theta,
        step_sizes=torch.full((r,), alpha, dtype=torch.float64, device="cpu"),
        sample_tasks=lambda n, generator: _floats(sample_episodes(train, n, ways, shots, generator), dtype),
        initial=net.vector(),
        net=net,
        images=train,
        test_images=test,
        ways=ways,
        shots=shots,
    )
