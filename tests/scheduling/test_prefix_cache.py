"""PrefixCache alone: the slot that a prompt gets, what is evicted for it, and how much of it need not be computed."""

from dataclasses import replace
from itertools import takewhile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.engine.prefill import CHUNK_SIZES, Prefill, split_into_chunks, usable_prefix
from qwen3fast.scheduling.prefix_cache import PrefixCache, common_prefix
from qwen3fast.scheduling.request import Adapter, Request

POSITIONS = 256
A, B, C, D = (list(range(start, start + 20)) for start in (0, 20, 40, 60))


def make_request(prompt_ids, output_ids=()):
    """A request that has its prompt in the cache and these tokens of its reply; logits tell prompts apart."""
    request = Request(list(prompt_ids), max_tokens=100)
    request.output_ids, request.launched = list(output_ids), len(output_ids)
    if output_ids:
        request.prompt_logits_1V = torch.tensor([[float(len(prompt_ids)), float(sum(prompt_ids))]])
    return request


def half_way(prompt_ids, done):
    """A request of whose prompt so many tokens are in the cache."""
    request = make_request(prompt_ids)
    request.prefill = Prefill(0, request.prompt_ids, done, [32], room=4096)
    return request


def cache_of(*contents, is_enabled=True, multiple=1):
    """Rows with these requests, which have ended in this order; None leaves a row as it was at first."""
    kept = PrefixCache(len(contents), POSITIONS, multiple, is_enabled)
    for row, request in enumerate(contents):
        if request is not None:
            kept.keep(row, request)
    return kept


def ended(prompt_ids, output_ids=(7, 8, 9)):
    return make_request(prompt_ids, output_ids)


def test_a_slot_keeps_all_but_the_last_token_of_the_reply():
    assert cache_of(ended(A, [7, 8, 9])).tokens(0, {}) == [*A, 7, 8]


# ------------------------------------------------------------------------------------------------- which row is taken


def test_the_first_prompt_gets_the_first_slot():
    plan = cache_of(None, None, None).plan(A, {})
    assert (plan.slot, plan.evicted, plan.reused, plan.logits_1V) == (0, 0, 0, None)


def test_the_lowest_free_slot_is_chosen_whatever_lies_there():
    kept = cache_of(None, ended(A), ended(B), None)
    active = {0: ended(C)}
    plan = kept.plan(D, active)
    assert (plan.slot, plan.evicted) == (1, 3)  # A moves to row 3, which is empty


def test_empty_slots_are_used_before_anything_is_evicted():
    kept = cache_of(ended(A), ended(B), None)
    assert kept.plan(D, {}).evicted == 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_least_recently_used_is_evicted_wherever_it_lies(order):
    kept = cache_of(None, None, None)
    for row in order:
        kept.keep(row, ended([A, B, C][row]))
    plan = kept.plan(D, {})
    assert (plan.slot, plan.evicted) == (0, order[0])


def test_what_is_kept_again_counts_as_used_again():
    kept = cache_of(ended(A), ended(B), ended(C))
    kept.take(0)
    kept.keep(0, ended(A))
    assert kept.plan(D, {}).evicted == 1


def test_age_moves_with_the_contents():
    kept = cache_of(ended(A), ended(B), ended(C))
    kept.swap(0, 2)
    assert [kept.tokens(row, {})[:20] for row in range(3)] == [C, B, A]
    assert kept.plan(D, {}).evicted == 2


def test_a_slot_in_use_is_never_evicted():
    kept = cache_of(None, ended(B), ended(C))
    kept.keep(0, ended(A))  # the newest
    assert kept.plan(D, {1: ended(B)}).evicted == 2


# ------------------------------------------------------------------------------------------------ what is taken over


def test_what_a_prompt_would_lose_nothing_of_is_taken_over():
    kept = cache_of(ended(A), ended(B, [7, 8, 9]), None)
    plan = kept.plan([*B, 7, 8, 9, 10], {})
    assert (plan.slot, plan.evicted, plan.source, plan.reused) == (0, 1, 1, 22)


def test_what_would_be_lost_is_copied():
    kept = cache_of(ended(A), ended(B, [7, 8, 9]), None)
    plan = kept.plan([*B, 7, 1, 2], {})
    assert (plan.slot, plan.evicted, plan.source, plan.reused) == (0, 2, 1, 21)


def test_what_a_prompt_goes_on_from_is_taken_over_even_if_some_is_lost():
    earlier = ended(B, [7, 8, 9])
    kept = cache_of(ended(A), earlier, None)
    plan = kept.plan([*B, 7, 1, 2], {}, continues=earlier)
    assert (plan.slot, plan.evicted, plan.source, plan.reused) == (0, 1, 1, 21)


def test_what_another_request_holds_is_copied_though_the_prompt_goes_on_from_something_else():
    earlier = ended(A)
    kept = cache_of(earlier, ended(B, [7, 8, 9]), None)
    plan = kept.plan([*B, 7, 1, 2], {}, continues=earlier)
    assert (plan.evicted, plan.source) == (2, 1)


STOP = 99
HEADER = [50, 51, 52, 53]  # of a reply; the last two are left out when the conversation goes on, as reasoning is


def conversation(first, turns):
    """The prompt after so many turns of a conversation, whose replies are [7, 8, 9]."""
    questions = [[first, 10 + turn, STOP] for turn in range(turns)]
    return [token for question in questions for token in (*question, *HEADER[:2], 7, 8, 9, STOP)][:-6] + HEADER


def test_the_next_turn_of_a_conversation_takes_over_its_slot_and_leaves_the_others_alone():
    kept = PrefixCache(4, POSITIONS)
    for turn in (1, 2, 3, 4):
        for first in (100, 200, 300, 400) if turn == 1 else (400,):
            prompt = conversation(first, turn)
            plan = kept.plan(prompt, {})
            kept.swap(plan.slot, plan.evicted)
            assert plan.reused == (0 if turn == 1 else len(conversation(first, turn - 1)) - 2)
            kept.keep(plan.slot, replace(ended(prompt), stop_ids=frozenset([STOP])))
    for first in (100, 200, 300):
        assert kept.plan(conversation(first, 2), {}).reused == len(conversation(first, 1)) - 2


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2, STOP, 4, 5, STOP, 50],  # another question
        [1, 2, STOP, 3, STOP, 50, 51],  # the same prompt, for another reply
    ],
)
def test_what_is_not_the_next_turn_leaves_a_conversation_s_slot_alone(prompt):
    earlier = replace(ended([1, 2, STOP, 3, STOP, 50, 51]), stop_ids=frozenset([STOP]))
    plan = cache_of(earlier, None).plan(prompt, {})
    assert plan.evicted == 1


def test_a_slot_in_use_is_copied_though_nothing_would_be_lost():
    running = make_request(B, [7, 8, 9])
    plan = cache_of(None, None).plan([*B, 7, 8, 9, 10], {0: running}, continues=running)
    assert (plan.slot, plan.evicted, plan.source, plan.reused) == (1, 1, 0, 22)


def test_a_prompt_that_shares_nothing_takes_nothing_over():
    earlier = ended(A)
    assert cache_of(earlier, None).plan(B, {}, continues=earlier).evicted == 1


# -------------------------------------------------------------------------------------------------- how much is reused


@pytest.mark.parametrize("row", [0, 1, 2])
def test_the_longest_prefix_is_found_in_any_slot(row):
    contents = [ended([*A[:5], *D]), ended([*A[:9], *D]), ended([*A[:7], *D])]
    contents[row] = ended([*A[:15], *D])
    plan = cache_of(*contents).plan([*A, 99], {})
    assert (plan.source, plan.reused) == (row, 15)


def test_the_longest_prefix_is_found_in_slots_in_use():
    running = make_request(A, [7, 8, 9])
    plan = cache_of(None, ended(A[:5]), None).plan([*A, 7, 8, 9], {0: running})
    assert (plan.slot, plan.source, plan.reused) == (1, 0, 22)


def test_of_a_prompt_on_its_way_what_is_done_can_be_reused():
    plan = cache_of(None, None).plan([*A, 1], {0: half_way([*A, 2], 13)})
    assert (plan.source, plan.reused) == (0, 13)


def test_of_a_prompt_that_was_cancelled_what_was_done_is_kept():
    kept = cache_of(half_way(A, 13))
    assert kept.tokens(0, {}) == A[:13]
    plan = kept.plan(A, {})
    assert (plan.reused, plan.logits_1V) == (13, None)


def test_the_last_token_is_computed_where_logits_are_missing():
    plan = cache_of(ended([*A, 5])).plan(A, {})
    assert (plan.reused, plan.logits_1V) == (19, None)


@pytest.mark.parametrize("is_active", [False, True])
def test_a_whole_prompt_that_was_there_gives_its_logits(is_active):
    """Even if a longer one comes first, which holds all of it, but no logits."""
    request = make_request(A, [7, 8, 9])
    logits_1V = request.prompt_logits_1V
    kept = cache_of(ended([*A, 5, 6]), None if is_active else request, None)
    plan = kept.plan(A, {1: request} if is_active else {})
    assert plan.logits_1V is logits_1V
    assert (plan.source, plan.reused, plan.evicted) == (1, 20, 2)


def test_a_running_request_whose_prompt_is_not_done_has_no_logits():
    plan = cache_of(None, None).plan(A, {0: half_way(A, 20)})
    assert (plan.reused, plan.logits_1V) == (19, None)


def test_a_whole_prompt_of_which_nothing_would_be_lost_is_taken_over():
    plan = cache_of(ended(B), ended(A, [7]), None).plan(A, {})
    assert (plan.slot, plan.evicted, plan.source, plan.reused) == (0, 1, 1, 20)


@pytest.mark.parametrize(("multiple", "reused"), [(1, 19), (8, 16), (32, 0)])
def test_reused_tokens_are_a_multiple_of_what_the_device_wants(multiple, reused):
    assert cache_of(ended(A), multiple=multiple).plan([*A[:19], 99, 98], {}).reused == reused


@given(blocks=st.integers(1, 8), multiple=st.sampled_from([1, 32]), data=st.data())
def test_usable_prefix_leaves_chunks_that_fit_the_cache(blocks, multiple, data):
    room = 128 * blocks
    num_tokens = data.draw(st.integers(1, room) | st.integers(max(1, room - 40), room))
    shared = data.draw(st.integers(0, num_tokens) | st.integers(max(0, num_tokens - 3), num_tokens))
    reused = usable_prefix(shared, num_tokens, room, multiple)
    assert reused <= min(shared, num_tokens - 1) and reused % multiple == 0
    is_near_the_end = num_tokens + CHUNK_SIZES[0] > room
    assert min(shared, num_tokens - 1) - reused < (CHUNK_SIZES[0] if is_near_the_end else multiple)
    assert sum(split_into_chunks(num_tokens - reused, room - reused)) <= room - reused


@pytest.mark.parametrize(("length", "reused"), [(224, 213), (225, 192), (256, 192)])
def test_near_the_end_of_the_cache_whole_chunks_are_reused(length, reused):
    prompt = list(range(1000, 1000 + length))
    assert cache_of(ended(prompt[:213], [7])).plan(prompt, {}).reused == reused


def test_near_the_end_of_the_cache_a_whole_prompt_is_still_reused_whole():
    prompt = list(range(1000, 1000 + POSITIONS))
    assert cache_of(ended(prompt, [7])).plan(prompt, {}).reused == POSITIONS


# ---------------------------------------------------------------------------------------------- what is never reused


def test_disabled_it_never_reuses_anything():
    kept = cache_of(ended(A), None, is_enabled=False)
    assert kept.tokens(0, {}) == []
    for active in ({}, {0: make_request(A, [7, 8])}):
        plan = kept.plan(A, active)
        assert (plan.slot, plan.reused, plan.logits_1V) == (len(active), 0, None)


def test_a_request_that_failed_leaves_nothing():
    failed = ended(A)
    failed.error = ValueError("no")
    kept = cache_of(failed, ended(B))
    assert kept.tokens(0, {}) == []
    plan = kept.plan(A, {})
    assert (plan.evicted, plan.reused, plan.logits_1V) == (0, 0, None)


def test_what_was_taken_and_what_cannot_be_trusted_is_forgotten():
    kept = cache_of(ended(A), ended(B))
    kept.take(0)
    assert (kept.tokens(0, {}), kept.plan(A, {}).reused, kept.plan(B, {}).reused) == ([], 0, 20)
    kept.forget_all()
    assert (kept.tokens(1, {}), kept.plan(B, {}).reused) == ([], 0)


def test_a_request_that_has_left_holds_no_tensor_and_no_earlier_request():
    request = ended(A)
    request.continues = ended(B)
    cache_of(request)
    assert (request.prompt_logits_1V, request.prefill, request.continues) == (None, None, None)


# -------------------------------------------------------------------------------------------------------- any contents

ids = st.lists(st.integers(0, 2), max_size=7)
contents = st.lists(
    st.tuples(st.sampled_from(["empty", "ended", "failed", "active"]), ids.filter(len), ids.filter(len)),
    min_size=1,
    max_size=5,
)


@given(contents=contents, order=st.randoms(use_true_random=False), prompt=ids.filter(len), data=st.data())
def test_plan_follows_a_plain_description(contents, order, prompt, data):
    kept, active, requests, ages = PrefixCache(len(contents), POSITIONS), {}, {}, {}
    rows = list(range(len(contents)))
    order.shuffle(rows)
    for age, row in enumerate(rows):
        kind, prompt_ids, output_ids = contents[row]
        requests[row] = request = make_request(prompt_ids, output_ids)
        if kind == "failed":
            request.error = ValueError("no")
        if kind in ("ended", "failed"):
            ages[row] = age + 1
            kept.keep(row, request)
        if kind == "active":
            active[row] = request
    free = [row for row in range(len(contents)) if row not in active]
    if not free:
        return
    continued = data.draw(st.sampled_from([None, *requests.values()]))
    plan = kept.plan(prompt, active, continued)

    held = {row: [] for row in range(len(contents))}
    for row, (kind, prompt_ids, output_ids) in enumerate(contents):
        if kind in ("ended", "active"):
            held[row] = prompt_ids + output_ids[:-1]
    shared = {row: sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(prompt, held[row]))) for row in held}  # noqa: B905
    is_whole = any(held[row] and contents[row][1] == prompt for row in held)
    assert plan.slot == free[0]
    assert plan.reused == (len(prompt) if is_whole else min(max(shared.values()), len(prompt) - 1))
    assert held[plan.source][: plan.reused] == prompt[: plan.reused]
    assert (plan.logits_1V is not None) == is_whole
    is_owner = continued is not None and requests[plan.source] is continued
    if plan.reused and plan.source in free and (is_owner or plan.reused == len(held[plan.source])):
        assert plan.evicted == plan.source
    else:
        oldest = min((bool(held[row]), ages.get(row, 0)) for row in free)
        assert (bool(held[plan.evicted]), ages.get(plan.evicted, 0)) == oldest


@given(ids=st.lists(st.integers(0, 1), max_size=40), others=st.lists(st.integers(0, 1), max_size=40))
def test_common_prefix_equals_a_plain_loop(ids, others):
    for some in (others, [*ids, *others], ids[: len(others)], [*ids[: len(others)], *others]):
        length = 0
        while length < min(len(ids), len(some)) and ids[length] == some[length]:
            length += 1
        assert common_prefix(ids, some) == common_prefix(some, ids) == length


def test_keys_and_values_of_another_adapter_are_never_reused():
    one, other = Adapter("one", 1), Adapter("one", 1)  # a name and a slot may be used again
    with_one = replace(ended(A), adapter=one)
    kept = cache_of(with_one, ended(B), None)
    assert kept.plan(A, {}, adapter=one).reused == len(A)
    assert kept.plan(A, {}, adapter=other).reused == kept.plan(A, {}).reused == 0
    assert kept.plan(A, {}, continues=with_one, adapter=other).reused == 0
    assert kept.plan(B, {}).reused == len(B)
    assert kept.plan(B, {}, adapter=one).reused == 0
    running = {2: replace(make_request(A, [7, 8]), adapter=one, launched=2)}
    assert cache_of(None, None, None).plan([*A, 1], running, adapter=one).reused == len(A)
    assert cache_of(None, None, None).plan([*A, 1], running).reused == 0
