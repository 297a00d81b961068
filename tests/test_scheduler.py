"""Continuous batching: prompts in chunks between decode steps, rows given on, and no request that feels the others."""

import random

import pytest
import torch
from conftest import assert_near, randomised, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3fast.engine import Engine, Request, Scheduler
from qwen3fast.engine.prefill import split_into_chunks
from qwen3fast.kv_cache import StaticKVCache

CPU = torch.device("cpu")
MODEL = randomised(small_config(max_position_embeddings=2048, eos_token_ids=()), seed=3)


def make_scheduler(rows, positions=256, lookahead=0):
    cache = StaticKVCache(MODEL.config, rows, positions, torch.float32, CPU)
    return Scheduler(Engine(MODEL, cache, CPU, compile=False, lookahead=lookahead))


def make_request(length, max_tokens, seed=0, **changes):
    """A prompt of random ids; sampled unless told otherwise."""
    rng = random.Random(1000 * seed + length)
    ids = [rng.randrange(97) for _ in range(length)]
    # These weights are sure of themselves, so sampling takes a high temperature.
    fields = {"temperature": 30.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed, "stop_ids": frozenset()}
    return Request(ids, max_tokens=max_tokens, **(fields | changes))


def finish(scheduler, requests):
    while any(request.finish_reason is None for request in requests):
        scheduler.step()


def alone(length, max_tokens, seed, temperature):
    request = make_request(length, max_tokens, seed, temperature=temperature)
    scheduler = make_scheduler(1)
    scheduler.add(request)
    finish(scheduler, [request])
    return request.output_ids


def test_a_running_reply_gets_a_token_after_each_chunk_of_anothers_prompt():
    scheduler = make_scheduler(2, 1300)
    first, second = make_request(5, 50), make_request(1100, 3)
    chunks = split_into_chunks(1100, scheduler.engine.cache.allocated_len)
    assert len(chunks) > 2
    scheduler.add(first)
    scheduler.step()
    scheduler.add(second)
    progress = []
    while not second.output_ids:
        scheduler.step()
        progress.append((len(first.output_ids), len(second.output_ids)))
    assert progress[0][0] == 3  # one by its prompt, two by steps
    assert progress[:-1] == [(3 + i, 0) for i in range(len(chunks) - 1)]
    assert progress[-1] == (3 + len(chunks) - 1, 2)  # the step after the last chunk is for both
    finish(scheduler, [first, second])
    assert second.output_ids == alone_in(1300, make_request(1100, 3))


def alone_in(positions, request):
    scheduler = make_scheduler(1, positions)
    scheduler.add(request)
    finish(scheduler, [request])
    return request.output_ids


def test_a_row_is_given_on_as_soon_as_it_is_free():
    scheduler = make_scheduler(2)
    long, short, waiting = make_request(4, 30), make_request(5, 2), make_request(6, 4)
    for request in (long, short, waiting):
        scheduler.add(request)
    while waiting.row is None:
        scheduler.step()
    assert short.finish_reason == "length" and waiting.row == short.row
    assert long.finish_reason is None and len(scheduler.active) == 2
    finish(scheduler, [long, waiting])
    assert not scheduler.active and not scheduler.waiting


@pytest.mark.parametrize("row", [0, 2])
def test_steps_of_others_leave_a_prompt_in_the_making_alone(row):
    """Steps write keys and values in every row that they cover: before the one at work, and up to the next bucket."""
    scheduler = make_scheduler(4, 1300)
    requests = [make_request(5, 40, seed=i) for i in range(4)]
    requests[row] = make_request(5, 10, seed=row)
    for request in requests:
        scheduler.add(request)
    finish(scheduler, [requests[row]])
    late, alone = (make_request(1100, 8, seed=9) for _ in range(2))
    scheduler.add(late)
    undisturbed = make_scheduler(4, 1300)
    undisturbed.add(alone)
    finish(scheduler, [late])
    finish(undisturbed, [alone])
    assert late.row == row and late.output_ids == alone.output_ids
    ours, theirs = scheduler.engine.cache, undisturbed.engine.cache
    for tensor, expected in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        assert_near(tensor[row, :, :1100], expected[alone.row, :, :1100])


def test_a_request_cancelled_in_the_middle_of_its_prompt_frees_its_row():
    scheduler = make_scheduler(1, 1300)
    request, after = make_request(1100, 3), make_request(40, 6, seed=2)
    scheduler.add(request)
    scheduler.step()
    assert request.prefill is not None and scheduler.active
    scheduler.cancel(request)
    assert not scheduler.active and request.prefill is None and request.output_ids == []
    scheduler.add(after)
    finish(scheduler, [after])
    assert after.output_ids == alone(40, 6, 2, 30.0)


def test_a_failure_in_a_chunk_leaves_the_others_as_they_are(monkeypatch):
    scheduler = make_scheduler(2, 1300)
    running, broken = make_request(20, 12, seed=1), make_request(1100, 3)
    scheduler.add(running)
    scheduler.step()
    scheduler.add(broken)
    scheduler.step()

    def fail(*arguments):
        raise MemoryError("no room")

    with monkeypatch.context() as without:
        without.setattr("qwen3fast.engine.prefill.prefill_chunk", fail)
        scheduler.step()
    assert broken.finish_reason == "error" and isinstance(broken.error, MemoryError)
    assert list(scheduler.active.values()) == [running]
    finish(scheduler, [running])
    assert running.output_ids == alone(20, 12, 1, 30.0)


arrivals = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps until it comes
        st.integers(1, 200),  # length of the prompt
        st.integers(1, 12),  # tokens
        st.booleans(),  # greedy
        st.one_of(st.none(), st.integers(0, 8)),  # cancelled after so many steps
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30)
@given(arrivals=arrivals, rows=st.integers(1, 3), lookahead=st.sampled_from([0, 2]))
def test_a_request_gets_what_it_gets_alone_whatever_runs_beside_it(arrivals, rows, lookahead):
    scheduler, requests, cancels, now = make_scheduler(rows, lookahead=lookahead), [], [], 0
    for i, (wait, length, tokens, greedy, cancel) in enumerate(arrivals):
        for _ in range(wait):
            scheduler.step()
            now += 1
            for at, request in cancels:
                if at == now:
                    scheduler.cancel(request)
        request = make_request(length, tokens, seed=i, temperature=0.0 if greedy else 30.0)
        requests.append(request)
        scheduler.add(request)
        if cancel is not None:
            cancels.append((now + cancel, request))
    finish(scheduler, requests)
    assert not scheduler.active and not scheduler.waiting
    for i, (request, (_, length, tokens, greedy, _)) in enumerate(zip(requests, arrivals, strict=True)):
        expected = alone(length, tokens, i, 0.0 if greedy else 30.0)
        if request.finish_reason == "cancelled":
            assert request.output_ids == expected[: len(request.output_ids)]
        else:
            assert request.output_ids == expected
