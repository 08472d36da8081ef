"""A study's configuration from TOML: what it gives, and every way in which it is refused."""

from dataclasses import dataclass, replace

import pandas as pd
import pytest

from studies import __main__ as main
from studies import divergence, optimal_q, regret, sinusoid
from studies.engine.configuration import keys, read_config
from ufom_theory import UfomError


@dataclass(frozen=True)
class Inner:
    name: str
    rate: float = 0.5
    options: dict[str, int] | None = None


@dataclass(frozen=True)
class Config:
    n: int
    inner: Inner
    several: tuple[Inner, ...] = ()
    pair: tuple[str, int] = ("a", 1)
    rates: tuple[float, ...] = (0.1, 0.2)
    names: tuple[str, ...] = ()
    compiled: bool = False
    least: float | None = None

    def __post_init__(self):
        if self.n == 13:
            raise UfomError("n = 13: give another")


BASE = Config(3, Inner("x"))


def read(tmp_path, text, base=BASE):
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config(path, base)


def test_what_is_given_is_overridden_and_the_rest_stays(tmp_path):
    text = """
    n = 4
    rates = [1, 2.5]
    pair = ["b", 2]
    names = ["exact"]
    compiled = true
    least = 0.25
    several = [{name = "one"}, {name = "two", rate = 2, options = {k = 3}}]
    [inner]
    name = "y"
    rate = 1e-3
    """
    expected = Config(
        4, Inner("y", 1e-3), (Inner("one"), Inner("two", 2.0, {"k": 3})), ("b", 2), (1.0, 2.5), ("exact",), True, 0.25
    )
    found = read(tmp_path, text)
    assert found == expected
    assert [type(x) for x in found.rates] == [float, float]
    assert read(tmp_path, "") == BASE


def test_the_studies_own(tmp_path):
    quick = optimal_q.SIZES["quick"]
    assert read(tmp_path, "seeds = 2\nalphas = [0.01]", quick) == replace(quick, seeds=2, alphas=(0.01,))
    assert read(tmp_path, "low = -3", divergence.SIZES["quick"]).low == -3.0
    assert read(tmp_path, "settings = [[5, 2], [10, 3]]", sinusoid.SIZES["quick"]).settings == ((5, 2), (10, 3))
    text = """
    grid = [0.1]
    [[settings]]
    name = "small"
    problem = "quadratic"
    outer = "sgd:0.1"
    steps = 5
    levels = [0.5, 0.1]
    horizons = [2, 4]
    arguments = {dim = 3, alpha = 0.1}
    """
    (setting,) = read(tmp_path, text, regret.SIZES["quick"]).settings
    expected = regret.Setting("small", "quadratic", "sgd:0.1", 5, (0.5, 0.1), (2, 4), {"dim": 3, "alpha": 0.1})
    assert setting == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m = 4", r'"m" to any data class field; a Config has n, inner, several, pair'),
        ("n = 4.0", r"n = 4.0 must be an integer"),
        ("n = true", r"n = True must be an integer"),
        ("n = -1", r"n = -1 must be between 0 and 1e\+12"),
        ("n = 1000000000001", r"must be between"),
        ("n = 13", r"n = 13: give another"),
        ("n = 1979-05-27", r"n = datetime.date\(1979, 5, 27\) must be an integer"),
        ("compiled = 1", r"compiled = 1 must be true or false"),
        ("rates = 0.1", r"rates = 0.1 must be an array;"),
        ('rates = [1, "x"]', r"rates.* = 'x' must be a number"),
        ('names = "exact"', r"names = 'exact' must be an array;"),
        ('names = ["exact", 3]', r'wrong value type for field "names"'),
        ('rates = "12"', r"rates = '12' must be an array;"),
        ("rates = [nan]", r"rates.* = nan must be a finite number"),
        ("rates = [-inf]", r"must be a finite number"),
        (f"rates = [{10**400}]", r"must be a finite number"),
        ('pair = ["b"]', r'wrong value type for field "pair"'),
        ('pair = [1, "b"]', r'wrong value type for field "pair"'),
        ("pair = [1, 1]", r'wrong value type for field "pair"'),
        ("inner = 3", r'"inner" - should be "Inner"'),
        ('inner = {name = "a", speed = 3}', r'"speed" to any data class field'),
        ("several = [{rate = 1.0}]", r'missing value for field "several.name"'),
        ('inner = {name = "a", options = 3}', r'"inner.options" - should be "Optional|dict'),
        ('inner = {name = "a", options = {k = 1.5}}', r"options = 1.5 must be an integer"),
        ("n = 4\nn = 5", r"cannot be read as TOML: .*overwrite"),
        ("n = ", r"cannot be read as TOML: Invalid value"),
        (b"n = 4 # \xff", r"cannot be read as TOML: .*utf-8"),
        ("n = " + "[" * 20_000, r"cannot be read as TOML: .*recursion"),
        ("a" + ".a" * 2000 + " = 1", r"it has 2000 dots, of numbers and keys: give no more than 1000"),
        ("#" * 70_000, r"it has 70000 bytes, more than 65536"),
    ],
    ids=lambda text: repr(text)[:24],
)
def test_what_is_no_configuration_is_named(text, message, tmp_path):
    with pytest.raises(UfomError, match=message) as caught:
        read(tmp_path, text)
    assert "mine.toml" in str(caught.value)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UfomError, match=r"no.toml cannot be read: No such file"):
        read_config(tmp_path / "no.toml", BASE)


def test_a_device_is_refused_at_once():
    with pytest.raises(UfomError, match=r"/dev/zero is damaged: it is not a regular file"):
        read_config("/dev/zero", BASE)


def test_a_study_is_measured_with_the_values_of_a_file(tmp_path, monkeypatch):
    from studies import __main__ as command

    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.setattr(command.commands, "CELLS", tmp_path / "cells")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    (tmp_path / "mine.toml").write_text("starts = 3\nsteps = 40\ncells = 1\n")
    command.app(["divergence", "--config", str(tmp_path / "mine.toml")], standalone_mode=False)
    table = pd.read_csv(tmp_path / "results" / "quick" / "divergence-mine.csv")
    assert (table.start.nunique(), table.step.max()) == (3, 40)
    assert (tmp_path / "figures" / "quick" / "divergence-mine.png").is_file()
    (tmp_path / "quick.toml").write_text("starts = 3\n")
    with pytest.raises(UfomError, match="give the file another name"):
        command.app(["divergence", "--config", str(tmp_path / "QUICK.toml")], standalone_mode=False)


@pytest.mark.parametrize("name", main.STUDIES)
def test_the_keys_that_the_help_lists_are_a_file_that_can_be_read(name, tmp_path):
    quick = main.load(name).sizes["quick"]
    (tmp_path / "mine.toml").write_text("\n".join(keys(quick)), encoding="utf-8")
    assert read_config(tmp_path / "mine.toml", quick) == quick
