"""Constraints: which tokens a mask leaves, when a rule is active, and how rules combine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.sampling.constraints import AfterReasoning, AllOf, MinTokens, ThinkingBudget, TokenConstraint, bits_of
from qwen3fast.text.reasoning import ReasoningFormat, ReasoningTracker

NUM_WORDS = 3
VOCAB = NUM_WORDS * 32
OPEN, CLOSE, BREAK, CALL = 31, 32, 95, 64  # at the borders of words
SENTENCE = [40, 41]  # closes reasoning at its limit
EVERY = frozenset(range(VOCAB))
token_sets = st.frozensets(st.integers(0, VOCAB - 1))


class Only:
    """Allows the same tokens always, and remembers what it is told."""

    def __init__(self, token_ids, active: bool = True) -> None:
        self.token_ids = token_ids
        self.active = active
        self.accepted: list[int] = []

    def is_active(self) -> bool:
        return self.active

    def fill_mask(self, words_W: np.ndarray) -> None:
        words_W &= bits_of(self.token_ids, len(words_W))

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def is_free_for(self, num_tokens: int) -> bool:
        return not self.active


def ids_of(words_W: np.ndarray) -> frozenset[int]:
    """The tokens whose bits are set, by the rule that the protocol states."""
    return frozenset(v for v in range(len(words_W) * 32) if int(words_W[v // 32]) >> (v % 32) & 1)


def allowed(constraint: TokenConstraint, before: frozenset[int] = EVERY) -> frozenset[int]:
    """What may come next, of the tokens `before`, as a caller finds it."""
    words_W = bits_of(before, NUM_WORDS)
    if constraint.is_active():
        constraint.fill_mask(words_W)
    return ids_of(words_W)


def steps(constraint: TokenConstraint, tokens) -> list[frozenset[int]]:
    """What was allowed before each of the tokens, and after the last."""
    seen = [allowed(constraint)]
    for token in tokens:
        constraint.accept(token)
        seen.append(allowed(constraint))
    return seen


class Tags:
    """A tokenizer of the tags: "\n\n" is the token BREAK, any other text is SENTENCE, every other id a letter."""

    chat_template = None

    def __init__(self, tags) -> None:
        self.base = SimpleNamespace(token_to_id=tags.get)

    def encode(self, text: str) -> list[int]:
        return [BREAK] if text == "\n\n" else SENTENCE

    def is_special(self, token_id: int) -> bool:
        return False

    def token_bytes(self, token_id: int) -> bytes:
        return b"\n\n" if token_id == BREAK else b"x"


FORMAT = ReasoningFormat(Tags({"<think>": OPEN, "</think>": CLOSE, "<tool_call>": CALL}))
WITHOUT_CALLS = ReasoningFormat(Tags({"<think>": OPEN, "</think>": CLOSE}))
FREE = EVERY - {CALL}  # what reasoning may hold before an answer that must follow a grammar


def budget(max_tokens: int, is_open: bool = True) -> ThinkingBudget:
    return ThinkingBudget(max_tokens, FORMAT, ReasoningTracker(FORMAT, is_open, not is_open))


def after(constraint, is_open: bool, reasoning=FORMAT, **options) -> AfterReasoning:
    return AfterReasoning(constraint, reasoning, ReasoningTracker(reasoning, is_open, not is_open), **options)


@given(token_sets)
def test_bits_of_sets_the_bits_of_its_tokens_and_no_others(token_ids):
    words_W = bits_of(token_ids, NUM_WORDS)
    assert (words_W.dtype, words_W.shape, ids_of(words_W)) == (np.int32, (NUM_WORDS,), token_ids)


@given(st.lists(st.tuples(token_sets, st.booleans()), max_size=4), token_sets)
def test_all_of_is_the_intersection_of_the_active_ones(parts, before):
    expected = before.intersection(*(token_ids for token_ids, active in parts if active))
    assert allowed(AllOf(Only(*part) for part in parts), before) == expected


@pytest.mark.parametrize("active", [(), (False, False), (False, True), (True, True)])
def test_all_of_is_active_if_one_of_them_is(active):
    assert AllOf([Only({1}, a) for a in active]).is_active() == any(active)


def test_all_of_tells_each_of_them_of_every_token():
    parts = [Only({1}), Only({2}, active=False)]
    steps(AllOf(parts), [5, 6])
    assert [part.accepted for part in parts] == [[5, 6], [5, 6]]


def test_after_reasoning_leaves_the_reasoning_free_and_begins_when_it_ends():
    inner = Only({1, 2})
    seen = steps(after(inner, is_open=True), [7, OPEN, 8, CLOSE, BREAK, 1, 2])
    assert seen == [FREE, FREE, FREE, FREE, {BREAK}, {1, 2}, {1, 2}, {1, 2}]
    assert inner.accepted == [1, 2]


def test_after_reasoning_without_a_token_for_tool_calls_is_inactive_while_it_is_open():
    assert steps(after(Only({1}), True, WITHOUT_CALLS), [7, CALL, CLOSE]) == [EVERY, EVERY, EVERY, {BREAK}]


@pytest.mark.parametrize("reasoning", [FORMAT, WITHOUT_CALLS])
def test_after_reasoning_does_not_let_the_reply_end_without_an_answer(reasoning):
    free = (FREE if reasoning is FORMAT else EVERY) - {5, 40}
    seen = steps(after(Only({1, 5}), False, reasoning, end_ids=[5, 40]), [OPEN, 7, CLOSE, BREAK, 5])
    assert seen == [{1, 5, OPEN}, free, free, {BREAK}, {1, 5}, {1, 5}]


def test_after_reasoning_allows_reasoning_to_begin_the_reply():
    inner = Only({1, 2})
    seen = steps(after(inner, is_open=False), [OPEN, 7, CLOSE, BREAK, 1])
    assert seen == [{1, 2, OPEN}, FREE, FREE, {BREAK}, {1, 2}, {1, 2}]
    assert inner.accepted == [1]


@pytest.mark.parametrize("first", [1, BREAK])
def test_after_reasoning_holds_from_the_first_token_of_a_reply_without_reasoning(first):
    inner = Only({1, 2, BREAK})
    seen = steps(after(inner, is_open=False), [first, 2])
    assert seen == [{1, 2, BREAK, OPEN}, {1, 2, BREAK}, {1, 2, BREAK}]
    assert inner.accepted == [first, 2]


def test_after_reasoning_takes_tags_in_the_answer_for_the_answer():
    inner = Only({1, OPEN, CLOSE})
    seen = steps(after(inner, is_open=False), [1, OPEN, CLOSE])
    assert seen == [{1, OPEN, CLOSE}] * 4
    assert inner.accepted == [1, OPEN, CLOSE]


def test_after_reasoning_never_allows_a_token_that_came_in_forbidden():
    assert allowed(after(Only({1, 2}), is_open=False), frozenset({2, 3})) == {2}
    assert allowed(after(Only({1, 2}), is_open=False), frozenset({2, OPEN})) == {2, OPEN}
    assert allowed(after(Only({1, 2}), is_open=True), frozenset({2, CALL})) == {2}


def test_after_reasoning_is_as_inactive_as_its_constraint():
    constraint = after(Only({1}, active=False), False, WITHOUT_CALLS)
    assert steps(constraint, [OPEN, 7, CLOSE, BREAK, 8]) == [EVERY, EVERY, EVERY, {BREAK}, EVERY, EVERY]


def test_after_reasoning_forces_the_separator_that_the_prompt_left_out():
    inner = Only({1})
    constraint = AfterReasoning(inner, FORMAT, ReasoningTracker(FORMAT, False, False), [BREAK])
    assert steps(constraint, [BREAK, 1]) == [{BREAK}, {1}, {1}]
    assert inner.accepted == [1]


def test_after_reasoning_does_not_move_the_tracker_that_it_was_given():
    tracker = ReasoningTracker(FORMAT, True, False)
    steps(AfterReasoning(Only({1}), FORMAT, tracker), [CLOSE])
    steps(ThinkingBudget(0, FORMAT, tracker), [CLOSE])
    assert tracker.is_open


def test_thinking_budget_ends_reasoning_that_is_still_open():
    closing = [{40}, {41}, {CLOSE}, {BREAK}]
    assert steps(budget(2), [7, 8, *SENTENCE, CLOSE, BREAK, 9]) == [EVERY, EVERY, *closing, EVERY, EVERY]


@pytest.mark.parametrize("before", [[], [BREAK]])
def test_thinking_budget_counts_from_the_token_that_opens_the_reasoning(before):
    seen = steps(budget(2, is_open=False), [*before, OPEN, 7, 8, *SENTENCE, CLOSE])
    assert seen[len(before) :] == [EVERY, EVERY, EVERY, {40}, {41}, {CLOSE}, {BREAK}]


@pytest.mark.parametrize("is_open", [True, False])
def test_thinking_budget_of_none_ends_the_reasoning_at_once(is_open):
    constraint = budget(0, is_open)
    if not is_open:
        assert allowed(constraint) == EVERY
        constraint.accept(OPEN)
    assert steps(constraint, [CLOSE, BREAK]) == [{CLOSE}, {BREAK}, EVERY]


@pytest.mark.parametrize("tokens", [[CLOSE], [7, CLOSE], [7, 8, CLOSE], [7, CALL]])
def test_thinking_budget_leaves_reasoning_that_ends_by_itself_alone(tokens):
    # Tags that follow are text: there is only one reasoning in a reply.
    assert steps(budget(3), [*tokens, OPEN, 7, 8, 9, 10])[-6:] == [EVERY] * 6


def test_thinking_budget_leaves_a_reply_without_reasoning_alone():
    assert steps(budget(1, is_open=False), [7, OPEN, 8, 9]) == [EVERY] * 5


def test_thinking_budget_is_over_once_it_has_ended_the_reasoning():
    assert steps(budget(0), [CLOSE, BREAK, OPEN, 7, 8])[2:] == [EVERY] * 4


def test_thinking_budget_never_allows_a_token_that_came_in_forbidden():
    assert allowed(budget(0), frozenset({1, 2})) == frozenset()


@given(st.integers(0, 6), st.lists(st.integers(0, VOCAB - 1), max_size=20), st.booleans())
def test_thinking_budget_is_never_exceeded(max_tokens, wishes, is_open):
    constraint = budget(max_tokens, is_open)
    reply = []
    for wish in [*([] if is_open else [OPEN]), *wishes, *[7] * 10]:
        may_come = allowed(constraint)
        reply.append(wish if wish in may_come else min(may_come))
        constraint.accept(reply[-1])
    ends = [n for n, token in enumerate(reply) if n >= (not is_open) and token in (CLOSE, CALL)]
    assert ends[0] - (not is_open) <= max_tokens + len(SENTENCE)


def test_thinking_budget_reports_a_token_other_than_the_one_that_had_to_come():
    with pytest.raises(RuntimeError, match=f"expected token {CLOSE} next, got 7"):
        budget(0).accept(7)


def test_thinking_budget_and_after_reasoning_agree_on_the_separator():
    seen = steps(AllOf([budget(1), after(Only({1}), is_open=True)]), [7, *SENTENCE, CLOSE, BREAK, 1])
    assert seen == [FREE, {40}, {41}, {CLOSE}, {BREAK}, {1}, {1}]


tokens = st.lists(st.sampled_from([OPEN, CLOSE, CALL, BREAK, 7]), max_size=12)


@given(st.integers(0, 6), tokens, tokens, st.booleans(), st.integers(1, 12))
def test_thinking_budget_restricts_no_token_that_it_called_free(max_tokens, before, then, is_open, num_tokens):
    constraint = AllOf([budget(max_tokens, is_open)])
    for wish in before:
        constraint.accept(wish if wish in (may_come := allowed(constraint)) else min(may_come))
    if constraint.is_free_for(num_tokens):
        for token in then[:num_tokens]:
            assert not constraint.is_active()
            constraint.accept(token)


@pytest.mark.parametrize(("max_tokens", "free"), [(0, 0), (1, 1), (5, 5)])
def test_thinking_budget_is_free_up_to_its_limit_and_once_it_is_over(max_tokens, free):
    constraint = budget(max_tokens)
    assert [constraint.is_free_for(n) for n in range(1, 9)] == [n <= free for n in range(1, 9)]
    for token in [*[7] * max_tokens, *(SENTENCE if max_tokens else []), CLOSE]:
        constraint.accept(token)
    assert not constraint.is_free_for(1)
    constraint.accept(BREAK)
    assert constraint.is_free_for(1000)


def test_min_tokens_forbids_the_ends_of_the_reply_until_it_is_long_enough():
    constraint = MinTokens(2, [5, OPEN])
    assert not constraint.is_free_for(1)
    assert steps(constraint, [7, 8, 5]) == [EVERY - {5, OPEN}, EVERY - {5, OPEN}, EVERY, EVERY]
    assert constraint.is_free_for(1000)


def test_a_constraint_on_the_answer_is_never_free():
    assert not after(Only({1}, active=False), is_open=True).is_free_for(1)
    assert not AllOf([budget(5), Only({1})]).is_free_for(1)
