"""The texts that name outer steps."""

import pytest

from ufom_theory import UfomError
from ufom_theory.laws import Outer, parse_outer


@pytest.mark.parametrize(
    ("text", "outer"),
    [
        ("sgd:0.05", Outer("sgd", 0.05)),
        ("adam:1e-3", Outer("adam", 1e-3)),
        ("tuned", Outer("tuned")),
        ("paper", Outer("paper")),
        ("decay:.5", Outer("decay", None, 0.5)),
        ("decay:1:20", Outer("decay", 20.0, 1.0)),
    ],
)
def test_the_grammar(text, outer):
    assert parse_outer(text) == outer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sgd", "does not name an outer optimizer: write sgd:γ"),
        ("Adam:0.1", "does not name"),
        ("tuned:0.1", "does not name"),
        ("decay", "does not name"),
        ("decay:0.5:1:2", "does not name"),
        (0.5, "does not name"),
        ("sgd:fast", "the rate 'fast' must be a finite number > 0"),
        ("adam:-1", "must be a finite number > 0"),
        ("adam:inf", "must be a finite number > 0"),
        ("decay:1.5", r"s = 1.5 must lie in \(0, 1\]"),
        ("decay:0.5:nan", "γ₁ 'nan'"),
    ],
)
def test_what_is_outside_the_grammar_is_refused(text, message):
    with pytest.raises(UfomError, match=message):
        parse_outer(text)
