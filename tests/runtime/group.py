"""Runs jobs in groups of processes: `python group.py FOLDER JOB:SIZE …`, each giving FOLDER/JOB-SIZE-RANK.json.

The processes are forked, so that torch is imported once; their environment is the one that torchrun makes. Size 0
is this process, without a group.
"""

import contextlib
import io
import json
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from ufom_runtime import EXACT, FOM, REPTILE, UFOM, AdaptiveUFOM, Roulette, Switch, moments_by_proxy, train
from ufom_runtime.measure import __main__ as measure
from ufom_runtime.measure import clock
from ufom_runtime.methods import ES, Forward
from ufom_runtime.problems.few_shot import _few_shot
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.training import processes
from ufom_theory import Sweep, Truncated, UfomError

PROXIES = (Truncated(0), Truncated(1))


def problems():
    """Name, problem, θ and tasks (None: a finite Ω)."""
    plain = quadratic(dim=4, r=3)
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(10, 6, 1, 8, 8, generator=rng, dtype=torch.float64)
    few_shot = _few_shot(images, images, 5, 1, 2, 0.1, 2, 0, torch.float64)
    yield "few-shot", few_shot, few_shot.initial, few_shot.sample(7, rng)
    yield "three θ", plain, plain.initial * torch.tensor([[1.0], [2.0], [-1.0]]), plain.sample(9, rng)


def as_json(measured):
    """All that was measured, to the last bit."""
    names = ("d2", "v2", "bias_sq", "bias_sq_sem", "cosine", "mean_gradient_sq")
    arrays = {"cov": measured.cov, "samples": measured.samples}
    return {name: float(getattr(measured, name)) for name in names} | {
        name: array.tolist() for name, array in {**arrays, **measured.per_theta}.items()
    }


def moments():
    with processes.join() as group:
        out = {}
        for name, problem, thetas, tasks in problems():
            with group.sharing():
                found = moments_by_proxy(problem, thetas, tasks, PROXIES, chunk=2)
            out[name] = [as_json(found[proxy]) for proxy in PROXIES]
        return out


def failing():
    """One process meets an error."""

    def function(piece):
        if int(piece) == 5:
            raise UfomError("it is five — ξ")
        return [piece.double()[None]] * 2

    seen = []
    with processes.join() as group:
        try:
            for found in group.map(function, torch.arange(7)[:, None].unbind()):
                seen += [float(x) for x in found]
        except UfomError as error:
            return [seen, str(error)]


def silent():
    """One process does not answer."""
    processes._PATIENCE = timedelta(seconds=1)
    with processes.join() as group:

        def function(piece):
            time.sleep(4 * group.rank)
            return [piece.double()[None]]

        try:
            return [len(found) for found in group.map(function, torch.ones(2, 1).unbind())]
        except UfomError as error:
            return str(error)


def refused():
    """The command, asked to share one chunk."""
    sys.argv = ["measure", "quadratic", "--m", "2", "--tasks", "4", "--chunk", "4"]
    with contextlib.redirect_stderr(open(f"refused-{os.environ['RANK']}.txt", "w")) as said:
        try:
            measure.main()
        except SystemExit as end:
            said.flush()
            return [end.code, Path(said.name).read_text()]


PLAIN = quadratic(dim=3, r=3)
FINITE = replace(PLAIN, sample_tasks=None, tasks=PLAIN.sample(6, torch.Generator().manual_seed(1)))
METHODS = {
    "ufom": (UFOM(0.4, Sweep.checkpointed(1), coin="stratified"), {"chunk": None}),
    "unrolled": (UFOM(0.4, Sweep.unrolled(), scale=0.8), {}),
    "adaptive": (AdaptiveUFOM(q_min=0.3), {"clip": 1.0}),
    "by steps": (AdaptiveUFOM(law="step", outer="sgd:0.05"), {}),
    "followed": (UFOM(0.4, scale="followed"), {}),
    "switch": (Switch(FOM, 3, UFOM(0.5, proxy=Forward())), {}),
    "drawing": (Roulette((0, 1, 3), (0.6, 0.5)), {"chunk": None}),
    "evolution": (ES(), {}),
    "reptile": (REPTILE, {}),
    "warm": (UFOM(0.4), {"warm_start": True}),
    "best": (EXACT, {"keep": "best", "evaluate": lambda theta: {"loss": float(theta.norm())}}),
    "until": (FOM, {"until": lambda row: time.perf_counter() > 0 and row["step"] == 4}),
}


def trained(name, group, **options):
    """θ after some steps of 5 tasks, in chunks of one task or two, and the log without its times."""
    method, own = METHODS[name]
    problem = FINITE if name == "warm" else PLAIN
    options = {"optimizer": "adam:0.01", "steps": 5, "batch": 5, "log_every": 2, "chunk": 2, **own, **options}
    run = train(problem, problem.initial, method, processes=group, **options)
    return [run.theta.tolist(), run.log.drop(columns="seconds").to_json(double_precision=15), run.ended]


def longer():
    """Eight steps of UFOM."""
    with processes.join() as group:
        return trained("ufom", group, steps=8)


def methods():
    """Every method."""
    with processes.join() as group:
        return {name: trained(name, group) for name in METHODS}


def halves():
    """Each call goes on with the run in a folder for 3 steps."""
    found = []
    with processes.join() as group:
        for name in ("adaptive", "warm"):
            folder = Path(f"state-{name}")
            done = len(list(folder.glob("*"))) and json.loads((folder / "state.json").read_text())["step"]
            found.append(trained(name, group, steps=done + 3, checkpoint=folder, checkpoint_every=2))
    return found


def differing():
    """Each process has another seed."""
    with processes.join() as group:
        try:
            trained("ufom", group, seed=group.rank)
        except UfomError as error:
            return str(error)


def killed():
    """Process 1 dies in the middle of step 6; a call without it gives the step that was saved, and goes on."""
    step, begun = {"now": 1}, []
    with processes.join() as group:

        def dies(theta, phi, task):
            if group.rank == 1 and step["now"] == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return PLAIN.inner_loss(theta, phi, task)

        def rate(k):
            step["now"] = k
            begun.append(k)
            return 0.01

        problem, options = replace(PLAIN, inner_loss=dies), {"processes": group, "checkpoint": "state-killed"}
        if group.size == 1:
            begun.append(json.loads(Path("state-killed/state.json").read_text())["step"])
        try:
            run = train(problem, problem.initial, UFOM(0.4), rate, 8, batch=5, **options)
        except processes.ProcessLost as error:
            return str(error)
        return [begun[0], run.steps]


def attempt(count):
    """The command measures mine.py's problem, at torchrun's first or second attempt; its status and what it says."""
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(count), "KILL_AT": "10"}
    sys.argv = ["measure", "mine:problem", "--tasks", "20", "--json", "--outer", "tuned"]
    clock.took, code = (lambda function, device: [function()] and 1e-3), None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            measure.main()
        except SystemExit as end:
            code = end.code
    return [code, out.getvalue(), error.getvalue()]


def attempt_0():
    """Process 1 kills itself."""
    return attempt(0)


def attempt_1():
    """It does not."""
    return attempt(1)


def write(job, size, rank):
    Path(f"{job}-{size}-{rank}.json").write_text(json.dumps(globals()[job]()))


def run(job, size):
    """Forks `size` processes and waits for them."""
    if not size:
        write(job, 0, 0)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = 1
        try:
            write(job, size, rank)
            code = 0
        finally:
            os._exit(code)
    failed = [os.waitpid(child, 0)[1] for child in children]
    assert job in ("killed", "attempt_0") or not any(failed), f"{job} with {size} processes failed"


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    for argument in sys.argv[2:]:
        job, _, size = argument.partition(":")
        run(job, int(size))
