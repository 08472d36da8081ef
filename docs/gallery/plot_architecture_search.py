"""
Architecture search with warm starts
====================================

As in DARTS (Liu et al. 2019), θ weighs the operations of a cell and φ holds the weights
of the net. `warm_start=True` goes on training from the φ where the last outer step
ended.
"""

import torch
from plain import assert_plain, print_q
from torch import nn
from torch.nn.functional import cross_entropy

from ufom_runtime import EXACT, FOM, BilevelProblem, FlatModule, train
from ufom_runtime.inner import momentum
from ufom_runtime.problems.data import digits

x, y = digits()
OPERATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda z: z,
    "zero": lambda z: 0 * z,
}


class Cell(nn.Module):
    """A hidden layer whose activation is a mixture of operations."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 24), nn.Linear(24, 10)

    def forward(self, x, mixture):
        z = self.first(x)
        return self.last(
            sum(w * f(z) for w, f in zip(mixture, OPERATIONS.values(), strict=True))
        )


torch.manual_seed(0)
net = FlatModule(Cell())


def loss(theta, phi, part):
    return cross_entropy(net(phi, x[part], theta.softmax(0)), y[part])


problem = BilevelProblem(
    inner_loss=lambda theta, phi, task: loss(theta, phi, slice(0, 200)),
    outer_loss=lambda theta, phi, task: loss(theta, phi, slice(200, 400)),
    start=lambda theta, task: net.vector(),
    update=momentum(lr=0.1, beta=0.9),
    steps=5,
    tasks=torch.zeros(1, 1),  # a single task, of no content
)
theta = torch.zeros(len(OPERATIONS))
assert_plain(problem, theta, problem.tasks)

# %%
# What DARTS calls first-order takes φ for a constant, which is FOM: the outer loss
# contains θ.

print_q(problem, theta, FOM)

# %%
# That q* is for steps which noise keeps small. Here is a single task, so the exact
# gradient has no noise, and exact steps are the choice.

run = train(
    problem, theta, EXACT, optimizer="adam:0.1", steps=40, warm_start=True, log_every=40
)
print(
    ", ".join(
        f"{name} {w:.2f}"
        for name, w in zip(OPERATIONS, run.theta.softmax(0), strict=True)
    )
)
