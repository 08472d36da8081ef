"""Functions of cells, in a module that other processes import quickly."""

import os
import signal
import sys
import time


def square(config):
    return [{"value": config["x"] ** 2 + config["seed"], "part": part} for part in ("a", "b")]


def odd_only(config):
    if config["seed"] == 0:
        raise ValueError("no even seed")
    return square(config)


BORN_WITH = dict(os.environ)


def threads(config):
    return [{"pid": os.getpid(), "omp": BORN_WITH["OMP_NUM_THREADS"]}]


class Wordless(Exception):
    def __str__(self):
        raise ValueError


def bad(config):
    match config["x"]:
        case "segmentation fault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "_exit":
            os._exit(0)
        case "exit":
            sys.exit(0)
        case "long":
            raise ValueError("é" * 2**24)
        case "wordless":
            raise Wordless
        case "hangs":
            time.sleep(600)
    return [{"value": 1}]


def squared(config):
    return [{"value": config["x"] ** 2}]


def fails_once(config):
    if config["x"] == 2 and not os.environ.get("REPAIRED"):
        raise ValueError("not repaired")
    return squared(config)


def devices(config):
    time.sleep(0.1)
    return [{"pid": os.getpid(), "devices": os.environ["CUDA_VISIBLE_DEVICES"]}]
