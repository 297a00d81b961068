"""Tool calls as Qwen3-Coder writes them: tags for the function and for each parameter, whose values are plain text."""

from __future__ import annotations

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
from qwen3fast.text.schema_types import parameters_of, properties_of, read_value, types_of

END_FUNCTION = "</function>"
_FUNCTION = "<function="
NAME = r"[^<>\n]+"  # of a function or parameter

_BEGIN = re.compile(rf"<tool_call>|^[ \t]*<function=({NAME})>", re.MULTILINE)
_OPENING = re.compile(rf"\s*<function=({NAME})>")
_NEXT = re.compile(rf"\s*(?:<parameter=({NAME})>|(</function>))")
# What may end a value. The last two begin another block: the value, and with it its block, was not closed.
_VALUE_END = re.compile(
    r"(?P<closed></parameter>)(?=\s*(?:<parameter=|</function>))"
    rf"|^<parameter=(?P<parameter>{NAME})>"
    r"|(?P<function></function>)(?=\s*</tool_call>)"
    r"|(?P<block><tool_call>)(?=\s*<function=)"
    rf"|^[ \t]*<function=(?P<bare>{NAME})>",
    re.MULTILINE,
)
# What may become a `<function=name>` without the `<tool_call>` before it.
_PARTIAL = re.compile(r"<function=[^<>\n]*\Z")


class XmlCalls:
    """The format of Qwen3-Coder. end_tags: the tags that can close a block.

    A block is `<tool_call>`, one or more functions and `</tool_call>`, with free whitespace between them. A function is
    `<function=name>`, then for each parameter `<parameter=key>`, the value and `</parameter>`, then `</function>`. One
    line break at each end of a value does not belong to it. The value ends at the first `</parameter>` with another
    parameter or the end of the function behind it, so it may hold tags. Two omissions are accepted:

    - `<tool_call>`, before a function that begins a line and, where the tools are known, is one of them. The block
      then ends with its last function, or with a `</tool_call>` behind it.
    - `</parameter>` before `</function>` and `</tool_call>`, or before a line that begins with the tag of a parameter
      that the function has and that has not been given.

    Values have the types of the function's schema (`read_value`); they are text where it names no type. A block is
    malformed where a tag is missing otherwise, or where another block begins before it is closed.
    Source: the chat template of Qwen3-Coder, and vLLM's parser `qwen3_coder`.
    """

    end_tags: tuple[str, ...] = (END_CALL, END_FUNCTION)

    def __init__(self, tools: list[dict[str, Any]] | None = None) -> None:
        """tools: JSON schemas of the functions that the prompt offers; None if they are not known."""
        self._parameters = parameters_of(tools)
        self._types: dict[tuple[str, str], list[str]] = {}  # of the parameters that have come

    def find(self, answer: str, position: int) -> int | None:
        """Return where the next block begins, at the position or later; None if there is none."""
        for begin in _BEGIN.finditer(answer, position):
            if begin[1] is None or self._is_tool(begin[1]):
                return begin.start()
        return None

    def read(self, answer: str, begin: int) -> CallBlock:
        """Return the block that begins there, at no more cost than the text that it takes.

        A malformed one ends where the next search starts.
        """
        has_opener = answer.startswith(BEGIN_CALL, begin)
        at = begin + len(BEGIN_CALL) if has_opener else begin
        calls: list[ToolCall] = []
        while opening := _OPENING.match(answer, at):
            arguments, at = self._read_arguments(answer, opening[1], opening.end())
            if arguments is None:
                return self._malformed(answer, at)
            calls.append(ToolCall(replace_surrogates(opening[1]), replace_surrogates(arguments)))
        end = END_OF_BLOCK.match(answer, at)
        if end is not None and calls:
            return CallBlock(calls, end.end(), bool(end[1]))
        following = skip_space(answer, at)
        rest = answer[following : following + len(END_CALL)]
        if has_opener or rest.startswith(_FUNCTION):
            return self._malformed(answer, at)
        return CallBlock(calls, at, not any(tag.startswith(rest) for tag in (END_CALL, _FUNCTION)))

    def num_held_back(self, answer: str) -> int:
        """Return how many characters at the end may become a `<tool_call>` or the opening tag of a function."""
        partial = _PARTIAL.search(answer, max(answer.rfind("<"), 0))
        lengths = [length_of_partial(answer, tag) for tag in (BEGIN_CALL, _FUNCTION)]
        return len(partial[0]) if partial else max(lengths)

    def _is_tool(self, name: str) -> bool:
        return not self._parameters or name in self._parameters

    def _read_arguments(self, answer: str, function: str, at: int) -> tuple[dict[str, Any] | None, int]:
        """Return the arguments and the position behind the function; or None and the position of the error."""
        schema = self._parameters.get(function, {})
        properties, arguments = properties_of(schema), dict[str, Any]()
        while tag := _NEXT.match(answer, at):
            if tag[2] is not None:
                return arguments, tag.end()
            key, begin = tag[1], tag.end()
            end = self._end_of_value(answer, begin, properties.keys() - arguments.keys() - {key})
            if end is None:
                return None, begin
            text = answer[begin : end.start()].removeprefix("\n").removesuffix("\n")
            if (function, key) not in self._types and key in properties:
                self._types[function, key] = types_of(properties[key], schema)
            arguments[key] = read_value(text, self._types.get((function, key), []))
            at = end.end() if end["closed"] else end.start()
        return None, at

    def _end_of_value(self, answer: str, begin: int, missing: set[str]) -> re.Match[str] | None:
        """Return the tag that ends a value. missing: the function's parameters that have not been given."""
        for tag in _VALUE_END.finditer(answer, begin):
            if tag["closed"] or tag["function"] or tag["parameter"] in missing:
                return tag
            if tag["block"] or (tag["bare"] and self._is_tool(tag["bare"])):
                return None
        return None

    def _malformed(self, answer: str, at: int) -> CallBlock:
        """Return a malformed block, wrong at a position: it reaches to the next tag that begins or ends a block."""
        begin = self.find(answer, at)
        limit = len(answer) if begin is None else begin
        end = answer.find(END_CALL, at, limit)
        return CallBlock([], limit if end < 0 else end + len(END_CALL), False)
