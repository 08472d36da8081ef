"""What the command line looks like: in a pipe, in 80 columns, and while it works."""

import sys

import numpy as np
import pytest
import typer

from studies.__main__ import app as studies_app
from tests.runtime.test_cli import run
from ufom_runtime.command import cli, printing


@pytest.mark.parametrize(
    "arguments",
    [
        "q --d2 0.02 --v2 0.9 -r 10 --outer paper",
        "q --constants 1,0,2,0.7,1 --alpha 0.1,0.1,0.05 -r 3 --m 2",
        "plan --moments 0:0.1:1 --moments 2:0.05:1 -r 100 --memory 20 --outer paper",
        "measure quadratic --outer paper --tasks 8",
        "claims 20",
    ],
)
def test_in_a_pipe_lines_end_without_blanks_and_tables_take_80_columns(capsys, monkeypatch, arguments):
    code, out, _ = run(capsys, monkeypatch, *arguments.split())
    lines = out.splitlines()
    assert code == 0
    assert [line for line in lines if line.endswith(" ")] == []
    assert [line for line in lines if len(line) > 80 and "  " in line] == []  # sentences may be longer
    assert "…  " not in out  # a column that is cut


@pytest.mark.parametrize("app", [cli.app, studies_app], ids=["ufom", "studies"])
def test_help_is_whole(app):
    command = typer.main.get_command(app)
    context = command.make_context("x", [], resilient_parsing=True)
    said = command.get_help(context)
    assert "..." not in said.replace("[ARGS]...", "")
    assert max(map(len, said.splitlines())) <= 80
    for name in command.list_commands(context):
        assert f"\n  {name} " in said
        for option in command.get_command(context, name).params:
            assert option.help or option.name == "help", (name, option.name)


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(capsys, monkeypatch):
    now = iter([0.0, 30.0, 61.0, 100.0, 190.0])
    monkeypatch.setattr(printing.time, "monotonic", lambda: next(now))
    with printing.progress("measuring") as done:
        for share in (0.1, 0.25, 0.5, 0.75):
            done(share)
    assert capsys.readouterr() == ("", "measuring: 25% after 1 min\nmeasuring: 75% after 3 min\n")


def test_inner_step_sizes_may_be_a_list(capsys, monkeypatch):
    options = ["q", "--constants", "1,0,2,0.7,1", "-r", "3", "--m", "2", "--json", "--alpha"]
    one, three = (run(capsys, monkeypatch, *options, alpha)[1] for alpha in ("0.1", "0.1,0.1,0.1"))
    assert one == three
    code, _, said = run(capsys, monkeypatch, *options, "0.1,0.2")
    assert code == 2
    assert "holds 2 step sizes and r = 3: give one, or 3, or -r 2" in said


def test_measure_at_theta_of_a_file(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    np.save("theta.npy", np.zeros(5))
    run(capsys, monkeypatch, "measure", "quadratic", "--m", "1", "--tasks", "4", "--theta", "theta.npy", "--json")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    code, _, said = run(capsys, monkeypatch, "measure", "quadratic", "--m", "1", "--theta", "bad.npy")
    assert (code, said.count("\n")) == (2, 1)
    assert "numpy.save('bad.npy', theta)" in said


def test_plots_without_matplotlib_name_what_brings_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, said = run(capsys, monkeypatch, *["q", "--d2", "0.02", "--v2", "0.9", "--m", "2", "--plot", "q.png"])
    assert (code, said.count("\n")) == (2, 1)
    assert "pip install '.[runtime]' from a checkout" in said
