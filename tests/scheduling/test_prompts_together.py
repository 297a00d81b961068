"""Chunks of several prompts in one forward pass: who takes part, and that no request feels it."""

import pytest
import torch
from conftest import engine_of, random_tensor, randomized, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3fast.engine import Engine, RowSampling
from qwen3fast.engine.parts import CHUNK_SIZES
from qwen3fast.engine.prefill import max_prompts
from qwen3fast.engine.prompt_logprobs import WantedLogprobs
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.scheduling.request import Adapter, Request
from qwen3fast.scheduling.scheduler import Scheduler

CPU = torch.device("cpu")
MODEL = randomized(small_config(max_position_embeddings=2048, eos_token_ids=(), tie_word_embeddings=False), seed=3)
ADAPTERS = (Adapter("one", 1), Adapter("two", 2))

pytestmark = pytest.mark.usefixtures("one_thread")


class Forwards:
    """The forward passes of a scheduler's prompts: how many prompts each has, and the size of their chunks."""

    def __init__(self, scheduler):
        self.scheduler, self.passes = scheduler, []
        engine = scheduler.engine
        self._one, self._several = engine.prefill_step, engine.prefill_together
        engine.prefill_step, engine.prefill_together = self._note_one, self._note_several

    def _note_one(self, prefill):
        self.passes.append((1, prefill.chunks[0]))
        return self._one(prefill)

    def _note_several(self, prefills):
        size = max(prefill.chunks[0] for prefill in prefills)
        assert size == prefills[0].chunks[0], "of the oldest"
        self.passes.append((len(prefills), size))
        return self._several(prefills)


def make_scheduler(rows, positions=256, lookahead=0, reuse=True):
    cache = StaticKVCache(MODEL.config, rows, positions, torch.float32, CPU)
    engine = Engine(MODEL, cache, CPU, False, lookahead=lookahead, max_adapters=2, max_adapter_rank=4)
    for slot in (1, 2):
        found = {}
        for i, (name, layer) in enumerate(engine.adapters.layers.items()):
            k, n = layer.base.in_features, layer.base.out_features
            found[name] = (random_tensor(4, k, seed=100 * slot + i), random_tensor(n, 4, seed=200 * slot + i) / 4)
        engine.write_adapter(slot, found)
    return Scheduler(engine, reuse)


def prompt_of(length, seed):
    return [(7 * i + 13 * seed + i * i * (seed + 1)) % 97 for i in range(length)]


def make_request(length, max_tokens=4, seed=0, temperature=30.0, top_k=0, **changes):
    return Request(prompt_of(length, seed), RowSampling(temperature, top_k, seed=seed), max_tokens, **changes)


def finish(scheduler, requests):
    for request in requests:
        if request.slot is None and request not in scheduler.waiting:
            scheduler.add(request)
    while any(request.finish_reason is None for request in requests):
        scheduler.step()
    return [request.output_ids for request in requests]


def alone(*arguments, **changes):
    [tokens] = finish(make_scheduler(1, 1300), [make_request(*arguments, **changes)])
    return tokens


def test_prompts_that_come_together_are_computed_together():
    scheduler = make_scheduler(8)
    forwards = Forwards(scheduler)
    lengths = (31, 5, 32, 7, 9, 20)
    requests = [make_request(n, 6, seed) for seed, n in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    scheduler.step()
    assert forwards.passes == [(6, 32)] and all(len(request.output_ids) == 2 for request in requests)
    assert finish(scheduler, requests) == [alone(n, 6, seed) for seed, n in enumerate(lengths)]


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [
        ([20] * 20, [(16, 32), (4, 32)]),
        ([60] * 9, [(8, 64), (1, 64)]),
        ([250, 128, 250, 100], [(2, 256), (2, 128)]),
        ([512, 512, 20], [(1, 512), (1, 512), (1, 32)]),
        ([60, 20, 50, 30], [(4, 64)]),  # others are padded to the first one's size
        ([20, 60, 30, 50], [(2, 32), (2, 64)]),  # but not the first one
        ([120, 20], [(1, 128), (1, 32)]),  # nor by more than another chunk costs
        ([320, 310, 320], [(2, 256), (2, 64), (1, 256), (1, 64)]),
    ],
)
def test_as_many_tokens_as_the_largest_chunk_are_computed_together(lengths, passes):
    scheduler = make_scheduler(20, 1300)
    forwards = Forwards(scheduler)
    requests = [make_request(n, 2, seed) for seed, n in enumerate(lengths)]
    finish(scheduler, requests)
    assert forwards.passes == passes
    assert all(count * size <= CHUNK_SIZES[-1] for count, size in passes)


def test_a_running_reply_gets_a_token_after_each_forward_pass():
    scheduler = make_scheduler(20, 1300)
    forwards, running = Forwards(scheduler), make_request(5, 60)
    scheduler.add(running)
    scheduler.step()
    others = [make_request(20 + 9 * seed, 2, seed) for seed in range(1, 19)]
    for request in others:
        scheduler.add(request)
    while not all(request.output_ids for request in others):
        computed, got = len(forwards.passes), len(running.output_ids)
        scheduler.step()
        assert len(forwards.passes) <= computed + 1 and len(running.output_ids) == got + 1
    assert max(forwards.passes)[0] > 1
    finish(scheduler, [running])
    assert running.output_ids == alone(5, 60)


def test_requests_get_slots_in_the_order_they_came():
    """The second has a chunk of another size: it has its slot before the third one has, which is computed first."""
    scheduler = make_scheduler(3)
    first, second, third, _ = requests = [make_request(n, 3, seed) for seed, n in enumerate((20, 100, 20, 20))]
    for request in requests:
        scheduler.add(request)
    scheduler.step()
    assert [request.slot for request in requests] == [0, 1, 2, None]
    assert (len(first.output_ids), len(second.output_ids), len(third.output_ids)) == (2, 0, 2)
    assert finish(scheduler, requests) == [alone(n, 3, seed) for seed, n in enumerate((20, 100, 20, 20))]


@pytest.mark.parametrize(("common", "passes"), [(3, 1), (31, 1), (40, 2), (70, 2)])
def test_a_prompt_waits_for_another_if_it_saves_a_chunk_of_its_own(common, passes):
    scheduler = make_scheduler(4)
    forwards = Forwards(scheduler)
    shared = prompt_of(common, 0)
    requests = [make_request(1, 3, seed) for seed in range(3)]
    for i, request in enumerate(requests):
        request.prompt_ids = [*shared, 90 + i, *prompt_of(99 - common, i + 1)]
    finish(scheduler, requests)
    assert len(forwards.passes) == passes
    assert [request.reused_tokens > 0 for request in requests] == [False, passes > 1, passes > 1]
    for request in requests:
        again = make_request(1, 3, request.sampling.seed)
        again.prompt_ids = request.prompt_ids
        assert finish(make_scheduler(1), [again]) == [request.output_ids]


def test_the_same_prompt_is_computed_once():
    scheduler = make_scheduler(4)
    forwards = Forwards(scheduler)
    requests = [make_request(20, 3, seed, temperature=0.0) for seed in range(4)]
    for request in requests:
        request.prompt_ids = prompt_of(20, 0)
    tokens = finish(scheduler, requests)
    assert forwards.passes == [(1, 32)] and tokens == [alone(20, 3, 0, temperature=0.0)] * 4


def test_a_prompt_that_is_there_already_joins_without_a_chunk():
    scheduler = make_scheduler(4)
    first = make_request(20, 3, 0)
    finish(scheduler, [first])
    forwards = Forwards(scheduler)
    requests = [make_request(20, 3, seed) for seed in (5, 0, 6)]
    finish(scheduler, requests)
    assert forwards.passes == [(2, 32)] and requests[1].reused_tokens == 20
    assert [r.output_ids for r in requests] == [alone(20, 3, seed) for seed in (5, 0, 6)]


def test_a_failed_forward_pass_ends_the_requests_in_it_and_no_other():
    scheduler = make_scheduler(6)
    running = make_request(5, 30, 9)
    scheduler.add(running)
    scheduler.step()
    broken = [make_request(20, 3, seed) for seed in range(3)]
    waiting = make_request(100, 3, 4)
    for request in (*broken, waiting):
        scheduler.add(request)
    together = scheduler.engine.prefill_together

    def fail(prefills):
        scheduler.engine.prefill_together = together
        raise MemoryError("no room")

    scheduler.engine.prefill_together = fail
    scheduler.step()
    assert all(isinstance(request.error, MemoryError) for request in broken)
    assert finish(scheduler, [running, waiting]) == [alone(5, 30, 9), alone(100, 3, 4)]
    assert finish(scheduler, [make_request(20, 3, 1)]) == [alone(20, 3, 1)]


def test_nan_logits_of_one_prompt_end_its_request_alone():
    model = randomized(small_config(max_position_embeddings=512, eos_token_ids=(), tie_word_embeddings=False), seed=3)
    model.model.embed_tokens.weight[96] = torch.nan
    scheduler = Scheduler(engine_of(model))
    requests = [make_request(20, 5, seed) for seed in range(3)]
    for request in requests:
        request.prompt_ids = [token % 90 for token in request.prompt_ids]
    requests[1].prompt_ids[4] = 96
    finish(scheduler, requests)
    assert [request.finish_reason for request in requests] == ["length", "error", "length"]
    assert isinstance(requests[1].error, FloatingPointError)


def test_one_of_the_prompts_is_cancelled_between_its_chunks():
    scheduler = make_scheduler(4, 1300)
    requests = [make_request(300, 5, seed) for seed in range(2)]
    for request in requests:
        scheduler.add(request)
    scheduler.step()
    assert [request.prefill.done for request in requests] == [256, 256]
    scheduler.cancel(requests[0])
    assert finish(scheduler, [requests[1]]) == [alone(300, 5, 1)]
    assert requests[0].output_ids == [] and requests[0].finish_reason == "cancelled"


def kinds_of_requests():
    """Each kind of request by a function of its length and seed; the fields that are compared."""
    return {
        "sampled": lambda n, seed: make_request(n, 5, seed),
        "greedy": lambda n, seed: make_request(n, 5, seed, temperature=0.0),
        "top-k": lambda n, seed: make_request(n, 5, seed, top_k=20),
        "penalties": lambda n, seed: make_request(n, 5, seed, repetition_penalty=1.5, frequency_penalty=1.0),
        "log-probabilities": lambda n, seed: make_request(n, 5, seed, logprobs=2),
        "prompt": lambda n, seed: make_request(n, 5, seed, wanted_logprobs=WantedLogprobs(1, 1)),
        "hook": lambda n, seed: make_request(n, 5, seed, logits_processor=lambda logits_V, _: logits_V.roll(3)),
        "adapter": lambda n, seed: make_request(n, 5, seed, adapter=ADAPTERS[seed % 2]),
    }


KINDS = kinds_of_requests()
arrivals = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps until it comes
        st.one_of(st.integers(1, 40), st.integers(1, 200)),  # length of the prompt
        st.sampled_from(sorted(KINDS)),
        st.one_of(st.none(), st.integers(0, 4)),  # cancelled after so many steps
    ),
    min_size=2,
    max_size=10,
)


@settings(max_examples=20)
@given(arrivals=arrivals, rows=st.integers(2, 8), lookahead=st.sampled_from([0, 2]))
def test_a_request_gets_what_it_gets_alone_whoever_is_prefilled_beside_it(arrivals, rows, lookahead):
    scheduler, requests, cancels, now = make_scheduler(rows, lookahead=lookahead), [], [], 0
    forwards = Forwards(scheduler)
    for seed, (wait, length, kind, cancel) in enumerate(arrivals):
        for _ in range(wait):
            scheduler.step()
            now += 1
            for at, request in cancels:
                if at == now:
                    scheduler.cancel(request)
        requests.append(KINDS[kind](length, seed))
        scheduler.add(requests[-1])
        if cancel is not None:
            cancels.append((now + cancel, requests[-1]))
    finish(scheduler, requests)
    assert all(count <= max_prompts(size, rows) for count, size in forwards.passes)
    single = make_scheduler(1, reuse=False)
    for seed, (request, (_, length, kind, _)) in enumerate(zip(requests, arrivals, strict=True)):
        expected = KINDS[kind](length, seed)
        finish(single, [expected])
        assert request.error is None and expected.error is None
        if request.finish_reason == "cancelled":
            assert request.output_ids == expected.output_ids[: len(request.output_ids)]
            continue
        assert request.output_ids == expected.output_ids
        assert [at.ids for at in request.output_logprobs] == [at.ids for at in expected.output_logprobs]
        assert [at.ids for at in request.prompt_logprobs] == [at.ids for at in expected.prompt_logprobs]
