"""Every claim comes out as recorded, could have come out otherwise, and is in the document."""

import json
import re
from pathlib import Path

import pytest
import sympy as sp
from typer.testing import CliRunner

from ufom_runtime.command.cli import app
from ufom_theory import UfomError
from ufom_theory.claims import CLAIMS, chosen, experiments, markdown
from ufom_theory.claims.registry import Claim, bounds, measures, vanishes

ROOT = Path(__file__).parents[2]
DECIDABLE = [c for c in CLAIMS.values() if c.evidence]


@pytest.mark.parametrize("claim", DECIDABLE, ids=lambda c: c.id)
def test_evidence(claim: Claim):
    """The recorded status, and another one for the form that must not pass (for an erratum: for its correction)."""
    assert claim.decide() == claim.status
    judged = claim.decide_other()
    assert judged != claim.status
    assert (judged == "refuted") != (claim.status == "refuted")


def test_all_that_the_paper_numbers_is_registered():
    numbers: set[int] = set()
    for claim in CLAIMS.values():
        for first, last in re.findall(r"\((\d+)\)(?:–\((\d+)\))?", claim.equation):
            numbers |= set(range(int(first), int(last or first) + 1))
    assert numbers == set(range(1, 25))
    named = " ".join(c.equation for c in CLAIMS.values())
    others = [f"Algorithm {n}" for n in range(1, 5)] + ["Proposition 1", "Lemma 1", "Theorem 1", "Theorem 2"]
    others += ["Figure 1a–c", "Figure 1d", "Figure 1e", "Figure 1f", "Figure 2", "Figure 3", "Table 1", "Table 2"]
    assert all(name in named for name in others)
    assert {f"erratum-{n}" for n in range(1, 13)} <= set(CLAIMS)


def test_only_experiments_are_left_open():
    for claim in CLAIMS.values():
        assert (claim.evidence is None) == (claim.status == "awaits a study")
        assert claim.statement


def test_named_tests_exist():
    for claim in DECIDABLE:
        file, name = claim.test.split("::")
        assert name != "test_evidence", claim.id  # that one runs the claim's own evidence
        assert f"def {name}(" in (ROOT / "tests/theory" / file).read_text(encoding="utf-8"), claim.id


def test_document_is_not_stale():
    """Regenerate with `ufom claims --markdown > docs/equations.md`."""
    assert (ROOT / "docs/equations.md").read_text(encoding="utf-8") == markdown()


def test_stored_verdicts_decide_what_a_study_measured(monkeypatch):
    judged = [{"subject": "log-time regret at q*, α = 0.01", "agrees": word} for word in ("yes", "inconclusive", "no")]
    for verdicts, status in ((judged[:1], "measured"), (judged[:2], "awaits a study"), (judged[2:], "refuted")):
        monkeypatch.setattr(experiments, "stored_verdicts", lambda study, v=verdicts: v)
        assert experiments.toy_optima() == status
    monkeypatch.setattr(experiments, "stored_verdicts", lambda study: [])
    assert experiments.toy_optima() == "awaits a study"


def test_layers_of_proof():
    x, n = sp.Symbol("x", positive=True), sp.Symbol("n", integer=True, positive=True)
    assert vanishes((x + 1) ** 2 - x**2 - 2 * x - 1) == "proved"
    assert vanishes(x - x * (1 + sp.Rational(1, 10**40))) == "refuted"
    # off by e − Σ_{n≤60} 1/n! ≈ 2e-84: below 50 digits, and no simplification makes it 0
    hard = sp.Sum(1 / sp.factorial(n), (n, 1, 60)) - (sp.E - 1)
    assert vanishes(hard) == "checked to 50 digits"
    assert [bounds(x - y) for y in (x, x / 2, 2 * x)] == ["proved", "loose", "refuted"]
    assert measures(1.0, 1.1, 1e-3) == "refuted"


def test_command():
    runner = CliRunner()
    one = runner.invoke(app, ["claims", "15"])
    assert (one.exit_code, "loose" in one.stdout) == (0, True)
    (row,) = json.loads(runner.invoke(app, ["claims", "21", "--json"]).stdout)
    assert (row["recorded"], row["agrees"]) == ("proved", True)
    assert "frac" in runner.invoke(app, ["claims", "20", "--latex"]).stdout
    assert isinstance(runner.invoke(app, ["claims", "nothing"]).exception, UfomError)


def test_command_fails_where_a_status_differs(monkeypatch):
    (claim,) = chosen("21")
    monkeypatch.setitem(CLAIMS, "21", Claim(**{**vars(claim), "status": "refuted"}))
    shown = CliRunner().invoke(app, ["claims", "21"])
    assert shown.exit_code == 1
    assert "recorded as" in " ".join(shown.stdout.split())
