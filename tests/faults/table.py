"""Faults: each a function of an empty folder that injects one and asserts the right answer or one typed error.

A function returns what came of the fault; its docstring says how it was injected. `FAULTS` lists them: append yours.
"""

from tests.faults.common import Fault
from tests.faults.disk import (
    another_cells_file,
    clock_set_back,
    error_in_reading,
    error_in_writing,
    flipped_bit,
    full_disk,
    read_only_folder,
    truncated_file,
)
from tests.faults.processes import (
    dead_rank,
    exiting_process,
    hanging_cell,
    leaving_cell,
    requeued,
    segmentation_fault,
    terminated,
    two_writers,
)
from tests.faults.sources import corrupt_archive, wrong_checksum

FAULTS: list[Fault] = [
    full_disk,
    read_only_folder,
    error_in_writing,
    error_in_reading,
    truncated_file,
    flipped_bit,
    another_cells_file,
    terminated,
    segmentation_fault,
    exiting_process,
    leaving_cell,
    hanging_cell,
    dead_rank,
    requeued,
    two_writers,
    clock_set_back,
    corrupt_archive,
    wrong_checksum,
]
