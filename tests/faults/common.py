"""What the faults share: a sweep of four cells, what it must come to, and looking at processes."""

import functools
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from studies.engine.sweep import Store
from ufom_theory import UfomError

ROOT = Path(__file__).parents[2]
CELLS = [{"study": "faults", "x": x} for x in range(4)]
Fault = Callable[[Path], str]


def rows(config):
    return [{"value": config["x"] ** 2, "part": part, "text": "x" * 400} for part in range(20)]


def table(store: Store) -> str:
    return store.table(CELLS).to_csv()


@functools.cache
def expected() -> str:
    """The table of a sweep that nothing disturbed."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Store(folder).run(CELLS, rows)
        return table(Store(folder))


def recovers(store: Store, ran: int | None = None) -> None:
    """Run the sweep again, now undisturbed: its table is the one of a sweep that never was disturbed."""
    outcome = Store(store.folder).run(CELLS, rows, retry=True)
    assert ran is None or outcome.ran == ran, outcome
    assert table(store) == expected()


def refused(call: Callable[[], object], *words: str) -> str:
    """The one line of the `UfomError` that the call must raise, without the names of temporary folders."""
    try:
        call()
    except UfomError as error:
        said = str(error)
        assert all(word in said for word in words), said
        return f"UfomError: {words[0]}"
    raise AssertionError(f"no error that says {words}")


def warned(store: Store) -> bool:
    """Whether reading the first cell warns that its file is damaged, and moves it aside."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = store.load(CELLS[0])
    if not said:
        return False
    assert found is None
    assert f"{store.path(CELLS[0])} is damaged" in str(said[0].message)
    assert not store.path(CELLS[0]).exists()
    return True


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Of a process's main thread and the others."""
    found = ""
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += " " + (task / "children").read_text()
    return [int(child) for child in found.split()]


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
