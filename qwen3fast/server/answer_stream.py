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

    What a later piece could change is held back: whitespace at the end (a tool call takes it away) and everything from
    a `<tool_call>` on, or the beginning of one, until its block is closed.
    """

    def __init__(self) -> None:
        self._answer = self._shown = ""
        self._num_calls = 0

    def push(self, text: str) -> AnswerPiece:
        """Add a piece of the answer. Returns what is certain now."""
        self._answer += text
        return self._news(self._answer[: self._certain_end()]) if text else AnswerPiece("", [])

    def finish(self, content: str, tool_calls: list[ToolCall]) -> AnswerPiece:
        """Return what is left to say of the whole reply, whose content and tool calls are given."""
        assert content.startswith(self._shown), "what was shown is how the content begins"
        news = AnswerPiece(content[len(self._shown) :], tool_calls[self._num_calls :])
        self._shown, self._num_calls = content, len(tool_calls)
        return news

    def _certain_end(self) -> int:
        begin = self._answer.rfind(BEGIN)
        is_open = begin >= 0 and self._answer.find(END, begin) < 0
        if begin >= 0 and not is_open:  # a string among the arguments may hold a tag: only the parser knows
            is_open = bool(parse_tool_calls(self._answer).malformed)
            begin = self._answer.find(BEGIN)
        end = begin if is_open else len(self._answer) - _length_of_partial_tag(self._answer)
        return len(self._answer[:end].rstrip())

    def _news(self, certain: str) -> AnswerPiece:
        parsed = parse_tool_calls(certain) if BEGIN in certain else None
        content, calls = (parsed.content, parsed.tool_calls) if parsed is not None else (certain, [])
        return self.finish(content, calls) if content.startswith(self._shown) else AnswerPiece("", [])


def _length_of_partial_tag(text: str) -> int:
    """Return how many characters at the end of a text may become a `<tool_call>`."""
    return next((n for n in range(min(len(BEGIN) - 1, len(text)), 0, -1) if text.endswith(BEGIN[:n])), 0)
