"""Shared set-up of the tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker: workers that share cores slow each other tenfold

from hypothesis import settings

settings.register_profile("ufom", deadline=None, derandomize=True)
settings.load_profile("ufom")
