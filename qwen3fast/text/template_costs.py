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

_TOO_LARGE = 2**63  # more than any budget
_PADDING = frozenset({"center", "ljust", "rjust", "zfill"})
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
    return _length(left) + (len(right) if isinstance(right, str) else size(right)) if operator == "+" else 1


def method_cost(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: Size) -> int:
    """Return the cost of calling a function or bound method of a template."""
    bound = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
    text, name = getattr(bound, "__self__", None), getattr(bound, "__name__", "")
    if not isinstance(text, str):
        return 1
    if name in ("format", "format_map"):
        return _format_cost(text, size(list(args)) + size(kwargs))
    if name == "replace":
        return _replace_cost(text, *args, **kwargs)
    if name == "join":
        items = args[0] if args else ()
        return size(items) + _length(items) * len(text)
    if name in _PADDING:
        return max([len(text), *(x for x in args if isinstance(x, int))])
    return len(text) + 1


def filter_cost(name: str, value: Any, args: list[Any], kwargs: dict[str, Any], value_size: int, size: Size) -> int:
    """Return the cost of `value | name(*args, **kwargs)`; value_size: characters and items of the value."""
    given = [*args, *kwargs.values()]
    numbers = [abs(x) for x in given if isinstance(x, int)]
    largest = max(numbers, default=1)
    if name == "replace":
        return _replace_cost(str(value), *args, **kwargs)
    if name == "join":
        return value_size + _length(value) * max((len(x) for x in given if isinstance(x, str)), default=0)
    if name == "format":
        return _format_cost(str(value), size(given))
    if name in ("center", "batch", "slice"):
        return value_size + largest
    if name == "indent":
        widest = max([4, *numbers, *(len(x) for x in given if isinstance(x, str))])
        return value_size + (str(value).count("\n") + 1) * widest
    if name == "round":
        return 1 if largest <= 100 else _TOO_LARGE
    if name == "sum" and not isinstance(kwargs.get("start", args[1] if len(args) > 1 else 0), int | float):
        return value_size * value_size  # lists are copied again and again
    return 1


def _format_cost(text: str, arguments: int) -> int:
    if _WIDTH.search(text):
        return _TOO_LARGE
    fields = text.count("%") + text.count("{")
    return len(text) + fields * (arguments + 10_000)


def _replace_cost(text: str, old: Any = "", new: Any = "", count: Any = -1, **_: Any) -> int:
    times = text.count(str(old))
    if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
        times = min(times, count)
    return len(text) + times * len(str(new))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 1
