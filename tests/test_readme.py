"""The README's Python blocks run as they stand."""

import re
import runpy
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs_and_prints(block, tmp_path, capsys):
    (tmp_path / "block.py").write_text(block)
    runpy.run_path(str(tmp_path / "block.py"))
    assert re.search(r"q = 0\.\d+, 95 %|gradient_norm|first-order: |a call takes", capsys.readouterr().out)


def test_nothing_is_left_to_fill_in_and_every_link_exists():
    assert "@@" not in README
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(targets) >= 3
    assert all((Path(__file__).parents[1] / target).exists() for target in targets)
