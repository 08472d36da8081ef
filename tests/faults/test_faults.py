"""Every fault of the table, and 10 kills: the right answer or one typed error, never silence."""

import subprocess
import sys

import pytest

from tests.faults.common import ROOT
from tests.faults.table import FAULTS
from tests.grids import slow_unless

# of these test_sweep and test_distributed look at smaller ones in a quick run
SLOW = {"dead_rank", "two_writers", "segmentation_fault", "exiting_process", "leaving_cell", "hanging_cell"}


@pytest.mark.parametrize(
    "fault", slow_unless(lambda fault: fault.__name__ not in SLOW, FAULTS), ids=lambda fault: fault.__name__
)
def test_a_fault_gives_the_right_answer_or_one_typed_error(fault, tmp_path):
    assert fault(tmp_path)


def test_ten_kills_lose_and_repeat_nothing():
    command = [sys.executable, "-m", "tests.faults", "--only-kills", "--kills", "10"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    counts = {name: int(n) for n, name in (line.split(maxsplit=1) for line in found.stdout.splitlines()[1:])}
    assert counts["kills"] == 10
    assert all(
        counts[name] == 0 for name in ("cells lost", "cells run again", "cells duplicated", "tables that differ")
    )
