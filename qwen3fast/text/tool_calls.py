"""The tool calls that a model writes in its answer, told from the text around them. Knows text only: no tokens."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwen3fast.text.plain_data import replace_surrogates

_BEGIN = re.compile(r"<tool_call>\s*")
_END = re.compile(r"\s*(?:</tool_call>|\Z)")
_TAG = re.compile(r"</?tool_call>")
_SPACE = re.compile(r"\s*")
_JSON = json.JSONDecoder(strict=False)  # models write line breaks inside strings


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks to have called, by its name in the `tools` of the prompt."""

    name: str
    arguments: dict[str, Any]


class ParsedAnswer(NamedTuple):
    """An answer taken apart.

    content: the text without the calls. tool_calls: the calls in their order. malformed: blocks that begin as a call
    but are none; they also stay in content.
    """

    content: str
    tool_calls: list[ToolCall]
    malformed: list[str]


def parse_tool_calls(answer: str) -> ParsedAnswer:
    """Find the blocks `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` in an answer (or any text).

    A block may stand anywhere, in a code block also; whitespace inside its tags is free, and the end of the text closes
    the last one. It holds one call, several after each other, or a list of calls. The arguments may be named
    "parameters", may be a string that holds the object, and may be null or "" for none; other keys are ignored, but a
    call without any arguments key, or with two that differ, is malformed. So is everything else between the tags
    (Qwen3-Coder's XML included), and a block that is not closed before the next one: one bad call spoils its block.

    Whitespace around a block goes with it; where text stands on both sides, a line break takes its place. Pass the
    answer without its reasoning: a call that the model only considers is none. Names and arguments are valid Unicode:
    U+FFFD replaces lone surrogates. Never raises, for any string.
    Source: the chat template of Qwen3, which asks the model for this form.
    """
    tool_calls: list[ToolCall] = []
    malformed: list[str] = []
    texts: list[str] = []  # before, between and after the calls
    text_begin = search_from = 0
    while begin := _BEGIN.search(answer, search_from):
        calls, search_from = _read_block(answer, begin)
        if not calls:
            # Without the whitespace after a block that is never closed: a call that follows takes it out of content.
            malformed.append(answer[begin.start() : search_from].rstrip())
        else:
            tool_calls += calls
            texts.append(answer[text_begin : begin.start()])
            text_begin = search_from
    texts.append(answer[text_begin:])
    return ParsedAnswer(_join(texts), tool_calls, malformed)


def _read_block(answer: str, begin: re.Match[str]) -> tuple[list[ToolCall], int]:
    """Return the calls of the block that begins there, none if malformed, and the position where the block ends."""
    # JSON is read before the closing tag is looked for: a string among the arguments may hold that tag.
    # Only where an object or a list begins: an error costs json a walk over all text before it, to name the line, and a
    # model that repeats itself may write <tool_call> to the end of its context (40,000 times: 2.8 s; so, 0.04 s).
    values, at = [], begin.end()
    try:
        while answer.startswith(("{", "["), at):
            value, json_end = _JSON.raw_decode(answer, at)
            values += value if isinstance(value, list) else [value]
            if end := _END.match(answer, json_end):
                return _to_calls(values), end.end()
            space = _SPACE.match(answer, json_end)
            at = space.end() if space else json_end
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        pass
    tag = _TAG.search(answer, begin.end())
    if tag is None:
        return [], len(answer)
    return [], tag.end() if tag[0] == "</tool_call>" else tag.start()


def _to_calls(values: list[Any]) -> list[ToolCall]:
    """Return the calls that JSON values describe; none if one of them is no call."""
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


def _join(texts: list[str]) -> str:
    if len(texts) == 1:  # no call was taken out
        return texts[0]
    first, *between, last = texts
    stripped = [first.rstrip(), *(text.strip() for text in between), last.lstrip()]
    return "\n".join(text for text in stripped if text)
