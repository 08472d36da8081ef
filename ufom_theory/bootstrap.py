"""An interval of q* that assumes neither normal estimates nor a linear q*: the tasks are drawn again.

`scipy.stats.bootstrap` gives the same interval, in 10 ms instead of 60 for 64 tasks. But it takes half a second to
import, and where D² = V² = 0 in some draws (q* has no value there) it warns of an interval that nobody asked for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ufom_theory.checks import UfomError, finite, instance, integer, scalar
from ufom_theory.cost import CostModel
from ufom_theory.laws import exponent_of
from ufom_theory.optimum import optimal_q
from ufom_theory.quantities import Moments


def bootstrap_interval(
    d2_samples: ArrayLike,
    v2_samples: ArrayLike,
    cost: CostModel,
    m: float | None = None,
    outer: str | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of q*: the tasks are drawn again, D² and V² of one task always together.

    It assumes neither normal estimates nor a linear q*, as `Prediction.interval` does; the two agree for many tasks.
    The errors of C1 and C2 are left out, and one call is a batch of one task.

    Args:
        d2_samples: ‖G_proxy − G‖² of each task at the same θ, shape (n,), n ≥ 2.
        v2_samples: ‖G‖² of the same tasks, shape (n,).
        cost: scalar cost model.
        m: exponent of the time to precision; give exactly one of m and outer.
        outer: how the outer steps are taken, as in `optimal_q`.
        draws: bootstrap samples.
        level: coverage, in (0, 1).
        seed: of the generator.

    Returns:
        The two ends, in [0, 1].

    Raises:
        UfomError: samples that are negative, not finite, fewer than 2, or of different lengths; D² = V² = 0 in every
            draw; a level outside (0, 1), m ≤ 0, neither or both of m and outer, draws < 1, seed < 0; a cost model that
            holds arrays.
    """
    rule = "a finite number ≥ 0: it is a squared norm"
    d2 = np.asarray(finite("d2_samples", d2_samples, rule, 0.0))
    v2 = np.asarray(finite("v2_samples", v2_samples, rule, 0.0))
    if d2.shape != v2.shape or d2.ndim != 1 or len(d2) < 2:
        raise UfomError(f"d2_samples {d2.shape} and v2_samples {v2.shape} must pair the same n ≥ 2 tasks")
    level = scalar("level", level)
    if not 0 < level < 1:
        raise UfomError(f"level = {level:g} must lie in (0, 1): 0.95 is usual")
    instance("cost", cost, CostModel, "write CostModel(r=10)")
    if cost.shape:
        raise UfomError(f"the cost model holds arrays of shape {cost.shape}: bootstrap one cost model at a time")
    exponent = scalar("m", exponent_of(m, outer)[0])
    draws, n = scalar("draws", draws, integer, 1), len(d2)
    rng, found = np.random.default_rng(scalar("seed", seed, integer, 0)), []
    for _ in range(draws):
        chosen = rng.integers(0, n, n)
        found.append((d2[chosen].mean(), v2[chosen].mean()))
    ds, vs = np.array(found).T
    ds, vs = ds[ds + vs > 0], vs[ds + vs > 0]  # where both vanish every q is as good
    if not len(ds):
        raise UfomError("D² = V² = 0 in every draw: the gradient vanishes; measure at another θ")
    low, high = np.quantile(optimal_q(Moments(ds, vs), cost, exponent).q, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
