"""The stored verdicts of the studies that decide claims: `studies` writes them here, so that an installed package has
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ufom_runtime.files import write_whole

FILE = Path(__file__).with_suffix(".json")


def stored_verdicts() -> dict[str, list[dict[str, Any]]]:
    """Study → its verdicts, each with subject, relation, predicted, measured, tolerance and agrees."""
    return json.loads(FILE.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def publish(study: str, verdicts: list[dict[str, Any]]) -> None:
    """Replace the verdicts of a study that decides a claim; those of another one are left where they are."""
    stored = stored_verdicts()
    if study in stored:
        content = json.dumps(stored | {study: verdicts}, indent=1, ensure_ascii=False) + "\n"
        write_whole(FILE, content.encode())
