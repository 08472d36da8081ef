"""The planner against brute force over everything that fits, and the plain words it owes its reader."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ufom_runtime.command.cli import app
from ufom_theory import Candidate, CostModel, Moments, Sweep, Truncated, UfomError, counted_candidates, optimal_q, plan
from ufom_theory.coins import stratified_second_moment
from ufom_theory.laws import Progress
from ufom_theory.planner import Recipe, states_held
from ufom_theory.roulette import roulette_moments

FOM = Truncated(0)


def counted(moments, memory, r=100, m=2, c2=1.0):
    return plan(counted_candidates(moments, r, 1.0, c2, memory), memory, m)


def test_one_more_state():
    best, exact = counted({FOM: Moments(0.1, 1.0)}, 1)
    assert (best.label, best.bytes) == (Recipe(FOM, Sweep.recomputed()), 1)
    cost = CostModel(r=100, as_printed=False)
    assert best.q == pytest.approx(optimal_q(Moments(0.1, 1.0), cost, m=2).q, rel=1e-15)
    assert (exact.label, exact.q) == (Recipe(None, Sweep.recomputed()), 1)
    assert exact.slower == pytest.approx(optimal_q(Moments(0.1, 1.0), cost, m=2).speedup_over_exact, rel=1e-12)
    best = counted({FOM: Moments(0.1, 1.0)}, 2)[0]
    assert (str(best.label.sweep), best.bytes) == ("checkpointed:1", 2)
    assert "which holds 2 of 2; 1.8× sooner than the exact gradient with the checkpointed:1 sweep" in best.why


def test_a_proxy_that_carries_nothing_is_named():
    best = counted({FOM: Moments(1.0, 1.0), Truncated(5): Moments(0.02, 1.0)}, 8)[0]
    assert best.label.proxy == Truncated(5)
    alone = counted_candidates({FOM: Moments(1.0, 1.0)}, 100, 1.0, 1.0, 1)[0]
    assert "a proxy of zero would do as well" in plan([alone], 1, 2)[0].why


def test_a_proxy_of_every_step_is_the_exact_gradient():
    best = counted({Truncated(3): Moments(0.0, 1.0)}, 3, r=3)[0]
    assert (best.label, best.cost) == (Recipe(None, Sweep.checkpointed(1)), 7.0)  # two states do


def test_the_exact_gradient_is_called_by_its_name():
    """Where q* = 1 a proxy of K steps is only a way to hold K states."""
    found = counted({FOM: Moments(1.0, 1.0), Truncated(1): Moments(0.9, 1.0)}, 10, r=10)
    assert all(c.q == 1 and c.label.proxy is None for c in found)
    assert len({c.label for c in found}) == len(found)
    assert found[0].why.startswith("run the exact gradient with the checkpointed:8 sweep, which holds 9 of 10")
    assert not {Sweep.checkpointed(9), Sweep.checkpointed(10)} & {c.label.sweep for c in found}


@settings(deadline=None, max_examples=50)
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
                cost = CostModel(r=r, c2=c2, sweep=sweep, proxy=proxy, as_printed=False)
                fits.append(cost.time(optimal_q(given_, cost, m).q, given_, m))
    found = counted(moments, budget, r, m, c2)
    times = [c.second_moment**m * c.cost for c in found]
    # the exact gradient is one of them: it has no proxy to pay for
    exact = min(c.cost for c in found if c.label.proxy is None)
    assert times[0] == pytest.approx(min(*fits, exact), rel=1e-12)
    assert all(c.bytes <= budget for c in found)
    assert times == sorted(times)
    assert [c.slower for c in found] == pytest.approx([time / times[0] for time in times])


BATCH = Moments(0.1, 1.0, mean_gradient_sq=0.5, cross=0.95, proxy_sq=1.0, mean_cross=0.45, mean_proxy_sq=0.45)
COST = CostModel.of(11.0, 10.0)


@pytest.mark.parametrize("coin", ["task", "batch", "stratified"])
@pytest.mark.parametrize("m", [0.5, 1.0, 2.0])
def test_coins_of_a_batch_against_a_grid(coin, m):
    """E‖mean‖² of eight tasks by Lemma 1 and its relatives, on a grid of q."""
    b, bias = 8, 0.5 - 2 * 0.45 + 0.45
    if coin == "stratified":
        q = np.append(np.linspace(0.001, 1 / b, 1500), np.arange(1, b + 1) / b)
        second = np.array([stratified_second_moment(Progress.of(BATCH), x, b) for x in q])
    else:
        q = np.linspace(0.001, 1, 5000)
        d2 = 0.1 + (b - 1) * bias * (coin == "batch")
        second = 0.5 + (1.0 - 0.5 + (1 / q - 1) * d2) / b
    time = second**m * (11.0 + 10.0 * q)
    (found,) = plan([Candidate("x", BATCH, COST, 10, coin)], 10, m, batch=b)
    assert found.second_moment**m * found.cost == pytest.approx(time.min(), rel=1e-6)
    assert found.q == pytest.approx(q[time.argmin()], abs=1e-3)


@pytest.mark.parametrize("q", [0.05, 0.125, 0.3, 1.0])
def test_stratified_coins_at_a_given_q(q):
    """By the mean over k of B corrections: k = ⌊qB⌋ or one more, with weight B/k where qB ≥ 1, else 1/q."""
    b, bias, least = 8, 0.5 - 2 * 0.45 + 0.45, int(q * 8)
    second = 0.0
    for k, chance in ((least, 1 - q * b + least), (least + 1, q * b - least)):
        weight = b / k if q * b >= 1 else 1 / q
        # E‖mean w·ξ·d‖² − ‖E d‖² by pairs of tasks, both corrected with chance k(k − 1)/(B(B − 1))
        pairs = weight**2 * k * (k - 1) / b**2 * bias
        second += chance * (weight**2 * k / b**2 * 0.1 + pairs) if k else 0.0
    second += 0.5 + 0.5 / b - (0.1 / b + (b - 1) / b * bias)
    (found,) = plan([Candidate("x", BATCH, COST, 10, "stratified", q=q)], 10, m=1, batch=b)
    assert (found.q, found.second_moment) == (q, pytest.approx(second, rel=1e-12))


def test_all_kinds_together():
    """The roulette by `roulette_moments`, a fixed q, an exact proxy; what does not fit is left out."""
    levels = [BATCH, replace(BATCH, d2=0.05, cross=0.975)]
    roulette = Candidate("roulette", levels, [11.0, 3.0, 7.0], 100)
    every = [
        roulette, Candidate("exact", BATCH, COST, 5, q=1), Candidate("fixed", BATCH, COST, 5, q=0.5),
        Candidate("too large", Moments(1e-9, 1.0), COST, 101), Candidate("no bias", Moments(0.0, 1.0), COST, 7),
    ]  # fmt: skip
    found = {c.label: c for c in plan(every, 100, m=1.0)}
    assert list(found) == ["no bias", "roulette", "fixed", "exact"]
    a, c = roulette_moments(found["roulette"].q, [0.1, 0.05], 1.0, [11.0, 3.0, 7.0])
    assert (found["roulette"].second_moment, found["roulette"].cost) == pytest.approx((a, c))
    assert (found["fixed"].second_moment, found["fixed"].cost) == pytest.approx((1.1, 16.0))
    assert (found["no bias"].q, found["no bias"].cost, found["exact"].cost) == (0.0, 11.0, 21.0)
    assert "500 B" not in found["no bias"].why
    useless = Candidate("q = 1", [Moments(2.0, 1.0), Moments(1.5, 1.0)], [11.0, 3.0, 7.0], 5)
    assert plan([useless], 100, m=2.0)[0].q == (1.0, 1.0)
    assert [c.label for c in plan([useless, every[1]], 100, m=2.0)] == ["exact"]
    (large,) = plan([replace(roulette, bytes=4_200_000)], "50MB", m=1.0)
    assert "which holds 4.2 MB of 50 MB" in large.why
    (larger,) = plan([replace(roulette, bytes=40 * 10**9)], "80GB", m=1.0)
    assert "which holds 40 GB of 80 GB" in larger.why


@pytest.mark.parametrize(
    ("sweep", "n", "held"),
    [("stored", 10, 10), ("unrolled", 10, 10), ("recomputed", 10, 1), ("checkpointed:3", 10, 4),
     ("checkpointed:3", 2, 2), ("recomputed", 0, 0)],
)  # fmt: skip
def test_states_held(sweep, n, held):
    assert Sweep.parse(sweep).states_held(n) == held


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: counted({}, 5), "is empty"),
        (lambda: counted({FOM: Moments([0.1, 0.2], 1)}, 5), "are arrays"),
        (lambda: counted({FOM: Moments(0.1, 1)}, 0), "at least one byte"),
        (lambda: counted({Truncated(5): Moments(0.1, 1)}, 5), "cannot hold"),
        (lambda: counted({Truncated(11): Moments(0.1, 1)}, 50, r=10), "keep K ≤ r"),
        (lambda: counted({FOM: Moments(0.1, 1)}, 5, m=-1), "> 0"),
        (lambda: plan([], 5, m=1), "no candidate was given"),
        (lambda: plan([Candidate("x", BATCH, COST, 2000)], "1kB", m=1), r"nothing fits .* 1 kB: .* 2 kB"),
        (lambda: plan([Candidate("x", BATCH, COST, 2)], 5), "exactly one of m and outer"),
        (lambda: plan([Candidate("x", Moments(0.1, 1), COST, 2)], 5, m=1, batch=4), "needs ‖∇M‖²"),
        (lambda: plan(["x"], 5, m=1), "write Candidate"),
        (lambda: Candidate("x", BATCH, 3.0, 2), r"write CostModel\.of"),
        (lambda: Candidate("x", [BATCH], [1.0], 2), "one more than these"),
        (lambda: Candidate("x", [], [1.0], 2), "0 levels"),
        (lambda: Candidate("x", [BATCH], [1.0, 1.0], 2, "batch"), "leave coin and q out"),
        (lambda: Candidate("x", BATCH, COST, 2, "coin"), "must be 'task'"),
        (lambda: Candidate("x", BATCH, COST, 2, q=0), r"in \(0, 1\]"),
        (lambda: Candidate("x", BATCH, COST, -2), "finite number ≥ 0"),
        (lambda: Candidate("x", [BATCH], "11", 2), "not a number"),
        (lambda: Candidate("x", [BATCH, Moments(0.05, 3.0)], [1.0, 1.0, 1.0], 2), "V² from 1 to 3"),
        (lambda: plan(5, 5, m=1), "give a list of Candidate"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UfomError, match=message):
        call()


def run(*arguments):
    return CliRunner().invoke(app, ["plan", "--m", "2", *arguments])


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--moments", "0:0.1:1", "--batch", "4"), "--batch would change nothing with --moments"),
     (("digits-few-shot", "-r", "5", "--c1", "1"), "-r, --c1 would change nothing with digits-few-shot")],
)  # fmt: skip
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(UfomError, match=message):
        raise run(*options).exception


def test_command():
    shown = run("--moments", "0:0.1:1", "--moments", "20:0.02:1", "-r", "100", "--memory", "2")
    assert shown.exit_code == 0
    assert "sooner than the exact gradient with the checkpointed:1 sweep" in shown.stdout
    rows = json.loads(run("--moments", "0:0.1:1", "-r", "100", "--memory", "2", "--json").stdout)
    assert (rows[0]["sweep"], rows[0]["proxy"], rows[1]["proxy"]) == ("checkpointed:1", 0, None)
    large = ["--moments", "0:0.1:1", "-r", "100", "--memory", "50MB", "--state-bytes", "20000000", "--json"]
    assert json.loads(run(*large).stdout)[0]["bytes"] == 40_000_000
    assert isinstance(run("--moments", "0:0.1").exception, UfomError)
    assert isinstance(run("--moments", "0:-1:1").exception, UfomError)
    with pytest.raises(UfomError, match="--state-bytes"):
        raise run("--moments", "0:0.1:1", "--memory", "50MB").exception
