"""What every study owes: sizes that are stored and read again, stored results that are judged as they were."""

import json
from dataclasses import asdict, fields, is_dataclass

import pandas as pd
import pytest
from typer.testing import CliRunner

from studies import __main__ as main
from studies import template
from studies.engine import commands
from studies.engine.configuration import build
from studies.engine.results import Results, as_json
from studies.engine.study import Study
from studies.engine.sweep import Store
from ufom_runtime.files import DamagedFile
from ufom_theory import UfomError

STUDIES = {name: main.load(name) for name in main.STUDIES}
STORED = {results.path.stem: results for _, results in main._stored()}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_a_question_and_sizes_that_are_stored_and_read_again(name):
    study = STUDIES[name]
    assert isinstance(study, Study)
    assert study.question.endswith("?")
    assert {"quick", "standard"} <= study.sizes.keys()
    for config in study.sizes.values():
        assert is_dataclass(config)
        assert type(config).__dataclass_params__.frozen
        assert "Attributes:" in type(config).__doc__
        assert all(f"{field.name}:" in type(config).__doc__ for field in fields(config))
        assert build(type(config), json.loads(as_json(asdict(config)))) == config


@pytest.mark.parametrize("stem", STORED)
def test_a_stored_table_is_of_its_size_and_is_judged_as_recorded(stem):
    name, _, size = stem.rpartition("-")
    study, results = STUDIES[name], STORED[stem]
    table, config = results.read(study)
    assert config == study.sizes[size]
    constant = {column for column in table if table[column].nunique(dropna=False) == 1}
    assert not constant & {field.name for field in fields(config)} - {"data"}  # which data were there, the table says
    recorded = {v["subject"]: v["agrees"] for v in results.verdicts()}
    assert {v.subject: v.agrees for v in study.judge(table, config)} == recorded
    said = study.caption(table, config)
    assert (results.figures / f"{results.path.stem}.txt").read_text() == said + "\n"
    assert study.answer(table, config).endswith((".", "best."))


def test_what_has_no_stored_results_is_named_in_the_index():
    index = (main.HERE / "README.md").read_text(encoding="utf-8")
    for name in STUDIES.keys() - {"template"}:
        stored = f"{name}-standard" in STORED
        assert stored == (f"\n## {name}\n" in index)
        assert stored != (f"Not yet run: `python -m studies {name} --size standard`" in index)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return template.measure(template.SIZES["quick"], Store(tmp_path_factory.mktemp("cells")))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(main, "HERE", tmp_path)
    monkeypatch.setattr(commands, "CELLS", tmp_path / "cells")
    return tmp_path


def call(*arguments):
    result = CliRunner().invoke(main.app, arguments)
    if isinstance(result.exception, UfomError):
        raise result.exception
    return result


def test_the_template_is_measured_judged_and_drawn(here, table):
    assert call("template").exit_code == 0
    results = Results(here / "results" / "quick" / "template-quick.csv")
    found, config = results.read(template.study)
    pd.testing.assert_frame_equal(found, table)
    assert config == template.SIZES["quick"]
    assert [v["agrees"] for v in results.verdicts()] == ["yes"] * 3
    assert {path.suffix for path in (here / "figures" / "quick").iterdir()} == {".png", ".pdf", ".svg", ".txt"}
    call("template", "--redraw")


def test_the_template_can_be_wrong(table):
    wrong = table.assign(variance=table.variance.where(table.number != 4, 1.2 * table.variance))
    assert [v.agrees for v in template.judge(wrong, template.SIZES["quick"])] == ["yes", "no", "yes"]


def test_half_a_table_or_another_s_is_refused(here, table):
    results = Results(here / "results" / "quick" / "template-quick.csv")
    results.write(table, template.SIZES["quick"], 1.0)
    whole = results.path.read_bytes()
    for content in (whole[: len(whole) // 2], whole.replace(b"number", b"NUMBER")):
        results.path.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"template-quick\.csv is damaged: its content is not what"):
            call("template", "--redraw")
    results.path.with_suffix(".json").write_text("{}")
    with pytest.raises(DamagedFile, match=r"template-quick\.json is damaged: it holds no configuration"):
        call("template", "--redraw")
    results.path.with_suffix(".json").unlink()
    with pytest.raises(UfomError, match=r"template-quick\.json cannot be read: No such file"):
        results.run()


def test_two_configurations_of_one_name_do_not_share_a_table(here, table):
    results = Results(here / "results" / "quick" / "template-mine.csv")
    results.write(table, template.SIZES["quick"], 1.0)
    (here / "mine.toml").write_text("seeds = 3\n")
    for redraw in ([], ["--redraw"]):
        with pytest.raises(UfomError, match="is of another configuration: give the file another name, or remove"):
            call("template", "--config", str(here / "mine.toml"), *redraw)
    (here / "mine.toml").write_text("seeds = 8\n")
    assert call("template", "--config", str(here / "mine.toml"), "--redraw").exit_code == 0
