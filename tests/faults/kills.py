"""kill -9 at random moments of a sweep: no cell is lost or run again once it is done, and the table is the same.

A sweep of eight cells is begun and killed, begun again and killed again, until it ends by itself; then the next. Nine
tenths of the kills hit a sweep in its own process, the others one with two more processes: it or one of its children.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from studies.engine.local import Local
from studies.engine.sweep import Store
from tests.faults.common import alive, children, until

CELLS = [{"study": "kills", "x": x} for x in range(8)]


def work(config):
    with open(os.environ["BEGUN"], "a") as stream:
        stream.write(f"{config['x']}\n")
    end, value = time.perf_counter() + 0.01, 0.0
    while time.perf_counter() < end:
        value += 1e-3
    return [{"value": (config["x"] + part) / 7, "part": part} for part in range(100)]


def begin(folder: Path, jobs: int) -> int:
    """Fork a process that runs the sweep; its exit status is 2 if a cell failed, as where a child was killed."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        outcome = Store(folder, Local(jobs) if jobs > 1 else None).run(CELLS, work, retry=True)
        status = 2 if outcome.failed else 0
    finally:
        os._exit(status)


def kill(count: int, seed: int, jobs: int) -> Counter[str]:
    """Kill `count` times; what was found, by name."""
    found, moments = Counter[str](), random.Random(seed)
    with tempfile.TemporaryDirectory() as top:
        os.environ["BEGUN"] = str(Path(top) / "begun")
        start = time.monotonic()
        assert os.waitpid(begin(Path(top) / "undisturbed", jobs), 0)[1] == 0
        longest = time.monotonic() - start
        expected = Store(Path(top) / "undisturbed").everything().to_csv()
        while found["kills"] < count:
            folder, done, ended = Path(top) / f"{found['sweeps']}", {}, False
            found["sweeps"] += 1
            while not ended:
                Path(os.environ["BEGUN"]).write_text("")
                pid = begin(folder, jobs)
                time.sleep(moments.uniform(0, longest))
                processes = [pid, *(children(pid) if alive(pid) else [])]
                victim = moments.choice(processes)
                if found["kills"] < count and alive(victim):
                    os.kill(victim, signal.SIGKILL)
                    found["kills"] += 1
                    found["kills of a process of the sweep's"] += victim != pid
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                assert status in (0, 2, -signal.SIGKILL), status
                ended = status == 0
                until(lambda processes=processes: not any(alive(p) for p in processes))
                begun = set(Path(os.environ["BEGUN"]).read_text().split())
                store = Store(folder)
                now = {p.name: p.read_bytes() for p in folder.glob("*.json") if p.name.count(".") == 1}
                found["cells lost"] += sum(now.get(name) != content for name, content in done.items())
                names = {str(c["x"]): store.path(c).name for c in CELLS}
                found["cells run again"] += sum(names[x] in done for x in begun)
                found["damaged files"] += list(store.states().values()).count("damaged")
                done = now
            found["kills while a file was written"] += len(list(folder.glob(".*.tmp")))
            found["cells duplicated"] += len(done) - len(CELLS)
            found["tables that differ"] += store.everything().to_csv() != expected
    return found


def kills(count: int, seed: int = 0) -> Counter[str]:
    """Nine tenths of them of a sweep in its own process."""
    beside = count // 10
    return kill(count - beside, seed, jobs=1) + kill(beside, seed + 1, jobs=2)
