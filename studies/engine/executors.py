"""Where the cells of a sweep run: here, in processes beside this one, or as an array of SLURM jobs.

Whoever runs cells is given their ids, reads what they are from the store, and writes there what came of them: no data
travels, and nothing that another process wrote is unpickled (submitit pickles the names of what a job calls).
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, Protocol

from studies.engine.cell import run_cells
from ufom_theory import UfomError
from ufom_theory.checks import integer

_SECONDS, _PATIENCE = 60, 3600  # for an answer of SLURM's, and without one


class Executor(Protocol):
    """Runs the cells of a store."""

    def each(self, folder: Path, function: str, ids: list[str]) -> Generator[str, None, None]:
        """Run cells, and give the id of each once it is done or failed. Closed, it ends those that still run.

        Args:
            folder: the store, where the cells are wanted.
            function: `module:function`.
            ids: of the cells.

        Raises:
            UfomError: the store cannot be written, or whoever ran the cells ended without them.
        """


@dataclass(frozen=True)
class Local:
    """New processes of one thread each; a process that is free takes the next cell.

    Attributes:
        jobs: processes.
        gpus: of each process, which sees no others, taken in turn from CUDA_VISIBLE_DEVICES or numbered from 0; 0:
            every process sees them all.
    """

    jobs: int
    gpus: int = 0

    def each(self, folder: Path, function: str, ids: list[str]) -> Generator[str, None, None]:
        """See `Executor`."""
        others, context = set(multiprocessing.active_children()), multiprocessing.get_context("spawn")
        devices, needed = context.SimpleQueue(), self.jobs * self.gpus
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(needed))))
        names = [name for name in visible.split(",") if name]
        if len(names) < needed:
            raise UfomError(f"{needed} GPUs are needed and CUDA_VISIBLE_DEVICES={visible}: take fewer jobs or GPUs")
        for first in range(0, needed, self.gpus or 1):
            devices.put(",".join(names[first : first + self.gpus]))
        pool = ProcessPoolExecutor(min(self.jobs, len(ids)), context, _begin, (devices if self.gpus else None,))
        try:
            with _one_thread():  # the processes start with the first cell, and inherit this
                futures = {pool.submit(run_cells, str(folder), function, id): id for id in ids}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as error:
            raise UfomError(
                "a process of the sweep died (out of memory?): what is done is kept; run again, with fewer jobs"
            ) from error
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # only a whole cell has a file
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(devices: SimpleQueue[str] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()


def _end_with_parent() -> None:
    """The pool's processes would wait for ever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@dataclass(frozen=True)
class Slurm:
    """An array of SLURM jobs among which the cells are split; preempted or out of time, a job goes back to the queue.

    Whatever else sbatch is to be told, such as an account, it takes from the environment (SBATCH_ACCOUNT).

    Attributes:
        jobs: of the array.
        partition: where they run; None: the cluster's default.
        minutes: a job may take. One that ran out of time oftener than it has cells goes back no more.
        gpus: of each job.
    """

    jobs: int
    partition: str | None = None
    minutes: int = 60
    gpus: int = 0

    def each(self, folder: Path, function: str, ids: list[str]) -> Generator[str, None, None]:
        """See `Executor`."""
        name, left, wait, active = f"{folder.resolve().name}-{secrets.token_hex(4)}", set(ids), 0.5, True
        try:
            array, logs = self._submit(folder.resolve(), name, function, ids)
            heard = time.monotonic()
            while active:
                time.sleep(wait := min(10.0, 1.2 * wait))
                answer = _active(array)  # before the look at the store, which is then the last
                if answer is not None:
                    heard, active = time.monotonic(), answer
                elif time.monotonic() - heard > _PATIENCE:
                    raise UfomError(
                        f"squeue has not answered for {_PATIENCE / 60:g} min: scancel {array}, which may still run; "
                        "what is done is kept; run again"
                    )
                with suppress(OSError):
                    folder.chmod(folder.stat().st_mode)  # makes NFS look again
                names = _names(folder)
                for id in [i for i in ids if i in left and _settled(i, names)]:
                    left.remove(id)
                    yield id
        except BaseException:
            with suppress(OSError, subprocess.TimeoutExpired):  # by name: their number may not be known yet
                subprocess.run(["scancel", f"--name={name}"], check=False, timeout=_SECONDS)
            raise
        if left:
            raise UfomError(
                f"{len(left)} cells were not run: their jobs ended early (out of memory or time?), the last words: "
                f"{_last_words(logs)!r}; what is done is kept, all logs are in {logs}; run again"
            )
        shutil.rmtree(logs)

    def _submit(self, folder: Path, name: str, function: str, ids: list[str]) -> tuple[str, Path]:
        """The number of the array, and where its logs are."""
        try:
            import submitit
        except ModuleNotFoundError as error:
            raise UfomError("SLURM needs submitit: pip install 'ufom[cluster]', or take --executor local") from error
        if shutil.which("sbatch") is None:
            raise UfomError("sbatch is missing: run this where SLURM is, or take --executor local")
        ids = sorted(ids)  # as good as shuffled: neighbours in a sweep are alike, and may all be long
        shares = [ids[k :: self.jobs] for k in range(min(self.jobs, len(ids)))]
        logs = Path(tempfile.mkdtemp(prefix="jobs-", dir=folder))
        executor = submitit.SlurmExecutor(logs, max_num_timeout=len(shares[0]))
        executor.update_parameters(
            job_name=name, partition=self.partition, time=self.minutes, gpus_per_node=self.gpus or None,
            setup=["export OMP_NUM_THREADS=1"], additional_parameters={"requeue": True},
        )  # fmt: skip
        names = zip(*((str(folder), function, " ".join(share)) for share in shares), strict=True)
        try:
            jobs = executor.map_array(Share(), *names)
        except submitit.core.utils.FailedJobError as error:
            shutil.rmtree(logs)
            raise UfomError(f"SLURM refuses the jobs: {error}") from error
        return str(jobs[0].job_id).partition("_")[0], logs


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise UfomError(
            f"{folder} cannot be read: {error.strerror}; the jobs are cancelled: mend that and run again"
        ) from error


class Share:
    """What a job calls, with names only; submitit calls `checkpoint` where the job is preempted or out of time."""

    def __call__(self, folder: str, function: str, ids: str) -> None:
        """Run the cells that are still wanted."""
        run_cells(folder, function, ids)

    def checkpoint(self, *names: str) -> Any:
        """The same again: what is done is in the store."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *names)


def _active(array: str) -> bool | None:
    """Whether any of its jobs waits or runs; None where there is no answer, as of a busy controller."""
    command = ["squeue", "--noheader", f"--jobs={array}", "--format=%i"]
    try:
        found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if found.returncode == 0:
        return bool(found.stdout.strip())
    return False if "Invalid job id" in found.stderr else None


def _settled(id: str, names: set[str]) -> bool:
    return f"{id}.json" in names or (f"{id}.failed.json" in names and f"{id}.wanted.json" not in names)


def _last_words(logs: Path) -> str:
    files = sorted(logs.glob("*.err"), key=lambda path: path.stat().st_mtime)
    return " / ".join(files[-1].read_text(errors="replace").splitlines()[-3:]) if files else "none"


def executor(
    kind: str | None, jobs: int | None, partition: str | None, minutes: int | None, gpus: int | None
) -> Executor | None:
    """What the options say; None: the study runs its cells here, or in as many processes as it says itself.

    Raises:
        UfomError: another kind, numbers out of range, or an option that this kind does not have.
    """
    given = {"--jobs": jobs, "--gpus-per-job": gpus, "--partition": partition, "--time": minutes}
    known = {None: (), "local": ("--jobs", "--gpus-per-job"), "slurm": tuple(given)}
    if kind not in known:
        raise UfomError(f"executor {kind!r} is unknown: use local or slurm")
    for option, value in given.items():
        if value is not None and option not in known[kind]:
            kinds = " or ".join(str(k) for k, options in known.items() if option in options)
            raise UfomError(f"{option} goes with --executor {kinds}")
    jobs, gpus = integer("--jobs", 2 if jobs is None else jobs, 1), integer("--gpus-per-job", gpus or 0, 0)
    if kind == "slurm":  # SLURM sends its signal 90 s before the end, and up to a minute sooner
        return Slurm(jobs, partition, integer("--time", 60 if minutes is None else minutes, 5), gpus)
    return Local(jobs, gpus) if kind == "local" else None
