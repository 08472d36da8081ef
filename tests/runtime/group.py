"""Runs jobs in groups of processes: `python group.py FOLDER JOB:SIZE …`, each giving FOLDER/JOB-SIZE-RANK.json.

The processes are forked, so that torch is imported once; their environment is the one that torchrun makes. Size 0
is this process, without a group.
"""

import contextlib
import json
import os
import socket
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from ufom_runtime import moments_by_proxy
from ufom_runtime.measure import __main__ as measure
from ufom_runtime.problems.few_shot import digits_few_shot
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.training import processes
from ufom_theory import Truncated, UfomError

PROXIES = (Truncated(0), Truncated(1))


def problems():
    """Name, problem, θ and tasks (None: a finite Ω)."""
    few_shot = digits_few_shot(filters=2, r=2, dtype=torch.float64)
    plain = quadratic(dim=4, r=3)
    rng = torch.Generator().manual_seed(0)
    yield "few-shot", few_shot, few_shot.initial, few_shot.sample(11, rng)
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
            shared = partial(group.map, thetas)
            found = moments_by_proxy(problem, thetas, tasks, PROXIES, chunk=2, each=shared)
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
            for found in group.map(torch.zeros(1, dtype=torch.float64), function, torch.arange(7)[:, None].unbind()):
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
            return [len(found) for found in group.map(torch.zeros(1).double(), function, torch.ones(2, 1).unbind())]
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
    assert not any(os.waitpid(child, 0)[1] for child in children), f"{job} with {size} processes failed"


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    for argument in sys.argv[2:]:
        job, _, size = argument.partition(":")
        run(job, int(size))
