"""What may come next in a reply, decided on the host token by token, and how several such rules combine.

Knows token ids and masks only: no text, no model, no engine. A mask has one bit a token: bit v % 32 of word v // 32
says whether token v is allowed. Key of names: W words of a mask, ceil(vocab_size / 32).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np


class TokenConstraint(Protocol):
    """A rule for one reply. It sees every token of the reply once, in order, and says which may follow."""

    def is_active(self) -> bool:
        """Whether the next token is restricted at all; if not, the caller leaves the mask alone."""
        ...

    def fill_mask(self, words_W: np.ndarray) -> None:
        """Clear the bits of forbidden tokens. Called only while active.

        words_W: int32, changed in place; bits that come in cleared stay so, and rules combine one after the other.
        """
        ...

    def accept(self, token: int) -> None:
        """Take note of a chosen token, whether the rule was active or not."""
        ...


def bits_of(token_ids: Iterable[int], num_words: int) -> np.ndarray:
    """The mask that allows these tokens alone: int32, (num_words,)."""
    words_W = np.zeros(num_words, np.uint32)  # unsigned, because bit 31 does not fit into a positive int32
    for token in token_ids:
        words_W[token // 32] |= np.uint32(1 << token % 32)
    return words_W.view(np.int32)


class AllOf:
    """Several constraints at once: a token must be allowed by each that is active."""

    def __init__(self, constraints: Iterable[TokenConstraint]) -> None:
        self._constraints = tuple(constraints)

    def is_active(self) -> bool:
        """Whether any of them restricts the next token."""
        return any(constraint.is_active() for constraint in self._constraints)

    def fill_mask(self, words_W: np.ndarray) -> None:
        """Clear the bits of tokens that one of them forbids; words_W as in TokenConstraint."""
        for constraint in self._constraints:
            if constraint.is_active():
                constraint.fill_mask(words_W)

    def accept(self, token: int) -> None:
        """Tell all of them."""
        for constraint in self._constraints:
            constraint.accept(token)


class AfterThought:
    """A constraint on the answer alone: it begins when the thought has ended, and the thought itself is free.

    A reply that is not inside a thought from the start may open one with its first token; if it does not, the
    constraint holds from that token on. separator_ids: the tokens that must stand between the end of a thought and
    the answer, such as those of two line breaks, which Qwen3 has learnt to write there.
    """

    def __init__(
        self,
        constraint: TokenConstraint,
        think_open_id: int,
        think_close_id: int,
        starts_in_thought: bool,
        separator_ids: Sequence[int] = (),
    ) -> None:
        self._constraint = constraint
        self._think_open_id = think_open_id
        self._thought = _Thought(think_open_id, think_close_id, starts_in_thought)
        self._separator = _ForcedTokens(separator_ids)
        self._is_separating = False

    def is_active(self) -> bool:
        """Whether the answer has begun, or may begin now, and is restricted."""
        if self._thought.is_open:
            return False
        return self._is_separating or self._constraint.is_active()

    def fill_mask(self, words_W: np.ndarray) -> None:
        """Clear the bits of what may not stand in the answer; words_W as in TokenConstraint."""
        if self._is_separating:
            self._separator.fill_mask(words_W)
        elif self._thought.may_open:
            opening_W = words_W & bits_of([self._think_open_id], len(words_W))
            self._constraint.fill_mask(words_W)
            words_W |= opening_W
        else:
            self._constraint.fill_mask(words_W)

    def accept(self, token: int) -> None:
        """Take note of a token; the inner constraint hears only of those of the answer."""
        was_open = self._thought.is_open
        self._thought.accept(token)
        if self._thought.is_open:
            return
        if self._is_separating:
            self._separator.accept(token)
        elif not was_open:
            self._constraint.accept(token)
        self._is_separating = (was_open or self._is_separating) and not self._separator.is_done


class ThinkingBudget:
    """Ends a thought that takes too long: after max_tokens tokens of it, the tokens close_ids follow, one by one.

    Counted are the tokens after `<think>`, or all of them in a reply that starts inside a thought. A thought that
    ends by itself is left alone. close_ids: such as the tokens of "\\n</think>\\n\\n".

    Raises: ValueError for a negative budget, or if close_ids would not end the thought.
    """

    def __init__(
        self,
        max_tokens: int,
        close_ids: Sequence[int],
        think_open_id: int,
        think_close_id: int,
        starts_in_thought: bool,
    ) -> None:
        if max_tokens < 0:
            raise ValueError(f"a thinking budget must be 0 tokens or more, got {max_tokens}")
        if think_close_id not in close_ids:
            raise ValueError(f"close_ids must contain {think_close_id}, which ends a thought; got {list(close_ids)}")
        self._tokens_left = max_tokens
        self._thought = _Thought(think_open_id, think_close_id, starts_in_thought)
        self._closing = _ForcedTokens(close_ids)

    def is_active(self) -> bool:
        """Whether the thought is being ended."""
        if self._closing.is_begun:
            return not self._closing.is_done
        return self._thought.is_open and self._tokens_left == 0

    def fill_mask(self, words_W: np.ndarray) -> None:
        """Clear all bits but that of the next of close_ids; words_W as in TokenConstraint."""
        self._closing.fill_mask(words_W)

    def accept(self, token: int) -> None:
        """Take note of a token.

        Raises: RuntimeError if it is not the one that had to come.
        """
        if self.is_active():
            self._closing.accept(token)
        elif self._thought.is_open:
            self._tokens_left -= 1
        self._thought.accept(token)


class _Thought:
    """Whether a reply is inside its thought, which begins before the reply or with its first token, never later."""

    def __init__(self, open_id: int, close_id: int, starts_in_thought: bool) -> None:
        self._open_id = open_id
        self._close_id = close_id
        self.is_open = starts_in_thought
        self.may_open = not starts_in_thought

    def accept(self, token: int) -> None:
        self.is_open = token != self._close_id if self.is_open else self.may_open and token == self._open_id
        self.may_open = False


class _ForcedTokens:
    """Tokens that must come one after the other."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = tuple(token_ids)
        self._position = 0

    @property
    def is_begun(self) -> bool:
        return self._position > 0

    @property
    def is_done(self) -> bool:
        return self._position == len(self._token_ids)

    def fill_mask(self, words_W: np.ndarray) -> None:
        words_W &= bits_of([self._token_ids[self._position]], len(words_W))

    def accept(self, token: int) -> None:
        expected = self._token_ids[self._position]
        if token != expected:
            raise RuntimeError(f"token {expected} had to come next, but {token} came")
        self._position += 1
