"""The two workloads once more in jax: `jit(grad(scan))`, with and without `jax.checkpoint` on a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from studies.peers import Call
from ufom_runtime.problem import BilevelProblem, Task
from ufom_runtime.problems.few_shot import FewShotProblem
from ufom_runtime.problems.hypercleaning import HypercleaningProblem


def scanned(
    problem: BilevelProblem,
    theta: Tensor,
    task: Task,
    second_order: bool = True,
    checkpoint: bool = False,
    unroll: int = 1,
    batched: bool = False,
) -> Call:
    """The hypergradient of a built-in problem, compiled; arrays go in and out at every call.

    With `batched`, the task is a stack, and the mean of its gradients is taken. On a CPU, XLA's convolutions are slow
    inside a loop: with `unroll` ≥ r there is none.
    """
    import jax

    jax.config.update("jax_enable_x64", True)  # what is float32 stays so
    inner, outer = _losses(problem)
    arrays = tuple(jax.numpy.asarray(t.cpu().numpy()) for t in task)
    maml = isinstance(problem, FewShotProblem)
    first = None if maml else jax.numpy.asarray(problem.start(theta, task).cpu().numpy())

    def loss(theta: Any, arrays: Any) -> Any:
        def step(phi: Any, _: None) -> tuple[Any, None]:
            g = jax.grad(inner, argnums=1)(theta, phi, arrays)
            return phi - problem.alphas[0] * (g if second_order else jax.lax.stop_gradient(g)), None

        body = jax.checkpoint(step) if checkpoint else step
        phi, _ = jax.lax.scan(body, theta if maml else first, None, length=problem.r, unroll=min(unroll, problem.r))
        return outer(theta, phi, arrays)

    one = jax.grad(loss)
    gradient = jax.jit((lambda x, stack: jax.vmap(one, (None, 0))(x, stack).mean(0)) if batched else one)
    return lambda: torch.from_numpy(np.array(gradient(theta.cpu().numpy(), arrays)))


def _losses(problem: BilevelProblem) -> tuple[Callable[..., Any], Callable[..., Any]]:
    import jax

    def cross_entropy(logits: Any, labels: Any) -> Any:
        return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]

    if isinstance(problem, HypercleaningProblem):
        shapes = _perceptron_shapes(problem.sizes)

        def logits(phi: Any, images: Any) -> Any:
            w1, b1, w2, b2 = _split(phi, shapes)
            return jax.nn.relu(images @ w1 + b1) @ w2 + b2

        def inner(theta: Any, phi: Any, task: Any) -> Any:
            return (jax.nn.sigmoid(theta) * cross_entropy(logits(phi, task[0]), task[1])).mean()

        return inner, lambda theta, phi, task: cross_entropy(logits(phi, task[2]), task[3]).mean()

    assert isinstance(problem, FewShotProblem)
    net = problem.net.module
    assert isinstance(net, nn.Sequential)
    return (
        lambda theta, phi, task: cross_entropy(_convolve(net, phi, task[0]), task[1]).mean(),
        lambda theta, phi, task: cross_entropy(_convolve(net, phi, task[2]), task[3]).mean(),
    )


def _perceptron_shapes(sizes: tuple[int, int, int]) -> list[tuple[int, ...]]:
    inputs, hidden, outputs = sizes
    return [(inputs, hidden), (hidden,), (hidden, outputs), (outputs,)]


def _split(vector: Any, shapes: list[tuple[int, ...]]) -> list[Any]:
    import jax

    ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
    return [x.reshape(shape) for x, shape in zip(jax.numpy.split(vector, ends), shapes, strict=True)]


def _convolve(net: nn.Sequential, vector: Any, images: Any) -> Any:
    """The layers of `conv_net` on parameters from a flat vector."""
    import jax

    values = iter(_split(vector, [tuple(p.shape) for p in net.parameters()]))
    x = images
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            x = jax.lax.conv_general_dilated(x, next(values), (2, 2), [(1, 1), (1, 1)])
            x = x + next(values)[:, None, None]
        elif isinstance(layer, nn.BatchNorm2d):
            mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
            scale, shift = (next(values)[:, None, None] for _ in range(2))
            x = (x - mean) / jax.numpy.sqrt(var + layer.eps) * scale + shift
        elif isinstance(layer, nn.ReLU):
            x = jax.nn.relu(x)
        elif isinstance(layer, nn.Flatten):
            x = x.reshape(len(x), -1)
        else:
            x = x @ next(values).T + next(values)
    return x
