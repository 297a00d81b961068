"""Constraints on the next token of a reply, evaluated on the host token by token, and their combination.

Knows token ids and masks only: no text, no model, no engine. A mask has one bit per token: bit v % 32 of word v // 32
says whether token v is allowed. Key of names: W words of a mask, ceil(vocab_size / 32).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from qwen3fast.text.reasoning import ReasoningFormat, ReasoningTracker


class TokenConstraint(Protocol):
    """A rule for one reply. It sees every token of the reply once, in order, and says which may follow."""

    def is_active(self) -> bool:
        """Return whether the next token is restricted at all; if not, the caller leaves the mask alone."""
        ...

    def fill_mask(self, words_W: np.ndarray) -> None:
        """Clear the bits of forbidden tokens. Called only while active.

        words_W: int32, changed in place; bits that come in cleared stay cleared, and rules combine one after the other.
        """
        ...

    def accept(self, token: int) -> None:
        """Record a chosen token, whether the rule was active or not."""
        ...

    def is_free_for(self, num_tokens: int) -> bool:
        """Return whether none of the next num_tokens tokens can be restricted, whatever they are."""
        ...


def bits_of(token_ids: Iterable[int], num_words: int) -> np.ndarray:
    """Return the mask that allows these tokens alone: int32, (num_words,)."""
    words_W = np.zeros(num_words, np.uint32)  # unsigned, because bit 31 does not fit into a positive int32
    for token in token_ids:
        words_W[token // 32] |= np.uint32(1 << token % 32)
    return words_W.view(np.int32)


class AllOf:
    """Several constraints at once: a token must be allowed by each that is active."""

    def __init__(self, constraints: Iterable[TokenConstraint]) -> None:
        self._constraints = tuple(constraints)

    def is_active(self) -> bool:
        """Return whether any of them restricts the next token."""
        return any(constraint.is_active() for constraint in self._constraints)

    def fill_mask(self, words_W: np.ndarray) -> None:
        """Clear the bits of tokens that one of them forbids; words_W as in TokenConstraint."""
        for constraint in self._constraints:
            if constraint.is_active():
                constraint.fill_mask(words_W)

    def accept(self, token: int) -> None:
        """Pass a token on to all of them."""
        for constraint in self._constraints:
            constraint.accept(token)

    def is_free_for(self, num_tokens: int) -> bool:
        """Return whether none of them can restrict the next num_tokens tokens."""
        return all(constraint.is_free_for(num_tokens) for constraint in self._constraints)


class AfterReasoning:
    """A constraint on the answer alone. The reasoning is free, but neither a tool call nor the reply's end may end it.

    A reply that is not inside reasoning from the start may open it with its first token; if it does not, the
    constraint holds from that token on. Between the reasoning and the answer, the format's separator tokens must
    stand, such as two line breaks, which Qwen3 has learned to write there.

    tracker: in its state after the prompt. separator_ids: what of the separator must come first, where the prompt ends
    behind the reasoning. end_ids: the tokens that would end the reply, which needs an answer first.
    """

    def __init__(
        self,
        constraint: TokenConstraint,
        reasoning: ReasoningFormat,
        tracker: ReasoningTracker,
        separator_ids: Sequence[int] = (),
        end_ids: Iterable[int] = (),
    ) -> None:
        self._constraint, self._format = constraint, reasoning
        self._tracker = tracker.copy()
        self._separator = _ForcedTokens(separator_ids)
        calls = [] if reasoning.tool_call_id is None else [reasoning.tool_call_id]
        self._not_in_reasoning = [*calls, *end_ids]

    def is_active(self) -> bool:
        """Return whether the next token is restricted."""
        if self._tracker.is_open:
            return bool(self._not_in_reasoning)
        return not self._separator.is_done or self._constraint.is_active()

    def fill_mask(self, words_W: np.ndarray) -> None:
        """Clear the bits of tokens that may not come next; words_W as in TokenConstraint."""
        if self._tracker.is_open:
            words_W &= ~bits_of(self._not_in_reasoning, len(words_W))
        elif not self._separator.is_done:
            self._separator.fill_mask(words_W)
        elif self._tracker.may_open and self._format.begin_id is not None:
            opening_W = words_W & bits_of([self._format.begin_id], len(words_W))
            self._constraint.fill_mask(words_W)
            words_W |= opening_W
        else:
            self._constraint.fill_mask(words_W)

    def accept(self, token: int) -> None:
        """Take note of a token; the inner constraint sees only tokens of the answer."""
        was_open = self._tracker.is_open
        self._tracker.push(token)
        if self._tracker.is_open:
            return
        if was_open:
            self._separator = _ForcedTokens(self._format.separator_ids)
        elif not self._separator.is_done:
            self._separator.accept(token)
        else:
            self._tracker.may_open = False  # the answer has begun, if only with whitespace
            self._constraint.accept(token)

    def is_free_for(self, num_tokens: int) -> bool:
        """Return False: the reasoning may end with any token."""
        return False


class ThinkingBudget:
    """A limit on reasoning: after max_tokens tokens of it, `</think>` and the separator are forced.

    Reasoning that has begun first gets the sentence that tells the model to answer (`CLOSING_TEXT`).

    It counts the tokens of the reply after `<think>`, or all of them in a reply that starts inside reasoning.
    Reasoning that ends by itself before is left alone. max_tokens: 0 or more. reasoning: a format with tags.
    tracker: in its state after the prompt.
    """

    def __init__(self, max_tokens: int, reasoning: ReasoningFormat, tracker: ReasoningTracker) -> None:
        assert reasoning.end_id is not None, "checked with the request"
        self._tokens_left = max_tokens
        self._tracker = tracker.copy()
        sentence = reasoning.closing_ids if max_tokens else []
        self._closing = _ForcedTokens([*sentence, reasoning.end_id, *reasoning.separator_ids])

    def is_active(self) -> bool:
        """Return whether the reasoning is being ended."""
        if self._closing.is_begun:
            return not self._closing.is_done
        return self._tracker.is_open and self._tokens_left == 0

    def fill_mask(self, words_W: np.ndarray) -> None:
        """Clear all bits but the one of the token that must come next; words_W as in TokenConstraint."""
        self._closing.fill_mask(words_W)

    def accept(self, token: int) -> None:
        """Take note of a token.

        Raises: RuntimeError if it is not the one that had to come.
        """
        if self.is_active():
            self._closing.accept(token)
        elif self._tracker.is_open:
            self._tokens_left -= 1
        self._tracker.push(token)

    def is_free_for(self, num_tokens: int) -> bool:
        """Return whether the reasoning cannot reach its limit within the next num_tokens tokens."""
        if self._closing.is_begun:
            return self._closing.is_done
        opening = 0 if self._tracker.is_open else 1  # the token that opens the reasoning does not count
        is_possible = self._tracker.is_open or self._tracker.may_open
        return not is_possible or num_tokens <= self._tokens_left + opening


class MinTokens:
    """A reply of at least min_tokens tokens before one that would end it. stop_ids: the tokens that would."""

    def __init__(self, min_tokens: int, stop_ids: Iterable[int]) -> None:
        self._tokens_left, self._stop_ids = min_tokens, tuple(stop_ids)

    def is_active(self) -> bool:
        """Return whether the reply is too short to end."""
        return self._tokens_left > 0

    def fill_mask(self, words_W: np.ndarray) -> None:
        """Clear the bits of the tokens that would end the reply; words_W as in TokenConstraint."""
        words_W &= ~bits_of(self._stop_ids, len(words_W))

    def accept(self, token: int) -> None:
        """Count a token."""
        self._tokens_left -= 1

    def is_free_for(self, num_tokens: int) -> bool:
        """Return whether the reply may end."""
        return not self.is_active()


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
            raise RuntimeError(f"expected token {expected} next, got {token}")
        self._position += 1
