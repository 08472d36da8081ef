"""`python -m tests.faults --kills 200`: the faults that are injected and what comes of each, as a table."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.kills import kills
from tests.faults.table import FAULTS

WRONG = ("cells lost", "cells run again", "cells duplicated", "damaged files", "tables that differ")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how often a sweep is killed (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--only-kills", action="store_true", help="inject no other fault")
    options = parser.parse_args()
    failed = 0
    for fault in [] if options.only_kills else FAULTS:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = fault(Path(folder))
            except AssertionError as error:
                failed, outcome = failed + 1, f"WRONG: {error}"
        name = fault.__name__.replace("_", " ")
        print(
            f"{name} ({time.perf_counter() - begin:.1f} s)\n  by      {fault.__doc__}\n  outcome {outcome}", flush=True
        )
    found = kills(options.kills, options.seed)
    print("kill -9 of a sweep at random moments")
    for name in dict.fromkeys([*found, *WRONG]):
        print(f"  {found[name]:5d} {name}")
    return int(failed > 0 or any(found[name] for name in WRONG))


if __name__ == "__main__":
    sys.exit(main())
