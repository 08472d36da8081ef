"""Shared set-up of the tests."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker: workers that share cores slow each other tenfold

import pytest
from hypothesis import settings

from tests import ticks
from ufom_runtime.measure import clock

settings.register_profile("ufom", deadline=None, derandomize=True)
settings.load_profile("ufom")


@pytest.fixture(scope="session", autouse=True)
def steady_clock():
    """No test depends on how quick or how busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "took", ticks.seconds)
        yield


def pytest_make_parametrize_id(val, argname):
    """Bytes are named by their argument: an archive holds the time it was made, and every worker makes its own."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_finish():
    """What was imported stays: a collection of garbage need not look at it, and many tests count bytes after one."""
    gc.freeze()


def compile_by(monkeypatch, way=lambda traced, arguments: traced):
    """Let this compile the traces, in inductor's place; as it is given, they run as they were traced."""
    monkeypatch.setattr("ufom_runtime.compiled.trace.by_inductor", way)
