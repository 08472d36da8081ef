"""Print the proofs, each step decided as it is shown: `python -m ufom_theory.derivations [NAME ...]`.

`--pages FOLDER` writes them as the pages of the documentation instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ufom_theory.checks import UfomError
from ufom_theory.derivations.registry import MODULES
from ufom_theory.derivations.report import page, text

if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--pages"]:
            for module in MODULES:
                (Path(sys.argv[2]) / f"{module}.md").write_text(page(module), encoding="utf-8")
        else:
            for module in sys.argv[1:] or MODULES:
                print(text(module))
    except UfomError as error:
        sys.exit(f"error: {error}")
