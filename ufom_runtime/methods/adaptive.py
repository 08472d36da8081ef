"""Adaptive UFOM: q chosen on the way, by section 4.5 (as printed or as released) or by the law of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ufom_runtime.coins import Draws, debias, toss
from ufom_runtime.estimators import Direction, Estimator, State, gradients
from ufom_runtime.methods import step_rule
from ufom_runtime.problem import BilevelProblem, Task, Tasks, check
from ufom_theory import CostModel, Moments, Sweep, Truncated, UfomError, optimal_q
from ufom_theory.checks import instance, positive, scalar
from ufom_theory.laws import parse_outer


class AdaptiveState(NamedTuple):
    """What adaptive UFOM remembers.

    Attributes:
        q: probability in force.
        d2_sm: smoothed ‖b_FO − b_Exact‖² of (23).
        v2_sm: smoothed ‖b_Exact‖² of (24).
        updates: k_upd of (22), how often the two were updated.
    """

    q: float
    d2_sm: float = 0.0
    v2_sm: float = 0.0
    updates: int = 0


@dataclass(frozen=True)
class AdaptiveUFOM:
    """UFOM whose q is chosen on the way from smoothed estimates of earlier steps; for `train`, which keeps its state.

    Each task has its own coin, as with UFOM.

    law="paper": q = max(q*, q_min), q* by (21) from (22)–(24). A batch makes one update, with the means over its tasks
    whose ξ = 1, and none where every ξ is 0. Before the first update (22) is 0/0: the run starts at q_min. D²
    and V² are those of one task: for a batch of B the best q is below the one that this rule seeks, since its V² is
    V² + (B − 1)·‖∇M‖².

    law="step": the q ≥ q_min of the most expected progress per cost, `scores(progress, cost, outer, batch)`, with the
    proxy scaled by c = E⟨G, F⟩/E‖F‖². Four exact steps come first. Where the step γ is given ("sgd:γ", "decay:s:γ₁"),
    the curvatures along G − F and G are measured too, by three exact gradients now and then: 3 % of the cost.
    AdaptiveUFOM(law="step", sweep=Sweep.stored())

    Attributes:
        q_min: floor of q, in (0, 1].
        beta: β of (23)–(24), in (0, 1): the decay of all averages. None: 0.99, or 0.95 with law="step".
        scale: factor of D² in (22); the paper's experiments use 0.1. Of law="paper", as are variant and m.
        variant: "printed", or "released": the authors' code measures D² after it has overwritten the first-order
            gradient with the estimate, and so smooths (1/q − 1)²·‖b_FO − b_Exact‖².
        c1: cost of a gradient, in any unit.
        c2: cost of a Hessian-vector product, in the same unit.
        m: exponent of the time to precision, `exponent(ε)`.
        sweep: how the exact gradient recovers the inner states.
        proxy: what is debiased.
        law: "paper" or "step".
        outer: who takes the outer steps: "sgd:γ", "adam:γ", "tuned", "decay:s:γ₁", …. None: the optimizer that
            `train` is given. With law="step" alone.
        allow_biased: whether the proxy goes alone where it makes more progress per cost; a coin of probability q_min
            then still corrects each task, for the estimates only, and is paid for. The theorem holds from the last such
            step on. With law="step" alone.
        cost: of one task, fixed before the run, such as `measure_cost` gives; None: counted calls, with c1 and c2.

    Raises:
        UfomError: a value outside its range, another law or variant, an argument of the other law.
    """

    q_min: float = 0.05
    beta: float = None  # type: ignore[assignment]
    scale: float = 1.0
    variant: Literal["printed", "released"] = "printed"
    c1: float = 1.0
    c2: float = 1.0
    m: float = 2.0
    sweep: Sweep = field(default_factory=Sweep.recomputed)
    proxy: Truncated = field(default_factory=Truncated)
    law: Literal["paper", "step"] = "paper"
    outer: str | None = None
    allow_biased: bool = False
    cost: CostModel | None = None
    gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.law, str) or self.law not in ("paper", "step"):
            raise UfomError(f"law {self.law!r} is unknown: use paper or step")
        if self.beta is None:
            object.__setattr__(self, "beta", 0.99 if self.law == "paper" else 0.95)
        for name in ("q_min", "beta", "scale", "m"):
            scalar(name, getattr(self, name), positive)
        if self.q_min > 1 or self.beta >= 1:
            raise UfomError(f"q_min = {self.q_min}, beta = {self.beta}: give 0 < q_min ≤ 1 and 0 < beta < 1")
        if not isinstance(self.variant, str) or self.variant not in ("printed", "released"):
            raise UfomError(f"variant {self.variant!r} is unknown: use printed or released")
        instance("proxy", self.proxy, Truncated, "write Truncated(K), K = 0 for FOM")
        self._refuse_the_other_law()
        self.costs(max(1, self.proxy.steps))  # refuses the rest

    def _refuse_the_other_law(self) -> None:
        """`UfomError` for an argument that this law does not read, or lacks."""
        instance("allow_biased", self.allow_biased, bool, "True or False")
        if self.law == "step":
            of_paper = {"scale": self.scale != 1, "variant": self.variant != "printed", "m": self.m != 2}
            if given := [name for name, changed in of_paper.items() if changed]:
                raise UfomError(f"{given} are read by law='paper' alone: leave them out")
            if self.outer is not None:
                parse_outer(self.outer)
        elif self.outer is not None or self.allow_biased:
            raise UfomError("outer and allow_biased are read by law='step' alone: leave them out, or take that law")
        if self.cost is not None:
            instance("cost", self.cost, CostModel, "write CostModel(r=10), or CostModel.of(c_det=..., c_rnd=...)")
            if self.cost.shape:
                raise UfomError(f"cost has shape {self.cost.shape}: give one cost, since one run has one")

    def costs(self, r: int) -> CostModel:
        """C_det and C_rnd of a problem with r inner steps."""
        return self.cost or CostModel(r=r, c1=self.c1, c2=self.c2, sweep=self.sweep, proxy=self.proxy)

    def trained_by(self, optimizer: object) -> AdaptiveUFOM:
        """This rule, told who takes the outer steps where that is missing: a text, or the rate of plain steps."""
        if self.law == "paper" or self.outer is not None:
            return self
        if isinstance(optimizer, int | float):
            optimizer = f"sgd:{optimizer!r}"
        return replace(self, outer=optimizer) if isinstance(optimizer, str) else self

    def begin(self) -> State:
        """The state before the first step, an `AdaptiveState` or a `StepState`."""
        return AdaptiveState(float(self.q_min)) if self.law == "paper" else step_rule.StepState()

    def estimates(self, state: AdaptiveState) -> tuple[float, float]:
        """D² (times `scale`) and V² of (22) that a `state` holds; nan before the first update."""
        if not state.updates:
            return math.nan, math.nan
        weight = 1 - self.beta**state.updates
        return self.scale * state.d2_sm / weight, state.v2_sm / weight

    def update(self, state: AdaptiveState, bias_sq: float, exact_sq: float, r: int) -> AdaptiveState:
        """The state after (23)–(24), and the q that follows, for r inner steps.

        `bias_sq` is ‖b_FO − b_Exact‖² and `exact_sq` ‖b_Exact‖².
        """
        if self.variant == "released":
            bias_sq *= (1 / state.q - 1) ** 2
        d2_sm = self.beta * state.d2_sm + (1 - self.beta) * bias_sq
        v2_sm = self.beta * state.v2_sm + (1 - self.beta) * exact_sq
        later = AdaptiveState(state.q, d2_sm, v2_sm, state.updates + 1)
        d2, v2 = self.estimates(later)
        if d2 == v2 == 0:  # every q is equally good
            return later
        best = optimal_q(Moments(d2, v2), self.costs(r), self.m).q
        return later._replace(q=max(float(best), float(self.q_min)))

    def direction(
        self,
        problem: BilevelProblem,
        theta: Tensor,
        tasks: Task | Tasks,
        state: State = (),
        draws: Draws = None,
        *,
        per_task: bool = False,
        chunk: int | None = None,
        compile: bool = False,
    ) -> Direction:
        """As `Method.direction`: the estimate of UFOM(q) at the q in force, and the state after it.

        An empty `state` is `begin()`; the columns are q, d2 and v2 as they were in force, with law="step" also c, and
        q = 0 where the proxy goes alone.

        Raises:
            UfomError: as `hypergradient`, and a state that this rule never has.
        """
        tasks = check(problem, theta, tasks)
        if self.law == "step":
            return step_rule.direction(self, problem, theta, tasks, state, draws, per_task, chunk, compile)
        now = AdaptiveState(*(state or self.begin()))  # type: ignore[arg-type]  # a checkpoint gives a plain tuple
        if not self.q_min <= now.q <= 1 or not all(0 <= x < math.inf for x in now):
            raise UfomError(f"{now} is not a state of this rule: {self.q_min} ≤ q ≤ 1, and the others finite and ≥ 0")
        n = len(tasks)
        coins = toss(n, now.q, draws)
        total, squares = torch.zeros_like(theta), torch.zeros(2, dtype=torch.float64, device=theta.device)
        each = theta.new_zeros(n, len(theta)) if per_task else None
        both = Estimator(0.5, self.sweep, self.proxy)  # at q = 1, too, D² is measured: any q < 1 asks for the proxy
        for index, proxy, exact in gradients(problem, theta, tasks, coins, both, chunk, compile):
            estimate = proxy if exact is None else debias(proxy, exact, now.q)
            total.add_(estimate.sum(0), alpha=1 / n)
            if each is not None:
                each[index.to(theta.device)] = estimate
            if exact is not None:
                squares += torch.stack([x.double().square().sum() for x in (exact - proxy, exact)])
        corrected = int(coins.sum())
        columns = dict(zip(("q", "d2", "v2"), (now.q, *self.estimates(now)), strict=True))
        if corrected:
            bias_sq, exact_sq = (squares / corrected).tolist()
            now = self.update(now, bias_sq, exact_sq, problem.r)
        return Direction(total, each, corrected, now, columns)
