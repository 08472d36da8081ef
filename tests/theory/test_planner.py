"""The planner against brute force over everything that fits, and the plain words it owes its reader."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ufom_runtime.command.cli import app
from ufom_theory import CostModel, Moments, Sweep, Truncated, UfomError, optimal_q, plan
from ufom_theory.planner import states_held

FOM = Truncated(0)


def test_one_stored_state_already_changes_the_answer():
    (paper,) = plan({FOM: Moments(0.1, 1.0)}, r=100, c1=1, c2=1, memory_slots=1, m=2)
    assert (str(paper.sweep), paper.states) == ("recomputed", 1)
    assert paper.q == pytest.approx(optimal_q(Moments(0.1, 1.0), CostModel(r=100), m=2).q, rel=1e-15)
    best, *rest = plan({FOM: Moments(0.1, 1.0)}, r=100, c1=1, c2=1, memory_slots=2, m=2)
    assert (str(best.sweep), best.states) == ("checkpointed:1", 2)
    assert paper.time / best.time_exact > 1.9
    assert "one stored state already changes the answer" in best.why
    assert paper.time in [c.time for c in rest]


def test_one_stored_state_need_not_change_it():
    best = plan({FOM: Moments(0.001, 1.0)}, r=100, c1=1, c2=1, memory_slots=2, m=2)[0]
    assert "does not overturn" in best.why


def test_a_proxy_that_carries_nothing_is_named():
    moments = {FOM: Moments(1.0, 1.0), Truncated(5): Moments(0.02, 1.0)}
    best = plan(moments, r=100, c1=1, c2=1, memory_slots=8, m=2)[0]
    assert best.proxy == Truncated(5)
    assert "no better than a proxy of zero" in best.why


def test_a_proxy_of_every_step_is_the_exact_gradient():
    best = plan({Truncated(3): Moments(0.0, 1.0)}, r=3, c1=1, c2=1, memory_slots=3, m=2)[0]
    assert (best.q, best.time, best.proxy, best.sweep) == (1.0, 7.0, FOM, Sweep.stored())


def test_the_exact_gradient_is_called_by_its_name():
    """Where q* = 1 a proxy of K steps is only a way to hold K states."""
    found = plan({FOM: Moments(1.0, 1.0), Truncated(1): Moments(0.9, 1.0)}, r=10, c1=1, c2=1, memory_slots=10, m=2)
    assert all(c.q == 1 and c.proxy == FOM for c in found)
    assert len({c.sweep for c in found}) == len(found)
    assert found[0].why.startswith("run the exact gradient with the stored sweep, holding 10 of 10 states")
    assert not {Sweep.checkpointed(9), Sweep.checkpointed(10)} & {c.sweep for c in found}


@settings(deadline=None, max_examples=100)
@given(
    bias=st.lists(st.floats(1e-4, 2), min_size=1, max_size=4),
    r=st.integers(1, 24),
    c2=st.floats(0.5, 5),
    budget=st.integers(1, 30),
    m=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_nothing_that_fits_is_sooner(bias, r, c2, budget, m):
    moments = {Truncated(k): Moments(d, 1.0) for k, d in enumerate(bias) if k <= r}
    fits = []
    for proxy, given_ in moments.items():
        for sweep in (Sweep.stored(), Sweep.recomputed(), *map(Sweep.checkpointed, range(1, r + 1))):
            if states_held(r, proxy, sweep) <= budget:
                cost = CostModel(r=r, c2=c2, sweep=sweep, proxy=proxy)
                fits.append(cost.time(optimal_q(given_, cost, m).q, given_, m))
    once = [Sweep.stored(), Sweep.recomputed(), *(Sweep.checkpointed(s) for s in range(1, r))]
    exact = [
        CostModel(r=r, c2=c2, sweep=x, as_printed=False).time(1.0, moments[FOM], m)
        for x in once
        if states_held(r, FOM, x) <= budget
    ]
    found = plan(moments, r, 1.0, c2, budget, m)
    best = found[0].time
    assert best <= min(fits) * (1 + 1e-12)
    assert best == pytest.approx(min(fits), rel=1e-12) or (found[0].q == 1 and best >= min(exact) * (1 - 1e-12))
    assert all(c.states <= budget and states_held(r, c.proxy, c.sweep) == c.states for c in found)
    assert [c.time for c in found] == sorted(c.time for c in found)


@pytest.mark.parametrize(
    ("sweep", "n", "held"),
    [("stored", 10, 10), ("unrolled", 10, 10), ("recomputed", 10, 1), ("checkpointed:3", 10, 4),
     ("checkpointed:3", 2, 2), ("recomputed", 0, 0)],
)  # fmt: skip
def test_states_held(sweep, n, held):
    assert Sweep.parse(sweep).states_held(n) == held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, 10, 1, 1, 5, 2), "is empty"),
        (({FOM: Moments([0.1, 0.2], 1)}, 10, 1, 1, 5, 2), "are arrays"),
        (({FOM: Moments(0.1, 1)}, 10, 1, 1, 0, 2), "at least 1"),
        (({Truncated(5): Moments(0.1, 1)}, 10, 1, 1, 5, 2), "cannot hold"),
        (({Truncated(11): Moments(0.1, 1)}, 10, 1, 1, 50, 2), "keep K ≤ r"),
        (({FOM: Moments(0.1, 1)}, 10, 1, 1, 5, -1), "> 0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(UfomError, match=message):
        plan(*arguments)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", "--m", "2", *arguments])


def test_command():
    shown = run("--moments", "0:0.1:1", "--moments", "20:0.02:1", "-r", "100", "--memory", "2")
    assert shown.exit_code == 0
    assert "one stored state already changes the answer" in shown.stdout
    rows = json.loads(run("--moments", "0:0.1:1", "-r", "100", "--memory", "2", "--json").stdout)
    assert rows[0]["sweep"] == "checkpointed:1"
    assert isinstance(run("--moments", "0:0.1").exception, UfomError)
    assert isinstance(run("--moments", "0:-1:1").exception, UfomError)
