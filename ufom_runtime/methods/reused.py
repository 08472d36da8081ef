"""Methods that are one of our estimators under another name: truncated back-propagation and checkpointing."""

from __future__ import annotations

import math

from ufom_runtime.estimators import Estimator
from ufom_theory import Sweep, Truncated
from ufom_theory.checks import integer, scalar


def TruncatedBackprop(steps: int) -> Estimator:
    """Truncated back-propagation (Shaban et al. 2018): the last `steps` backward steps are kept, and their states.

    Biased, unless steps = r; 0 is FOM. Its bias falls geometrically in K near a minimum of a strongly convex inner
    loss, and need not elsewhere.

    Raises:
        UfomError: steps no integer ≥ 0; when it runs, steps > r.
    """
    return Estimator(0.0, proxy=Truncated(steps))


def Checkpointing(slots: int) -> Estimator:
    """The exact gradient with `slots` states and φ_0 kept, placed by the binomial schedule (Griewank 1992).

    Raises:
        UfomError: slots no integer ≥ 0.
    """
    return Estimator(1.0, Sweep.checkpointed(slots))


def RootCheckpointing(r: int) -> Estimator:
    """The exact gradient with ⌈√r⌉ checkpoints (Hascoët & Araya-Polo 2006), placed by the binomial schedule.

    With as many states no schedule takes fewer steps, evenly spaced checkpoints included.

    Raises:
        UfomError: r no integer ≥ 1.
    """
    return Checkpointing(math.isqrt(scalar("r, the number of inner steps,", r, integer, 1) - 1) + 1)
