"""Moments and training by 1 and more processes: the same bits, and never a hang.

That torchrun starts a group anew after a kill is the fault `dead_rank` of `tests.faults`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from tests.runtime import group
from ufom_runtime import measure_moments, train
from ufom_runtime.command.report import measure
from ufom_runtime.training import processes
from ufom_theory import UfomError

pytestmark = pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork")
MOMENTS = ("d2", "d2_sem", "v2", "v2_sem", "cov_d2_v2", "bias_sq", "bias_sq_sem", "cosine", "mean_gradient_sq")
CPU = {"CUDA_VISIBLE_DEVICES": ""}
SIZES = (0, 4)  # 0: without a group

MINE = """
import os, signal
from dataclasses import replace
from ufom_runtime.problems.quadratic import quadratic

calls = 0

def inner(theta, phi, task, loss=quadratic(dim=4, r=3).inner_loss):
    global calls
    calls += 1
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("RANK")
    if attempt == ("0", "1") and calls == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(theta, phi, task)

problem = replace(quadratic(dim=4, r=3), inner_loss=inner)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the processes of each job gave, by job, number of processes and rank."""
    folder = tmp_path_factory.mktemp("group")
    jobs = [f"moments:{size}" for size in SIZES] + ["failing:3", "silent:2", "refused:2"]
    jobs += ["longer:0", "longer:4", "methods:0", "methods:2", "halves:0", "halves:4", "halves:2"]
    jobs += ["differing:2", "killed:2", "killed:0", "attempt_0:2", "attempt_1:2", "attempt_1:0"]
    (folder / "mine.py").write_text(MINE)
    subprocess.run([sys.executable, group.__file__, folder, *jobs], env=os.environ | CPU, check=True, timeout=600)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_the_moments_are_the_same_bits_for_any_number_of_processes(found):
    alone = json.dumps(found["moments-0-0"])
    for size in SIZES:
        for rank in range(size):
            assert json.dumps(found[f"moments-{size}-{rank}"]) == alone


def test_the_moments_are_those_of_a_plain_loop(found):
    for name, problem, thetas, tasks in group.problems():
        for proxy, shared in zip(group.PROXIES, found["moments-4-0"][name], strict=True):
            alone = group.as_json(measure_moments(problem, thetas, tasks, proxy, chunk=1))
            for key, value in alone.items():
                scale = np.abs(value).max()
                np.testing.assert_allclose(shared[key], value, rtol=0, atol=1e-12 * scale, err_msg=f"{name} {key}")


def test_an_error_of_one_process_is_raised_by_all(found):
    for rank in range(3):
        seen, error = found[f"failing-3-{rank}"]
        assert seen == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]
        assert error == "it is five — ξ"


def test_a_silent_process_is_waited_for_no_longer_than_was_said(found):
    assert "was silent for 0:00:01" in found["silent-2-0"]


def test_more_processes_than_chunks_are_refused_in_one_line(found):
    (code, said), other = found["refused-2-0"], found["refused-2-1"]
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("ufom: 2 processes for 1 chunk(s): start no more")
    assert other == [2, ""]


@pytest.mark.parametrize(("job", "sizes"), [("longer", (4,)), ("methods", (2,))])
def test_training_gives_the_same_bits_for_any_number_of_processes(found, job, sizes):
    for size in sizes:
        for rank in range(size):
            assert found[f"{job}-{size}-{rank}"] == found[f"{job}-0-0"]


def test_training_by_chunks_is_training(found):
    for name in set(group.METHODS) - {"drawing", "evolution"}:  # which draw chunk by chunk
        method, options = group.METHODS[name]
        problem = group.FINITE if name == "warm" else group.PLAIN
        options = {
            "optimizer": "adam:0.01",
            "steps": 5,
            "batch": 5,
            **{k: v for k, v in options.items() if k != "chunk"},
        }
        run = train(problem, problem.initial, method, **options)
        np.testing.assert_allclose(found["methods-2-0"][name][0], run.theta, rtol=1e-10, atol=1e-12, err_msg=name)


def test_a_run_goes_on_with_another_number_of_processes(found):
    with processes.join() as alone:
        whole = [group.trained(name, alone, steps=9) for name in ("adaptive", "warm")]
    for rank in range(2):
        assert found[f"halves-2-{rank}"] == whole


def test_processes_that_were_given_other_arguments_are_refused(found):
    for rank in range(2):
        assert found[f"differing-2-{rank}"].startswith("process 1 has another seed than process 0, 1 and 0")


def test_a_process_that_dies_ends_the_run_with_nothing_lost(found):
    assert "another process died" in found["killed-2-0"]
    assert found["killed-0-0"] == [5, 8]


def test_a_group_that_is_started_anew_after_a_kill_gives_the_same_bits(found):
    code, out, error = found["attempt_0-2-0"]
    assert (code != 0, out) == (True, "")
    assert sum(line.startswith("ufom: ") and "process died" in line for line in error.splitlines()) == 1
    (_, shared, _), (_, silent, _), (_, alone, _) = (found[f"attempt_1-{x}"] for x in ("2-0", "2-1", "0-0"))
    shared, alone = json.loads(shared), json.loads(alone)
    assert json.dumps([shared[name] for name in MOMENTS]) == json.dumps([alone[name] for name in MOMENTS])
    assert silent == ""


def torchrun(folder, *options, **environment):
    """`ufom measure` of `MINE` by two processes in a group, of which rank 1 kills itself."""
    (folder / "mine.py").write_text(MINE)
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2", *options]
    arguments = ["-m", "ufom_runtime.measure", "mine:problem", "--tasks", "20", "--json", "--outer", "tuned"]
    environment = {**os.environ, **CPU, **environment}
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow  # torchrun itself; the test above forks what it would start
def test_without_restarts_a_killed_process_ends_all_and_is_reported(tmp_path):
    done = torchrun(tmp_path, KILL_AT="10")
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert sum(line.startswith("ufom: ") and "process died" in line for line in done.stderr.splitlines())


def test_a_group_that_does_not_form_is_named(monkeypatch):
    with processes.join() as alone:
        assert alone == processes.Processes(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for missing in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(missing, raising=False)
    with pytest.raises(UfomError, match=r"the 2 processes form no group: .*RANK"), processes.join():
        pass
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    with pytest.raises(UfomError, match="no gloo"), processes.join():
        pass


def test_gpus_are_one_a_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    with pytest.raises(UfomError, match=r"2 processes for 1 GPU\(s\): start one a GPU"), processes.join():
        pass
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(UfomError, match="no nccl"), processes.join():
        pass


@pytest.mark.parametrize(("pairs", "chunks"), [(1, 1), (16, 16), (64, 16), (17, 9), (100_000, 391)])
def test_the_chunks_do_not_depend_on_the_processes(pairs, chunks, monkeypatch):
    seen = set()

    def caught(*_, chunk, **__):
        seen.add(chunk)
        raise UfomError("enough")

    monkeypatch.setattr("ufom_runtime.command.report.moments_by_proxy", caught)
    problem = next(problem for name, problem, *_ in group.problems() if name == "three θ")
    for size in {1, 2, 9} & set(range(chunks + 1)):
        with pytest.raises(UfomError, match="enough"):
            measure(problem, pairs, m=2, processes=processes.Processes(0, size))
    (chunk,) = seen
    assert -(-pairs // chunk) == chunks
