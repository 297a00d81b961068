"""Tool calls as Qwen3 writes them: JSON between `<tool_call>` and `</tool_call>`."""

from __future__ import annotations

import json
import re
from typing import Any

from qwen3fast.text.call_blocks import (
    BEGIN_CALL,
    END_CALL,
    END_OF_BLOCK,
    CallBlock,
    ToolCall,
    length_of_partial,
    skip_space,
)
from qwen3fast.text.plain_data import replace_surrogates

_TAG = re.compile(r"</?tool_call>")
_JSON = json.JSONDecoder(strict=False)  # models write line breaks inside strings


class JsonCalls:
    """The format `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. end_tags: the tags that can close a block.

    A block holds one call, several after each other, or a list of calls. Whitespace between the tags is free. The
    arguments may be named "parameters", may be a string that holds the object, and may be null or "" for none; other
    keys are ignored. A call without any arguments key, or with two that differ, is malformed.
    Source: the chat template of Qwen3.
    """

    end_tags: tuple[str, ...] = (END_CALL,)

    def find(self, answer: str, position: int) -> int | None:
        """Return where the next block begins, at the position or later; None if there is none."""
        begin = answer.find(BEGIN_CALL, position)
        return begin if begin >= 0 else None

    def read(self, answer: str, begin: int) -> CallBlock:
        """Return the block that begins there. A malformed one ends where the next search starts."""
        # JSON is read before the closing tag is looked for: a string among the arguments may hold that tag.
        # Only where an object or a list begins: an error costs json a walk over all text before it, to name the line,
        # and a model that repeats itself may write <tool_call> to the end of its context (40,000 times: 2.8 s; with
        # this check, 0.04 s).
        values: list[Any] = []
        body = at = skip_space(answer, begin + len(BEGIN_CALL))
        try:
            while answer.startswith(("{", "["), at):
                value, json_end = _JSON.raw_decode(answer, at)
                values += value if isinstance(value, list) else [value]
                if end := END_OF_BLOCK.match(answer, json_end):
                    return CallBlock(_to_calls(values), end.end(), bool(end[1]))
                at = skip_space(answer, json_end)
        except (ValueError, RecursionError):  # RecursionError: nested too deeply
            pass
        tag = _TAG.search(answer, body)
        if tag is None:
            return CallBlock([], len(answer), False)
        return CallBlock([], tag.end() if tag[0] == END_CALL else tag.start(), False)

    def num_held_back(self, answer: str) -> int:
        """Return how many characters at the end may become a `<tool_call>`."""
        return length_of_partial(answer, BEGIN_CALL)


def _to_calls(values: list[Any]) -> list[ToolCall]:
    """Return the calls that JSON values describe; none if one of them is not a call."""
    calls = [call for value in values if (call := _to_call(value)) is not None]
    return calls if len(calls) == len(values) else []


def _to_call(value: Any) -> ToolCall | None:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        return None
    found = [_read_arguments(value[key]) for key in ("arguments", "parameters") if key in value]
    if not found or found[0] is None or found[0] != found[-1]:
        return None
    return ToolCall(replace_surrogates(name), replace_surrogates(found[0]))


def _read_arguments(arguments: Any) -> dict[str, Any] | None:
    """Return the arguments as a dict, or None for what cannot be arguments."""
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = _JSON.decode(arguments)
        except (ValueError, RecursionError):
            return None
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    return arguments if isinstance(arguments, dict) else None
