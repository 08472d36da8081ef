"""Shared set-up of the tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker: workers that share cores slow each other tenfold

from hypothesis import settings

settings.register_profile("ufom", deadline=None, derandomize=True)
settings.load_profile("ufom")


def pytest_make_parametrize_id(val, argname):
    """Bytes are named by their argument: an archive holds the time it was made, and every worker makes its own."""
    return argname if isinstance(val, bytes) else None
