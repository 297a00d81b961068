"""Tool calls in a model's answer, separated from the text around them. Knows text only: no tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

from qwen3fast.text.call_blocks import ToolCall
from qwen3fast.text.json_calls import JsonCalls
from qwen3fast.text.xml_calls import XmlCalls

__all__ = ["CallFormat", "JsonCalls", "ParsedAnswer", "ToolCall", "XmlCalls", "call_format_of", "parse_tool_calls"]

# Thread-safe, and shared by all replies to a request.
CallFormat = JsonCalls | XmlCalls
_JSON_CALLS = JsonCalls()


class ParsedAnswer(NamedTuple):
    """An answer taken apart.

    content: the text without the calls. tool_calls: the calls in their order. malformed: blocks that begin as a call
    but are none; they also stay in content.
    """

    content: str
    tool_calls: list[ToolCall]
    malformed: list[str]


def call_format_of(chat_template: str | None, tools: list[dict[str, Any]] | None = None) -> CallFormat:
    """Return the format of the tool calls that a chat template asks for: Qwen3-Coder's XML or Qwen3's JSON.

    tools: JSON schemas of the functions that the prompt offers, which give XML's values their types.
    """
    return XmlCalls(tools) if "<function=" in (chat_template or "") else _JSON_CALLS


def parse_tool_calls(answer: str, call_format: CallFormat = _JSON_CALLS) -> ParsedAnswer:
    """Find the tool calls in an answer (or any text).

    A block of calls may stand anywhere, also inside a code block, and the end of the text closes the last one. The
    format (`JsonCalls`, `XmlCalls`) defines what a block may hold; other contents are malformed, and so is a block that
    is not closed before the next one. One malformed call makes its whole block malformed.

    Whitespace around a block goes with it; where text stands on both sides, a line break takes its place. Pass the
    answer without its reasoning: calls in there are only considered, not made. Names and arguments are valid Unicode:
    U+FFFD replaces lone surrogates. Never raises, for any string.
    """
    tool_calls: list[ToolCall] = []
    malformed: list[str] = []
    texts: list[str] = []  # before, between and after the calls
    text_begin = search_from = 0
    while (begin := call_format.find(answer, search_from)) is not None:
        calls, search_from, _ = call_format.read(answer, begin)
        if not calls:
            # Without the whitespace after a block that is never closed: a call that follows takes it out of content.
            malformed.append(answer[begin:search_from].rstrip())
        else:
            tool_calls += calls
            texts.append(answer[text_begin:begin])
            text_begin = search_from
    texts.append(answer[text_begin:])
    return ParsedAnswer(_join(texts), tool_calls, malformed)


def _join(texts: list[str]) -> str:
    if len(texts) == 1:  # no call was taken out
        return texts[0]
    first, *between, last = texts
    stripped = [first.rstrip(), *(text.strip() for text in between), last.lstrip()]
    return "\n".join(text for text in stripped if text)
