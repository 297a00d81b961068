"""Files that users name: read or written, or refused with a clear message."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any


def file_to_read(path: Path, expected: str) -> Path:
    """Return the path of a file or pipe. Raises: FileNotFoundError, naming what was expected, for anything else."""
    if path.is_dir() or not path.exists():
        raise FileNotFoundError(f"{path} {'is a folder' if path.is_dir() else 'not found'}; expected {expected}")
    return path


def read_text(path: Path, expected: str) -> str:
    """Return the text of a file. Raises: as `file_to_read`; ValueError if it is not UTF-8."""
    try:
        return file_to_read(path, expected).read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise ValueError(f"{path} is not text in UTF-8: {err}") from err


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint.

    Raises: FileNotFoundError if the file is missing; ValueError naming the file if it is not a JSON object.
    """
    text = file_to_read(path, "a folder in Hugging Face layout").read_bytes()
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as err:  # not UTF-8, not JSON, a number or nesting too long for Python
        raise ValueError(f"{path} is not valid JSON: {err}; if it was downloaded, download it again") from err
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if there is no file. Raises: ValueError, as `read_json`."""
    return read_json(path) if path.is_file() else {}


def file_to_write(path: Path) -> Path:
    """Return the path of a file, whose folder is created if need be.

    Raises: FileExistsError if it is a folder, or a file stands in the place of its folder.
    """
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; expected the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as err:
        raise FileExistsError(f"{path.parent} is not a folder, so {path.name} cannot be written there") from err
    return path


def folder_to_write(path: Path) -> Path:
    """Return the path of a folder that files can be written to. Folders above it are created if need be.

    Raises: FileExistsError if it is a file; OSError if nothing can be written there.
    """
    if path.is_file():
        raise FileExistsError(f"{path} is a file; expected the name of a folder to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path.parent, path):
            if folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder):
                    pass
    except OSError as err:
        raise OSError(f"{path} cannot be written: {err.strerror} ({err.filename})") from err
    return path
