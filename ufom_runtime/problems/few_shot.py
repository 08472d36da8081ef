"""Few-shot classification by MAML (section 5.3): V(θ) = θ, cross entropy on a task's training and test shots.

The net is the one of Finn et al. (2017) with strided convolutions: four 3×3 layers of stride 2, each with batch-norm on
batch statistics and ReLU, then a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from ufom_runtime.data import OMNIGLOT_TRAIN, digits, omniglot
from ufom_runtime.parameters import FlatModule
from ufom_runtime.problem import BilevelProblem, Task
from ufom_theory import UfomError


@dataclass(frozen=True, eq=False, kw_only=True)
class FewShotProblem(BilevelProblem):
    """Few-shot classification; a task is (training images, labels, test images, labels).

    Attributes:
        net: the classifier, as a function of flat parameters.
        images: all training classes, shape (classes, drawings, 1, height, width).
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
        return sample_episodes(self.test_images, n, self.ways, self.shots, generator)


def conv_net(ways: int, filters: int = 64, side: int = 28, seed: int = 0) -> nn.Sequential:
    """Four strided 3×3 convolutions with batch-norm and ReLU, and a linear layer, for 1 × side × side images."""
    layers: list[nn.Module] = []
    for channels in (1, filters, filters, filters):
        layers += [
            nn.Conv2d(channels, filters, 3, stride=2, padding=1),
            nn.BatchNorm2d(filters, track_running_stats=False),
            nn.ReLU(),
        ]
        side = (side + 1) // 2
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * side * side, ways))
    generator = torch.Generator().manual_seed(seed)
    for module in net:
        if isinstance(module, nn.Conv2d | nn.Linear):  # torch's own rule, from a generator of our own
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return net


def sample_episodes(images: Tensor, n: int, ways: int, shots: int, generator: Generator) -> Task:
    """n tasks of `ways` random classes, `shots` training images and one test image a class, all different.

    Args:
        images: (classes, drawings, 1, height, width).
        n, ways, shots: sizes.
        generator: a CPU generator.

    Returns:
        (n, ways·shots, 1, h, w), (n, ways·shots), (n, ways, 1, h, w), (n, ways).
    """
    classes, drawings = images.shape[:2]
    chosen = torch.stack([torch.randperm(classes, generator=generator)[:ways] for _ in range(n)])
    shown = torch.rand(n, ways, drawings, generator=generator).argsort(-1)[..., : shots + 1]
    episodes = images[chosen[..., None].to(images.device), shown.to(images.device)]  # (n, ways, shots + 1, 1, h, w)
    labels = torch.arange(ways, device=images.device).expand(n, ways)
    return (
        episodes[:, :, :shots].flatten(1, 2),
        labels.repeat_interleave(shots, dim=1),
        episodes[:, :, shots],
        labels.contiguous(),
    )


def omniglot_few_shot(
    ways: int = 20, shots: int = 1, r: int = 10, alpha: float = 0.005, filters: int = 64, seed: int = 0,
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
) -> FewShotProblem:  # fmt: skip
    """Omniglot from the folder that UFOM_DATA names: 182 characters for training, 60 held out."""
    images = omniglot().to(device, dtype)
    return _few_shot(images[:OMNIGLOT_TRAIN], images[OMNIGLOT_TRAIN:], ways, shots, r, alpha, filters, seed)


def digits_few_shot(
    ways: int = 5, shots: int = 1, r: int = 10, alpha: float = 0.005, filters: int = 16, seed: int = 0,
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
) -> FewShotProblem:  # fmt: skip
    """scikit-learn's 8×8 digits, which need no download; ten classes only, so none is held out but drawings are."""
    images, labels = digits()
    least = int(labels.bincount().min())
    stacked = torch.stack([images[labels == c][:least] for c in range(10)]).view(10, least, 1, 8, 8).to(device, dtype)
    half = least // 2
    return _few_shot(stacked[:, :half], stacked[:, half:], ways, shots, r, alpha, filters, seed)


def _few_shot(
    train: Tensor, test: Tensor, ways: int, shots: int, r: int, alpha: float, filters: int, seed: int
) -> FewShotProblem:
    if not 2 <= ways <= min(len(train), len(test)):
        raise UfomError(f"ways = {ways}: give 2 to {min(len(train), len(test))}, the number of classes there are")
    if not 1 <= shots < train.shape[1] or min(r, filters) < 1:
        raise UfomError(f"shots = {shots}, r = {r}, filters = {filters}: at least 1 each, shots < {train.shape[1]}")
    net = FlatModule(conv_net(ways, filters, train.shape[-1], seed).to(train.device, train.dtype))
    return FewShotProblem(
        inner_loss=lambda theta, phi, task: cross_entropy(net(phi, task[0]), task[1]),
        outer_loss=lambda theta, phi, task: cross_entropy(net(phi, task[2]), task[3]),
        start=lambda theta, task: theta,
        step_sizes=torch.full((r,), alpha, dtype=torch.float64),
        sample_tasks=lambda n, generator: sample_episodes(train, n, ways, shots, generator),
        initial=net.vector(),
        net=net,
        images=train,
        test_images=test,
        ways=ways,
        shots=shots,
    )
