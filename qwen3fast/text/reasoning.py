"""Reasoning and answer separated by token ids, in a reply and in the prompt that it continues."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from qwen3fast.text.tokenizer import Tokenizer

BEGIN_REASONING, END_REASONING, BEGIN_TOOL_CALL = "<think>", "</think>", "<tool_call>"
AFTER_REASONING = "\n\n"  # what Qwen3 has learned to write between reasoning and answer
# Ends reasoning at its limit, before `</think>`. Source: Qwen3 Technical Report, arXiv:2505.09388, thinking budget.
CLOSING_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
)

# How chat templates begin a turn, and how they begin an assistant's turn: Qwen's, and DeepSeek's distilled Qwen3.
_TURNS = {"<|im_start|>": "<|im_start|>assistant\n", "<｜Assistant｜>": "<｜Assistant｜>", "<｜User｜>": ""}
_END_OF_TURN = "<|im_end|>"
_QUESTION = [{"role": "user", "content": "?"}]


class ReasoningTracker:
    """The state of one reply: whether it is inside its reasoning. Push every token of the reply, in order.

    Reasoning stands between `<think>`, which only whitespace may precede, and `</think>`; a reply has one at most.
    A token `<tool_call>` inside also ends it: the call belongs to the answer.

    Attributes:
        is_open: the reply, with the last token pushed, is inside its reasoning.
        may_open: nothing but whitespace has come, so `<think>` would begin the reasoning.
    Source: the model cards of Qwen3, and vLLM's reasoning parser for it.
    """

    def __init__(self, reasoning: ReasoningFormat, is_open: bool = False, may_open: bool = True) -> None:
        self._format = reasoning
        self.is_open = is_open and reasoning.has_tags
        self.may_open = may_open and reasoning.has_tags

    def push(self, token_id: int) -> None:
        """Take note of a token."""
        tags = self._format
        if self.may_open and token_id == tags.begin_id:
            self.is_open, self.may_open = True, False
        elif self.is_open and token_id in (tags.end_id, tags.tool_call_id):
            self.is_open = self.may_open = False
        elif self.may_open:
            self.may_open = tags.is_blank(token_id)

    def copy(self) -> ReasoningTracker:
        """Return a tracker in the same state."""
        return copy(self)


class ReasoningFormat:
    """The marks of one model's reasoning: the ids of its tags, and the text around them in its chat template.

    Attributes:
        begin_id, end_id: of `<think>` and `</think>`; None without them, and then has_tags is False.
        tool_call_id: of `<tool_call>`, or None. separator_ids: of what stands between reasoning and answer.
        closing_ids: of `CLOSING_TEXT`.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        ids = [self._id(tag) for tag in (BEGIN_REASONING, END_REASONING, BEGIN_TOOL_CALL)]
        self.begin_id, self.end_id, self.tool_call_id = ids
        self.has_tags = self.begin_id is not None and self.end_id is not None
        texts = (AFTER_REASONING, CLOSING_TEXT) if tokenizer is not None and self.has_tags else ("", "")
        self.separator_ids, self.closing_ids = (tokenizer.encode(x) if tokenizer and x else [] for x in texts)
        # The id that begins a turn -> the ids that begin an assistant's turn; none where it is somebody else's.
        self._turns = {i: tokenizer.encode(x) for mark, x in _TURNS.items() if tokenizer and (i := self._id(mark))}
        self._template: tuple[str | None, bool] | None = None  # of the tokenizer when last asked, and the answer

    @property
    def has_switch(self) -> bool:
        """True if the chat template lets the caller choose between answers with and without reasoning."""
        return self._tokenizer is not None and "enable_thinking" in (self._tokenizer.chat_template or "")

    def is_blank(self, token_id: int) -> bool:
        """Return whether a token shows nothing but whitespace, as control tokens do."""
        assert self._tokenizer is not None, "asked for where there are tags"
        if self._tokenizer.is_special(token_id):
            return True
        return not self._tokenizer.token_bytes(token_id).decode("utf-8", "replace").strip()

    def tracker_after(self, prompt_ids: Sequence[int]) -> ReasoningTracker:
        """Return a tracker for the reply to a prompt: the prompt's whole last assistant turn is part of the reply.

        If the last turn belongs to another role, the reply begins with its first token. In a prompt without turns, the
        reply is inside reasoning if the last tag is `<think>`. Where the chat template itself opens the reasoning, a
        turn begins inside it even without the tag.
        """
        if not self.has_tags:
            return ReasoningTracker(self)
        turn = self._last_turn(prompt_ids)
        if turn is not None:
            tracker = ReasoningTracker(self, is_open=self._template_opens_reasoning())
            for token_id in turn:
                tracker.push(token_id)
            return tracker
        if any(token_id in self._turns for token_id in prompt_ids):
            return ReasoningTracker(self)
        tags = (self.begin_id, self.end_id, self.tool_call_id)
        last = next((token_id for token_id in reversed(prompt_ids) if token_id in tags), None)
        return ReasoningTracker(self, last == self.begin_id, last != self.begin_id)

    def may_begin(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether the reply to a prompt may begin with reasoning, by what the chat template promises."""
        tracker = self.tracker_after(prompt_ids)
        if tracker.is_open or not tracker.may_open or self._tokenizer is None:
            return tracker.is_open
        return self.has_switch and self._last_turn(prompt_ids) == []

    def separator_after(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the tokens that must still come before the answer, where a prompt ends behind `</think>`."""
        turn = self._last_turn(prompt_ids) if self.has_tags else None
        if not turn or self.end_id not in turn or self.tracker_after(prompt_ids).is_open:
            return []
        written = turn[len(turn) - turn[::-1].index(self.end_id) :]
        is_begun = written == self.separator_ids[: len(written)]
        return self.separator_ids[len(written) :] if is_begun else []

    def _last_turn(self, prompt_ids: Sequence[int]) -> list[int] | None:
        """Return the tokens of the assistant's turn that a prompt ends in; None if it ends in none."""
        begins = (n for n in range(len(prompt_ids) - 1, -1, -1) if prompt_ids[n] in self._turns)
        turn = list(prompt_ids[next(begins, len(prompt_ids)) :])
        header = self._turns[turn[0]] if turn else []
        is_open = header and turn[: len(header)] == header and self._id(_END_OF_TURN) not in turn
        return turn[len(header) :] if is_open else None

    def _template_opens_reasoning(self) -> bool:
        """Return whether the chat template's beginning of a reply is inside reasoning, as Thinking-2507's is."""
        assert self._tokenizer is not None, "asked for where there are tags"
        source = self._tokenizer.chat_template
        if self._template is None or self._template[0] != source:
            try:
                text = str(self._tokenizer.apply_chat_template(_QUESTION)) if source is not None else ""
            except ValueError:  # a template that wants other messages
                text = ""
            self._template = source, text.rstrip().endswith(BEGIN_REASONING)
        return self._template[1]

    def _id(self, token: str) -> int | None:
        return self._tokenizer.base.token_to_id(token) if self._tokenizer is not None else None
