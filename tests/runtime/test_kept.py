"""How a problem is run belongs to the call; what is kept for a problem goes with it."""

from dataclasses import replace

import pytest

from tests.runtime.conftest import coupled
from ufom_theory import UfomError


def test_compile_is_refused_as_a_part_of_a_problem():
    problem = coupled()
    with pytest.raises(UfomError, match=r"pass compile=True to the call"):
        replace(problem, compile=True)
    assert replace(problem, step_sizes=[0.1]).r == 1
