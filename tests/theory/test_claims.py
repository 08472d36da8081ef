"""Every claim and every step comes out as recorded, a correction differs from what it corrects, and a change is
seen."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import sympy as sp
from typer.testing import CliRunner

from tests.grids import slow_unless
from ufom_runtime.command.cli import app
from ufom_runtime.command.verdicts import FILE, stored_verdicts
from ufom_theory import UfomError
from ufom_theory.derivations import mutate, registry, report
from ufom_theory.derivations.registry import Claim, bounds, load, measures, studied, vanishes, worst

ROOT = Path(__file__).parents[2]
CLAIMS = load()
FORMED = [c for c in CLAIMS.values() if c.form is not None]


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda c: c.id)
def test_status(claim: Claim):
    assert claim.decide(stored_verdicts()) == claim.status
    assert claim.statement
    if claim.form is not None and claim.form != claim.printed:
        assert claim.on(claim.form) == claim.holds
        assert (claim.printed is None) or claim.holds != claim.status or claim.holds == "proved"


def test_restated_claims_say_so():
    for claim in CLAIMS.values():
        assert (claim.status == "refuted") == ("it is not so" in claim.statement), claim.id
        assert claim.status != "refuted" or claim.form not in (None, claim.printed), claim.id


def test_all_that_the_paper_numbers_is_there():
    numbers: set[int] = set()
    for claim in CLAIMS.values():
        for first, last in re.findall(r"\((\d+)\)(?:–\((\d+)\))?", claim.equation):
            numbers |= set(range(int(first), int(last or first) + 1))
    assert numbers == set(range(1, 25))
    named = " ".join(c.equation for c in CLAIMS.values())
    others = [
        "Algorithm 1",
        "Algorithm 2",
        "Algorithm 3",
        "Algorithm 4",
        "Proposition 1",
        "Lemma 1",
        "Theorem 1",
        "Theorem 2",
    ]
    others += ["Figure 1a–c", "Figure 1d", "Figure 1e", "Figure 1f", "Figure 2", "Figure 3", "Table 1", "Table 2"]
    assert [name for name in others if name not in named] == []
    assert {f"erratum-{n}" for n in range(1, 13)} <= set(CLAIMS)


DEAR = {"theorem-1", "23", "inverse"}  # seconds each
PART = slow_unless(
    lambda case: list(CLAIMS).index(case[0]) % 6 == 2 and case[0] not in DEAR,
    ((c.id, i) for c in FORMED for i, _ in enumerate(mutate.forms(c)) if list(CLAIMS).index(c.id) % 3 == 2),
)


@pytest.mark.parametrize(("id", "which"), PART)
def test_a_change_is_seen(id: str, which: int):
    """A third of `python -m ufom_theory.derivations.mutate` (a quick run: a sixth); the record is docs/mutations.md."""
    claim = CLAIMS[id]
    status, form = list(mutate.forms(claim))[which]
    changed = mutate.mutants(form)
    assert changed
    for mutant in changed:
        assert mutate.changes(claim, mutant, status) or mutate.equal(mutant.form, form), mutant


def test_recorded_table_has_every_form_and_no_survivor():
    recorded = (ROOT / "docs/mutations.md").read_text(encoding="utf-8")
    assert "Survived: 0." in recorded
    for claim in FORMED:
        for _, form in mutate.forms(claim):
            name = claim.id if form == claim.form else f"{claim.id}, as printed"
            (row,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", recorded, flags=re.M)
            counts = [int(x or 0) for x in re.sub(" ", "", row).split("|")[:4]]
            assert sum(counts) == len(mutate.mutants(form)), f"{name}: record the table again"


def test_mutants_change_one_part_each():
    x, y, n = sp.symbols("x y n")
    form = x**2 - 3 * y + sp.Sum(sp.Symbol("z"), (n, 1, y))
    kinds = [m.kind for m in mutate.mutants(form)]
    assert {kind: kinds.count(kind) for kind in mutate.KINDS} == {"sign": 3, "index": 4, "factor": 4, "exponent": 4}
    assert mutate.equal(sp.Tuple((x + 1) ** 2), sp.Tuple(x**2 + 2 * x + 1))
    assert not mutate.equal(sp.Tuple(x), sp.Tuple(x + y))


def test_what_a_study_measured_is_handed_in():
    judged = [{"subject": "log-time regret at q*, α = 0.01", "agrees": word} for word in ("yes", "inconclusive", "no")]
    claim = CLAIMS["figure-1e"]
    for verdicts, status in ((judged[:1], "measured"), (judged[:2], "not established"), (judged[2:], "refuted")):
        assert claim.decide({claim.study: verdicts}) == status
        assert studied(verdicts, "log-time") == status
    assert claim.decide() == claim.decide({}) == "not established"


def test_verdicts_in_the_package_are_the_studies_own():
    assert set(stored_verdicts()) == {c.study for c in CLAIMS.values() if c.study}
    for study, verdicts in stored_verdicts().items():
        assert verdicts == json.loads((ROOT / f"studies/results/{study}.verdicts.json").read_text(encoding="utf-8"))
    assert FILE.parents[1].name == "ufom_runtime"


def test_layers_of_proof():
    x, n = sp.Symbol("x", positive=True), sp.Symbol("n", integer=True, positive=True)
    assert vanishes((x + 1) ** 2 - x**2 - 2 * x - 1) == "proved"
    assert vanishes(x - x * (1 + sp.Rational(1, 10**40))) == "refuted"
    # off by e − Σ_{n≤60} 1/n! ≈ 2e-84: below 50 digits, and no simplification makes it 0
    assert vanishes(sp.Sum(1 / sp.factorial(n), (n, 1, 60)) - (sp.E - 1)) == "checked to 50 digits"
    assert [bounds(x, y) for y in (x, x / 2, 2 * x)] == ["proved", "loose", "refuted"]
    assert measures(1.0, 1.1, 1e-3) == "refuted"
    assert worst("proved", ("loose" for _ in range(2)), "checked to 50 digits") == "loose"
    assert registry.holds(sp.Symbol("y") > 0) == "refuted"


@pytest.mark.parametrize("module", registry.MODULES)
def test_pages_are_not_stale(module):
    """Regenerate with `python -m ufom_theory.derivations --pages docs/proofs`."""
    assert (ROOT / f"docs/proofs/{module}.md").read_text(encoding="utf-8") == report.page(module)


def test_list_of_claims_is_not_stale():
    """Regenerate with `ufom claims --markdown > docs/equations.md`."""
    assert (ROOT / "docs/equations.md").read_text(encoding="utf-8") == report.markdown()


def test_proofs_are_printed_by_name(monkeypatch, capsys):
    def shown(name):
        monkeypatch.setattr(sys, "argv", ["derivations", name])
        runpy.run_module("ufom_theory.derivations", run_name="__main__")
        return capsys.readouterr().out

    assert "1. 12-13 [(12)–(13)]" in (said := shown("second_moment"))
    assert "printed: proved" in said
    with pytest.raises(SystemExit, match="there are chain_rule, second_moment"):
        shown("nothing")


def test_command():
    runner = CliRunner()
    one = runner.invoke(app, ["claims", "15"])
    assert (one.exit_code, "loose" in one.stdout) == (0, True)
    assert max(map(len, one.stdout.splitlines())) <= 80
    (row,) = json.loads(runner.invoke(app, ["claims", "21", "--json"]).stdout)
    assert (row["recorded"], row["agrees"]) == ("proved", True)
    assert "frac" in runner.invoke(app, ["claims", "20", "--latex"]).stdout
    assert isinstance(runner.invoke(app, ["claims", "nothing"]).exception, UfomError)


def test_command_fails_where_a_status_differs(monkeypatch):
    monkeypatch.setitem(CLAIMS, "21", Claim(**{**vars(CLAIMS["21"]), "status": "refuted"}))
    shown = CliRunner().invoke(app, ["claims", "21"])
    assert shown.exit_code == 1
    assert "recorded as" in " ".join(shown.stdout.split())
