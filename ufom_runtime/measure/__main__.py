"""`ufom measure` by one process or several: `torchrun --standalone --nproc-per-node W -m ufom_runtime.measure PROBLEM`.

The tasks are cut into chunks that do not depend on W, process k runs chunks k, k + W, …, each on one thread, and what
they give is summed in the order of the tasks: on CPUs of one kind the moments are the same for every W, to the last
bit. `python -m ufom_runtime.measure` is the case of one process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from ufom_runtime.command import cli
from ufom_runtime.training.processes import join


def main() -> None:
    """Entry point: the arguments, errors and exit statuses of `ufom measure`; process 0 alone prints."""
    prints = os.environ.get("RANK", "0") == "0"
    if "RANK" in os.environ and hasattr(signal, "sigwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_stop, args=(prints,), daemon=True).start()
    cli.main(["measure", *sys.argv[1:]], join, prints)


def _stop(prints: bool) -> None:
    """Ends this process when torchrun says so, also where it waits for another: a handler would not be run there."""
    signal.sigwait({signal.SIGTERM})
    if prints:
        print("ufom: stopped: another process died, or the job was cancelled", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
