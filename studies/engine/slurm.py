"""Cells as an array of SLURM jobs, by submitit: it pickles the names of what a job calls, and no data.

Nothing that a job wrote is unpickled: what came of a cell is read from the store.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.engine.local import Local
from ufom_theory import UfomError

_SECONDS, _PATIENCE = 60, 3600  # for an answer of SLURM's, and without one
_MARGIN = 180  # SLURM sends its signal 90 s before a job's end, and up to a minute sooner


@dataclass(frozen=True)
class Slurm:
    """An array of SLURM jobs among which the cells are split; preempted or out of time, a job goes back to the queue.

    Whatever else sbatch is to be told, such as an account, it takes from the environment (SBATCH_ACCOUNT).

    Attributes:
        jobs: of the array.
        partition: where they run; None: the cluster's default.
        minutes: a job may take. One that ran out of time more often than it has cells is not queued again.
        gpus: of each job.

    A cell that takes nearly as long as a job may is ended and recorded as failed: it would never be done.
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
            raise UfomError(
                "SLURM needs submitit: pip install '.[cluster]' from the checkout, or take --executor local"
            ) from error
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
            jobs = executor.map_array(Share(60 * self.minutes - _MARGIN), *names)
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


@dataclass(frozen=True)
class Share:
    """What a job calls, with names only; submitit calls `checkpoint` where the job is preempted or out of time.

    Attributes:
        seconds: a cell may take.
    """

    seconds: float

    def __call__(self, folder: str, function: str, ids: str) -> None:
        """Run the cells that are still wanted, beside this process: a cell that ends its own ends no other's."""
        for _ in Local(1, seconds=self.seconds).each(Path(folder), function, ids.split()):
            pass

    def checkpoint(self, *names: str) -> Any:
        """The same again: what is done is in the store."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *names)


def _active(array: str) -> bool | None:
    """Whether any of its jobs waits or runs; None without an answer, as from a busy controller."""
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
