"""Constraints: which tokens a mask leaves, when a rule is active, and how rules combine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.sampling.constraints import AfterThought, AllOf, ThinkingBudget, TokenConstraint, bits_of

NUM_WORDS = 3
VOCAB = NUM_WORDS * 32
OPEN, CLOSE, BREAK = 31, 32, 95  # at the borders of words
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


def budget(max_tokens: int, close_ids=(BREAK, CLOSE, BREAK), starts_in_thought: bool = True) -> ThinkingBudget:
    return ThinkingBudget(max_tokens, close_ids, OPEN, CLOSE, starts_in_thought)


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


def test_after_thought_leaves_the_thought_free_and_begins_when_it_ends():
    inner = Only({1, 2})
    seen = steps(AfterThought(inner, OPEN, CLOSE, starts_in_thought=True), [7, OPEN, 8, CLOSE, 1, 2])
    assert seen == [EVERY, EVERY, EVERY, EVERY, {1, 2}, {1, 2}, {1, 2}]
    assert inner.accepted == [1, 2]


def test_after_thought_allows_a_thought_to_begin_the_reply():
    inner = Only({1, 2})
    seen = steps(AfterThought(inner, OPEN, CLOSE, starts_in_thought=False), [OPEN, 7, CLOSE, 1])
    assert seen == [{1, 2, OPEN}, EVERY, EVERY, {1, 2}, {1, 2}]
    assert inner.accepted == [1]


def test_after_thought_holds_from_the_first_token_of_a_reply_without_a_thought():
    inner = Only({1, 2})
    seen = steps(AfterThought(inner, OPEN, CLOSE, starts_in_thought=False), [1, 2])
    assert seen == [{1, 2, OPEN}, {1, 2}, {1, 2}]
    assert inner.accepted == [1, 2]


def test_after_thought_takes_marks_of_a_thought_in_the_answer_for_the_answer():
    inner = Only({1, OPEN, CLOSE})
    seen = steps(AfterThought(inner, OPEN, CLOSE, starts_in_thought=False), [1, OPEN, CLOSE])
    assert seen == [{1, OPEN, CLOSE}] * 4
    assert inner.accepted == [1, OPEN, CLOSE]


def test_after_thought_never_allows_a_token_that_came_in_forbidden():
    constraint = AfterThought(Only({1, 2}), OPEN, CLOSE, starts_in_thought=False)
    assert allowed(constraint, frozenset({2, 3})) == {2}
    assert allowed(constraint, frozenset({2, OPEN})) == {2, OPEN}


def test_after_thought_is_as_inactive_as_its_constraint():
    constraint = AfterThought(Only({1}, active=False), OPEN, CLOSE, starts_in_thought=False)
    assert steps(constraint, [OPEN, 7, CLOSE, 8]) == [EVERY] * 5


def test_after_thought_forces_the_separator_between_thought_and_answer():
    inner = Only({1})
    constraint = AfterThought(inner, OPEN, CLOSE, starts_in_thought=True, separator_ids=[BREAK, 4])
    assert steps(constraint, [7, CLOSE, BREAK, 4, 1]) == [EVERY, EVERY, {BREAK}, {4}, {1}, {1}]
    assert inner.accepted == [1]


def test_after_thought_forces_no_separator_without_a_thought():
    constraint = AfterThought(Only({1}), OPEN, CLOSE, starts_in_thought=False, separator_ids=[BREAK])
    assert steps(constraint, [1]) == [{1, OPEN}, {1}]


def test_thinking_budget_ends_a_thought_that_is_still_open():
    assert steps(budget(2), [7, 8, BREAK, CLOSE, BREAK, 9]) == [EVERY, EVERY, {BREAK}, {CLOSE}, {BREAK}, EVERY, EVERY]


def test_thinking_budget_counts_from_the_token_that_opens_the_thought():
    seen = steps(budget(2, [CLOSE], starts_in_thought=False), [OPEN, 7, 8, CLOSE, 9])
    assert seen == [EVERY, EVERY, EVERY, {CLOSE}, EVERY, EVERY]


@pytest.mark.parametrize("starts_in_thought", [True, False])
def test_thinking_budget_of_none_ends_the_thought_at_once(starts_in_thought):
    constraint = budget(0, [CLOSE], starts_in_thought)
    if not starts_in_thought:
        assert allowed(constraint) == EVERY
        constraint.accept(OPEN)
    assert steps(constraint, [CLOSE]) == [{CLOSE}, EVERY]


@pytest.mark.parametrize("tokens", [[CLOSE], [7, CLOSE], [7, 8, CLOSE]])
def test_thinking_budget_leaves_a_thought_that_ends_by_itself_alone(tokens):
    # A second thought, too: there is only one in a reply.
    assert steps(budget(3), [*tokens, OPEN, 7, 8, 9, 10])[-6:] == [EVERY] * 6


def test_thinking_budget_leaves_a_reply_without_a_thought_alone():
    assert steps(budget(1, starts_in_thought=False), [7, OPEN, 8, 9]) == [EVERY] * 5


def test_thinking_budget_is_over_once_it_has_ended_the_thought():
    assert steps(budget(0, [CLOSE]), [CLOSE, OPEN, 7, 8])[1:] == [EVERY] * 4


def test_thinking_budget_never_allows_a_token_that_came_in_forbidden():
    assert allowed(budget(0, [CLOSE]), frozenset({1, 2})) == frozenset()


@given(st.integers(0, 6), st.lists(st.integers(0, VOCAB - 1), max_size=20), st.booleans())
def test_thinking_budget_is_never_exceeded(max_tokens, wishes, starts_in_thought):
    constraint = budget(max_tokens, starts_in_thought=starts_in_thought)
    reply = []
    for wish in [*([] if starts_in_thought else [OPEN]), *wishes, *[7] * 10]:
        may_come = allowed(constraint)
        reply.append(wish if wish in may_come else min(may_come))
        constraint.accept(reply[-1])
    thought = reply[not starts_in_thought : reply.index(CLOSE, not starts_in_thought)]
    assert len(thought) <= max_tokens + 1  # and the BREAK that comes before CLOSE


def test_thinking_budget_refuses_close_ids_that_do_not_end_the_thought():
    with pytest.raises(ValueError, match=rf"must contain {CLOSE}, which ends a thought; got \[{BREAK}\]"):
        budget(5, [BREAK])


def test_thinking_budget_refuses_a_negative_number():
    with pytest.raises(ValueError, match="0 tokens or more, got -1"):
        budget(-1)


def test_thinking_budget_reports_a_token_other_than_the_one_that_had_to_come():
    with pytest.raises(RuntimeError, match=f"token {CLOSE} had to come next, but 7 came"):
        budget(0, [CLOSE]).accept(7)


def test_thinking_budget_and_after_thought_agree_on_the_separator():
    thinking = budget(1)
    answer = AfterThought(Only({1}), OPEN, CLOSE, starts_in_thought=True, separator_ids=[BREAK])
    seen = steps(AllOf([thinking, answer]), [7, BREAK, CLOSE, BREAK, 1])
    assert seen == [EVERY, {BREAK}, {CLOSE}, {BREAK}, {1}, {1}]
