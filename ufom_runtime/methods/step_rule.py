"""Adaptive UFOM by the law of one step: q of the most expected progress per cost, from estimates of earlier steps.

q is a function of what is known before the step, and not of its tasks or coins: given the past the direction is
unbiased, and the theorem for adaptive rules holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ufom_runtime.batching import in_chunks
from ufom_runtime.coins import Draws, debias, toss
from ufom_runtime.estimators import Direction, Estimator, State, gradients
from ufom_runtime.problem import BilevelProblem, Tasks
from ufom_theory import CostModel, UfomError
from ufom_theory.laws import Progress, parse_outer
from ufom_theory.scores import Scores, scores

if TYPE_CHECKING:
    from ufom_runtime.methods.adaptive import AdaptiveUFOM

_FIRST = 4  # steps that are exact, before there are estimates to choose by
_SHARE = 0.03  # of the cost, spent on curvatures


def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64, device="cpu")


class StepState(NamedTuple):
    """What the rule remembers. A sum decays: it is multiplied by β before each addition.

    With F the proxy's and G the exact gradient of a task, d = G − F, and H the Hessian of another task's objective.

    Attributes:
        q: probability in force; 0: the proxy alone.
        c: scale of the proxy in force.
        steps: outer steps taken.
        owed: cost that curvatures may take before they are measured again; they are where it is ≥ 0.
        means: sums over steps of 1, ⟨ḡ, Ḡ⟩, ⟨ḡ, F̄⟩ and ‖F̄‖², with Ḡ the unbiased estimate and F̄ the proxy of a batch.
        norms: sums over corrected tasks of 1, ‖d‖², ⟨d, F⟩ and ‖F‖².
        curved: sums over measurements of ‖d‖², dᵀHd, ‖G‖² and GᵀHG.
        mean: ḡ, the smoothed Ḡ of the steps before, shape (s,); empty before the first.
    """

    q: float = 1.0
    c: float = 1.0
    steps: int = 0
    owed: float = 0.0
    means: Tensor = _zeros(4)
    norms: Tensor = _zeros(4)
    curved: Tensor = _zeros(4)
    mean: Tensor = _zeros(0)

    @classmethod
    def of(cls, state: State, theta: Tensor, q_min: float) -> StepState:
        """From what a step or a checkpoint gave; `UfomError` where the rule never has such a state."""
        now = cls(*state)  # type: ignore[arg-type]
        shapes = [x.shape for x in now[4:]] == [(4,), (4,), (4,), theta.shape if now.steps else (0,)]
        numbers = torch.cat([torch.tensor(now[:4], dtype=torch.float64), *(x.double().cpu() for x in now[4:])])
        if not (shapes and now.steps >= 0 and numbers.isfinite().all() and (now.q == 0 or q_min <= now.q <= 1)):
            raise UfomError(f"{now} is not a state of this rule: q is 0 or in [{q_min}, 1], and all is finite")
        return now._replace(mean=now.mean.to(theta))

    def bias_sq(self, c: float) -> float:
        """D_c² = E‖G − cF‖²; D² at c = 1, V² at c = 0; nan before a task is corrected."""
        weight, dd, df, ff = self.norms.tolist()
        return max(0.0, dd + 2 * (1 - c) * df + (1 - c) ** 2 * ff) / weight if weight else math.nan

    def progress(self) -> Progress:
        """The estimates as the law takes them, with the proxy scaled by c in D²; two curvatures: of d, and of the rest.

        ‖f‖² + Var_F/B is known as a whole, and one curvature serves both parts.
        """
        weight, gradient_sq, cross, fom_sq = self.means.tolist()
        v2 = self.bias_sq(0.0)
        gradient_sq = min(gradient_sq / weight, v2)
        dd, by_d, gg, by_g = self.curved.tolist()
        of_g, of_d = by_g / gg if gg else 0.0, by_d / dd if dd else 0.0
        moments = gradient_sq, v2 - gradient_sq, self.bias_sq(self.c), cross / weight, fom_sq / weight, 0.0
        return Progress(*moments, of_g, of_g, of_d, of_g, of_g)


def choose(rule: AdaptiveUFOM, state: StepState, cost: CostModel, batch: int) -> StepState:
    """The state with the c and the q of the next step."""
    if state.steps < _FIRST:
        return state
    _, _, df, ff = state.norms.tolist()
    state = state._replace(c=1 + df / ff if ff else 1.0)  # c* = E⟨G, F⟩/E‖F‖²
    found: Scores = scores(state.progress(), cost, str(rule.outer), batch, state.steps + 1, rule.q_min)
    if rule.allow_biased and found.fom > found.ufom:
        return state._replace(q=0.0)
    return state._replace(q=1.0 if math.isnan(found.q) else float(found.q))  # nan: no q makes progress on average


def direction(
    rule: AdaptiveUFOM,
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Tasks,
    state: State,
    draws: Draws,
    per_task: bool,
    chunk: int | None,
    compile: bool,
) -> Direction:
    """As `Method.direction`: the estimate at the q and c in force, and the state after it."""
    if rule.outer is None:
        raise UfomError(
            "law='step' must know who takes the outer steps: give outer='sgd:0.05' to the rule, or "
            "optimizer='sgd:0.05' to train"
        )
    now = StepState.of(state or rule.begin(), theta, rule.q_min)
    coins = toss(len(tasks), now.q or rule.q_min, draws)
    both = Estimator(0.5, rule.sweep, rule.proxy)  # at q = 1, too, D² is measured: any q < 1 asks for the proxy
    found = gradients(problem, theta, tasks, coins, both, chunk, compile)
    return learn(rule, problem, theta, tasks, now, coins, found, per_task, chunk, compile)


def learn(
    rule: AdaptiveUFOM,
    problem: BilevelProblem,
    theta: Tensor,
    tasks: Tasks,
    now: StepState,
    coins: Tensor,
    found: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    per_task: bool = False,
    chunk: int | None = None,
    compile: bool = False,
) -> Direction:
    """The direction and the next state from the gradients that these coins asked for, as `gradients` yields them."""
    n, q = len(tasks), now.q or rule.q_min  # where the proxy goes alone, coins still correct tasks for the estimates
    unbiased, first, norms = torch.zeros_like(theta), torch.zeros_like(theta), _zeros(4)
    each = theta.new_zeros(n, len(theta)) if per_task else None
    seen: list[tuple[int, Tensor]] = []  # a corrected task, and its d and G
    for index, proxy, exact in found:
        scaled = now.c * proxy
        estimate = scaled if exact is None else debias(scaled, exact, q)
        unbiased.add_(estimate.sum(0), alpha=1 / n)
        first.add_(proxy.sum(0), alpha=1 / n)
        if each is not None:
            each[index.to(theta.device)] = estimate if now.q else proxy
        if exact is not None:
            d, f = (exact - proxy).double(), proxy.double()
            norms += torch.stack([d.new_tensor(len(d)), (d * d).sum(), (d * f).sum(), (f * f).sum()]).cpu()
            seen = seen or [(int(index[0]), torch.stack([exact[0] - proxy[0], exact[0]]))]
    cost, rate, corrected = rule.costs(problem.r), _rate(rule, now.steps + 1), int(coins.sum())
    later = _after(rule, now, unbiased, first, norms)
    later = later._replace(owed=now.owed + _SHARE * float(n * cost.c_det + corrected * cost.c_rnd))
    if rate and seen and now.owed >= 0:
        task, along = seen[0]
        thetas = torch.cat([theta[None], theta - rate / n * along])
        pairs = torch.tensor([[0, 1, 2], [(task + 1) % n] * 3], device="cpu")
        rows = in_chunks(problem, thetas, tasks, pairs, (problem.r,), rule.sweep, chunk, compile=compile)
        forms = _forms(along.double(), torch.cat([x[0] for _, x in rows]).double(), rate / n)
        paid = 3 * float(cost.c_det + cost.c_rnd)
        later = later._replace(curved=rule.beta * now.curved + forms, owed=later.owed - paid)
    columns = {"q": now.q, "c": now.c, "d2": now.bias_sq(now.c), "v2": now.bias_sq(0.0)}
    return Direction(unbiased if now.q else first, each, corrected, choose(rule, later, cost, n), columns)


def _rate(rule: AdaptiveUFOM, step: int) -> float | None:
    """γ_k where the law has it, and so needs curvatures; else None."""
    outer = parse_outer(str(rule.outer))
    return None if outer.kind == "adam" or outer.rate is None else outer.rate_at(step)


def _after(rule: AdaptiveUFOM, now: StepState, unbiased: Tensor, first: Tensor, norms: Tensor) -> StepState:
    """The state with the averages of one more step."""
    beta, steps = rule.beta, now.steps + 1
    if not now.steps:
        return now._replace(steps=1, norms=norms, mean=unbiased)
    mean, g, f = now.mean.double(), unbiased.double(), first.double()
    found = torch.stack([g.new_tensor(1.0), mean @ g, mean @ f, f @ f]).cpu()
    return now._replace(
        steps=steps,
        means=beta * now.means + found,
        norms=beta * now.norms + norms if norms[0] else now.norms,
        mean=torch.lerp(now.mean, unbiased, (1 - beta) / (1 - beta**steps)),
    )


def _forms(along: Tensor, found: Tensor, rate: float) -> Tensor:
    """‖x‖² and xᵀHx of the two rows x = d, G of `along`.

    Hx is the difference of the gradients `found` at θ and at θ − γx/B, the step that x makes (`rate` is γ/B); 0 where
    the inner loop diverges there.
    """
    curved = (along * (found[0] - found[1:])).sum(1) / rate
    forms = torch.stack([along.square().sum(1), curved], 1).flatten().cpu()
    return forms if forms.isfinite().all() else _zeros(4)
