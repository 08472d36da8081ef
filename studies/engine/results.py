"""A study's results: its table, and beside it what was run, the verdicts, the figure and its caption.

`results/NAME-SIZE.csv` holds the table and `.json` the configuration, how it was run, and the table's digest. All files
are written whole or not at all; the JSON is written last, so that a table without it, or beside another's, is seen.
"""

from __future__ import annotations

import io
import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from studies.shared.verdicts import Verdict
from ufom_runtime.command.plain import json_text
from ufom_runtime.command.verdicts import publish
from ufom_runtime.files import DamagedFile, digest, read_whole, write_whole
from ufom_theory import UfomError

if TYPE_CHECKING:
    from studies.engine.study import Config, Study

_MOST_BYTES = 2**28


@dataclass(frozen=True)
class Results:
    """The files of one study at one size.

    Attributes:
        path: of the table, under results/; the figures are under figures/ in the same way.
    """

    path: Path

    @property
    def figures(self) -> Path:
        """The figure's folder."""
        parts = list(self.path.parent.parts)
        parts[len(parts) - 1 - parts[::-1].index("results")] = "figures"
        return Path(*parts)

    def write(self, table: pd.DataFrame, config: Any, seconds: float) -> None:
        """Write the table, and then what it is of and the seconds that it took, of resumed runs in all.

        Errors as `write_whole`.
        """
        content = table.to_csv(index=False).encode()
        device = _device(getattr(config, "device", "cpu"))
        run = {"seconds": round(seconds, 1), "date": time.strftime("%Y-%m-%d"), "device": device,
               "machine": platform.machine(), "processor": _processor(), "cores": os.cpu_count()}  # fmt: skip
        versions = {"python": platform.python_version()} | {n: version(n) for n in ("numpy", "pandas", "torch")}
        record = {"config": asdict(config), **run, "versions": versions, "table_sha256": digest(content)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, content)
        write_whole(self.path.with_suffix(".json"), as_json(record))

    def run(self) -> dict[str, Any]:
        """What the JSON file says.

        Raises:
            MissingFile: the study was not run.
            DamagedFile: a file that is not such a record.
        """
        path = self.path.with_suffix(".json")
        content = read_whole(path, _MOST_BYTES)
        try:
            record = json.loads(content)
            if isinstance(record["config"], dict) and isinstance(record["table_sha256"], str):
                return record  # type: ignore[no-any-return]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise DamagedFile(f"{path} is damaged: it holds no configuration with a table's digest; run the study again")

    def read(self, study: Study[Config]) -> tuple[pd.DataFrame, Config]:
        """The table and its configuration.

        Raises:
            MissingFile: the study was not run.
            DamagedFile: the table is not the one that the JSON file is of.
            UfomError: the configuration is of another version of the study.
        """
        from studies.engine.configuration import build  # dacite is not needed to measure

        record = self.run()
        content = read_whole(self.path, _MOST_BYTES)
        if digest(content) != record["table_sha256"]:
            raise DamagedFile(
                f"{self.path} is damaged: its content is not what {self.path.stem}.json says; run the study again"
            )
        return pd.read_csv(io.BytesIO(content)), build(type(study.sizes["quick"]), record["config"])

    def refuse_another(self, config: Any) -> None:
        """Raise a `UfomError` where these are the results of another configuration of the same name."""
        if self.path.exists() and self.run()["config"] != json.loads(as_json(asdict(config))):
            raise UfomError(f"{self.path} is of another configuration: give the file another name, or remove the table")

    def verdicts(self) -> list[dict[str, Any]]:
        """The stored verdicts."""
        return json.loads(read_whole(self.path.with_suffix(".verdicts.json"), _MOST_BYTES))  # type: ignore[no-any-return]

    def write_verdicts(self, verdicts: list[Verdict]) -> None:
        """Write them, the repository's own into the package too, where they decide a claim; errors as `write_whole`."""
        write_whole(self.path.with_suffix(".verdicts.json"), as_json([asdict(v) for v in verdicts]))
        if self.path.resolve().parent == Path(__file__).resolve().parents[1] / "results":
            publish(self.path.stem, self.verdicts())

    def draw(self, study: Study[Config], table: pd.DataFrame, config: Config) -> Path:
        """The figure in all formats and its caption; the PNG's path. Errors as `write_whole`."""
        from matplotlib import rc_context

        from ufom_runtime.command.style import SHEET

        self.figures.mkdir(parents=True, exist_ok=True)
        undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
        with rc_context(SHEET):  # with its hash salt the same table draws the same bytes
            figure = study.draw(table, config)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # its solver's last digits differ from run to run
            for axes in figure.axes:
                left, bottom, width, height = (round(x, 6) for x in axes.get_position().bounds)
                axes.set_position((left, bottom, width, height))
            for kind, metadata in undated.items():
                content = io.BytesIO()
                figure.savefig(content, format=kind, metadata=metadata)
                write_whole(self.figures / f"{self.path.stem}.{kind}", content.getvalue())
        write_whole(self.figures / f"{self.path.stem}.txt", (study.caption(table, config) + "\n").encode())
        return self.figures / f"{self.path.stem}.png"


def as_json(value: Any) -> bytes:
    """JSON, null for nan and ±inf, which it does not have."""
    return (json_text(value, indent=1) + "\n").encode()


def _device(name: str) -> str:
    """The GPU's own name, where that is the device."""
    if not name.startswith("cuda"):
        return name
    import torch

    return torch.cuda.get_device_name(name)


def _processor() -> str:
    """Its name; platform.processor() is empty on Linux."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()
