"""The JSON schema of a Python function that a model may call, from its signature and docstring.

Source: `get_json_schema` of transformers; the results are the same.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_TYPES: dict[Any, dict[str, Any]] = {
    **{python: {"type": name} for python, name in _JSON_TYPES.items()},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}

# Sections of a docstring in Google's style.
_DESCRIPTION = re.compile(r"^(.*?)[\n\s]*(Args:|Returns:|Raises:|\Z)", re.DOTALL)
_ARGUMENTS = re.compile(r"\n\s*Args:\n(.*?)[\n\s]*(Returns:|Raises:|\Z)", re.DOTALL)
_RETURNS = re.compile(r"\n\s*Returns:\n\s*(.*?)[\n\s]*(Raises:|\Z)", re.DOTALL)
_NAME = r"\w+(?:[ \t]*\([^()\n]*\))?:"  # a name, a type in parentheses that is left out, a colon
_ARGUMENT = re.compile(
    rf"(?:^|\n)([ \t]*)(?P<name>\w+)(?:[ \t]*\([^()\n]*\))?:\s*(?P<text>.*?)\s*(?=\n(?!\1[ \t])[ \t]*{_NAME}|\Z)",
    re.DOTALL,
)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the JSON schema of a function or method, as chat templates read it.

    Every parameter needs a type hint and a description under "Args:" in the docstring, which may end in
    `(choices: ["a", "b"])`. An untyped first parameter `self` or `cls` is left out.

    Raises: ValueError naming the function, and the part that is missing or has no JSON type.
    """
    name = getattr(function, "__name__", "operation")
    try:
        doc = (inspect.getdoc(function) or "").strip()
        if not doc:
            raise ValueError("it has no docstring")
        parameters, returns = _read_signature(function)
        _describe(parameters["properties"], doc)
    except (TypeError, NameError, ValueError) as err:
        raise ValueError(f"the function {name} cannot be described as a tool: {err}; or pass a JSON schema") from err
    description = _DESCRIPTION.search(doc)
    schema = {"name": name, "description": description[1].strip() if description else None, "parameters": parameters}
    if returns is not None:
        described = _RETURNS.search(doc)
        schema["return"] = returns | ({"description": described[1].strip()} if described else {})
    return {"type": "function", "function": schema}


def _read_signature(function: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the schema of the parameters, without descriptions, and of the returned value where it has one."""
    hints, signature = get_type_hints(function), inspect.signature(function)
    properties, required = {}, []
    for number, (name, parameter) in enumerate(signature.parameters.items()):
        if parameter.annotation is inspect.Parameter.empty:
            if number == 0 and name in ("self", "cls"):
                continue
            raise ValueError(f"its parameter {name} has no type hint")
        properties[name] = _schema_of(hints[name])
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
    returns = None
    if "return" in hints:
        with contextlib.suppress(ValueError):  # the model never writes it: left out rather than described wrongly
            returns = _schema_of(hints["return"])
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    return parameters | ({"required": required} if required else {}), returns


def _describe(properties: dict[str, dict[str, Any]], doc: str) -> None:
    """Add the docstring's descriptions, and the choices that they name."""
    section = _ARGUMENTS.search(doc)
    lines = [line for line in section[1].split("\n") if line.strip()] if section else []
    found = {x["name"]: re.sub(r"\s*\n+\s*", " ", x["text"].strip()) for x in _ARGUMENT.finditer("\n".join(lines))}
    for name, schema in properties.items():
        if name not in found:
            raise ValueError(f"its docstring has no description of {name} under 'Args:'")
        text = found[name]
        if choices := _CHOICES.search(text):
            schema["enum"] = [x.strip() if isinstance(x, str) else x for x in json.loads(choices[1])]
            text = text[: choices.start()].strip()
        schema["description"] = text


def _schema_of(hint: Any) -> dict[str, Any]:
    """Return the JSON schema of a type hint."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is None and isinstance(hint, type) and issubclass(hint, Enum):
        return _schema_of_values([member.value for member in hint])
    if origin is None and hint in _TYPES:
        return dict(_TYPES[hint])
    if origin is Union or origin is types.UnionType:
        return _schema_of_union(args)
    if origin is Literal:
        return _schema_of_values(list(args))
    if origin is list:
        return {"type": "array", "items": _schema_of(args[0])}
    if origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_schema_of(x) for x in args]}
    if origin is dict:
        return {"type": "object"} | ({"additionalProperties": _schema_of(args[1])} if len(args) == 2 else {})
    hint_name = getattr(hint, "__name__", hint) if origin is None else hint
    raise ValueError(f"the type hint {hint_name} has no JSON schema (use int, float, str, bool, list, dict, Literal)")


def _schema_of_union(args: tuple[Any, ...]) -> dict[str, Any]:
    schemas = [_schema_of(x) for x in args if x is not type(None)]
    if len(schemas) == 1:
        union = schemas[0]
    elif all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        names = sorted({schema["type"] for schema in schemas})
        union = {"type": names[0] if len(names) == 1 else names}
    else:
        union = {"anyOf": schemas}
    return union | ({"nullable": True} if type(None) in args else {})


def _schema_of_values(values: list[Any]) -> dict[str, Any]:
    if not values or any(type(value) not in _JSON_TYPES for value in values):
        raise ValueError(f"the choices {values} must be one or more texts, numbers, booleans or None")
    names = list(dict.fromkeys(_JSON_TYPES[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}
