"""Continuous batching: prompts in chunks between decode steps, rows given on, moved and read again, and no request that
feels the others."""

import random

import pytest
import torch
from conftest import assert_near, assert_same, engine_of, randomized, slowly, small_config, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3fast.engine import RowSampling
from qwen3fast.engine.parts import chunk_sizes
from qwen3fast.engine.prefill import split_into_chunks, usable_prefix
from qwen3fast.scheduling.prefix_cache import common_prefix
from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.scheduler import Scheduler
from qwen3fast.scheduling.worker import EngineWorker

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")

CACHE_DTYPES = [torch.float32, torch.int8]
MODEL = randomized(small_config(max_position_embeddings=2048, eos_token_ids=()), seed=3)


def make_scheduler(rows, positions=256, lookahead=0, reuse=True, cache_dtype=torch.float32):
    return Scheduler(engine_of(MODEL, rows, positions, cache_dtype, lookahead=lookahead), reuse)


def random_prompt(length, seed=0):
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(97) for _ in range(length)]


def make_request(prompt, max_tokens, seed=0, temperature=30.0, top_k=64, **changes):
    """prompt: ids, or the length of a random one. Sampled unless told otherwise, by the cheaper of the samplers."""
    ids = random_prompt(prompt, seed) if isinstance(prompt, int) else list(prompt)
    # These weights are sure of themselves, so sampling takes a high temperature.
    return Request(ids, RowSampling(temperature, top_k, seed=seed), max_tokens, **changes)


def finish(scheduler, requests):
    while any(request.finish_reason is None for request in requests):
        scheduler.step()


def run(scheduler, *requests):
    """All of them at once, to their ends. Returns their tokens."""
    for request in requests:
        scheduler.add(request)
    finish(scheduler, requests)
    return [request.output_ids for request in requests]


def alone(length, max_tokens, seed, temperature, top_k=64):
    request = make_request(length, max_tokens, seed, temperature, top_k)
    scheduler = make_scheduler(1)
    scheduler.add(request)
    finish(scheduler, [request])
    return request.output_ids


def test_a_running_reply_gets_a_token_after_each_chunk_of_anothers_prompt():
    scheduler = make_scheduler(2, 1300)
    first, second = make_request(5, 50), make_request(1100, 3)
    chunks = split_into_chunks(1100, scheduler.engine.cache.allocated_len, chunk_sizes(CPU))
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


def test_a_slot_is_given_on_as_soon_as_it_is_free():
    scheduler = make_scheduler(2)
    long, short, waiting = make_request(4, 30), make_request(5, 2), make_request(6, 4)
    for request in (long, short, waiting):
        scheduler.add(request)
    while waiting.slot is None:
        scheduler.step()
    assert short.finish_reason == "length" and waiting.slot == short.slot
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
    assert late.slot == row and late.output_ids == alone.output_ids
    ours, theirs = scheduler.engine.cache, undisturbed.engine.cache
    for tensor, expected in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        assert_near(tensor[row, :, :1100], expected[alone.slot, :, :1100])


def test_a_request_cancelled_in_the_middle_of_its_prompt_frees_its_slot():
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

    def fail(*arguments, **more):
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


@settings(max_examples=20)
@given(arrivals=arrivals, rows=st.integers(1, 4), lookahead=st.sampled_from([0, 2]))
def test_a_request_gets_what_it_gets_alone_whatever_runs_beside_it(arrivals, rows, lookahead):
    scheduler, requests, cancels, now = make_scheduler(rows, lookahead=lookahead), [], [], 0
    for i, (wait, length, tokens, greedy, cancel) in enumerate(arrivals):
        for _ in range(wait):
            scheduler.step()
            now += 1
            for at, request in cancels:
                if at == now:
                    scheduler.cancel(request)
        request = make_request(length, tokens, i, 0.0 if greedy else 30.0, top_k=(64, 0)[i % 2])
        requests.append(request)
        scheduler.add(request)
        if cancel is not None:
            cancels.append((now + cancel, request))
    finish(scheduler, requests)
    assert not scheduler.active and not scheduler.waiting
    for i, (request, (_, length, tokens, greedy, _)) in enumerate(zip(requests, arrivals, strict=True)):
        expected = alone(length, tokens, i, 0.0 if greedy else 30.0, top_k=(64, 0)[i % 2])
        if request.finish_reason == "cancelled":
            assert request.output_ids == expected[: len(request.output_ids)]
        else:
            assert request.output_ids == expected


# --------------------------------------------------------------------------------------------------- reuse of prefixes


def calls_of(monkeypatch, engine, name):
    """Arguments of each call of a method, which still does its work."""
    calls, method = [], getattr(engine, name)

    def note(*arguments):
        calls.append(arguments)
        return method(*arguments)

    monkeypatch.setattr(engine, name, note)
    return calls


def note_prompt_logits(scheduler):
    """The logits after the prompt of each request, by identity; the request itself lets go of them at its end."""
    logits, sample_first = {}, scheduler.engine.sample_first

    def note(row, logits_BV, *arguments):
        for slot, logits_V in zip([row] if isinstance(row, int) else row, logits_BV, strict=True):
            logits[id(scheduler.active[slot])] = logits_V[None].clone()
        return sample_first(row, logits_BV, *arguments)

    scheduler.engine.sample_first = note
    return logits


turns = st.lists(
    st.tuples(
        st.sampled_from(["new", "extend", "branch", "repeat"]),
        st.integers(0, 5),  # which earlier one
        st.integers(1, 150),  # tokens of its own, or how many it shares
        st.integers(1, 8),  # tokens
        st.integers(0, 12),  # steps until the next one
        st.booleans(),  # told which one it goes on from
    ),
    min_size=2,
    max_size=7,
)


def next_prompt(kind, earlier, number, i):
    """A prompt of random ids; or one that goes on from an earlier request, leaves it somewhere, or is the same."""
    if kind == "new" or earlier is None:
        return random_prompt(number, i)
    if kind == "repeat":
        return earlier.prompt_ids
    if kind == "branch":
        return [*earlier.prompt_ids[:number], *random_prompt(1 + number % 40, i)]
    return [*earlier.prompt_ids, *earlier.output_ids, *random_prompt(1 + number % 60, i)]


@settings(max_examples=25)
@given(turns=turns, rows=st.integers(1, 4), lookahead=st.sampled_from([0, 2]))
def test_reuse_of_prefixes_changes_no_request(turns, rows, lookahead):
    scheduler, requests = make_scheduler(rows, lookahead=lookahead), []
    logits = note_prompt_logits(scheduler)
    for i, (kind, which, number, max_tokens, wait, is_told) in enumerate(turns):
        earlier = requests[which % i] if i else None
        if kind == "extend" and i:
            finish(scheduler, [earlier])
        # A prompt that is too long ends near the end of the cache.
        prompt = next_prompt(kind, earlier, number, i)[: 256 - max_tokens]
        requests.append(make_request(prompt, max_tokens, seed=i, continues=earlier if is_told else None))
        scheduler.add(requests[-1])
        for _ in range(wait):
            scheduler.step()
    finish(scheduler, requests)
    assert scheduler.reused_tokens == sum(request.reused_tokens for request in requests)
    assert scheduler.reused_tokens + scheduler.prefilled_tokens == sum(len(r.prompt_ids) for r in requests)
    plain = make_scheduler(1, reuse=False)
    plain_logits = note_prompt_logits(plain)
    for i, request in enumerate(requests):
        expected = make_request(request.prompt_ids, request.max_tokens, seed=i)
        assert [request.output_ids] == run(plain, expected)
        assert_near(logits[id(request)], plain_logits[id(expected)])
    assert (plain.reused_tokens, plain.prefilled_tokens) == (0, sum(len(r.prompt_ids) for r in requests))


@settings(max_examples=20)
@given(turns=turns)
def test_with_slots_for_all_the_longest_prefix_there_was_is_reused(turns):
    scheduler, requests = make_scheduler(len(turns)), []
    for i, (kind, which, number, max_tokens, _, _) in enumerate(turns):
        earlier = requests[which % i] if i else None
        prompt = next_prompt(kind, earlier, number, i)[: 256 - max_tokens]
        there = max((common_prefix(prompt, r.prompt_ids + r.output_ids[:-1]) for r in requests), default=0)
        request = make_request(prompt, max_tokens, seed=i)
        run(scheduler, request)
        requests.append(request)
        is_whole = request.reused_tokens == len(prompt)
        assert is_whole or request.reused_tokens == usable_prefix(there, len(prompt), 256)
        assert not is_whole or prompt in [r.prompt_ids for r in requests[:-1]]


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_prompt_that_was_there_is_not_computed_again(rows, cache_dtype, monkeypatch):
    scheduler = make_scheduler(rows, cache_dtype=cache_dtype)
    logits = note_prompt_logits(scheduler)
    chunks = calls_of(monkeypatch, scheduler.engine, "prefill_step")
    first, second = (make_request(100, 9) for _ in range(2))
    assert run(scheduler, first) == run(scheduler, second)
    assert (first.reused_tokens, second.reused_tokens, len(chunks)) == (0, 100, 1)
    assert (scheduler.reused_tokens, scheduler.prefilled_tokens) == (100, 100)
    assert_same(logits[id(first)], logits[id(second)])


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_what_prompts_begin_with_alike_is_computed_once(rows, cache_dtype):
    system = random_prompt(70)
    scheduler = make_scheduler(rows, cache_dtype=cache_dtype)
    requests = [make_request([*system, i, *random_prompt(10 * i, i)], 12, seed=i) for i in range(5)]
    run(scheduler, *requests)
    first, *others = [request.reused_tokens for request in requests]
    # The second chunk of the first prompt, in which its last 6 common tokens are, is computed with chunks of others.
    assert first == 0 and set(others) <= {64, 70} and (rows > 1 or 64 not in others)
    for i, request in enumerate(requests):
        alone = make_scheduler(1, reuse=False, cache_dtype=cache_dtype)
        assert [request.output_ids] == run(alone, make_request(request.prompt_ids, 12, seed=i))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("is_told", [True, False])
def test_the_next_turn_of_a_chat_computes_what_is_new(is_told, lookahead, cache_dtype, monkeypatch):
    """The last token of a reply has never been fed to the model."""
    scheduler = make_scheduler(3, lookahead=lookahead, cache_dtype=cache_dtype)
    copies = calls_of(monkeypatch, scheduler.engine, "copy_row")
    other = make_request(20, 5, seed=9)
    first = make_request(40, 15)
    run(scheduler, other, first)
    prompt = [*first.prompt_ids, *first.output_ids, *random_prompt(11)]
    second = make_request(prompt, 15, continues=first if is_told else None)
    alone = make_scheduler(1, reuse=False, cache_dtype=cache_dtype)
    assert run(scheduler, second) == run(alone, make_request(prompt, 15))
    assert (second.reused_tokens, scheduler.reused_tokens) == (54, 54)
    assert copies == []  # its row is taken over
    assert scheduler.prefixes.plan(other.prompt_ids, {}).reused == 20  # and nothing else is lost


def test_what_lies_in_the_slot_that_a_prompt_gets_can_be_copied_from_where_it_is_moved(monkeypatch):
    """The lowest row holds what the prompt begins with, and another one is to be given up."""
    scheduler = make_scheduler(2)
    run(scheduler, make_request(50, 30), make_request(40, 5, seed=1))  # the first ends last
    copies = calls_of(monkeypatch, scheduler.engine, "copy_row")
    prompt = [*random_prompt(50)[:45], *random_prompt(8, 5)]
    assert scheduler.prefixes.tokens(0, {})[:50] == random_prompt(50)
    assert run(scheduler, make_request(prompt, 9)) == run(make_scheduler(1, reuse=False), make_request(prompt, 9))
    assert copies == [(1, 0, 45)]
    assert scheduler.prefixes.tokens(1, {})[:50] == random_prompt(50)


def test_a_reply_that_is_regenerated_takes_its_slot_over(monkeypatch):
    """As a chat does after `/retry`: the prompt of the turn before goes on differently."""
    scheduler = make_scheduler(2)
    copies = calls_of(monkeypatch, scheduler.engine, "copy_row")
    first = make_request(40, 15)
    run(scheduler, first)
    prompt = [*first.prompt_ids, *first.output_ids[:5], *random_prompt(11)]
    second = make_request(prompt, 15, continues=first)
    assert run(scheduler, second) == run(make_scheduler(1, reuse=False), make_request(prompt, 15))
    assert (second.reused_tokens, copies) == (45, [])


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("n", [4, 7])
def test_identical_prompts_are_computed_once(n, lookahead):
    scheduler = make_scheduler(4, lookahead=lookahead)
    prompt = random_prompt(90)
    requests = [make_request(prompt, 6 + 3 * (i % 4), seed=i) for i in range(n)]
    run(scheduler, *requests)
    assert (scheduler.prefilled_tokens, scheduler.reused_tokens) == (90, 90 * (n - 1))
    for i, request in enumerate(requests):
        alone = make_request(prompt, request.max_tokens, seed=i)
        assert [request.output_ids] == run(make_scheduler(1, reuse=False), alone)


@pytest.mark.parametrize("length", [225, 240, 250])
def test_prompts_near_the_end_of_the_cache_are_right(length):
    scheduler, prompt = make_scheduler(2), random_prompt(length)
    run(scheduler, make_request([*prompt[:213], 1], 3))
    request = make_request(prompt, 6)
    assert run(scheduler, request) == run(make_scheduler(1, reuse=False), make_request(prompt, 6))
    assert request.reused_tokens == 192


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_slot_without_a_request_is_left_as_it_is_by_steps_that_cover_it(lookahead, cache_dtype, monkeypatch):
    """It runs along, and writes to the last position, which nothing reads."""
    scheduler = make_scheduler(4, 1300, lookahead, cache_dtype=cache_dtype)
    run(scheduler, *(make_request(30 + i, 20 - i, seed=i) for i in range(4)))
    tensors, steps = scheduler.engine.cache.tensors(), calls_of(monkeypatch, scheduler.engine, "launch")
    assert len(tensors) == (8 if cache_dtype == torch.int8 else 4)
    requests = [make_request(length, 60, seed=9) for length in (5, 9, 1100)]
    for request in requests:
        scheduler.add(request)
    while requests[2].slot is None:
        scheduler.step()
    before = [tensor[3].clone() for tensor in tensors]
    finish(scheduler, requests)
    assert sum(num_rows == 3 for num_rows, *_ in steps) >= 50  # rounded up to 4
    for tensor, old in zip(tensors, before, strict=True):
        assert_same(tensor[3, :, :-1], old[:, :-1])


def held_numbers(scheduler):
    """Return the contents of rows without a request, by the tokens that they were computed from."""
    tensors, kept = scheduler.engine.cache.tensors(), scheduler.prefixes
    rows = set(range(scheduler.engine.cache.max_batch_size)) - set(scheduler.active)
    held = {row: tuple(kept.tokens(row, scheduler.active)) for row in rows}
    return {ids: [t[row, :, : len(ids)].clone() for t in tensors] for row, ids in held.items() if ids}


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("seed", "lookahead"), [(0, 0), (1, 2)])
def test_what_a_slot_has_kept_stays_the_same_bit_for_bit_wherever_it_is_moved(seed, lookahead, cache_dtype):
    rng = random.Random(seed)
    scheduler = make_scheduler(4, lookahead=lookahead, cache_dtype=cache_dtype)
    requests, first_seen, places = [], {}, {}
    for i in range(9):
        requests.append(make_request(rng.randint(1, 150), rng.choice([1, 3, 20, 60]), seed=20 * seed + i))
        scheduler.add(requests[-1])
        for _ in range(rng.randint(0, 25)):
            scheduler.step()
            for ids, numbers in held_numbers(scheduler).items():
                for now, then in zip(numbers, first_seen.setdefault(ids, numbers), strict=True):
                    assert_same(now, then)
            for row in range(4):
                places.setdefault(tuple(scheduler.prefixes.tokens(row, scheduler.active)), set()).add(row)
    assert len(first_seen) > 4
    assert any(len(rows) > 1 for ids, rows in places.items() if ids in first_seen)  # some were moved
    finish(scheduler, requests)


# -------------------------------------------------------------------------------------------------------- closing gaps

PROCESSED = {
    "repetition_penalty": 1.3,
    "presence_penalty": 1.5,
    "frequency_penalty": 0.5,
    "logit_bias": {5: 30.0, 7: -float("inf"), 11: 20.0},
    "logprobs": 3,
}


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, PROCESSED], ids=["sampled", "greedy", "processed"])
def test_a_request_moves_down_when_those_before_it_end(changes, lookahead, monkeypatch):
    """Then steps run as few rows as there are requests."""
    scheduler = make_scheduler(4, lookahead=lookahead)
    steps = calls_of(monkeypatch, scheduler.engine, "launch")
    others = [make_request(10 + i, 8 + 7 * i, seed=i) for i in range(3)]
    long = make_request(40, 44, seed=5, **changes)
    for request in (*others, long):
        scheduler.add(request)
    places = []
    while long.finish_reason is None:
        scheduler.step()
        places.append(long.slot)
    assert list(dict.fromkeys(places)) == [3, 0]  # and request 2 from row 2 to 1, when two are left
    # Steps were of all rows, then of fewer and fewer, and at last of one.
    sizes = [scheduler.engine.batch_bucket(num_rows) for num_rows, *_ in steps]
    assert sizes[3:] == sorted(sizes[3:], reverse=True) and sizes.count(1) >= 20 and sizes.count(2) >= 5
    alone = make_request(40, 44, seed=5, **changes)
    assert [long.output_ids] == run(make_scheduler(1, lookahead=lookahead), alone)
    for request in others:
        expected = make_request(request.prompt_ids, request.max_tokens, request.sampling.seed)
        assert [request.output_ids] == run(make_scheduler(1), expected)
    assert [at.ids for at in long.output_logprobs] == [at.ids for at in alone.output_logprobs]


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_a_prompt_moves_down_while_it_is_computed(cache_dtype, lookahead, monkeypatch):
    scheduler = make_scheduler(2, 1900, lookahead, cache_dtype=cache_dtype)
    moves = calls_of(monkeypatch, scheduler.engine, "swap_rows")
    other, late = make_request(10, 4), make_request(1700, 20, seed=1)
    scheduler.add(other)
    scheduler.step()
    scheduler.add(late)
    places = []
    while not late.output_ids:
        scheduler.step()
        places += [late.prefill.row] if late.prefill is not None else []
    assert (places[0], places[-1], late.slot, len(moves)) == (1, 0, 0, 1)
    alone = make_scheduler(1, 1900, cache_dtype=cache_dtype)
    finish(scheduler, [late])
    assert [late.output_ids] == run(alone, make_request(1700, 20, seed=1))


def test_a_gap_stays_while_there_is_a_request_to_fill_it(monkeypatch):
    scheduler = make_scheduler(2)
    moves = calls_of(monkeypatch, scheduler.engine, "swap_rows")
    short, long, next_one = make_request(10, 3), make_request(20, 40, seed=1), make_request(30, 10, seed=2)
    for request in (short, long, next_one):
        scheduler.add(request)
    while not next_one.output_ids:
        scheduler.step()
    assert (short.finish_reason, long.slot, next_one.slot, moves) == ("length", 1, 0, [])
    finish(scheduler, [next_one])
    assert (long.slot, len(moves)) == (0, 1)


def test_processors_move_with_their_request():
    scheduler = make_scheduler(2)
    other, long = make_request(10, 3), make_request(12, 30, seed=1, **PROCESSED)
    for request in (other, long):
        scheduler.add(request)
    while other.finish_reason is None or long.slot is None:
        scheduler.step()
    state = scheduler.engine.processors.tensors
    assert long.slot == 0
    assert (state.presence_penalty_B.tolist(), state.bias_BV[:, 5].tolist()) == ([1.5, 0.0], [30.0, 0.0])
    assert state.in_prompt_BV[0].nonzero()[:, 0].tolist() == sorted(set(long.prompt_ids))
    assert state.count_BV[0].sum() == len(long.output_ids)


def test_what_a_slot_held_that_a_request_moves_to_can_still_be_reused():
    scheduler = make_scheduler(2)
    other, long = make_request(30, 5), make_request(12, 30, seed=1)
    run(scheduler, other, long)
    again = make_request(30, 5)
    assert scheduler.prefixes.tokens(1, {})[:30] == other.prompt_ids  # it was computed in row 0
    assert (run(scheduler, again), again.reused_tokens) == ([other.output_ids], 30)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_request_that_is_cancelled_or_fails_lets_others_move_down(lookahead):
    scheduler = make_scheduler(4, lookahead=lookahead)
    requests = [make_request(10 + i, 40, seed=i) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    while requests[3].slot is None:
        scheduler.step()
    scheduler.cancel(requests[0])
    assert [request.slot for request in requests[1:]] == [1, 2, 3]  # no smaller bucket holds three
    requests[2].on_token = lambda token: 1 / 0
    while requests[2].finish_reason is None:
        scheduler.step()
    assert sorted(scheduler.active) == [0, 1]
    finish(scheduler, requests)
    for i in (1, 3):
        assert [requests[i].output_ids] == run(make_scheduler(1), make_request(10 + i, 40, seed=i))


@pytest.mark.parametrize("lookahead", [0, 1, 4])
def test_a_reply_that_fills_the_cache_ends_there_while_others_run_on(lookahead):
    """Steps that are launched after its last one cover its row, and must not move it on, past the end."""
    scheduler = make_scheduler(2, 128, lookahead)
    full, other = make_request(100, 28), make_request(5, 60, seed=1)
    run(scheduler, full, other)
    assert (len(full.output_ids), len(other.output_ids)) == (28, 60)
    for request in (full, other):
        assert [request.output_ids] == run(
            make_scheduler(1, 128), make_request(request.prompt_ids, request.max_tokens, request.sampling.seed)
        )


# ---------------------------------------------------------------------------------------- what breaks a whole step


def step_as_the_worker_does(scheduler, times):
    for _ in range(times):
        try:
            scheduler.step()
        except MemoryError as err:
            scheduler.fail_all(err)


def refuse(*arguments):
    raise MemoryError("no room")


def test_a_request_for_which_no_slot_can_be_made_ready_ends(monkeypatch):
    """It is neither waiting nor active then, and must not be waited for."""
    scheduler, prompt = make_scheduler(2), random_prompt(50)
    running, late = make_request(prompt, 50), make_request(prompt, 5, seed=1)
    scheduler.add(running)
    scheduler.step()
    monkeypatch.setattr(scheduler.engine, "copy_row", refuse)
    scheduler.add(late)
    step_as_the_worker_does(scheduler, 60)
    assert running.finish_reason is not None
    assert late.finish_reason == "error" and isinstance(late.error, MemoryError)


def test_a_request_that_cannot_be_moved_ends(monkeypatch):
    scheduler = make_scheduler(2)
    short, long = make_request(10, 4), make_request(20, 50, seed=1)
    monkeypatch.setattr(scheduler.engine, "swap_rows", refuse)
    scheduler.add(short)
    scheduler.add(long)
    step_as_the_worker_does(scheduler, 60)
    assert (short.finish_reason, long.finish_reason) == ("length", "error")


PATIENCE_S = 20  # for what comes at once on a machine that nobody else uses


def test_a_request_that_cannot_be_cancelled_leaves_the_thread_alive(monkeypatch):
    scheduler = make_scheduler(2, 1300)
    runner = EngineWorker(scheduler)
    short, long = (make_request(n, 1000, logits_processor=slowly) for n in (10, 20))
    runner.add([short, long])
    wait_until(lambda: long.output_ids)
    runner.call(monkeypatch.setattr, scheduler.engine, "swap_rows", refuse)
    runner.cancel(short)  # the other moves to its row
    wait_until(lambda: long.finish_reason is not None)
    assert (short.finish_reason, long.finish_reason) == ("cancelled", "error")
    assert isinstance(long.error, MemoryError) and runner.thread.is_alive()


def test_a_device_that_is_gone_ends_all_requests(monkeypatch):
    """After a CUDA error all calls fail, also those that clean up."""
    scheduler = make_scheduler(1, 1300)
    running, waiting = make_request(10, 1000, logits_processor=slowly), make_request(20, 5, seed=1)
    runner = EngineWorker(scheduler)
    runner.add([running, waiting])
    wait_until(lambda: running.output_ids)

    def lose_device():
        for name in ("launch", "begin_prefill", "clear_row", "erase"):
            monkeypatch.setattr(scheduler.engine, name, refuse)

    runner.call(lose_device)
    wait_until(lambda: running.finish_reason == "error")
    wait_until(lambda: waiting.finish_reason == "error")


def spoilt_scheduler(token, lookahead=0, reuse=True):
    """One row, and a model that gives NaN after this token, as float16 overflows at some."""
    model = randomized(small_config(max_position_embeddings=2048, eos_token_ids=(), tie_word_embeddings=False), seed=3)
    model.model.embed_tokens.weight[token] = torch.nan
    return Scheduler(engine_of(model, 1, 1300, lookahead=lookahead), reuse)


def assert_next_one_is_right(scheduler, token):
    """It reads all positions up to 128, of which it has written a few; a masked NaN still spreads, through 0 * NaN."""
    after = make_request([(token + 1) % 97] * 3, 20, logit_bias={token: -float("inf")})
    run(scheduler, after)
    assert (after.finish_reason, after.error) == ("length", None)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("how", ["seen", "cancelled", "failed otherwise"])
def test_numbers_that_a_prompt_left_do_not_spoil_the_next_request(how, reuse):
    def refuse_nan(logits_V, output_T):
        assert how == "seen" or not logits_V.isnan().any(), "no logits"
        return logits_V

    scheduler = spoilt_scheduler(96, reuse=reuse)
    spoiling = make_request([5] * 100 + [96] * 1000, 3, logits_processor=refuse_nan)
    scheduler.add(spoiling)
    scheduler.step()
    if how == "cancelled":
        scheduler.cancel(spoiling)
    finish(scheduler, [spoiling])
    assert_next_one_is_right(scheduler, 96)


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("how", ["seen", "cancelled", "stopped", "failed otherwise"])
def test_numbers_that_a_reply_left_do_not_spoil_the_next_request(how, lookahead):
    """With lookahead, tokens are fed on before the host has seen that they were the last."""
    expected = make_request([5] * 90, 3)
    run(spoilt_scheduler([]), expected)  # by no token
    first, token, _ = expected.output_ids
    assert len({0, 5, first, token}) == 4

    def fail_at_it(got):
        assert how != "failed otherwise" or got != token, "not this one"
        return False

    scheduler = spoilt_scheduler(token, lookahead)
    stop_ids = frozenset([token] if how == "stopped" else [])
    spoiling = make_request([5] * 90, 9, stop_ids=stop_ids, on_token=fail_at_it)
    scheduler.add(spoiling)
    while len(spoiling.output_ids) < 2:
        scheduler.step()
    if how == "cancelled":
        scheduler.cancel(spoiling)
    finish(scheduler, [spoiling])
    assert spoiling.output_ids == [first, token]
    assert_next_one_is_right(scheduler, token)
