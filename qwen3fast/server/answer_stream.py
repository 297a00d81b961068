"""AnswerStream: the answer of a reply as it comes, told apart into text and finished tool calls, exactly.

Joined, what it gives is what `parse_tool_calls` makes of the whole answer, wherever the pieces were cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3fast.text.tool_calls import ToolCall, parse_tool_calls

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class AnswerPiece:
    """News of an answer: text to show, and tool calls that are complete."""

    content: str
    tool_calls: list[ToolCall]


class AnswerStream:
    """Takes an answer piece by piece.

    What a later piece could change is held back: whitespace at the end (a tool call takes it away), the beginning of a
    `<tool_call>`, and everything from one on until its block is closed and well formed. A malformed block is held back
    to the end of the reply: its closing tag may turn out to stand inside a string.
    """

    def __init__(self) -> None:
        self._answer = self._shown = ""
        self._num_calls = 0
        self._read = 0  # up to here, every tool call is closed and well formed
        self._tried = 0  # up to here, closing tags did not end a well-formed block that begins after `_read`

    def push(self, text: str) -> AnswerPiece:
        """Add a piece of the answer. Returns what is certain now."""
        self._answer += text
        certain = self._answer[: self._certain_end()].rstrip()
        if BEGIN not in certain:
            return self._news(certain, [])
        parsed = parse_tool_calls(certain)
        return self._news(parsed.content, parsed.tool_calls)

    def finish(self, content: str, tool_calls: list[ToolCall]) -> AnswerPiece:
        """Return what is left to say of the whole reply, whose content and tool calls are given."""
        assert content.startswith(self._shown), "what was shown is how the content begins"
        return self._news(content, tool_calls)

    def _certain_end(self) -> int:
        """Return the length of the part of the answer that no later piece changes."""
        while (begin := self._answer.find(BEGIN, self._read)) >= 0:
            end = self._end_of_call(begin)
            if end is None:
                return begin
            self._read = self._tried = end
        return len(self._answer) - _length_of_partial_tag(self._answer)

    def _end_of_call(self, begin: int) -> int | None:
        """Return where the well-formed block that begins there ends, if it has ended."""
        at = max(begin, self._tried)
        while (at := self._answer.find(END, at)) >= 0:
            at += len(END)
            parsed = parse_tool_calls(self._answer[begin:at])
            if parsed.tool_calls and not parsed.malformed and not parsed.content:
                return at
            self._tried = at
        return None

    def _news(self, content: str, tool_calls: list[ToolCall]) -> AnswerPiece:
        news = AnswerPiece(content[len(self._shown) :], tool_calls[self._num_calls :])
        self._shown, self._num_calls = max(self._shown, content, key=len), max(self._num_calls, len(tool_calls))
        return news


def _length_of_partial_tag(text: str) -> int:
    """Return how many characters at the end of a text may become a `<tool_call>`."""
    return next((n for n in range(min(len(BEGIN) - 1, len(text)), 0, -1) if text.endswith(BEGIN[:n])), 0)
