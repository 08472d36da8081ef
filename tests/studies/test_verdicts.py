"""A verdict can say each of its words, and an interval is narrow only where its caller says so."""

import numpy as np
import pytest

from studies.shared.verdicts import Verdict
from ufom_theory import UfomError


def judge(values, **options):
    return Verdict.from_paired("x", "<=", 0.0, values, **options).agrees


def test_a_verdict_can_say_each_of_its_words():
    assert judge([-1.0, -1.1, -0.9]) == "yes"
    assert judge([1.0, 1.1, 0.9]) == "no"
    assert judge([-5.0, 6.0, 0.1]) == "inconclusive"
    assert judge([np.inf, 1.0]) == "inconclusive"


@pytest.mark.parametrize("unit", [1.0, 100.0])
def test_accuracies_that_cannot_be_told_apart_are_inconclusive_in_every_unit(unit):
    accuracies = unit * np.array([-0.0095, 0.0055, -0.003, -0.001])  # -0.0020 ± 0.0098
    found = Verdict.from_paired("x", ">=", 0.0, accuracies)
    assert found.measured < 0 < found.measured + found.tolerance
    assert found.agrees == "inconclusive"
    assert Verdict.from_paired("x", ">=", 0.0, accuracies, widest=0.02 * unit).agrees == "no"
    assert Verdict.from_paired("x", ">=", 0.0, accuracies, widest=0.019 * unit).agrees == "inconclusive"


def test_the_margin_is_kept_on_both_sides():
    for centre, agrees in ((0.02, "yes"), (-0.02, "yes"), (0.2, "no"), (-0.2, "no")):
        values = centre + np.array([-1e-3, 1e-3, 0.0])
        assert Verdict.from_paired("x", "=", 0.0, values, margin=0.1).agrees == agrees


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("x", "<=", 0, [1.0]), "x: 1 paired difference.* needs at least 2"),
        (("x", "‹", 0, [1, 2]), "use =, <= or >="),
        (("x", "=", 0, ["a", "b"]), "one vector of numbers"),
    ],
)
def test_what_cannot_be_judged_is_named(arguments, said):
    with pytest.raises(UfomError, match=said):
        Verdict.from_paired(*arguments)
