"""The programs in the pages: the site's build shows what they print."""

import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

FENCED = re.compile(r"^```(\w+)\n(.*?)^```(?:\n```text\n(.*?)^```)?", re.M | re.S)
FILE = re.compile(r"# (\w+\.py)\n")  # a block that begins so is that file
WIDTH = 88
END = "\0"


def fill_in(page: str) -> str:
    """The page with what its programs print now, where the output that it shows leaves parts out by "..."."""
    blocks = [b for b in FENCED.finditer(page) if b[1] == "python"]
    open_ends = [i for i, b in enumerate(blocks) if b[3] and "..." in b[3]]
    if not open_ends:
        return page
    blocks = blocks[: open_ends[-1] + 1]
    parts, end = [], 0
    for block, printed in zip(blocks, printed_by([b[2] for b in blocks]), strict=True):
        if block[3] and "..." in block[3]:
            lines = [textwrap.fill(line, WIDTH) for line in printed.splitlines()]
            parts += [page[end : block.start(3)], "\n".join(lines), "\n"]
            end = block.end(3)
    return "".join([*parts, page[end:]])


def printed_by(blocks: list[str]) -> list[str]:
    """What each block prints, run one after the other in a process and a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        program = ""
        for text in blocks:
            if file := FILE.match(text):
                Path(folder, file[1]).write_text(text, encoding="utf-8")
                text = ""
            program += f"{text}\nprint({END!r}, end='')\n"
        Path(folder, "page.py").write_text(program, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "page.py"],
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return done.stdout.split(END)[:-1]
