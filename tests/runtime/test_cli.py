"""The command line, as a user runs it."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from ufom_runtime.command import cli
from ufom_runtime.command.report import _advice, _row, _why
from ufom_runtime.problems import load_problem
from ufom_runtime.problems.sources import SOURCES, Source
from ufom_theory import CostModel, Moments, Sweep, Truncated, optimal_q


def ufom(*arguments, cwd=None):
    steady = "from ufom_runtime.measure import clock; clock.took = lambda function, device: [function()] and 1e-3"
    code = f"{steady if 'measure' in arguments else ''}\nfrom ufom_runtime.command.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ufom", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_q_prints_the_reference_point(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "q", "--d2", "0.02", "--v2", "0.9", "-r", "10", "--m", "2")
    assert code == 0
    for words in ("0.1073846826", "2.781×", "1.537", "holds", "yes", "2.78× sooner than q = 1"):
        assert words in out


def test_q_as_json_is_the_librarys_answer(capsys, monkeypatch):
    options = ["--d2", "0.05", "--v2", "1", "-r", "40", "--c1", "2", "--c2", "5", "--epsilon", "0.1", "--json"]
    options += ["--sweep", "checkpointed:3", "--proxy", "4"]
    _, out, _ = run(capsys, monkeypatch, "q", *options)
    cost = CostModel(r=40, c1=2, c2=5, sweep=Sweep.checkpointed(3), proxy=Truncated(4))
    p = optimal_q(Moments(0.05, 1.0), cost, 2.5)
    found = json.loads(out)
    assert (found["q"], found["m"], found["c_rnd"]) == (p.q, 2.5, p.cost.c_rnd)
    assert (found["speedup_over_exact"], found["pays"]) == (p.speedup_over_exact, "yes")


def test_q_of_a_batch(capsys, monkeypatch):
    options = ["--d2", "0.1", "--v2", "1", "-r", "10", "--batch", "32", "--mean-gradient-sq", "0.5", "--json"]
    options += ["--outer", "paper"]
    assert json.loads(run(capsys, monkeypatch, "q", *options)[1])["q"] == pytest.approx(0.0525292762)


def test_the_module_is_the_command_and_says_its_version():
    done = subprocess.run([sys.executable, "-m", "ufom_runtime", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"ufom {version('ufom')}\n")


def test_every_command_explains_itself_at_h(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "-h")
    assert code == 0
    for command in ("q", "measure", "compare", "plan", "derive", "claims", "explore", "data"):
        assert f"\n  {command} " in out
        code, said, _ = run(capsys, monkeypatch, command, "-h")
        assert code == 0
        assert "-h, --help" in said


def test_data_are_fetched_or_one_line_says_why_not(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("UFOM_DATA", str(tmp_path))
    monkeypatch.setitem(SOURCES, "mnist", Source(("http://127.0.0.1:9/",), {"x.gz": "md5:0"}))
    code, out, error = run(capsys, monkeypatch, "data", "mnist")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("ufom: x.gz could not be fetched: http://127.0.0.1:9/: no connection")
    (tmp_path / "mnist" / "x.gz").write_bytes(b"there")
    assert run(capsys, monkeypatch, "data", "mnist")[:2] == (0, "all files of mnist are there\n")


def test_derive(capsys, monkeypatch):
    _, out, _ = run(capsys, monkeypatch, "derive", "20", "--m", "1", "--latex")
    assert out == "\\mathbb{D}^2 < \\frac{C_{rnd}}{C_{det} + C_{rnd}} \\mathbb{V}^2\n"
    _, out, _ = run(capsys, monkeypatch, "derive", "20", "--m", "2", "--c-det", "11", "--c-rnd", "55")
    assert out == "D2 < 5*V2/12\n"


def test_q_from_constants(capsys, monkeypatch):
    options = ["--constants", "1,0,2,0.7,1", "--alpha", "0.1", "-r", "10", "--json", "--m", "2"]
    found = json.loads(run(capsys, monkeypatch, "q", *options)[1])
    assert found["D_printed_15"] == pytest.approx(4.139407809, rel=1e-9)
    assert found["D_tight"] == pytest.approx(3.868605429, rel=1e-9)
    assert found["d2"] == found["D_tight"] ** 2
    assert found["v2"] == found["V_bound"] ** 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("q --d2 nan --v2 1", "finite number ≥ 0"),
        ("q --d2 0 --v2 0", "measure at another θ"),
        ("q --d2 0.1", "--v2"),
        ("q --d2 0.1 --v2 1", "exactly one of m and outer, neither"),
        ("q --d2 0.1 --v2 1 --m 2 --outer paper", "exactly one of m and outer, both"),
        ("q --d2 0.1 --v2 1 --outer sgd:0.1", "no exponent m"),
        ("measure quadratic", "exactly one of m and outer"),
        ("plan --moments 0:0.1:1", "exactly one of m and outer"),
        ("q --d2 abc --v2 1", "--d2"),
        ("q --nothing", "--nothing"),
        ("q --d2 0.1 --v2 1 --alpha 0.1", "go with --constants"),
        ("q --d2 0.1 --v2 1 --mean-gradient-sq 0.1", "give --batch"),
        ("q --d2 0.1 --v2 1 --d2-sem -1", "standard error"),
        ("q --d2 0.1 --v2 1 --m 2 --plot /proc/nothing.png", "cannot be written"),
        ("plan", "moments"),
        ("plan --moments 0:0.1:1 --m 2 --memory -3", "memory = '-3': give bytes as a number"),
        ("derive 17", "there are 15, 18, 20, 21, local"),
        ("derive 15 --m 1", "does not depend on m"),
        ("derive 20 --m -1", "finite and > 0"),
        ("plan --moments 0:0.1:1 --moments 0:0.2:1", "twice"),
        ("q --d2 0.1 --v2 1 -r 0", "at least 1"),
        ("q --d2 0.1 --v2 1 --sweep some", "is unknown"),
        ("q --d2 0.1 --v2 1 --proxy 11", "keep K ≤ r"),
        ("q --d2 0.1 --v2 1 --epsilon 0.5", "[0, 0.5)"),
        ("q --d2 0.1 --v2 1 --epsilon 0.1 --m 2", "give one of them"),
        ("q --d2 0.1 --v2 1 --m 2 --batch 4", "needs ‖∇M‖²"),
        ("q --constants 1,2,3 --alpha 0.1", "five are needed"),
        ("q --constants a,b --alpha 0.1", "five numbers"),
        ("q --constants 1,0,1,1,1", "give --alpha"),
        ("q --constants 1,0,1,1,1 --alpha 0.1 -r 0", "at least 1"),
        ("q --constants 1,0,1,1,1 --alpha 0.1 -r 3000000000", "at most 1,000,000"),
        ("q --constants 1,0,1,1,1 --alpha 0.1 --d2 1 --v2 1", "give either"),
        ("measure nothing --m 2", "is unknown"),
        ("measure quadratic --m 2 --html=", "is a folder, or empty"),
        ("explore -o .", "is a folder, or empty"),
        ("measure no_such_module:x --m 2", "no module named"),
        ("measure json:nothing --m 2", "has no"),
        ("measure json:__name__ --m 2", "is a str"),
        ("measure quadratic --tasks 1 --m 2", "at least 2"),
        ("measure quadratic --tasks 0 --m 2", "n ≥ 1"),
        ("measure quadratic --m -1", "> 0"),
        ("measure quadratic --device nothing --m 2", "device"),
        ("measure quadratic --device meta --m 2", "device"),
        ("measure quadratic --seed 4294967296 --m 2", "below 2^32"),
        ("measure quadratic --chunk 0 --m 2", "at least 1"),
        ("measure json:loads --device cpu --m 2", "for built-in problems"),
        ("measure json:loads --m 2", "cannot be made"),
        ("measure .x:y --m 2", "cannot be made"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, monkeypatch, arguments, words):
    code, out, err = run(capsys, monkeypatch, *arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("ufom: ")
    assert err.count("\n") == 1
    assert words in err


def test_missing_data_are_one_line(capsys, monkeypatch):
    monkeypatch.delenv("UFOM_DATA", raising=False)
    from ufom_runtime.problems import data

    data.mnist.cache_clear()
    code, _, err = run(capsys, monkeypatch, "measure", "mnist-hypercleaning", "--m", "2")
    assert code == 2
    assert err == (
        "ufom: UFOM_DATA is not set: point it at the folder that holds mnist/, omniglot/ and cifar100/, or at an empty "
        "one for `ufom data`\n"
    )


def test_an_extra_that_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = run(capsys, monkeypatch, "measure", "quadratic", "--m", "2")
    assert (code, err) == (2, "ufom: this needs torch: pip install '.[runtime]' from a checkout of ufom\n")


def test_q_loads_neither_torch_nor_sympy():
    code = (
        "import sys; from ufom_runtime.command.cli import main; sys.argv = 'ufom q --d2 0.02 --v2 0.9 --m 2'.split()\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'sympy', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "0.107" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_measure_synthetic(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "measure", "synthetic", "--json", "--outer", "paper")
    assert code == 0
    found = json.loads(out)
    assert (found["r"], found["s"], found["p"], found["thetas"]) == (10, 1, 1, 1001)
    assert found["d2"] == pytest.approx(53.21197334, rel=1e-9)
    assert found["v2"] == pytest.approx(2229.315673, rel=1e-9)
    sweeps = [row["sweep"] for row in found["by_sweep"]]
    assert sweeps == ["recomputed", "checkpointed:1", "checkpointed:3", "stored", "unrolled"]  # r = 10
    assert all(row["interval"][0] <= row["q"] <= row["interval"][1] for row in found["by_sweep"])


def test_measure_says_that_the_first_order_gradient_vanishes(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "measure", "digits-hypercleaning", "--m", "2")
    assert code == 0
    assert "first-order gradient is identically zero" in out
    assert "Holding one state, run the exact gradient, RECOMPUTED" in out


def test_where_the_data_cannot_tell_the_answer_says_what_to_run_and_what_to_do():
    doubtful, known = Moments(0.35, 1.0, np.diag([0.1, 0.01])), Moments(0.1, 1.0)
    rows = {
        states: {"states": states, **_row(moments, CostModel(r=10, sweep=sweep), 2.0, 1.0)}
        for states, moments, sweep in (
            (1, doubtful, Sweep.recomputed()),
            (2, known, Sweep.checkpointed(1)),
            (4, doubtful, Sweep.checkpointed(3)),
        )
    }
    said = _why([rows[1], rows[2]], vanishes=False)
    assert "run UFOM(0.806) or the exact gradient, RECOMPUTED; both are unbiased" in said
    assert "the data cannot tell which is sooner: the 95 % interval of q*" in said
    assert "measure D² and V² on more tasks. Holding 2 states" in said
    assert said.endswith("sooner than that: run UFOM(0.346, Sweep.checkpointed(1)).")
    said = _why([{**rows[4], "q": 1.0}], vanishes=False)
    assert "run the exact gradient, UFOM(1, Sweep.checkpointed(3)); the data cannot tell whether" in said
    exact = [
        _advice({"sweep": sweep, "proxy": 0, "q": 1, "pays": "no"})
        for sweep in ("stored", "recomputed", "checkpointed:2")
    ]
    assert [x.removeprefix("run the exact gradient, ") for x in exact] == [
        "EXACT", "RECOMPUTED", "UFOM(1, Sweep.checkpointed(2))",
    ]  # fmt: skip


def test_measure_a_problem_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from ufom_runtime import BilevelProblem\n"
        "problem = BilevelProblem(\n"
        "    inner_loss=lambda theta, phi, task: (phi - task).square().sum(),\n"
        "    outer_loss=lambda theta, phi, task: (phi - task).square().sum(),\n"
        "    start=lambda theta, task: theta, step_sizes=torch.full((4,), 0.01),\n"
        "    sample_tasks=lambda n, g: torch.randn(n, 3, generator=g), initial=torch.ones(3))\n"
        "without_theta = BilevelProblem(problem.inner_loss, problem.outer_loss, problem.start,\n"
        "    problem.step_sizes, problem.sample_tasks)\n"
    )
    code, out, _ = run(capsys, monkeypatch, "measure", "mine:problem", "--m", "2")
    assert (code, "run UFOM(" in out) == (0, True)
    code, out, error = run(capsys, monkeypatch, "measure", "mine:without_theta", "--m", "2")
    assert (code, out, "give BilevelProblem(initial=...)" in error) == (2, "", True)
    del sys.modules["mine"]


def test_a_stray_file_never_stands_in_for_an_installed_module(tmp_path, monkeypatch):
    installed, here = tmp_path / "installed", tmp_path / "here"
    for folder, text in ((installed, ""), (here, "raise SystemExit('the stray file ran')")):
        folder.mkdir()
        (folder / "of_both.py").write_text(text)
    (here / "mine.py").write_text("from ufom_runtime.problems.quadratic import quadratic as problem\nimport of_both")
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    monkeypatch.chdir(here)
    load_problem("mine:problem")
    assert Path(sys.modules.pop("of_both").__file__).parent == installed
    del sys.modules["mine"]
