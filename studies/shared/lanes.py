"""Many outer runs of one problem side by side: their gradients in one call, the adaptive rules, outer Adam, losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ufom_runtime import AdaptiveUFOM
from ufom_runtime.algorithms import first_state, inner_loop
from ufom_runtime.batching import in_chunks
from ufom_runtime.coins import debias
from ufom_runtime.derivatives import phi_of
from ufom_runtime.estimators import Direction, State
from ufom_runtime.methods import step_rule
from ufom_runtime.methods.adaptive import AdaptiveState
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_runtime.steps import Steps
from ufom_theory import Sweep


def both_gradients(
    problem: BilevelProblem, thetas: Tensor, tasks: Tasks, task: Tensor, coins: Tensor, proxy: int = 0
) -> tuple[Tensor, Tensor]:
    """Proxy and exact gradients, shape (runs, batch, s); where a coin is 0, the proxy twice.

    Args:
        problem: the problem.
        thetas: θ of each run, shape (runs, s).
        tasks: stacked tasks.
        task: the tasks of each run, shape (runs, batch).
        coins: of each of them, shape (runs, batch).
        proxy: backward steps that the proxy keeps.
    """
    runs, flat, r = torch.arange(len(thetas)).repeat_interleave(task.shape[1]), coins.flatten(), problem.r
    pairs, stops = torch.stack([runs, task.flatten()]), torch.where(flat, r, proxy)
    firsts, lasts, done = [], [], 0
    for columns, found in in_chunks(problem, thetas, tasks, pairs, (proxy, r), Sweep.stored(), ring=proxy, stops=stops):
        last = found[0].clone()
        last[flat[done : (done := done + columns.shape[1])]] = found[1]
        firsts.append(found[0])
        lasts.append(last)
    shape = (*task.shape, thetas.shape[1])
    return torch.cat(firsts).view(shape), torch.cat(lasts).view(shape)


def estimates(coins: Tensor, q: Tensor, proxy: Tensor, exact: Tensor) -> Tensor:
    """The mean of F + (ξ/q)·(G − F) over each run's batch, shape (runs, s), from what `both_gradients` gives."""
    weight = coins.double() / q[:, None].clamp(min=1e-300)
    return (proxy + weight[..., None].to(proxy) * (exact - proxy)).mean(1)


def follow(
    rule: AdaptiveUFOM, state: State, problem: BilevelProblem, theta: Tensor, tasks: Tasks, coins: Tensor,
    proxy: Tensor, exact: Tensor,
) -> Direction:  # fmt: skip
    """The direction of an adaptive rule in one run, and its state after it; coins of shape (batch,)."""
    corrected = int(coins.sum())
    if rule.law == "step":
        pieces = [
            (index, proxy[index], exact[index] if coin else None)
            for coin in (False, True)
            if len(index := (coins == coin).nonzero()[:, 0])
        ]
        now = step_rule.StepState.of(state, theta, rule.q_min)
        return step_rule.learn(rule, problem, theta, tasks, now, coins, pieces)
    before = AdaptiveState(*state)  # type: ignore[arg-type]
    value = torch.where(coins[:, None], debias(proxy, exact, before.q), proxy).mean(0)
    if not corrected:
        return Direction(value, state=before)
    bias_sq, exact_sq = (float(x[coins].double().square().sum()) / corrected for x in (exact - proxy, exact))
    return Direction(value, None, corrected, rule.update(before, bias_sq, exact_sq, problem.r))


class Adam:
    """Adam's averages of all runs, with torch's defaults."""

    def __init__(self, theta: Tensor) -> None:
        self.mean, self.square = torch.zeros_like(theta), torch.zeros_like(theta)

    def direction(self, gradient: Tensor, k: int) -> Tensor:
        """What the rate of step k = 1, 2, … multiplies."""
        self.mean.lerp_(gradient, 0.1)
        self.square.lerp_(gradient**2, 0.001)
        return self.mean / (1 - 0.9**k) / ((self.square / (1 - 0.999**k)).sqrt() + 1e-8)


def outer_losses(problem: BilevelProblem, thetas: Tensor, tasks: Tasks) -> Tensor:
    """L_out after the inner loop, for one θ and one task a row; not finite where the loop diverges."""
    x = first_state(problem, thetas, tasks)
    with torch.enable_grad():
        x = inner_loop(Steps(problem, thetas, tasks, products=False), x)
    return torch.func.vmap(problem.outer_loss)(thetas, phi_of(problem, thetas, x, tasks), tasks.stack)
