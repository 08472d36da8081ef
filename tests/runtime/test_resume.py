"""A run that was stopped and went on, against one that never stopped: the same bits."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import safetensors.torch
import torch

from ufom_runtime import EXACT, FOM, REPTILE, UFOM, AdaptiveUFOM, hypergradient, outer_sgd
from ufom_runtime.files import digest, read_sealed, write_sealed, write_whole
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.training.resume import Checkpoint
from ufom_runtime.training.seeds import generator
from ufom_theory import UfomError

ADAM = {"optimiser": lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.8, 0.99), weight_decay=0.1)}
MOMENTUM = {"optimiser": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True)}
PLAIN = {"step_sizes": lambda k: 1 / (k + 20)}
PROBLEM = quadratic(dim=3, r=3)
CASES = {
    "plain": (UFOM(0.4), PLAIN),
    "sequence": (FOM, {"step_sizes": [0.1] * 20}),
    "adam": (UFOM(0.4), ADAM),
    "momentum": (EXACT, MOMENTUM),
    "adaptive": (AdaptiveUFOM(q_min=0.3, beta=0.8), PLAIN),
    "adaptive-adam": (AdaptiveUFOM(q_min=0.3, beta=0.8, variant="released"), ADAM),
    "adaptive-step": (AdaptiveUFOM(law="step", outer="sgd:0.05", q_min=0.3, beta=0.8), PLAIN),
    "adaptive-biased": (AdaptiveUFOM(law="step", outer="adam:0.03", q_min=0.3, allow_biased=True), ADAM),
    "reptile": (REPTILE, PLAIN),
}


def run(estimator=None, **options):
    call = {"steps": 10, "batch": 2, "log_every": 3, "seed": 4, **PLAIN, **options}
    if "optimiser" in options:
        call.pop("step_sizes")
    return outer_sgd(call.pop("problem", PROBLEM), PROBLEM.initial, estimator or UFOM(0.4), **call)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Puts a finished run of a case into a folder; each case runs once."""

    @cache
    def made(name):
        estimator, steps = CASES[name]
        run(estimator, checkpoint=(folder := tmp_path_factory.mktemp(name)), **steps)
        return folder

    return lambda name, folder: shutil.copytree(made(name), folder, dirs_exist_ok=True)


class Stops:
    """Raises `error` at its n-th call, and else returns columns."""

    def __init__(self, n, error=KeyboardInterrupt):
        self.left, self.error = n, error

    def __call__(self, argument):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return {"norm": float(torch.as_tensor(argument).norm())}


def norm(theta):
    return {"norm": float(theta.norm())}


def assert_same(one, other):
    assert torch.equal(one.theta, other.theta)
    pd.testing.assert_frame_equal(
        one.log.drop(columns="seconds"), other.log.drop(columns="seconds"), check_exact=True, check_dtype=True
    )


@pytest.mark.parametrize("name", CASES)
def test_goes_on_to_the_same_bits(name, tmp_path):
    estimator, steps = CASES[name]
    whole = run(estimator, evaluate=norm, **steps)
    for stop, step in ((4, 4), (6, 10)):
        with pytest.raises(KeyboardInterrupt):
            run(estimator, evaluate=norm, progress=Stops(stop), checkpoint=tmp_path, **steps)
        assert read_sealed(tmp_path / "state.json")["step"] == step
    assert_same(run(estimator, evaluate=norm, checkpoint=tmp_path, **steps), whole)
    assert_same(run(estimator, evaluate=norm, checkpoint=tmp_path, **steps), whole)  # nothing is left to do
    assert len(list(tmp_path.iterdir())) == 3


def long_run(name, checkpoint=None):
    estimator, steps = CASES[name]
    return run(estimator, steps=STEPS, evaluate=norm, checkpoint=checkpoint, checkpoint_every=1, **steps)


STEPS, KILLED = 25, ("adaptive-adam",)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_goes_on_to_the_same_bits_after_kill_9_at_any_moment(tmp_path):
    script = f"from tests.runtime.test_resume import be_killed; be_killed({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    for name in KILLED:
        assert_same(long_run(name, tmp_path / name), long_run(name))
        assert len(set(kills[name]) - {STEPS}) == 3  # within the run, at steps that differ
        assert len(list((tmp_path / name).iterdir())) == 3  # what the killed ones left is gone


def be_killed(folder):
    """Kills each case at a random moment of three random steps, and then lets it end; prints the steps stored then."""
    chance, kills = random.Random(0), {}
    run(**ADAM)  # imports what the forked processes then have
    for name in KILLED:
        kills[name], state = [], Path(folder, name, "state.json")
        for target in (*sorted(chance.sample(range(1, STEPS - 9), 3)), None):
            child = os.fork()
            if not child:
                long_run(name, state.parent)
                os._exit(0)
            if target is not None:
                while not state.exists() or read_sealed(state)["step"] < target:
                    time.sleep(0.005)
                time.sleep(chance.uniform(0, 0.01))
                os.kill(child, signal.SIGKILL)
                kills[name].append(read_sealed(state)["step"])
            assert os.waitpid(child, 0)[1] == (signal.SIGKILL if target else 0)
    print(json.dumps(kills))


@pytest.mark.parametrize("steps", [PLAIN, ADAM], ids=["plain", "adam"])
def test_a_stop_within_a_step_falls_back_to_the_one_before(steps, tmp_path):
    whole = run(evaluate=norm, **steps)
    with pytest.raises(KeyboardInterrupt):
        run(evaluate=Stops(3), checkpoint=tmp_path, **steps)  # θ_9 is there, its row is not
    assert read_sealed(tmp_path / "state.json")["step"] == 8
    assert_same(run(evaluate=norm, checkpoint=tmp_path, **steps), whole)


def test_an_error_leaves_the_last_saved_state(tmp_path):
    with pytest.raises(RuntimeError):
        run(progress=Stops(9, RuntimeError), checkpoint=tmp_path, checkpoint_every=4)
    assert read_sealed(tmp_path / "state.json")["step"] == 8
    assert_same(run(checkpoint=tmp_path), run())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 5}, "its seed is 4, not 5"),
        ({"batch": 3}, "its batch is 2"),
        ({"log_every": 1}, "log_every is 3"),
        ({"steps": 9}, "holds a run of 10 steps already"),
        ({"step_sizes": lambda k: 1 / (k + 21)}, "outer steps"),
        (ADAM, "outer steps"),
        ({"estimator": UFOM(0.5)}, r"estimator is Estimator\(q=0.4"),
        ({"problem": quadratic(dim=3, r=4)}, "its r is 3, not 4"),
        ({"problem": quadratic(dim=3, r=3, noise=2.0)}, "first tasks"),
        ({"problem": quadratic(dim=3, r=3, alpha=0.7)}, "inner step sizes"),
    ],
)
def test_a_state_of_another_run_is_refused(other, named, tmp_path, finished):
    finished("plain", tmp_path)
    with pytest.raises(UfomError, match=named):
        run(checkpoint=tmp_path, **other)


def test_another_start_or_another_setting_of_the_optimiser_is_refused(tmp_path):
    problem = PROBLEM

    def go(theta, rate):
        adam = {"optimiser": lambda p: torch.optim.Adam(p, lr=rate)}
        return outer_sgd(problem, theta, FOM, steps=2, checkpoint=tmp_path, **adam)

    go(problem.initial, 0.1)
    with pytest.raises(UfomError, match="its θ_0 is"):
        go(problem.initial + 1, 0.1)
    with pytest.raises(UfomError, match="its outer steps is"):
        go(problem.initial, 0.2)


@pytest.mark.parametrize("damage", ["cut", "altered", "tensors", "missing", "no object"])
def test_damaged_files_are_named(damage, tmp_path, finished):
    finished("plain", tmp_path)
    state, (tensors,) = tmp_path / "state.json", tmp_path.glob("*.safetensors")
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:-20])
    elif damage == "altered":
        state.write_text(state.read_text().replace('"step": 10', '"step": 11'))
    elif damage == "no object":
        state.write_text("[1, 2]")
    elif damage == "tensors":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    else:
        tensors.unlink()
    name = tensors.name if damage in ("tensors", "missing") else "state.json"
    with pytest.raises(UfomError, match=f"{name} is damaged"):
        run(checkpoint=tmp_path)


def resealed(folder, change):
    """The state in `folder` altered, under a seal that fits."""
    content = read_sealed(folder / "state.json")
    change(content)
    write_sealed(folder / "state.json", content)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "tensors-0.safetensors", "state.json", 3, None])
def test_a_state_that_names_a_file_elsewhere_is_refused(name, tmp_path, finished):
    finished("plain", tmp_path / "run")
    (tmp_path.parent / "x").write_bytes(next((tmp_path / "run").glob("*.safetensors")).read_bytes())
    resealed(tmp_path / "run", lambda state: state.update(tensors=name))
    with pytest.raises(UfomError, match=r"or names '.*' as its tensors"):
        run(checkpoint=tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"}, {"step": 0}, {"step": True}, {"log": {}}, {"log": [1]}, {"seconds": None}, {"state": ["a"]},
        {"state": 1}, {"calls": {}}, {"calls": {"gradients": 1}}, {"outer": {"tensor": "no"}}, {"outer": 1},
        {"outer": {"dict": [[[], 1]]}}, {"outer": {"dict": []}},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_of_other_kinds_is_refused(change, tmp_path, finished):
    finished("adam", tmp_path)
    resealed(tmp_path, lambda state: state.update(change))
    with pytest.raises(UfomError, match="is damaged: it holds no such state"):
        run(checkpoint=tmp_path, **ADAM)


@pytest.mark.parametrize("forged", [torch.zeros(1), torch.zeros(4), torch.zeros(3, 1), torch.zeros(3).long()], ids=str)
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("plain", "theta"), ("momentum", "theta"), ("momentum", "outer.optimizer.state.0.momentum_buffer"),
        ("adam", "outer.optimizer.state.0.exp_avg"), ("adam", "outer.optimizer.state.0.exp_avg_sq"),
        ("adam", "outer.optimizer.state.0.step"),
    ],
)  # fmt: skip
def test_a_forged_tensor_is_refused_before_any_step(name, part, forged, tmp_path, finished):
    estimator, steps = CASES[name]
    finished(name, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    content = safetensors.torch.save({**safetensors.torch.load(file.read_bytes()), part: forged})
    file.write_bytes(content)
    resealed(tmp_path, lambda state: state.update(step=3, tensors_sha256=digest(content)))
    steps_taken, path = [], part.split(".")
    named = path[0] + "".join(rf"\['?{key}'?\]" for key in path[1:])
    with pytest.raises(UfomError, match=rf"holds no such state \(ValueError: {named} is torch.*, not torch.*remove it"):
        run(estimator, checkpoint=tmp_path, progress=steps_taken.append, **steps)
    assert steps_taken == []


@pytest.mark.parametrize(
    ("forged", "named"),
    [
        ([0.3, 0.0, 0.0], r"state\[3\] is absent, not int"),
        ([0.3, 0.0, True, 1], r"state\[2\] is bool, not float"),
        ([5.0, 0.0, 0.0, 0], r"q=5\.0.*0\.3 ≤ q ≤ 1"),
        ([0.2, 0.0, 0.0, 0], r"q=0\.2.*0\.3 ≤ q ≤ 1"),
        ([float("nan"), 0.0, 0.0, 1], r"q=nan"),
        ([0.3, -1.0, 0.0, 1], r"d2_sm=-1\.0"),
        ([0.3, 0.0, float("inf"), 1], r"v2_sm=inf"),
        ([0.3, 0.0, 0.0, -1], r"updates=-1"),
    ],
)
def test_a_forged_state_of_a_rule_is_refused_before_any_step(forged, named, tmp_path, finished):
    estimator, steps = CASES["adaptive"]
    finished("adaptive", tmp_path)
    resealed(tmp_path, lambda state: state.update(step=3, state=forged))
    steps_taken = []
    with pytest.raises(UfomError, match=named):
        run(estimator, checkpoint=tmp_path, progress=steps_taken.append, **steps)
    assert steps_taken == []


def test_what_is_too_large_is_neither_written_nor_read(tmp_path):
    path = tmp_path / "x.json"
    for content, message in (({"x": "é" * 2**23}, "bytes, more than"), ({"x": [0] * 2**20}, "values, more than")):
        with pytest.raises(UfomError, match=f"would hold .*{message} .*: keep fewer rows"):
            write_sealed(path, content)
        path.write_text(json.dumps(content, ensure_ascii=False))
        with pytest.raises(UfomError, match=f"is damaged: .*{message}"):
            read_sealed(path)
    os.truncate(path, 2**40)
    with pytest.raises(UfomError, match=r"is damaged: .*1099511627776 bytes"):
        read_sealed(path)
    run(checkpoint=tmp_path)
    os.truncate(next(tmp_path.glob("*.safetensors")), 2**40)
    with pytest.raises(UfomError, match=r"safetensors is damaged"):
        run(checkpoint=tmp_path)
    with pytest.raises(UfomError, match="more than 10: run without checkpoint="):
        Checkpoint(tmp_path, {}, most_bytes=10).save({"x": torch.zeros(9)}, {})


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_folder_that_cannot_be_read_is_named(call, tmp_path, monkeypatch):
    run(checkpoint=tmp_path)
    where = Path if call == "mkdir" else os
    real = getattr(where, call)

    def failing(path, *arguments, **options):
        if call == "mkdir" or str(path).endswith(".safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *arguments, **options)

    monkeypatch.setattr(where, call, failing)
    with pytest.raises(UfomError, match=r"cannot be .*: Input/output error; "):
        run(checkpoint=tmp_path)


def test_old_states_that_cannot_be_removed_do_no_harm(tmp_path):
    with mock.patch.object(Path, "unlink", side_effect=OSError(errno.EIO, os.strerror(errno.EIO))):
        assert_same(run(checkpoint=tmp_path, checkpoint_every=4), run())
    assert len(list(tmp_path.iterdir())) == 5
    assert_same(run(checkpoint=tmp_path), run())


def test_without_safetensors_only_a_checkpoint_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert torch.isfinite(run().theta).all()
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        run(checkpoint=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_json_does_not_have_is_refused(tmp_path):
    with pytest.raises(UfomError, match="cannot be stored as JSON"):
        run(checkpoint=tmp_path, evaluate=lambda theta: {"theta": theta})


def test_an_optimiser_takes_the_steps_that_torch_takes():
    problem = quadratic(dim=3, r=3)
    result = run(EXACT, batch=1, seed=0, **ADAM)
    parameter = torch.nn.Parameter(problem.initial.clone())
    adam = ADAM["optimiser"]([parameter])
    for k in range(1, 11):
        parameter.grad = hypergradient(problem, parameter.detach(), problem.sample(1, generator(0, k, "tasks")), EXACT)
        adam.step()
    assert torch.equal(result.theta, parameter.detach())
    assert set(result.log.gamma) == {0.03}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_sizes": None}, "either step_sizes or an optimizer"),
        ({"step_sizes": [0.1] * 20, **MOMENTUM}, "either step_sizes or an optimizer"),
        ({"step_sizes": None, "optimiser": lambda p: 3}, "returned a int"),
        ({"checkpoint_every": 0}, "at least 1"),
    ],
)
def test_bad_input_is_named(options, message):
    problem = quadratic(dim=3, r=3)
    with pytest.raises(UfomError, match=message):
        outer_sgd(problem, problem.initial, FOM, **{**PLAIN, "steps": 20, **options})


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_sealed(path, {"α": [0.1, float("inf")], "b": {"c": None}})
    assert read_sealed(path) == {"α": [0.1, float("inf")], "b": {"c": None}}
    assert json.loads(path.read_text())["α"][0] == 0.1
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *names: Stops(1)(names))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_or_read_is_named(tmp_path):
    with pytest.raises(UfomError, match=r"x\.json cannot be written: No such file or directory; make room in .*none"):
        write_sealed(tmp_path / "none" / "x.json", {})
    with pytest.raises(UfomError, match=r"x\.json cannot be read: No such file"):
        read_sealed(tmp_path / "x.json")


def test_a_float32_theta_stays_one(tmp_path):
    problem = digits_few_shot(filters=2, r=2)
    call = (problem, problem.initial, UFOM(0.5), [0.1] * 4, 4)
    result = [outer_sgd(*call, checkpoint=folder).theta for folder in (tmp_path / "a", tmp_path / "a", None)]
    assert result[0].dtype == torch.float32
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])
