"""The cells of the study `regret`: problems, outer steps, and the precisions that were fixed before any run.

The numbers in `levels` and `horizons` are what `regret_cell.levels` gives.
"""

from __future__ import annotations

from typing import Any

from studies.regret_cell import Setting

_OWN = {"alpha": 0.03, "spread": 0.7}
_LONG = {"alpha": 0.003, "r": 100, "spread": 0.7}
_CLEANING = {"n_train": 50, "n_validation": 50, "hidden": 6, "r": 10, "alpha": 1.0}


_LEVELS: dict[str, tuple[tuple[float, float], tuple[int, int]]] = {
    "hypercleaning, digits, sgd:30": ((2.06, 1.95), (5, 27)),
    "hypercleaning, digits, sgd:100": ((1.99, 1.91), (5, 15)),
    "MAML, digits, sgd:0.3": ((0.996, 0.847), (14, 56)),
    "MAML, digits, adam:0.01": ((0.965, 0.817), (17, 54)),
    "MAML, Omniglot, sgd:0.3": ((1.04, 0.961), (13, 58)),
    "MAML, Omniglot, adam:0.01": ((1.0, 0.943), (22, 55)),
    "hypercleaning, MNIST, sgd:30": ((2.24, 2.14), (7, 28)),
    "hypercleaning, MNIST, sgd:100": ((2.18, 2.12), (6, 21)),
    "sinusoid, adam:0.005": ((3.25, 3.23), (29, 41)),
    "curved, sgd:0.1": ((0.0701, 0.0127), (67, 108)),
    "curved, sgd:0.3": ((0.0602, 0.0251), (25, 35)),
    "curved, decay:0.5:1": ((0.022, 0.00805), (33, 65)),
    "curved, adam:0.1": ((0.0357, 0.0224), (56, 93)),
    "pair, sgd:0.1": ((0.0884, 0.0319), (77, 91)),
    "pair, sgd:0.3": ((0.167, 0.114), (24, 27)),
    "pair, decay:0.5:0.5": ((0.0469, 0.0304), (78, 86)),
    "pair, adam:0.3": ((7.05, 0.0645), (83, 160)),
    "quadratic, sgd:0.1": ((0.179, 0.0166), (54, 100)),
    "quadratic, sgd:0.3": ((0.0759, 0.0327), (27, 44)),
    "quadratic, decay:0.5:1": ((0.0232, 0.0132), (42, 63)),
    "quadratic, adam:0.1": ((0.0554, 0.0327), (48, 58)),
    "curved, r = 100, adam:0.1": ((0.0303, 0.0231), (59, 93)),
    "rates, adam:0.1": ((2.3, 1.99), (9, 24)),
    "curved, r = 100, sgd:0.1": ((0.0578, 0.0134), (70, 107)),
    "pair, r = 100, sgd:0.1": ((0.0884, 0.0317), (76, 91)),
}


def _many(name: str, problem: str, outers: dict[str, int], **options: Any) -> list[Setting]:
    """A setting for each of the outer steps, with the steps of the exact gradient that make the budget."""
    return [
        Setting(f"{name}, {outer}", problem, outer, steps, *_LEVELS[f"{name}, {outer}"], **options)
        for outer, steps in outers.items()
    ]


_MNIST = {"n": 50, "hidden": 6, "r": 10}
_PAIR = {"alpha": 0.03}
# those of each kind first, in case not all can be run
STANDARD = (
    *_many("quadratic", "quadratic", {"sgd:0.1": 100}, arguments={"alpha": 0.03}, chains=8),
    *_many("curved", "quadratic", {"sgd:0.1": 120, "sgd:0.3": 60}, arguments=_OWN, chains=8),
    *_many("MAML, digits", "digits-maml", {"sgd:0.3": 60}),
    *_many("hypercleaning, digits", "digits-hypercleaning", {"sgd:30": 40}, arguments=_CLEANING, batch=1, proxy=3),
    *_many("curved, r = 100", "quadratic", {"sgd:0.1": 120}, arguments=_LONG, chains=8),
    *_many("curved", "quadratic", {"decay:0.5:1": 120, "adam:0.1": 120}, arguments=_OWN, chains=8),
    *_many("quadratic", "quadratic", {"adam:0.1": 100, "decay:0.5:1": 100}, arguments={"alpha": 0.03}, chains=8),
    *_many("rates", "rates", {"adam:0.1": 24}, arguments={"hidden": 2, "r": 5}, batch=2, proxy=1),
    *_many("hypercleaning, MNIST", "mnist-hypercleaning", {"sgd:30": 40}, arguments=_MNIST, batch=1, proxy=3),
    *_many("MAML, Omniglot", "omniglot-maml", {"adam:0.01": 60}),
    *_many("pair", "pair", {"adam:0.3": 180, "sgd:0.1": 100}, arguments=_PAIR, chains=16, batch=2),
    *_many("sinusoid", "sinusoid", {"adam:0.005": 60}, arguments={"shots": 5, "width": 8}),
    *_many("MAML, digits", "digits-maml", {"adam:0.01": 60}),
    *_many("hypercleaning, digits", "digits-hypercleaning", {"sgd:100": 40}, arguments=_CLEANING, batch=1, proxy=3),
    *_many("hypercleaning, MNIST", "mnist-hypercleaning", {"sgd:100": 40}, arguments=_MNIST, batch=1, proxy=3),
    *_many("pair", "pair", {"sgd:0.3": 40, "decay:0.5:0.5": 100}, arguments=_PAIR, chains=16, batch=2),
    *_many("pair, r = 100", "pair", {"sgd:0.1": 100}, arguments={"alpha": 0.003, "r": 100}, chains=16, batch=2),
    *_many("quadratic", "quadratic", {"sgd:0.3": 60}, arguments={"alpha": 0.03}, chains=8),
    *_many("curved, r = 100", "quadratic", {"adam:0.1": 120}, arguments=_LONG, chains=8),
    *_many("MAML, Omniglot", "omniglot-maml", {"sgd:0.3": 60}),
)
QUICK = (
    Setting("curved, sgd:0.1", "quadratic", "sgd:0.1", 60, (0.0922, 0.0261), (27, 46), _OWN, chains=4),
    Setting("MAML, digits, sgd:0.3", "digits-maml", "sgd:0.3", 6, (0.94, 0.85), (2, 5), {"hidden": 3, "r": 2}, batch=2),
)
