"""
Adversarial training
====================

The inner loop is an attack on one image: five steps of gradient ascent on a
perturbation φ, projected onto a ball. The outer loop trains the net θ on what the
attack has made of the images.
"""

import torch
from plain import assert_plain, print_q
from torch import nn
from torch.nn.functional import cross_entropy

from ufom_runtime import FOM, BilevelProblem, FlatModule, adapt, train
from ufom_runtime.problems.data import digits

x, y = digits()
torch.manual_seed(0)
net = FlatModule(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))


class Attack:
    """Ascent, projected onto the ball of radius 1 around the image; it has no state."""

    def init(self, theta, phi, task):
        return ()

    def update(self, theta, phi, state, g, task, j):
        moved = phi + 5 * g
        return moved / moved.norm().clamp(min=1), state


def loss(theta, phi, task):
    image, label = task
    return cross_entropy(net(theta, image + phi), label)


def draw(n, generator):
    i = torch.randint(len(x), (n,), generator=generator)
    return x[i], y[i]


problem = BilevelProblem(
    loss,
    loss,
    lambda theta, task: torch.zeros(64),
    update=Attack(),
    steps=5,
    sample_tasks=draw,
)
assert_plain(problem, net.vector(), problem.sample(3, torch.Generator().manual_seed(1)))

# %%
# The proxy is FOM, which takes the attacked images for constants; that is what
# adversarial training does. If the attack found the maximum, FOM would be exact, by
# Danskin's theorem. It nearly is: D²/V² is tiny, and a rare correction of probability
# q* would remove what is left.

print_q(
    problem, net.vector(), FOM, problem.sample(100, torch.Generator().manual_seed(0))
)

# %%
# In a run as short as this no correction would be drawn, so FOM is the choice.


def accuracy(theta, attacked):
    phi = adapt(problem, theta, (x, y)) if attacked else 0
    return (net(theta, x + phi).argmax(1) == y).float().mean().item()


theta = train(
    problem, net.vector(), FOM, optimizer="adam:0.02", steps=80, batch=32, log_every=80
).theta
clean, attacked = accuracy(theta, False), accuracy(theta, True)
print(f"accuracy: {clean:.2f} on clean images, {attacked:.2f} on attacked ones")
