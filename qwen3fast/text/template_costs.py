"""Upper bounds on the cost of a chat template's operations, computed from their input before they run.

A cost is an integer of characters or items. Anything that is not named here makes no more than it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# Methods of texts that can make a large value of any input and that no template needs.
ALWAYS_LARGE = frozenset({"encode", "expandtabs", "maketrans", "translate"})

# Filters that look at a value's items but never into them: their input need not be counted again.
SHALLOW_FILTERS = frozenset(
    "attr batch count d default first items last length list map".split()
    + "reject rejectattr reverse select selectattr slice".split()
)

# Methods of texts and filters that can repeat or widen a value, by a number or by the length of a text.
_REPEATING = frozenset({"batch", "center", "indent", "join", "ljust", "rjust", "slice", "zfill"})

_TOO_LARGE = 2**63  # more than any budget
_WIDTH = re.compile(r"\d{5,}|\*|\{[^{}]*\{")  # a width of five digits, or one that an argument gives

Size = Callable[[Any], int]


def operator_cost(operator: str, left: Any, right: Any, size: Size) -> int:
    """Return the cost of `left operator right`, for +, *, ** and %; `size` charges and counts a container."""
    if operator == "%" and isinstance(left, str):
        return _format_cost(left, size(right))
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return 1 if left.bit_length() * abs(right) <= 4096 else _TOO_LARGE
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                return max(0, times) * size(sequence) + 1
    if operator == "+":
        has_length = isinstance(left, str | list | tuple | dict)
        return (len(left) if has_length else 1) + (len(right) if isinstance(right, str) else size(right))
    return 1


def method_cost(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: Size) -> int:
    """Return the cost of calling a function or bound method of a template."""
    bound = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
    text, name = getattr(bound, "__self__", None), getattr(bound, "__name__", "")
    if not isinstance(text, str):
        return 1
    if name == "join":  # as the filter
        return filter_cost(name, None, [text], {}, size(list(args)), size)
    return max(len(text), filter_cost(name, text, list(args), kwargs, len(text) + 1, size))


def filter_cost(name: str, value: Any, args: list[Any], kwargs: dict[str, Any], value_size: int, size: Size) -> int:
    """Return the cost of `value | name(*args, **kwargs)`; value_size: characters and items of the value."""
    given = [*args, *kwargs.values()]
    largest = max([1, *(abs(x) for x in given if isinstance(x, int)), *(len(x) for x in given if isinstance(x, str))])
    if name in _REPEATING:
        return value_size * largest
    if name == "replace":
        return _replace_cost(str(value), *args, **kwargs)
    if name in ("format", "format_map"):
        return _format_cost(str(value), size(given))
    if name == "round" and largest > 100:
        return _TOO_LARGE
    if name == "sum" and not isinstance(kwargs.get("start", args[1] if len(args) > 1 else 0), int | float):
        return value_size * value_size  # lists are copied again and again
    return 1


def _replace_cost(text: str, old: Any = "", new: Any = "", count: Any = -1, **_: Any) -> int:
    times = text.count(str(old))
    if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
        times = min(times, count)
    return len(text) + times * len(str(new))


def _format_cost(text: str, arguments: int) -> int:
    if _WIDTH.search(text):
        return _TOO_LARGE
    fields = text.count("%") + text.count("{")
    return len(text) + fields * (arguments + 10_000)
