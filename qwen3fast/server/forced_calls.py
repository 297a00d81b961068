"""Replies that must be a tool call (`tool_choice`): the schema or the grammar of a call, by the model's format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qwen3fast.server.errors import ApiError
from qwen3fast.server.sampling import Sampling
from qwen3fast.text.call_blocks import BEGIN_CALL, END_CALL
from qwen3fast.text.schema_types import parameters_of, properties_of, types_of
from qwen3fast.text.tokenizer import Tokenizer
from qwen3fast.text.tool_calls import XmlCalls, call_format_of
from qwen3fast.text.xml_calls import NAME

# llguidance's options for JSON as Qwen3's chat templates write it: without line breaks.
AS_IN_TEMPLATE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAX_GRAMMAR = 2**22  # characters
# A value up to the tag behind it. The tags of calls are left out, because a parser would take them for the value's end.
_XML_VALUES = r"""
VALUE: TEXT "\n</parameter>\n"
TEXT: /(?s:.*)/ & ~/(?s:.*)(<\/?(parameter|function)[=>]|<tool_call>)(?s:.*)/
"""


def forced(
    sampling: Sampling, tokenizer: Tokenizer, tools: list[dict[str, Any]] | None, choice: str | None
) -> tuple[Sampling, bool]:
    """Return the sampling of a reply that must be a call of the function named, or of any ("").

    The second value says whether the reply is then the bare JSON of a call; otherwise it is written as other calls are.
    Raises: ApiError (400) together with another shape of the reply, and for a name that the format cannot write.
    """
    if choice is None:
        return sampling, False
    if sampling.params.is_structured:
        raise ApiError(400, "a forced tool call and a response format exclude each other", "tool_choice")
    given = [tool for tool in tools or [] if choice in ("", tool["function"]["name"])]
    if not isinstance(call_format_of(tokenizer.chat_template), XmlCalls):
        params = replace(sampling.params, json_schema=schema_of_calls(given))
        return replace(sampling, params=params, shaped_by="tools"), True
    try:
        grammar = grammar_of_calls(given, tokenizer)
    except ValueError as err:
        raise ApiError(400, str(err), "tools", "invalid_value") from err
    return replace(sampling, params=replace(sampling.params, grammar=grammar), shaped_by="tools"), False


def schema_of_calls(tools: list[dict[str, Any]]) -> str:
    """Return the JSON schema of one call of any of these functions, as JSON text.

    Source: the form that Qwen3's chat template asks for, `{"name": ..., "arguments": {...}}`.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return json.dumps({**schema, "x-guidance": AS_IN_TEMPLATE})


def grammar_of_calls(tools: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """Return the grammar of one call of any of these functions in Qwen3-Coder's format, in llguidance's form of Lark.

    Parameters come in the order of the schema; those that are not required may be left out. Values that may be strings
    are free text (without the tags of calls) or, under `enum` and `const`, one of the texts; others are JSON under
    their schema. A function whose schema names no parameters may be given any, as text, unless it has no schema for
    them or allows no others.

    Raises: ValueError for a name with an angle bracket or a line break, and for schemas that are too large.
    Source: the chat template of Qwen3-Coder.
    """
    functions = list(parameters_of(tools).items())
    begin, end = (_tag(tokenizer, tag) for tag in (BEGIN_CALL, END_CALL))
    lines = [f'start: {begin} "\\n" call "</function>\\n" {end}']
    lines.append("call: " + " | ".join(f"f{n}" for n in range(len(functions))))
    size = 0
    for n, (name, schema) in enumerate(functions):
        for line in _function_rules(f"f{n}", name, schema):
            lines.append(line)
            size += len(line)
            if size > MAX_GRAMMAR:  # each parameter repeats the definitions that its schema may refer to
                raise ValueError(f"the grammar of a call would be longer than {MAX_GRAMMAR:,} characters")
    return "\n".join(lines) + _XML_VALUES


def _tag(tokenizer: Tokenizer, tag: str) -> str:
    """Return a tag as the token that the tokenizer has for it, or as text."""
    token_id = tokenizer.base.token_to_id(tag)
    return json.dumps(tag) if token_id is None else f"<[{token_id}]>"


def _function_rules(rule: str, name: str, schema: dict[str, Any]) -> Iterator[str]:
    """Yield the rules of a function: from its opening tag to the closing tag of its last parameter."""
    properties, opening = properties_of(schema), json.dumps(f"<function={_checked(name)}>\n")
    if not properties:
        is_free = bool(schema) and schema.get("additionalProperties") is not False
        yield f"{rule}: {opening}" + (rf' ("<parameter=" /{NAME}/ ">\n" VALUE)*' if is_free else "")
        return
    required = schema["required"] if isinstance(schema.get("required"), list) else []
    parts = []
    for n, (key, value) in enumerate(properties.items()):
        tag = json.dumps(f"<parameter={_checked(key)}>\n")
        parts.append(f"{rule}p{n}" + ("" if key in required else "?"))
        yield f"{rule}p{n}: {tag} {_value_rule(value, schema)}"
    yield f"{rule}: {opening} {' '.join(parts)}"


def _value_rule(schema: Any, root: dict[str, Any]) -> str:
    """Return the rule of a value and the tag behind it."""
    types = types_of(schema, root)
    if types and "string" not in types:
        has_reference = "$ref" in json.dumps(schema)
        definitions = {key: root[key] for key in ("$defs", "definitions") if has_reference and key in root}
        embedded = {**definitions, **schema, "x-guidance": AS_IN_TEMPLATE}
        return f'%json {json.dumps(embedded)} "\\n</parameter>\\n"'
    texts = schema.get("enum", [schema["const"]] if "const" in schema else None) if isinstance(schema, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return "VALUE"
    return f'({" | ".join(json.dumps(text) for text in texts)}) "\\n</parameter>\\n"'


def _checked(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError(f"the name {name!r} of a function or parameter must have no '<', no '>' and no line break")
    return name
