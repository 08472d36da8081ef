"""The template of "Add a method" runs as it stands, and is short."""

import re
import runpy
from pathlib import Path

from ufom_runtime import METHODS

PAGE = (Path(__file__).parents[1] / "docs" / "add-a-method.md").read_text(encoding="utf-8")


def test_the_template_runs_and_is_right(tmp_path, capsys):
    assert len(PAGE.splitlines()) <= 45
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "block.py").write_text(block)
    try:
        runpy.run_path(str(tmp_path / "block.py"))
        assert METHODS["central-differences"].kind == "biased"
    finally:
        METHODS.pop("central-differences", None)
    said = capsys.readouterr().out
    assert float(re.search(r"error (\S+)", said)[1]) < 1e-7
    assert "as declared True" in said
