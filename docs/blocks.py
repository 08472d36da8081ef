"""The programs in the pages: the site's build shows what they print, and the tests hold it to what the page says."""

import contextlib
import io
import re
import runpy
import sys
import tempfile
import textwrap
from pathlib import Path

FENCED = re.compile(r"^```(\w+)\n(.*?)^```(?:\n```text\n(.*?)^```)?", re.M | re.S)
WIDTH = 88


def run(text: str, names: dict[str, object]) -> tuple[str, dict[str, object]]:
    """What a block prints, run in this folder with the names of the blocks before it, and the names after it.

    A block that begins with "# mine.py" is that file, and is written instead.
    """
    if file := re.match(r"# (\w+\.py)\n", text):
        Path(file[1]).write_text(text, encoding="utf-8")
        return "", names
    Path("block.py").write_text(text, encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = runpy.run_path("block.py", names)
    return printed.getvalue(), names


def fill_in(page: str) -> str:
    """The page with what its programs print now, where the output that it shows leaves parts out by "..."."""
    blocks = list(FENCED.finditer(page))
    open_ends = [i for i, b in enumerate(blocks) if b[3] and "..." in b[3]]
    if not open_ends:
        return page
    parts, names, end = [], dict[str, object](), 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        sys.path.insert(0, folder)
        for block in blocks[: open_ends[-1] + 1]:
            if block[1] != "python":
                continue
            printed, names = run(block[2], names)
            if block[3] and "..." in block[3]:
                lines = [textwrap.fill(line, WIDTH) for line in printed.splitlines()]
                parts += [page[end : block.start(3)], "\n".join(lines), "\n"]
                end = block.end(3)
        sys.path.remove(folder)
        for file in Path(folder).glob("*.py"):  # the next page's mine.py is another
            sys.modules.pop(file.stem, None)
    return "".join([*parts, page[end:]])
