"""The bootstrap interval, and the picture that shows an interval among its competitors."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from typer.testing import CliRunner

from ufom_runtime.command.cli import app
from ufom_runtime.command.time_curve import draw_time_curve
from ufom_theory import CostModel, Moments, UfomError, bootstrap_interval, optimal_q

COST = CostModel(r=10)


def tasks(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """‖d‖² and ‖G‖² of n tasks, correlated: exponential with means 0.03 and 0.9."""
    common = rng.exponential(size=n)
    return 0.03 * (common + rng.exponential(size=n)) / 2, 0.9 * (common + rng.exponential(size=n)) / 2


def test_bootstrap_covers():
    rng, truth, covered = np.random.default_rng(0), optimal_q(Moments(0.03, 0.9), COST, m=2).q, 0
    for seed in range(120):
        low, high = bootstrap_interval(*tasks(rng, 80), COST, draws=300, seed=seed, m=2)
        covered += low <= truth <= high
    assert 0.88 <= covered / 120 <= 0.99  # a percentile bootstrap of 80 tasks falls somewhat short of 95 %


def test_bootstrap_and_delta_method_agree_for_many_tasks():
    d2, v2 = tasks(np.random.default_rng(1), 4000)
    moments = Moments(d2.mean(), v2.mean(), np.cov(d2, v2) / len(d2))
    np.testing.assert_allclose(bootstrap_interval(d2, v2, COST, m=2), optimal_q(moments, COST, m=2).interval, rtol=0.01)


def test_bootstrap_is_seeded_and_degenerates():
    d2, v2 = tasks(np.random.default_rng(2), 20)
    assert bootstrap_interval(d2, v2, COST, draws=50, m=2) == bootstrap_interval(d2, v2, COST, draws=50, m=2)
    assert bootstrap_interval(d2, v2, COST, draws=50, m=2) != bootstrap_interval(d2, v2, COST, draws=50, seed=1, m=2)
    q = optimal_q(Moments(0.1, 1.0), COST, m=2).q
    assert bootstrap_interval([0.1] * 3, [1.0] * 3, COST, m=2) == pytest.approx((q, q), rel=1e-12)
    assert bootstrap_interval([2.0, 3.0], [0.0, 0.0], COST, draws=9, m=2) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.1], [1.0]), {}, "n ≥ 2"),
        (([0.1, 0.2], [1.0]), {}, "pair the same"),
        (([0.1, -0.2], [1.0, 1.0]), {}, "squared norm"),
        (([0.1, 0.2], [1.0, float("nan")]), {}, "squared norm"),
        (([0.0, 0.0], [0.0, 0.0]), {"draws": 3}, "gradient vanishes"),
        (([0.1, 0.2], [1.0, 1.0]), {"level": 1.0}, r"\(0, 1\)"),
        (([0.1, 0.2], [1.0, 1.0]), {"draws": 0}, "at least 1"),
        (([0.1, 0.2], [1.0, 1.0]), {"m": 0}, "> 0"),
    ],
)
def test_bad_samples_are_named(arguments, options, message):
    with pytest.raises(UfomError, match=message):
        bootstrap_interval(*arguments, COST, **{"m": 2, **options})


def test_time_curve_shows_what_was_computed():
    prediction = optimal_q(Moments(0.02, 0.9, np.diag([3.6e-5, 0.01])), COST, m=2)
    (axes,) = draw_time_curve(prediction).axes
    lines = {line.get_label().split(" =")[0].split(",")[0]: line for line in axes.lines}
    assert float(lines["q*"].get_xdata()[0]) == pytest.approx(prediction.q)
    q, time = lines["UFOM"].get_data()
    assert time.min() >= 1
    assert time[-1] == pytest.approx(prediction.speedup_over_exact)
    assert q[-1] == 1
    # the floor is below every q; no two look alike
    assert lines["FOM alone"].get_ydata()[0] < 1
    looks = {(to_hex(line.get_color()), line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(looks) == len(axes.lines) == 6
    low, high = prediction.interval
    (band,) = [patch for patch in axes.patches if "interval" in patch.get_label()]
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((low, high))


@pytest.mark.parametrize("d2", [0.0, 1e-12, 0.9, 5.0])
def test_time_curve_at_the_ends_of_the_range(d2):
    figure = draw_time_curve(optimal_q(Moments(d2, 0.9), COST, m=2))
    figure.canvas.draw()
    (axes,) = figure.axes
    assert all(np.isfinite(np.asarray(line.get_data(), dtype=float)).all() for line in axes.lines)
    assert all(np.isfinite((*axes.get_xlim(), *axes.get_ylim())))


def test_plot_option(tmp_path):
    arguments = ["q", "--d2", "0.02", "--v2", "0.9", "--m", "2", "--d2-sem", "0.006", "--plot"]
    shown = CliRunner().invoke(app, [*arguments, str(tmp_path / "curve.png")])
    assert shown.exit_code == 0
    assert "95 % interval" in shown.stdout
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    for name, message in (("curve.xyz", "unknown ending"), ("none/curve.png", "does not exist; make it first")):
        result = CliRunner().invoke(app, [*arguments, str(tmp_path / name)])
        assert isinstance(result.exception, UfomError)
        assert message in str(result.exception)


def test_arrays_are_not_drawn():
    with pytest.raises(UfomError, match="single values"):
        draw_time_curve(optimal_q(Moments([0.1, 0.2], 1.0), COST, m=2))
