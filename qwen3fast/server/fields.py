"""Fields: a request's JSON object, read field by field; each is type-checked, and none is ignored silently.

Nested objects are Fields as well and know their path, which names unread fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from starlette.requests import Request

from qwen3fast.server.errors import ApiError

T = TypeVar("T")
MAX_OBJECTS = 2**14  # of a list; each costs time that other clients wait
IGNORED_HEADER = "X-Ignored-Fields"


class Fields:
    """A JSON object of a request. null counts as absent, as in OpenAI's API.

    path: of the object in the body, for messages; "" is the body itself.
    """

    def __init__(self, value: Any, path: str = "") -> None:
        """Raises: ApiError (400) if the value is not an object."""
        if not isinstance(value, dict):
            raise ApiError(400, f"expected a JSON object, got {describe(value)}", path or None)
        self._values: dict[str, Any] = value
        self._path = path
        self._taken: set[str] = set()
        self._children: list[Fields] = []

    def name(self, key: str) -> str:
        """Return the field's path from the body's root."""
        return f"{self._path}.{key}" if self._path else key

    def error(self, key: str, message: str, code: str | None = None) -> ApiError:
        """Return the error (400) that names a field."""
        return ApiError(400, message, self.name(key), code)

    def raw(self, key: str, default: Any = None) -> Any:
        """Return the unchecked value, or the default if it is absent or null."""
        self._taken.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def _typed(
        self, key: str, kind: type[T], expected: str, accepts: Callable[[Any], bool] = lambda v: True
    ) -> T | None:
        value = self.raw(key)
        if value is None or (isinstance(value, kind) and accepts(value)):
            return value
        raise self.error(key, f"must be {expected}, got {describe(value)}", "invalid_type")

    def text(self, key: str, default: str | None = None, choices: Collection[str] | None = None) -> str | None:
        """Return a string, one of `choices` if they are given. Raises: ApiError (400)."""
        expected = "a string" if choices is None else f"one of {', '.join(choices)}"
        value = self._typed(key, str, expected, lambda v: choices is None or v in choices)
        return default if value is None else value

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a boolean. Raises: ApiError (400)."""
        value = self._typed(key, bool, "true or false")
        return default if value is None else value

    def number(self, key: str) -> float | None:
        """Return a finite number or None. Raises: ApiError (400)."""
        value: Any = self._typed(key, object, "a finite number", is_number)
        return None if value is None else float(value)

    def integer(self, key: str, min: int = -(2**63), max: int = 2**63 - 1) -> int | None:
        """Return an integer within bounds or None; 5.0 counts as 5. Raises: ApiError (400)."""
        expected = f"an integer from {min} to {max}"
        value: Any = self._typed(
            key, object, expected, lambda v: is_number(v) and float(v).is_integer() and min <= v <= max
        )
        return None if value is None else int(value)

    def items(
        self, key: str, accepts: Callable[[Any], bool] = lambda item: True, expected: str = "a list"
    ) -> list[Any] | None:
        """Return a list of acceptable items or None. Raises: ApiError (400)."""
        return self._typed(key, list, expected, lambda items: all(map(accepts, items)))

    def ids(self, key: str) -> list[int] | None:
        """Return a list of token ids or None. Raises: ApiError (400)."""
        return self.items(key, lambda item: type(item) is int and 0 <= item < 2**31, "a list of token ids")

    def object(self, key: str) -> Fields | None:
        """Return an object's fields or None. Raises: ApiError (400)."""
        value = self.raw(key)
        return None if value is None else self._child(value, self.name(key))

    def mapping(self, key: str) -> dict[str, Any] | None:
        """Return an object whose fields are not checked, such as a JSON schema. Raises: ApiError (400)."""
        return self._typed(key, dict, "a JSON object")

    def objects(self, key: str) -> list[Fields]:
        """Return the fields of each object of a list, which is empty if it is absent. Raises: ApiError (400)."""
        values = self.items(key) or []
        if len(values) > MAX_OBJECTS:
            raise self.error(key, f"at most {MAX_OBJECTS} items, got {len(values)}", "invalid_value")
        return [self._child(value, f"{self.name(key)}[{i}]") for i, value in enumerate(values)]

    def take(self, *keys: str) -> None:
        """Accept fields that do not change a reply."""
        self._taken.update(keys)

    def _child(self, value: Any, path: str) -> Fields:
        self._children.append(Fields(value, path))
        return self._children[-1]

    def required(self, key: str, value: T | None) -> T:
        """Return the value that was read. Raises: ApiError (400) if it was absent."""
        if value is None:
            raise self.error(key, "this field is required", "missing_required_parameter")
        return value

    def unknown(self) -> list[str]:
        """Return the paths of unread fields, also of nested objects."""
        own = [self.name(key) for key, value in self._values.items() if value is not None and key not in self._taken]
        return own + [name for child in self._children for name in child.unknown()]


async def read_fields(request: Request) -> Fields:
    """Return the fields of a request's body. Raises: ApiError (400) if it is not a JSON object."""
    try:
        return Fields(json.loads(await request.body(), parse_constant=_refuse_constant))
    except (ValueError, RecursionError) as err:
        raise ApiError(400, f"the body is not valid JSON: {err or 'nested too deeply'}", code="invalid_json") from err


def refuse_or_name(fields: Fields, strict: bool) -> dict[str, str]:
    """Return a header that names ignored fields, if there are any. Raises: ApiError (400) for them if strict."""
    names = fields.unknown()
    if not names:
        return {}
    if strict:
        raise ApiError(400, f"unknown field {names[0]!r}; this server was started with --strict", names[0], "unknown")
    return {IGNORED_HEADER: ", ".join(name.encode("unicode_escape").decode() for name in names)[:1000]}


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**1023 and not math.isnan(value)


def describe(value: Any) -> str:
    """Return a short text of a JSON value for messages."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
