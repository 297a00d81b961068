"""Reading a JSON file of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: FileNotFoundError if the file is missing; ValueError naming the file if it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; expected a folder in Hugging Face layout")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:  # not UTF-8, not JSON, a number or nesting too long for Python
        raise ValueError(f"{path} is not valid JSON: {err}; if it was downloaded, download it again") from err
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
