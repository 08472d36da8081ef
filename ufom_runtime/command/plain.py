"""Plain text for other programs."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON without NaN and ±inf, which it does not know: null stands for them."""

    def known(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: known(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [known(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(known(value), ensure_ascii=False, indent=indent, allow_nan=False)
