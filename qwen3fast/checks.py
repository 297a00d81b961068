"""Checks of arguments that applications pass. Each returns the value in one type, or raises ValueError."""

from __future__ import annotations

import operator
import os
import re
import threading
from numbers import Real
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")
VARIABLES = {  # of the environment: the allowed values, the default first
    "QWEN3FAST_FORMS": ("measured", "first"),
    "QWEN3FAST_CALIBRATE": ("1", "0"),
    "QWEN3FAST_HUGE_PAGES": ("1", "0"),
    "QWEN3FAST_INTERLEAVE": ("1", "0"),
    "QWEN3FAST_FUSED_STEP": ("1", "0"),
    "QWEN3FAST_PDL": ("1", "0"),
}


def checked_integer(name: str, value: Any, low: int, high: int, note: str = "") -> int:
    """Return an integer from `low` to `high` as an int; NumPy's integers and tensors of one integer are accepted.

    note: the meaning of the upper bound, for the message.
    Raises: ValueError naming the argument, the range and the value.
    """
    number = as_integer(value)
    if number is None or not low <= number <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}{note}, got {value!r:.200}")
    return number


def as_integer(value: Any) -> int | None:
    """Return an integer value as an int; None for any other value, booleans included."""
    if type(value) is int:
        return value
    is_boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    if is_boolean or getattr(value, "ndim", 0) != 0:  # a tensor of one element in a dimension is a list, not a number
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def checked_flag(name: str, value: Any, also: str = "") -> bool:
    """Return a bool of Python or NumPy as a bool. also: another value that the caller accepts, for the message.

    Raises: ValueError for any other value: "no" and [0] would silently count as true.
    """
    if isinstance(value, bool):
        return value
    if str(getattr(value, "dtype", "")) == "bool" and getattr(value, "shape", None) == ():
        return bool(value)
    allowed = f"True, False or {also}" if also else "True or False"
    raise ValueError(f"{name} must be {allowed}, got {value!r:.200}")


def checked_timeout(name: str, value: Any) -> float | None:
    """Return a timeout in seconds; None, also for times beyond the clock's range, waits without limit.

    Raises: ValueError unless the value is None or a number of at least 0.
    """
    if value is None:
        return None
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not value >= 0:  # NaN is not
        raise ValueError(f"{name} must be a number of seconds >= 0, or None, got {value!r:.200}")
    return float(value) if value < threading.TIMEOUT_MAX else None


def checked_text(name: str, text: Any) -> str:
    """Return a string that UTF-8 can encode.

    Raises: ValueError for other types, and for a lone surrogate, naming its position.
    """
    if not isinstance(text, str):
        hint = "; decode it first, as in data.decode('utf-8')" if isinstance(text, bytes | bytearray) else ""
        raise ValueError(f"{name} must be a string, got {type(text).__name__}{hint}")
    found = None if text.isascii() else SURROGATE.search(text)
    if found is not None:
        raise ValueError(
            f"{name} holds the lone surrogate {found.group()!a} at character {found.start()}, which UTF-8 cannot encode"
            "; text.encode('utf-8', 'replace').decode() replaces such characters"
        )
    return text


def checked_source(
    source: Any, quantization: Any = None, revision: Any = None, adapter: Any = None, check_weights: Any = False
) -> None:
    """Check the types of the arguments that name a checkpoint and how to load it.

    Raises: ValueError for a source or adapter that is not a path, a quantization or revision that is not a string, or
    a check_weights that is not a bool.
    """
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"source must be a hub id or a path, got {type(source).__name__}")
    if adapter is not None and not isinstance(adapter, str | os.PathLike):
        raise ValueError(f"adapter must be a path, or None, got {type(adapter).__name__}")
    for name, value in (("quantization", quantization), ("revision", revision)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be a string, or None, got {value!r:.200}")
    checked_flag("check_weights", check_weights)


def checked_option(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return one of the allowed strings.

    Raises: ValueError naming them for anything else.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r:.200}")
    return value


def checked_variable(name: str) -> str:
    """Return the value of an environment variable of VARIABLES, its default if it is unset or empty.

    Raises: ValueError naming the variable, the allowed values and the value.
    """
    allowed = VARIABLES[name]
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, or unset, got {value!r:.200}")
    return value


def num_processes() -> int:
    """Return the number of processes that torchrun has started, or 1. Raises: ValueError for a bad WORLD_SIZE."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(
            f"the environment's WORLD_SIZE must be a number of processes, as torchrun sets it, got {size!r}"
        )
    return int(size)
