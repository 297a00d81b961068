"""Conversion of arguments to plain JSON values of valid Unicode. Every error names the place of the value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3fast.checks import SURROGATE, checked_text


def replace_surrogates(value: Any) -> Any:
    """Return JSON values with lone surrogates in texts and keys replaced by U+FFFD, and pairs joined."""
    if isinstance(value, str):
        if value.isascii() or not SURROGATE.search(value):
            return value
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {replace_surrogates(key): replace_surrogates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [replace_surrogates(item) for item in value]
    return value


def to_plain(value: Any, place: str) -> Any:
    """Return a copy made of None, bool, int, float, str, list and dict alone.

    NumPy scalars, enumerations of strings, dataclasses and objects with `model_dump()` (pydantic) are converted.
    place: names the value in errors, such as "messages[2]".
    Raises: ValueError for other types, text that is not valid Unicode, and values that are nested too deeply.
    """
    try:
        return _to_plain(value, place)
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply, or holds itself") from None


def _to_plain(value: Any, place: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # also a subclass, which may have methods that a template must not call
        return checked_text(place, str.__str__(value))
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, np.generic):
        return _to_plain(value.item(), place)
    if isinstance(value, Mapping):
        return {_to_plain(key, f"a key of {place}"): _to_plain(x, f"{place}[{key!r:.80}]") for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item, f"{place}[{number}]") for number, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {x.name: _to_plain(getattr(value, x.name), f"{place}.{x.name}") for x in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)) and not isinstance(value, type):
        return _to_plain(value.model_dump(), place)
    hint = "; decode it first" if isinstance(value, bytes | bytearray) else ""
    raise ValueError(f"{place} must be text, a number, a list or a dict, got {type(value).__name__}{hint}")
