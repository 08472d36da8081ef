"""Every code block of the README and of the site's pages runs as it stands, and prints what the page says it prints."""

import doctest
import importlib.util
import json
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import compile_by
from ufom_runtime.command import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
ELSEWHERE = {"equations", "add-a-method"}  # generated, and run by a test of its own
OF_OTHERS = {"lightning": "lightning", "transformers": "transformers"}  # page → what it needs
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem not in ELSEWHERE)
blocks = runpy.run_path(str(ROOT / "docs" / "blocks.py"))


def run_block(text, names):
    """Run in this folder with the names of the blocks before it; the names after it. A file is written instead."""
    if file := blocks["FILE"].match(text):
        Path(file[1]).write_text(text, encoding="utf-8")
        return names
    Path("block.py").write_text(text, encoding="utf-8")
    return runpy.run_path("block.py", names)


@pytest.mark.parametrize("block", BLOCKS[1:], ids=range(1, len(BLOCKS)))
def test_block_runs_and_prints(block, tmp_path, capsys):
    (tmp_path / "block.py").write_text(block)
    runpy.run_path(str(tmp_path / "block.py"))
    assert re.search("gradient_norm", capsys.readouterr().out)


def test_the_first_example_prints_what_it_promises(tmp_path, capsys):
    (tmp_path / "block.py").write_text(BLOCKS[0])
    runpy.run_path(str(tmp_path / "block.py"))
    why, steps = capsys.readouterr().out.splitlines()
    assert re.search(r"sooner than your script|keep your script|cannot tell", why)
    expected, tolerance = map(float, re.search(r"# ([\d.]+) ± ([\d.]+): FOM's steps", BLOCKS[0]).groups())
    assert abs(float(steps) - expected) <= tolerance


@pytest.mark.parametrize(
    ("study", "subject", "words"),
    [
        ("table_1", "UFOM − exact, equal calls, states recomputed", "is {0:.1f} points of test accuracy\n  ahead"),
        ("table_1", "UFOM − exact, equal calls, states recomputed", "({1:.1f} to {2:.1f})"),
        ("table_1", "UFOM − exact, equal calls, states stored", "(−{3:.1f} to {2:.1f})"),
        ("table_2", "FOM's bias costs", "costs {0:.1f} points of test\n  accuracy ({1:.1f} to {2:.1f})"),
        (
            "table_2",
            "UFOM − exact, equal calls, states stored",
            "is {0:.1f} behind the exact gradient there, undecided",
        ),
        ("table_2", "UFOM − exact, equal calls, states stored", "(−{2:.1f} to {3:.1f})"),
        ("table_2", "step rule − FOM, equal calls, states stored", "is {0:.1f} ahead of FOM ({1:.1f} to {2:.1f})"),
    ],
)
def test_the_numbers_of_the_studies_are_the_stored_ones(study, subject, words):
    stored = json.loads((ROOT / "studies" / "results" / f"{study}-standard.verdicts.json").read_text(encoding="utf-8"))
    (verdict,) = (v for v in stored if subject in v["subject"])
    mean, half = verdict["measured"], verdict["tolerance"]
    assert words.format(abs(mean), abs(mean) - half, abs(mean) + half, half - abs(mean)) in README


def stored(module, stem):
    """The stored table of a study and its configuration."""
    from studies.engine.results import Results

    return Results(ROOT / "studies" / "results" / f"{stem}.csv").read(module.study)


def test_what_is_said_of_the_synthetic_pair_is_in_the_stored_table():
    from studies import optimal_q as study

    table, config = stored(study, "optimal_q-standard")
    found = study.basins(table, config.r)
    assert (found.regret <= np.log(1.05)).all()
    largest, slowest = (found.q_star_paper / found.best).max(), np.exp(found.regret_paper.max())
    for words in (
        f"at all {len(found)} pairs", f"up to {largest:.2g} times as large", f"takes up to {slowest:.2f} times as long",
    ):  # fmt: skip
        assert words in README
    from ufom_theory.derivations import figures

    assert f"to {largest:.2g} times the fastest q" in figures.toy_optima.__doc__


PAGE = (ROOT / "docs" / "paper-tables.md").read_text(encoding="utf-8")
SAID = {"yes": "pays", "no": "does not pay", "inconclusive": "undecided"}


@pytest.mark.parametrize(
    ("study", "row", "method", "account"),
    [
        ("table_1", "adaptive ×0.1, states recomputed", "adaptive ×0.1", "recomputed"),
        ("table_1", "adaptive ×0.1, states stored", "adaptive ×0.1", "stored"),
        ("table_1", "on a proxy of 50 backward steps, recomputed", "UFOM", "recomputed"),
        ("table_1", "on a proxy of 50 backward steps, stored", "UFOM", "stored"),
        ("table_1-paper", "at the paper's size, recomputed", "UFOM", "recomputed"),
        ("table_1-paper", "at the paper's size, stored", "UFOM", "stored"),
        ("table_1", "step rule on that proxy, recomputed", "step rule", "recomputed"),
        ("table_1", "step rule on that proxy, stored", "step rule", "stored"),
        ("table_1", "on an implicit proxy, recomputed", "UFOM, implicit", "recomputed"),
        ("table_1", "on an implicit proxy, stored", "UFOM, implicit", "stored"),
        ("table_1", "printed or released rule, recomputed", "adaptive", "recomputed"),
        ("table_1", "printed or released rule, stored", "adaptive", "stored"),
        ("table_1", "printed or released rule, recomputed", "released ×0.1", "recomputed"),
        ("table_1", "printed or released rule, stored", "released ×0.1", "stored"),
        ("table_1-paper", "adaptive ×0.1 at the paper's size, recomputed", "adaptive ×0.1", "recomputed"),
        ("table_1-paper", "adaptive ×0.1 at the paper's size, stored", "adaptive ×0.1", "stored"),
        ("table_1-paper", "implicit proxy at the paper's size, recomputed", "UFOM, implicit", "recomputed"),
        ("table_1-paper", "implicit proxy at the paper's size, stored", "UFOM, implicit", "stored"),
        ("table_1-paper", "step rule at the paper's size, recomputed", "step rule", "recomputed"),
        ("table_1-paper", "step rule at the paper's size, stored", "step rule", "stored"),
        ("table_1-paper", "printed or released rule at the paper's size, recomputed", "adaptive", "recomputed"),
        ("table_1-paper", "printed or released rule at the paper's size, stored", "adaptive", "stored"),
        ("table_1-paper", "printed or released rule at the paper's size, recomputed", "released ×0.1", "recomputed"),
        ("table_1-paper", "printed or released rule at the paper's size, stored", "released ×0.1", "stored"),
        ("table_2", "adaptive ×0.1, states recomputed", "adaptive ×0.1", "recomputed"),
        ("table_2", "adaptive ×0.1, states stored", "adaptive ×0.1", "stored"),
        ("table_2", "q* at the start, recomputed", "UFOM", "recomputed"),
        ("table_2", "q* at the start, stored", "UFOM", "stored"),
        ("table_2", "step rule, recomputed", "step rule", "recomputed"),
        ("table_2", "step rule, stored", "step rule", "stored"),
        ("table_2-wide", "adaptive ×0.1 at 20 ways, recomputed", "adaptive ×0.1", "recomputed"),
        ("table_2-wide", "adaptive ×0.1 at 20 ways, stored", "adaptive ×0.1", "stored"),
        ("table_2-wide", "q* at the start at 20 ways, recomputed", "UFOM", "recomputed"),
        ("table_2-wide", "q* at the start at 20 ways, stored", "UFOM", "stored"),
        ("table_2-wide", "step rule at 20 ways, recomputed", "step rule", "recomputed"),
        ("table_2-wide", "step rule at 20 ways, stored", "step rule", "stored"),
    ],
)
def test_the_page_of_the_papers_tables_has_the_stored_verdicts(study, row, method, account):
    named = study if "-" in study else f"{study}-standard"
    stored = json.loads((ROOT / "studies" / "results" / f"{named}.verdicts.json").read_text(encoding="utf-8"))
    cells = []
    for other in ("exact", "FOM"):
        start = f"UFOM pays: test accuracy (points), {method} − {other}, equal calls, states {account}"
        (v,) = (v for v in stored if v["subject"].startswith(start))
        cells.append(f"{SAID[v['agrees']]}, {v['measured']:+.1f} ± {v['tolerance']:.1f}".replace("-", "−"))
    assert f"| {row} | {cells[0]} | {cells[1]} |" in PAGE.split("## Table")[int(study[6])]


def test_what_is_said_of_the_papers_size_is_in_the_stored_table():
    from studies import table_1
    from studies.shared.accounts import budgets
    from studies.shared.paying import at_equal

    table, config = stored(table_1, "table_1-paper")
    test = at_equal(table[table.method.isin(["exact", "UFOM", "FOM"])], "stored", budgets(config)).test.unstack(
        "method"
    )
    lost, (good, start) = test.loc[2], (test.loc[[1, 3], m] for m in (["exact", "UFOM"], "FOM"))
    page = " ".join(PAGE.split())
    assert f"come to {good.min(axis=None):.1f} to {good.max(axis=None):.1f} % on two seeds" in page
    assert f"from the {start.min():.1f} to {start.max():.1f} % of no cleaning" in page
    assert f"the exact gradient falls from {lost.FOM:.1f} to {lost.exact:.1f} %" in page
    assert f"rises to {lost.UFOM:.1f} % there" in page
    moved = table[(table.method == "adaptive") & (table.seed > 0) & (table.moved > 0)].groupby("seed").moved.first()
    assert f"the first hypergradient is {moved[2] / moved[[1, 3]].mean():.0f} times as long as on the others" in page
    smaller = at_equal(table[table.method.isin(["adaptive", "adaptive ×0.1"])], "stored", budgets(config)).test
    assert (smaller.xs(2, level="seed") < lost.FOM).all()
    chosen = table[table.seed > 0].groupby("method").gamma.first()
    assert chosen["adaptive"] == chosen["UFOM"] == chosen["exact"] / 10


def test_what_is_said_of_few_shot_learning_is_in_the_stored_table():
    from studies import table_2
    from studies.shared.accounts import budgets
    from studies.shared.paying import at_equal
    from studies.shared.training import interval

    table, config = stored(table_2, "table_2-standard")
    limits, page = budgets(config), " ".join(PAGE.split())
    ends = at_equal(table, "stored", limits).accuracy
    exact, rule, ufom, fom, reptile = (
        f"at {interval(ends.loc[m], 1)} %" for m in ("exact", "step rule", "UFOM", "FOM", "Reptile")
    )
    q = table.q[table.method == "UFOM"].mean()
    said = f"the exact gradient ends {exact}, the step rule {rule}, UFOM with q* = {q:.2f} {ufom}, FOM {fom}, Reptile"
    assert f"{said} {reptile}." in page
    for account, words in (("stored", "and the exact gradient overtakes FOM"), ("recomputed", "and it overtakes")):
        led, n_b = (interval(found, 0) for found in table_2.leads(table, config)[account])
        assert f"{n_b} with {account} states, {words} after {led}" in page
    last = {}
    for account, limit in limits.items():  # the last of 24 budgets at which FOM's mean is above the exact gradient's
        for calls in np.linspace(limit / 24, limit, 24):
            means = at_equal(table, account, {account: calls}).accuracy.groupby("method").mean()
            last[account] = round(calls, -3) if means["FOM"] > means["exact"] else last.get(account)
    assert f"FOM is ahead up to {last['recomputed']:,.0f} calls with recomputed states" in page
    assert f"and up to {last['stored']:,.0f} with stored ones" in page


def test_what_is_said_of_a_run_that_falls_is_in_the_stored_table():
    from studies import table_2

    table, _ = stored(table_2, "table_2-standard")
    mine = table[(table.method == "adaptive ×0.1") & (table.seed == 2)].set_index("step")
    first, last = mine.index[-4], mine.index[-1]
    page = " ".join(PAGE.split())
    grows = float(f"{mine.d2[mine.index[-4:]].max() / mine.d2[first]:.2g}")
    assert f"In its last {last - first} steps the rule's average of D² grows {grows:.0f}-fold" in page
    assert f"falls from {mine.accuracy[first]:.1f} to {mine.accuracy[last]:.1f} %" in page
    others = table[(table.method == "adaptive ×0.1") & (table.seed != 2) & (table.step > first)]
    assert others.d2.max() < mine.d2.max() / 100


def test_what_is_said_of_20_ways_is_in_the_stored_table():
    from studies import table_2
    from studies.shared.accounts import budgets
    from studies.shared.paying import at_equal

    table, config = stored(table_2, "table_2-wide")
    (recomputed, kept), page = (
        (at_equal(table, account, budgets(config)).accuracy.unstack("method") for account in ("recomputed", "stored")),
        " ".join(PAGE.split()),
    )
    assert f"600 exact steps, n = {len(kept)}" in page
    q = table.q[table.method == "UFOM"].mean()
    named = (
        ("the step rule comes", "step rule"), ("adaptive ×0.1", "adaptive ×0.1"), (f"UFOM with q* = {q:.2f}", "UFOM"),
        ("the exact gradient", "exact"), ("FOM", "FOM"), ("Reptile", "Reptile"),
    )  # fmt: skip
    assert ", ".join(f"{said} to {recomputed[m].mean():.1f} %" for said, m in named) in page
    ufoms, others = [m for _, m in named[:3]], ["exact", "FOM"]
    assert (recomputed[ufoms].min(axis=1) > recomputed[others].max(axis=1)).all()  # on both seeds
    assert (kept.idxmax(axis=1) == "exact").all()
    ends = kept.mean()
    assert f"the exact gradient is ahead of all: {ends['exact']:.1f} %, against {ends['UFOM']:.1f} % for UFOM" in page
    assert f"{ends['adaptive ×0.1']:.1f} % for adaptive ×0.1, {ends['step rule']:.1f} % for the step rule" in page
    assert f"{ends['FOM']:.1f} % for FOM and {ends['Reptile']:.1f} % for Reptile" in page
    falls = table[(table.method == "step rule") & (table.seed == 0)].sort_values("step").iloc[-3:-1]
    (before, after), (small, large) = falls.accuracy, falls.d2
    assert f"The step rule falls from {before:.1f} to {after:.1f} % on one seed" in page
    assert f"grows {large / small:.0f}-fold within {np.ptp(falls.step)} steps" in page
    found = table_2.leads(table, config)
    both = [" and ".join(f"{x:.0f}" for x in series) for account in found.values() for series in account]
    assert f"{both[1]} with recomputed states, where the exact gradient overtakes after {both[0]}" in page
    assert f"and {both[3]} with stored states, where it overtakes after {both[2]}" in page
    short = np.concatenate([led / n_b for led, n_b in found.values()])
    assert f"N_b is too small by {short.min():.0f} to {short.max():.0f} times here" in page


def test_what_is_said_of_compare_is_in_the_stored_table():
    from studies import regret

    found = regret.regrets(stored(regret, "regret-standard")[0])
    told = found[found.told].regret
    words = f"{told.median():.2f} times the calls of the best (median of {len(told)}), {told.max():.2f} at most"
    assert f"{words}; FOM alone {found.FOM.median():.2f}, exact alone {found.exact.median():.2f}." in README


def test_what_is_said_of_turns_with_other_libraries_is_in_the_stored_table():
    from studies import performance

    table, _ = stored(performance, "performance-standard")
    turns = table[(table.group == "in turns") & table.method.str.startswith("exact")]
    ratios = turns.pivot_table(index=["library", "method"], columns=["workload", "r"], values="ratio")
    rows = {
        "unrolled, compiled": [("ufom", "exact, unrolled, compiled")],
        "stored, compiled": [("ufom", "exact, stored, compiled")],
        "unrolled": [("ufom", "exact, unrolled")],
        "torchopt; higher; BOAT": [(name, "exact, unrolled") for name in ("torchopt", "higher", "boat-torch")],
    }
    page = (ROOT / "docs" / "time-and-memory.md").read_text(encoding="utf-8").split("| exact, in turns |")[1]
    for name, measured in rows.items():
        (said,) = re.findall(rf"^\| {name} \| (.*) \|$", page, re.M)
        numbers = [[float(x) for x in cell.split(";")] for cell in said.split("|")]
        np.testing.assert_allclose(numbers, ratios.loc[measured].T, rtol=0, atol=0.005)
    ours = ratios.loc[("ufom", "exact, unrolled, compiled")]
    assert f"take {ours.min():.2f} to {ours.max():.2f} of plain autograd's time".replace("0.", ".") in README
    torch_libraries = ratios.loc[["torchopt", "higher", "boat-torch", "betty-ml"]]
    assert torch_libraries.min(axis=None) > 1  # over plain autograd by hand, to which the page's numbers refer


def test_what_is_said_of_a_gpu_is_in_the_stored_table():
    from studies import gpu

    table, _ = stored(gpu, "gpu-standard")
    found = table.drop_duplicates(["workload", "library", "method"]).set_index(["workload", "library", "method"])
    few, cleaning = (found.loc[workload] for workload in sorted(table.workload.unique()))
    ms, mb = (lambda row: f"{1e3 * row.seconds:.0f} ms"), (lambda row: f"{row.bytes / 1e6:.0f} MB")
    compiled = ("ufom", "exact, stored, compiled")
    hand, torchopt, jax = (
        cleaning.loc[("torch", "exact, by hand")],
        cleaning.loc[("torchopt", "exact, unrolled")],
        cleaning.loc[("jax", "exact, scan, vmapped")],
    )
    page = " ".join((ROOT / "docs" / "time-and-memory.md").read_text().split())
    for words in (
        f"takes {ms(cleaning.loc[compiled])}, against {ms(hand)} by hand, {ms(torchopt)} by torchopt and {ms(jax)} by",
        f"holds {mb(cleaning.loc[compiled])}, the unrolled graph {mb(hand)}",
        f"{ms(few.loc[compiled])}, plain {ms(few.loc[('ufom', 'exact, stored')])}",
        f"FOM {ms(few.loc[('ufom', 'first-order')])}",
        f"takes {ms(few.loc[('ufom', 'UFOM(0.1)')])}. One coin",
        f"compiles for {cleaning.loc[compiled, 'first']:.0f} s and {few.loc[compiled, 'first']:.0f} s",
    ):
        assert words in page


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("few-shot learning, Omniglot", "few-shot, Omniglot"),
        ("MAML on quadratics", "quadratic, MAML"),
        ("data hypercleaning, digits", "hypercleaning, digits"),
        ("hyperparameters, on quadratics", "quadratic, hyperparameters"),
        ("the paper's synthetic pair", "synthetic pair"),
    ],
)
def test_the_numbers_of_the_methods_are_those_of_the_guide(here, there):
    guide = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8")
    (said,), (stored,) = (
        re.findall(rf"^\| {name} \|(.*)$", text, re.M) for name, text in ((here, README), (there, guide))
    )
    for mine, theirs in zip(said.split("|")[:3], stored.split("|")[1:4], strict=True):
        known = [float(x) for x in re.findall(r"([\d.]+)×", theirs)]
        for number in re.findall(r"\d+\.\d+", mine):
            unit = 10.0 ** -len(number.split(".")[1])
            assert any(abs(float(number) - x) <= unit / 2 + 1e-9 for x in known), (number, theirs)
    (off,) = re.findall(r"off by (\d+) %", said)
    assert f"FOM is off by {off} %" in stored


def test_nothing_is_left_to_fill_in_and_every_link_exists():
    assert "@@" not in README
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(targets) >= 3
    assert all((Path(__file__).parents[1] / target).exists() for target in targets)


def run_line(line, monkeypatch):
    """A line for the shell: our command is run; of what would install or measure for minutes, that it is there."""
    words = shlex.split(line, comments=True)
    if words[0] == "ufom":
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, line
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), line
    elif words[:2] == ["pip", "install"]:
        extra = re.search(r"\[(\w+)\]", words[2])[1]
        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert extra in known["project"]["optional-dependencies"], line
    elif words[0] == "torchrun":
        assert importlib.util.find_spec(words[words.index("-m") + 1]), line
    else:
        from studies.__main__ import STUDIES

        assert words[:3] == ["python", "-m", "studies"], f"{line!r}: no test knows how to run this"
        assert {*words[3:5]} & {*STUDIES, "status"}, line


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_does_what_it_says(page, tmp_path, monkeypatch, capsys):
    """Blocks of a page share their names, as in one session; a block that begins with "# mine.py" is that file."""
    if page.stem in OF_OTHERS:
        reason = "pip install -e '.[integrations]'"
        pytest.importorskip(OF_OTHERS[page.stem], reason=reason, exc_type=ImportError)
        warnings.simplefilter("ignore")  # theirs
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    compile_by(monkeypatch)  # test_steps compiles
    names = {}
    for language, text, expected in blocks["FENCED"].findall(page.read_text(encoding="utf-8")):
        capsys.readouterr()
        assert [line for line in text.splitlines() if len(line) > 88] == []
        if language == "sh":
            for line in text.splitlines():
                run_line(line, monkeypatch)
        else:
            assert language == "python", f"{page.name}: no test knows how to run a block of {language}"
            names = run_block(text, names)
            printed = capsys.readouterr().out
            options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(expected, printed, options), printed
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version} (" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
