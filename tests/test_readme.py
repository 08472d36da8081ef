"""The README's Python blocks run as they stand."""

import re
import runpy
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs_and_prints(block, tmp_path, capsys):
    (tmp_path / "block.py").write_text(block)
    runpy.run_path(str(tmp_path / "block.py"))
    assert re.search(r"q = 0\.\d+, 95 %|gradient_norm", capsys.readouterr().out)
