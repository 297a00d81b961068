"""TextStream: token ids become text that is safe to show: whole characters, no part of a stop string.

It separates the reasoning from the answer, and knows neither prompts nor the contents of tool calls.
"""

from __future__ import annotations

from typing import NamedTuple

from qwen3fast.text.reasoning import BEGIN_REASONING, BEGIN_TOOL_CALL, END_REASONING, ReasoningFormat, ReasoningTracker
from qwen3fast.text.tokenizer import IncrementalDecoder, Tokenizer


class TextPiece(NamedTuple):
    """Text that has become safe to show: all of it, tags included, and its shares of reasoning and answer.

    Reasoning and answer may lag behind text: in them, line breaks wait until something follows.
    """

    text: str
    reasoning: str
    answer: str


class TextStream:
    """The text of one reply, collected token by token, and split into reasoning and answer.

    `ReasoningTracker` decides where the reasoning begins and ends; reasoning that is never closed takes the whole
    reply. Tags in other places, or written with other tokens, are ordinary text.

    text: everything, tags included. Stop strings count wherever they stand, in the reasoning also, and across the tags.
    stop_string: the one that ended the reply.
    Without a tokenizer (random weights) everything stays empty; if the tokenizer lacks the tags, all is answer.
    Source: the model cards of Qwen3 (the tag's token id decides; both parts lose line breaks at their ends).
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: tuple[str, ...] = (),
        tracker: ReasoningTracker | None = None,
        min_tokens: int = 0,
    ) -> None:
        """Begin a reply.

        tracker: in its state after the prompt, by default one that has seen nothing. min_tokens: stop strings that end
        within the first min_tokens tokens do not count.
        """
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer is not None else None
        self._tracker = tracker.copy() if tracker is not None else ReasoningTracker(ReasoningFormat(tokenizer))
        self._stop, self._tokens_left = stop, min_tokens
        self._passed = 0  # stop strings that end up to here do not count
        self.stop_string: str | None = None
        self._held_back = max((len(s) for s in stop), default=1) - 1
        self._shown = 0
        self.text = ""
        self.is_finished = False
        self._reasoning = _Stretch(0 if self._tracker.is_open else None)
        self._answer = _Stretch(None if self._tracker.is_open else 0)

    @property
    def reasoning(self) -> str:
        """The reasoning so far, without tags and without line breaks at its ends."""
        return self._reasoning.of(self.text)

    @property
    def answer(self) -> str:
        """The answer so far, without line breaks at its ends; empty while the reasoning goes on."""
        return self._answer.of(self.text)

    def push(self, token_id: int) -> bool:
        """Add a token. Returns whether a stop string is now complete; it and all after it are cut from the text."""
        if self._decoder is None:
            return False
        piece = self._decoder.push(token_id)
        self._find_parts(token_id, piece)
        return self._append(piece)

    def finish(self) -> None:
        """End the reply: nothing is held back any longer, except line breaks at the ends of reasoning and answer."""
        if not self.is_finished and self._decoder is not None:
            self._append(self._decoder.finish())
        self.is_finished = True

    def take(self) -> TextPiece:
        """Return the text that has become safe to show since the last call.

        After finish() or a stop string, the pieces of all calls together are text, reasoning and answer.
        """
        end = len(self.text) if self.is_finished else max(self._shown, len(self.text) - self._held_back)
        new, self._shown = self.text[self._shown : end], end
        if self._tracker.may_open and not self.is_finished:  # whitespace before a tag belongs to neither part
            return TextPiece(new, "", "")
        return TextPiece(new, self._reasoning.take(self.text, end), self._answer.take(self.text, end))

    def _find_parts(self, token_id: int, piece: str) -> None:
        """Notice a tag. It ends its piece; before it may stand U+FFFD, for a character that the tag cut off."""
        was_open, could_open = self._tracker.is_open, self._tracker.may_open
        self._tracker.push(token_id)
        begin, end = len(self.text), len(self.text) + len(piece)
        if was_open and not self._tracker.is_open:
            is_call = piece.endswith(BEGIN_TOOL_CALL)  # which the answer keeps
            self._reasoning.end = begin + len(piece.removesuffix(BEGIN_TOOL_CALL if is_call else END_REASONING))
            self._answer.begin = self._reasoning.end if is_call else end
        elif could_open and self._tracker.is_open and piece.endswith(BEGIN_REASONING):
            self._reasoning.begin, self._answer.begin = end, None

    def _append(self, piece: str) -> bool:
        # A stop string may have begun in text seen before, but not further back than its own length.
        search_from = max(0, len(self.text) - self._held_back)
        self.text += piece
        if self._tokens_left > 0:
            self._tokens_left, self._passed = self._tokens_left - 1, len(self.text)
            return False
        begins = {s: max(search_from, self._passed - len(s) + 1) for s in self._stop}
        found = [(at, s) for s, begin in begins.items() if (at := self.text.find(s, begin)) >= 0]
        if not found:
            return False
        begin, self.stop_string = min(found)
        self.text = self.text[:begin]
        self.is_finished = True
        return True


class _Stretch:
    """A stretch of a reply's text, begin to end (None: not yet known); it is shown without line breaks at its ends.

    A stop string may cut the text before begin or end; slices then end with the text.
    """

    def __init__(self, begin: int | None) -> None:
        self.begin = begin
        self.end: int | None = None
        self._taken = 0  # where in the text the next piece begins
        self._line_breaks = 0  # taken, but to be shown only if something follows
        self._has_shown = False

    def of(self, text: str) -> str:
        """Return the part of `text` that the stretch holds."""
        return "" if self.begin is None else text[self.begin : self.end].strip("\n")

    def take(self, text: str, safe_end: int) -> str:
        """Return what may be shown since the last call, of text up to safe_end. Costs no more than the new text."""
        if self.begin is None:
            return ""
        end = safe_end if self.end is None else min(safe_end, self.end)
        new, self._taken = text[max(self.begin, self._taken) : end], end
        if not self._has_shown:
            new = new.lstrip("\n")
        shown = new.rstrip("\n")
        trailing = len(new) - len(shown)
        if not shown:
            self._line_breaks += trailing
            return ""
        shown = "\n" * self._line_breaks + shown
        self._line_breaks, self._has_shown = trailing, True
        return shown
