"""What `train` takes: optimizers, schedulers, clipping, patience; what it keeps; and that all of it resumes."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from ufom_runtime import EXACT, FOM, METHODS, UFOM, Run, Stopped, hypergradient, outer_sgd, train
from ufom_runtime.inner import sgd
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.training.resume import Checkpoint
from ufom_runtime.training.seeds import generator
from ufom_theory import UfomError

PROBLEM = quadratic(dim=3, r=2)


HALF = UFOM(0.5)


def go(optimizer="sgd:0.05", steps=7, estimator=HALF, problem=PROBLEM, **options):
    if "step_sizes" not in options:
        options["optimizer"] = optimizer
    return train(problem, PROBLEM.initial, estimator, steps=steps, batch=2, **options)


def norm(theta):
    return {"norm": float(theta.norm())}


def assert_same(one, other):
    assert torch.equal(one.theta, other.theta)
    assert (one.step, one.steps) == (other.step, other.steps)
    pd.testing.assert_frame_equal(
        one.log.drop(columns="seconds"), other.log.drop(columns="seconds"), check_exact=True, check_dtype=True
    )


@pytest.mark.parametrize(
    ("optimizer", "same"),
    [
        ("sgd:0.05", {"step_sizes": [0.05] * 7}),
        (0.05, {"step_sizes": lambda k: 0.05}),
        ("decay:0.5:0.1", {"step_sizes": lambda k: 0.1 * k**-0.5}),
        ("adam:1e-3", {"optimizer": lambda p: torch.optim.Adam(p, lr=1e-3)}),
    ],
)
def test_a_name_stands_for_its_steps(optimizer, same):
    assert_same(go(optimizer), go(**same))
    if "step_sizes" in same:
        alias = outer_sgd(PROBLEM, PROBLEM.initial, UFOM(0.5), same["step_sizes"], 7, batch=2)
        assert_same(alias, go(optimizer))


def test_clipping_and_a_scheduler_against_a_loop_written_out():
    leaf = torch.nn.Parameter(PROBLEM.initial.clone())
    sgd = torch.optim.SGD([leaf], lr=0.5, momentum=0.9)
    scheduler = ExponentialLR(sgd, 0.8)
    norms = []
    for k in range(1, 8):
        gradient = hypergradient(PROBLEM, leaf.detach(), PROBLEM.sample(2, generator(0, k, "tasks")), EXACT)
        norms.append(float(gradient.norm()))
        leaf.grad = gradient * min(1.0, 1.1 / norms[-1])
        sgd.step()
        scheduler.step()
    run = go(
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        estimator=EXACT,
        clip=1.1,
        scheduler=lambda o: ExponentialLR(o, 0.8),
    )
    torch.testing.assert_close(run.theta, leaf.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(run.log.gradient_norm.tolist(), norms)
    assert min(norms) < 1.1 < max(norms)
    assert run.log.gamma.tolist() == pytest.approx([0.5 * 0.8**k for k in range(7)])


def interrupted(at):
    def progress(share):
        if share >= at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": lambda p: torch.optim.NAdam(p, lr=0.02)},
        {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True), "clip": 0.3},
        {"optimizer": 0.1, "scheduler": lambda o: SequentialLR(o, [ConstantLR(o), ExponentialLR(o, 0.9)], [3])},
        {
            "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
            "scheduler": lambda o: OneCycleLR(o, 0.1, total_steps=30),
        },
        {"optimizer": "decay:0.5:0.3", "keep": "best", "patience": 3, "evaluate": norm},
    ],
    ids=["nadam", "amsgrad, clipped", "sequential", "one cycle", "best"],
)
def test_all_of_it_goes_on_to_the_same_bits_and_a_finished_run_is_extended(options, tmp_path):
    whole = go(steps=14, log_every=2, **options)
    with pytest.raises(Stopped):
        go(steps=7, log_every=2, checkpoint=tmp_path, progress=interrupted(0.7), **options)
    shorter = go(steps=7, log_every=2, checkpoint=tmp_path, **options)
    assert_same(shorter, go(steps=7, log_every=2, **options))
    assert shorter.log.step.iloc[-1] == 7  # the last step is always logged; extended, it is not the last
    assert_same(go(steps=14, log_every=2, checkpoint=tmp_path, **options), whole)
    assert_same(go(steps=14, log_every=2, checkpoint=tmp_path, **options), whole)


def test_a_run_is_stored_and_extended_where_its_last_theta_is_the_best(tmp_path):
    options = {"keep": "best", "evaluate": lambda theta: {"loss": -float((theta - PROBLEM.initial).norm())}}
    half = go(steps=3, checkpoint=tmp_path, checkpoint_every=1, **options)
    assert (half.step, half.log.loss.idxmin()) == (3, 2)  # θ and the best θ are one tensor at every save
    assert_same(go(steps=5, checkpoint=tmp_path, **options), go(steps=5, **options))


def test_a_run_does_not_go_on_with_a_scheduler_of_another_function(tmp_path):
    def options(power):
        return {
            "optimizer": 0.1,
            "scheduler": lambda o: LambdaLR(o, lambda k: (1 + k) ** power),
            "checkpoint": tmp_path,
        }

    go(steps=3, **options(-1.0))
    with pytest.raises(UfomError, match=r"gives the rates \[0.05\] after step 3, and the stored run had \[0.025\]"):
        go(steps=5, **options(-0.5))
    assert_same(go(steps=5, **options(-1.0)), go(steps=5, **options(-1.0) | {"checkpoint": None}))


def test_ctrl_c_keeps_what_was_done():
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4") as stop:
        go(progress=interrupted(0.5))
    run = stop.value.run
    assert run.ended == "Ctrl-C"
    assert torch.equal(run.theta, go(steps=4).theta)
    assert run.log.step.tolist() == [1, 2, 3, 4]


def test_the_best_row_is_kept_and_patience_ends_the_run():
    values = [5.0, float("nan"), 3.0, 4.0, 3.0, 6.0, 1.0]
    whole = go(steps=3)
    given = iter(values)
    run = go(evaluate=lambda theta: {"loss": next(given)}, keep="best", patience=3)
    assert (run.step, run.steps, run.ended) == (3, 6, "patience")
    assert torch.equal(run.theta, whole.theta)
    given = iter(values)
    run = go(evaluate=lambda theta: {"loss": next(given), "other": 0.0}, keep="best", column="loss")
    assert (run.step, run.steps, run.ended) == (7, 7, "steps")
    given = iter([2.0, 9.0, 1.0])
    last = go(evaluate=lambda theta: {"loss": next(given)}, keep="best", log_every=3)
    assert (last.step, last.log.step.tolist()) == (7, [3, 6, 7])  # the row of the last step may be the best


def test_evaluate_may_return_tensors_of_one_number(tmp_path):
    given = go(evaluate=lambda theta: {"norm": theta.norm()}, keep="best", checkpoint=tmp_path)
    assert_same(given, go(evaluate=norm, keep="best"))


def test_a_run_is_said_in_a_line():
    run = go(steps=3, evaluate=norm)
    assert isinstance(run, Run)
    said = repr(run)
    assert said.startswith("Run of 3 steps, ended by steps, θ of step 3: ")
    assert "norm " in said
    assert "\n" not in said
    assert len(said) < 200


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters)


def elsewhere(parameters):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])}, "bound to other tensors.*factory"),
        ({"optimizer": "tuned"}, "has no rate"),
        ({"optimizer": "paper"}, "has no rate"),
        ({"optimizer": "decay:0.5"}, "has no rate"),
        ({"optimizer": "adamw:0.1"}, "does not name an outer optimizer"),
        ({"optimizer": -0.1}, "> 0"),
        ({"optimizer": [0.1]}, "must be one number"),
        ({"optimizer": lbfgs}, "LBFGS evaluates the loss within a step"),
        ({"optimizer": elsewhere}, "left out the parameter"),
        ({"optimizer": lambda p: 3}, "returned a int"),
        ({"optimizer": lambda p, q: 3}, "factory failed"),
        ({"optimizer": lambda p: torch.optim.SparseAdam(p)}, "dense gradient"),
        ({"optimizer": None}, "either step_sizes or an optimizer"),
        ({"step_sizes": lambda k: [0.1, 0.2]}, "γ_k at k = 1 has shape"),
        ({"step_sizes": lambda k: "fast"}, "γ_k at k = 1"),
        ({"step_sizes": lambda k: 0.1, "scheduler": lambda o: ExponentialLR(o, 0.9)}, "leave scheduler out"),
        ({"scheduler": ReduceLROnPlateau}, "needs no metric"),
        ({"scheduler": "cosine"}, "gave a str"),
        ({"clip": 0.0}, "clip"),
        ({"keep": "first"}, "must be 'last' or 'best'"),
        ({"keep": "best"}, "go by a column"),
        ({"keep": "best", "column": "loss"}, "not a column of numbers"),
        ({"keep": "best", "evaluate": lambda theta: {"a": 1.0, "b": 2.0}}, "name the one to go by"),
        ({"column": "loss"}, "for keep='best' and patience"),
        ({"patience": 0, "evaluate": norm}, "patience"),
        ({"evaluate": lambda theta: {"step": 1.0}}, "the log has already"),
        ({"evaluate": 3}, "must be a function"),
        ({"until": 3}, "must be a function"),
        ({"checkpoint": 3}, "must be the path of a folder"),
        ({"checkpoint": ""}, "must be the path of a folder"),
        ({"optimizer": True}, "is not a number"),
        ({"checkpoint": "a\0b"}, "cannot be made"),
        ({"estimator": "exact"}, "is a name, and not the method itself"),
    ],
)  # fmt: skip
def test_bad_input_is_named(options, message):
    with pytest.raises(UfomError, match=message):
        go(**options)


def test_a_state_of_another_loss_or_start_is_refused_and_another_chunk_is_not(tmp_path):
    go(checkpoint=tmp_path)
    assert_same(go(checkpoint=tmp_path, chunk=1), go())
    inner, outer, start = PROBLEM.inner_loss, PROBLEM.outer_loss, PROBLEM.start
    for name, other in (
        ("inner_loss", lambda theta, phi, task: inner(theta, phi, task) + 1e-3 * phi[0] ** 2),
        ("outer_loss", lambda theta, phi, task: 1.001 * outer(theta, phi, task)),
        ("start", lambda theta, task: start(theta, task) + 1e-3),
    ):
        changed = replace(PROBLEM, **{name: other})
        with pytest.raises(UfomError, match="is of another run: on the first task it has another"):
            go(problem=changed, checkpoint=tmp_path)


class Cube(torch.autograd.Function):
    """Σφ³, which cannot be differentiated twice, so no exact hypergradient tells one update from another."""

    @staticmethod
    def forward(ctx, phi):
        ctx.save_for_backward(phi)
        return phi.pow(3).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2


@pytest.mark.filterwarnings("ignore:the tasks of this problem run one after another")
def test_a_state_of_another_inner_update_is_refused_without_second_derivatives_too(tmp_path):
    inner_loss = PROBLEM.inner_loss

    def run(rate):
        loss = lambda theta, phi, task: inner_loss(theta, phi, task) + 0.01 * Cube.apply(phi)  # noqa: E731
        problem = replace(PROBLEM, inner_loss=loss, step_sizes=None, update=sgd(rate), steps=3)
        return go(problem=problem, estimator=FOM, checkpoint=tmp_path)

    run(0.1)
    with pytest.raises(UfomError, match="on the first task it has another φ_r at θ_0 than"):
        run(0.11)


def test_a_start_that_the_run_changes_is_refused():
    warm = {"phi": torch.zeros(3, dtype=torch.float64)}

    def remember(theta):
        warm["phi"] = theta.clone()
        return {}

    problem = replace(PROBLEM, start=lambda theta, task: theta + warm["phi"])
    with pytest.raises(UfomError, match=r"gave another φ_0 after step 1 .*make it a function"):
        go(problem=problem, estimator=FOM, evaluate=remember)


def test_saving_costs_the_same_whatever_the_log_holds(tmp_path):
    """The log is appended to, the state beside it stays as small: at 50,000 rows as at ten."""
    store, theta = Checkpoint(tmp_path, {}, most_bytes=2**20), {"theta": torch.zeros(3)}
    row = {"step": 123456, "gamma": 0.05, "gradients": 1e6, "loss": 0.1}
    sizes = []
    for rows in (10, 50_000, 1):
        store.save(theta, {"step": 1}, [row] * rows)
        log = (tmp_path / "log.jsonl").stat()
        sizes.append((log.st_size, log.st_ino, (tmp_path / "state.json").stat().st_size))
    (ten, file, small), (many, same, large), (after, again, last) = sizes
    assert file == same == again  # never written anew
    assert after - many == ten // 10
    assert max(large, last) - small < 20
    assert len(Checkpoint(tmp_path, {}, most_bytes=2**20).log.read(store.log.seal())) == 50_011


@pytest.mark.parametrize("torn", [b'{"step": 8, "ga', b"\0\0\n{}\n"])
def test_what_a_killed_run_left_after_its_last_state_is_cut_off(torn, tmp_path):
    with pytest.raises(Stopped):
        go(checkpoint=tmp_path, progress=interrupted(0.5))
    with open(tmp_path / "log.jsonl", "ab") as log:
        log.write(torn)
    assert_same(go(checkpoint=tmp_path), go())
    assert torn not in (tmp_path / "log.jsonl").read_bytes()


def test_a_log_that_is_cut_altered_or_missing_is_named(tmp_path):
    for damage in (lambda log: log[:-1], lambda log: log.replace(b'"step": 1', b'"step": 2'), None):
        go(checkpoint=tmp_path / str(damage), steps=2)
        path = tmp_path / str(damage) / "log.jsonl"
        path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
        with pytest.raises(UfomError, match=r"log\.jsonl is damaged"):
            go(checkpoint=path.parent, steps=3)


@pytest.mark.parametrize("name", ["ufom", "roulette", "es", "adaptive-ufom"])
def test_a_default_device_moves_nothing(name):
    expected = go(estimator=METHODS[name].make(2), steps=3).theta
    torch.set_default_device("meta")
    try:
        found = go(estimator=METHODS[name].make(2), steps=3).theta
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)
