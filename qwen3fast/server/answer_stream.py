"""AnswerStream: splits the answer of a streamed reply into text and finished tool calls, exactly.

Its joined output equals the result of `parse_tool_calls` for the whole answer, wherever the pieces were cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3fast.text.tool_calls import CallFormat, JsonCalls, ToolCall, parse_tool_calls


@dataclass(frozen=True)
class AnswerPiece:
    """A new part of an answer: text to show, and complete tool calls."""

    content: str
    tool_calls: list[ToolCall]


class AnswerStream:
    """An incremental parser of an answer.

    Text that a later piece could change is held back: whitespace at the end (a tool call takes it away), the beginning
    of a tag that opens a call, and everything from such a tag on until its block is closed and well formed. A malformed
    block is held back to the end of the reply: its closing tag may turn out to stand inside a string.
    """

    def __init__(self, call_format: CallFormat | None = None, max_calls: int | None = None) -> None:
        """call_format: of the tool calls in the answer; Qwen3's JSON by default. max_calls: more are left out."""
        self._format: CallFormat = call_format or JsonCalls()
        self._answer = self._shown = ""
        self._num_calls, self._max_calls = 0, max_calls
        self._read = 0  # up to here, every tool call is closed and well formed
        self._tried = 0  # tags before this position do not end the first block that is not closed yet

    def push(self, text: str) -> AnswerPiece:
        """Add a piece of the answer. Returns the part that no later piece changes."""
        self._answer += text
        certain = self._answer[: self._certain_end()].rstrip()
        if self._read == 0:  # no call yet
            return self._news(certain, [])
        parsed = parse_tool_calls(certain, self._format)
        return self._news(parsed.content, parsed.tool_calls)

    def finish(self, content: str, tool_calls: list[ToolCall]) -> AnswerPiece:
        """Return the rest of the whole reply, whose content and tool calls are given."""
        assert content.startswith(self._shown), "the content begins with the text that was shown"
        return self._news(content, tool_calls)

    def _certain_end(self) -> int:
        """Return the length of the part of the answer that no later piece changes."""
        while (begin := self._format.find(self._answer, self._read)) is not None:
            end = self._end_of_call(begin)
            if end is None:
                return begin
            self._read = self._tried = end
        return len(self._answer) - self._format.num_held_back(self._answer)

    def _end_of_call(self, begin: int) -> int | None:
        """Return where the well-formed block that begins there ends, if it has ended."""
        start = max(begin, self._tried)
        tags = [at + len(tag) for tag in self._format.end_tags if (at := self._answer.rfind(tag, start)) >= 0]
        if not tags:
            return None
        calls, end, is_closed = self._format.read(self._answer, begin)
        if calls and is_closed:
            return end
        if not calls:
            self._tried = max(tags)
        return None

    def _news(self, content: str, tool_calls: list[ToolCall]) -> AnswerPiece:
        news = AnswerPiece(content[len(self._shown) :], tool_calls[self._num_calls : self._max_calls])
        self._shown, self._num_calls = max(self._shown, content, key=len), max(self._num_calls, len(tool_calls))
        return news
