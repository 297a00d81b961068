"""JSON types of a function's parameters, read from its schema, and values of these types read from text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 32  # of references and unions inside each other
_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_NAMES |= {list: "array", dict: "object"}


def parameters_of(tools: list[dict[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each function's parameters by the function's name; {} where a tool has none.

    tools: in OpenAI's form, or the bare functions.
    """
    functions = [tool.get("function", tool) for tool in tools or []]
    named = [f for f in functions if isinstance(f, dict) and isinstance(f.get("name"), str)]
    return {f["name"]: f["parameters"] if isinstance(f.get("parameters"), dict) else {} for f in named}


def properties_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schemas of a function's parameters by their names."""
    properties = parameters.get("properties")
    return properties if isinstance(properties, dict) else {}


def types_of(schema: Any, root: Mapping[str, Any]) -> list[str]:
    """Return the JSON types that a schema allows, in its order; none if it does not restrict them.

    Read are `type`, `nullable`, `enum`, `const`, `anyOf`, `oneOf`, `allOf` and references inside root. Each reference
    is followed once, so the time is linear in the size of root.
    """
    return list(dict.fromkeys(_types_of(schema, root, set(), 0)))


def _types_of(schema: Any, root: Mapping[str, Any], followed: set[str], depth: int) -> list[str]:
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return []
    types: list[str] = []
    if isinstance(named := schema.get("type"), str | list):
        types += [named] if isinstance(named, str) else [x for x in named if isinstance(x, str)]
    elif isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        types += [_NAMES[type(x)] for x in values if type(x) in _NAMES]
    elif isinstance(reference := schema.get("$ref"), str):
        if reference not in followed:
            followed.add(reference)
            types += _types_of(resolve(reference, root), root, followed, depth + 1)
    else:
        for key in ("anyOf", "oneOf", "allOf"):
            for option in schema[key] if isinstance(schema.get(key), list) else ():
                types += _types_of(option, root, followed, depth + 1)
    if types and schema.get("nullable") is True:
        types.append("null")
    return types


def resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """Return the schema that a reference such as `#/$defs/Point` names, or None."""
    found: Any = root
    for key in reference.removeprefix("#/").split("/") if reference.startswith("#/") else [None]:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def read_value(text: str, types: list[str]) -> Any:
    """Return the value of the first type that a text can be read as; the text itself if there is none.

    "string" is any text. Other types are JSON, except that booleans and null may have Python's spelling, as chat
    templates write them. A nullable string may be null. NaN, infinities, and numbers beyond float64 stay text.
    """
    word = text.strip().lower()
    if word in ("null", "none") and types and ("null" in types or "string" not in types):
        return None
    if word in ("true", "false") and _first_of(types, "boolean"):
        return word == "true"
    value: Any = None
    if any(name not in ("string", "null") for name in types):
        try:
            value = json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)
        except (ValueError, RecursionError):
            return text
    for name in types:
        if name == "string":
            return text
        if name == "integer" and isinstance(value, float) and value.is_integer():
            return int(value)
        if _is_of(value, name):
            return value
    return text


def _first_of(types: list[str], name: str) -> bool:
    """Return whether a type is allowed, and "string" does not come before it."""
    return name in types and "string" not in types[: types.index(name)]


def _is_of(value: Any, name: str) -> bool:
    found = _NAMES.get(type(value))
    return value is not None and (found == name or (found == "integer" and name == "number"))


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("beyond float64")
    return number


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
