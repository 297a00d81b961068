"""Tool calls, and the blocks of text that hold them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

BEGIN_CALL, END_CALL = "<tool_call>", "</tool_call>"
END_OF_BLOCK = re.compile(rf"\s*({END_CALL}|\Z)")
_NO_SPACE = re.compile(r"\S|\Z")


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks to have called, by its name in the `tools` of the prompt."""

    name: str
    arguments: dict[str, Any]

    def to_message(self) -> dict[str, Any]:
        """Return the call as an entry of a message's "tool_calls", in the form that chat templates read."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallBlock(NamedTuple):
    """A block of tool calls.

    calls: in their order; empty for a malformed block. end: the position behind the block.
    is_closed: no text that is appended can change the block.
    """

    calls: list[ToolCall]
    end: int
    is_closed: bool


def length_of_partial(text: str, tag: str) -> int:
    """Return how many characters at the end of a text are the beginning of a tag, but not all of it."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def skip_space(text: str, position: int) -> int:
    """Return the position of the next character that is not whitespace, or of the end of the text."""
    found = _NO_SPACE.search(text, position)
    return found.start() if found else len(text)
