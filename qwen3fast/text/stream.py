"""From token ids to text that may be shown: whole characters only, never any part of a stop string, and the thought
apart from the answer. Knows Qwen3's `<think>` and `</think>`, but nothing of prompts or of tool calls."""

from __future__ import annotations

from typing import NamedTuple

from qwen3fast.text.tokenizer import IncrementalDecoder, Tokenizer

BEGIN_THOUGHT, END_THOUGHT = "<think>", "</think>"


class Piece(NamedTuple):
    """Text that has become safe to show: all of it, tags included, and what of it is thought and what is answer.

    The three need not keep step: line breaks wait in reasoning and answer until something follows, but not in text.
    """

    text: str
    reasoning: str
    answer: str


class TextStream:
    """Collects the text of one reply and tells its thought from its answer.

    The thought stands between the tokens `<think>`, with only whitespace before it, and `</think>`. There is one at
    most, and what is never closed is all thought. With starts_in_thought the prompt has ended in `<think>`, and the
    reply begins inside its thought. Tags that stand elsewhere or are spelled out in other tokens are ordinary text.

    text: everything, tags included. Stop strings count wherever they stand, in the thought too, and across the tags.
    Without a tokenizer (random weights) everything stays empty; if the tokenizer lacks the tags, all is answer.
    Source: the model cards of Qwen3 (the tag's token id decides; both parts lose line breaks at their ends).
    """

    def __init__(
        self, tokenizer: Tokenizer | None, stop: tuple[str, ...] = (), starts_in_thought: bool = False
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer is not None else None
        self._stop = stop
        self._held_back = max((len(s) for s in stop), default=1) - 1
        self._shown = 0
        self.text = ""
        self.is_finished = False

        tags = (BEGIN_THOUGHT, END_THOUGHT)
        self._begin_id, self._end_id = (tokenizer.base.token_to_id(t) if tokenizer is not None else None for t in tags)
        has_tags = self._begin_id is not None and self._end_id is not None
        starts_in_thought = starts_in_thought and has_tags
        self._thought = _Part(0 if starts_in_thought else None)
        self._answer = _Part(None if starts_in_thought else 0)
        self._thought_may_begin = has_tags and not starts_in_thought  # only whitespace so far

    @property
    def reasoning(self) -> str:
        """The thought so far, without tags and without line breaks at its ends."""
        return self._thought.of(self.text)

    @property
    def answer(self) -> str:
        """The answer so far, without line breaks at its ends; empty while the thought goes on."""
        return self._answer.of(self.text)

    @property
    def is_thinking(self) -> bool:
        """Whether the reply, with the last token pushed, is inside its thought."""
        return self._thought.begin is not None and self._thought.end is None

    def push(self, token_id: int) -> bool:
        """Add a token. Returns whether a stop string is now complete; it and all after it are cut from the text."""
        if self._decoder is None:
            return False
        piece = self._decoder.push(token_id)
        self._find_parts(token_id, piece)
        return self._append(piece)

    def finish(self) -> None:
        """No more tokens: nothing is held back any longer, but for line breaks at the ends of thought and answer."""
        if not self.is_finished and self._decoder is not None:
            self._append(self._decoder.finish())
        self.is_finished = True

    def take(self) -> Piece:
        """What has become safe to show since the last call.

        After finish() or a stop string, the pieces of all calls together are text, reasoning and answer.
        """
        end = len(self.text) if self.is_finished else max(self._shown, len(self.text) - self._held_back)
        new, self._shown = self.text[self._shown : end], end
        # Whitespace that a thought may follow is not yet known to be answer.
        is_open = self._thought_may_begin and not self.is_finished
        return Piece(new, self._thought.take(self.text, end), "" if is_open else self._answer.take(self.text, end))

    def _find_parts(self, token_id: int, piece: str) -> None:
        """Notice a tag. It ends its piece; before it may stand U+FFFD, for a character that the tag cut off."""
        if token_id == self._end_id and self.is_thinking:
            before = piece.removesuffix(END_THOUGHT)
            self._thought.end = len(self.text) + len(before)
            self._answer.begin = len(self.text) + len(piece)
        elif self._thought_may_begin:
            is_tag = token_id == self._begin_id
            before = piece.removesuffix(BEGIN_THOUGHT) if is_tag else piece
            is_blank = not before.strip()
            if is_tag and is_blank:
                self._thought.begin = len(self.text) + len(piece)
                self._answer.begin = None
            self._thought_may_begin = is_blank and not is_tag

    def _append(self, piece: str) -> bool:
        # A stop string may have begun in text seen before, but not further back than its own length.
        search_from = max(0, len(self.text) - self._held_back)
        self.text += piece
        found = [at for s in self._stop if (at := self.text.find(s, search_from)) >= 0]
        if not found:
            return False
        self.text = self.text[: min(found)]
        self.is_finished = True
        return True


class _Part:
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
        """All of the part that `text` holds."""
        return "" if self.begin is None else text[self.begin : self.end].strip("\n")

    def take(self, text: str, safe_end: int) -> str:
        """What may be shown since the last call, of text up to safe_end; costs no more than the new text's length."""
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
