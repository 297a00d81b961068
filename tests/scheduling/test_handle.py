"""Replies on their way: submit, handles, astream, cancelling, back-pressure, closing, and steps that fail.

A reply that must still run when something happens to it is made slow (SLOW sleeps at each token), never timed.
"""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace

import pytest
from conftest import randomized, slowly, small_config, wait_until

from qwen3fast import Generator, QueueFullError, SamplingParams
from qwen3fast.scheduling.waiter import Waiter, wake_all

PATIENCE_S = 20  # for what comes at once on a machine that nobody else uses
GREEDY = SamplingParams(temperature=0, max_tokens=12)
MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]


SLOW = SamplingParams(temperature=0, max_tokens=1500, logits_processor=slowly)


@pytest.fixture(scope="module")
def model(tokenizer):
    sizes = {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    config = small_config(**sizes, eos_token_ids=())
    return randomized(config, seed=1)


@pytest.fixture(scope="module")
def alone(model, tokenizer):
    """A Generator that runs one request at a time and takes nothing over from earlier ones."""
    with Generator(model, tokenizer, max_seq_len=2048, compile=False, prefix_reuse=False) as generator:
        yield generator


@pytest.fixture
def generator(model, tokenizer):
    with Generator(model, tokenizer, max_seq_len=2048, max_batch_size=2, compile=False) as generator:
        yield generator


@pytest.fixture
def narrow(model, tokenizer):
    """One slot, and two places to wait for it."""
    with Generator(model, tokenizer, max_seq_len=2048, max_queue=2, compile=False) as generator:
        yield generator


@pytest.fixture(scope="module")
def tiny():
    with Generator.from_pretrained("tiny", dtype="bfloat16", max_batch_size=2, compile=True) as generator:  # in C++
        yield generator


def state(generator):
    """Slots in use and requests waiting."""
    stats = generator.stats
    return stats.slots_in_use, stats.waiting


@contextmanager
def all_slots_busy(generator):
    """Slow replies in all slots while the block runs."""
    rows = generator.stats.max_batch_size
    handles = [generator.submit("busy", SLOW) for _ in range(rows)]
    wait_until(lambda: generator.stats.slots_in_use == rows)
    try:
        yield handles
    finally:
        for handle in handles:
            handle.cancel()


def places(generator):
    """Return the number of requests that can wait before one is refused, with all slots busy; cancel them."""
    wait_until(lambda: state(generator)[1] == 0)  # a cancel counts from the next step on
    handles = []
    try:
        while True:
            handles.append(generator.submit("place", GREEDY, timeout=0))
    except QueueFullError:
        return len(handles)
    finally:
        for handle in handles:
            handle.cancel()


def assert_unharmed(generator, alone, prompt="is it still right?"):
    """No slot in use, nobody waiting, and the next reply is right."""
    wait_until(lambda: state(generator) == (0, 0))
    assert generator.generate(prompt, GREEDY).token_ids == alone.generate(prompt, GREEDY).token_ids


# Submitting


def test_submit_from_many_threads_gives_each_what_generate_gives_alone(generator, alone):
    rng = random.Random(0)
    cases = [
        (
            [rng.randrange(90) for _ in range(rng.randint(1, 150))],
            SamplingParams(temperature=rng.choice([0, 30]), seed=i, max_tokens=rng.randint(1, 30)),
        )
        for i in range(24)
    ]
    begin = threading.Barrier(len(cases))

    def work(case):
        begin.wait()
        return generator.submit(*case).result(PATIENCE_S)

    with ThreadPoolExecutor(len(cases)) as pool:
        results = list(pool.map(work, cases))
    expected = [alone.generate(*case) for case in cases]
    assert [(r.token_ids, r.text, r.finish_reason) for r in results] == [
        (r.token_ids, r.text, r.finish_reason) for r in expected
    ]


def test_submit_returns_before_the_reply_has_ended(generator):
    handle = generator.submit("hello", SLOW)
    assert not handle.is_done
    handle.cancel()
    handle.result(PATIENCE_S)
    assert handle.is_done


def test_submit_refuses_bad_arguments_and_takes_no_place_for_them(narrow):
    for prompt, params in [("", GREEDY), ([10**6], GREEDY), ("a", SamplingParams(max_tokens=3000)), ("a", 5)]:
        with pytest.raises(ValueError):
            narrow.submit(prompt, params)
    with all_slots_busy(narrow):
        assert places(narrow) == 2


# Chunks


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("stop", [(), ("carry", "4")])
def test_chunks_join_to_the_result(tiny, thinking, stop):
    prompt = tiny.render(MESSAGES, SamplingParams(temperature=0.6), thinking)
    for seed in range(3):
        params = SamplingParams(seed=seed, max_tokens=60, stop=stop)
        *chunks, last = tiny.submit(prompt, params)
        result = last.result
        assert [c.finish_reason for c in chunks] == [None] * len(chunks)
        assert [c.result for c in chunks] == [None] * len(chunks)
        assert last.finish_reason == result.finish_reason
        chunks.append(last)
        assert "".join(c.text for c in chunks) == result.text
        assert "".join(c.reasoning for c in chunks) == result.reasoning
        assert "".join(c.answer for c in chunks) == result.answer
        assert [i for c in chunks for i in c.token_ids] == result.token_ids
        assert result.text == tiny.generate(prompt, params).text


def test_every_chunk_of_a_quick_reader_has_news(generator):
    may_go_on = threading.Semaphore(1)

    def wait(logits, output):
        assert may_go_on.acquire(timeout=PATIENCE_S), "nobody has read the last chunk"
        return logits

    chunks = []
    for chunk in generator.submit("hello", replace(GREEDY, logits_processor=wait)):
        chunks.append(chunk)
        may_go_on.release()
    assert all(chunk.token_ids or chunk.result is not None for chunk in chunks)
    assert len(chunks) >= GREEDY.max_tokens


def test_a_slow_reader_gets_fewer_chunks_and_loses_nothing(generator, alone):
    handle = generator.submit("hello", GREEDY)
    handle.result(PATIENCE_S)
    [chunk] = list(handle)
    expected = alone.generate("hello", GREEDY)
    assert (chunk.text, chunk.token_ids, chunk.finish_reason) == (expected.text, expected.token_ids, "length")


def test_a_reader_that_comes_back_late_gets_all_that_it_missed_in_one_chunk(generator, alone):
    may_go_on = threading.Event()

    def wait(logits, output):
        assert len(output) < 5 or may_go_on.wait(PATIENCE_S), "nobody has read a chunk"
        return logits

    handle = generator.submit("hello", replace(GREEDY, logits_processor=wait))
    first = next(iter(handle))
    may_go_on.set()
    handle.result(PATIENCE_S)
    [rest] = list(handle)
    expected = alone.generate("hello", GREEDY)
    assert first.token_ids and first.result is None
    assert first.token_ids + rest.token_ids == expected.token_ids
    assert first.text + rest.text == expected.text == rest.result.text


def test_chunks_are_given_once(generator):
    handle = generator.submit("hello", GREEDY)
    assert handle.result(PATIENCE_S) is list(handle)[-1].result
    assert list(handle) == []
    assert handle.result().finish_reason == "length"


def test_two_readers_share_the_chunks_of_a_handle(generator):
    handle = generator.submit("hello", SamplingParams(temperature=0, max_tokens=60))
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda _: list(handle), range(2)))
    tokens = [i for part in parts for chunk in part for i in chunk.token_ids]
    assert sorted(tokens) == sorted(handle.result().token_ids)


# Results


def test_result_raises_timeout_error_and_the_reply_goes_on(generator, alone):
    params = SamplingParams(temperature=0, max_tokens=60, logits_processor=slowly)
    handle = generator.submit("hello", params)
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match=r"has not ended within .* it continues"):
            handle.result(timeout)
    assert (
        handle.result(PATIENCE_S).token_ids
        == alone.generate("hello", SamplingParams(temperature=0, max_tokens=60)).token_ids
    )


def test_result_may_be_asked_for_again_and_by_several_threads(generator):
    handle = generator.submit("hello", GREEDY)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: handle.result(PATIENCE_S), range(4)))
    assert all(result is handle.result(0) for result in results)


def failing_at(number, error):
    """A logits_processor that raises at a token of the reply."""

    def fail(logits, output):
        if len(output) == number:
            raise error
        return logits

    return fail


@pytest.mark.parametrize("number", [0, 3])
def test_an_error_is_raised_by_every_way_to_wait_for_the_reply(generator, alone, number):
    params = SamplingParams(temperature=0, max_tokens=12, logits_processor=failing_at(number, KeyError("mine")))

    async def read(stream):
        return [chunk async for chunk in stream]

    waits = [
        lambda: generator.generate("a", params),
        lambda: generator.submit("a", params).result(PATIENCE_S),
        lambda: list(generator.submit("a", params)),
        lambda: list(generator.stream("a", params)),
        lambda: asyncio.run(read(generator.submit("a", params))),
        lambda: asyncio.run(read(generator.astream("a", params))),
    ]
    for wait in waits:
        with pytest.raises(KeyError, match="mine"):
            wait()
    assert_unharmed(generator, alone)


def test_a_reader_hears_of_an_error_that_another_has_seen(generator):
    """Otherwise its loop ends as if the reply were over, without a result."""
    params = SamplingParams(temperature=0, max_tokens=12, logits_processor=failing_at(3, KeyError("mine")))
    handle = generator.submit("a", params)
    with pytest.raises(KeyError, match="mine"):
        handle.result(PATIENCE_S)
    with pytest.raises(KeyError, match="mine"):
        list(handle)


# Cancelling


def test_cancelled_before_the_start_it_never_gets_a_slot(generator, alone):
    handle = generator._builder.build_one("hello", GREEDY)
    handle.cancel()
    [chunk] = list(generator._dispatcher.stream(handle))
    assert (chunk.token_ids, chunk.finish_reason, chunk.result.text) == ([], "cancelled", "")
    assert generator.stats.prefilled_tokens == 0
    assert_unharmed(generator, alone)


def test_cancelled_while_waiting_it_ends_while_all_slots_are_busy(generator, alone):
    with all_slots_busy(generator):
        handle = generator.submit("hello", GREEDY)
        handle.cancel()
        assert handle.result(PATIENCE_S).finish_reason == "cancelled"
        assert state(generator) == (2, 0)
    assert_unharmed(generator, alone)


def test_cancelled_during_prefill_it_computes_no_other_chunk(generator, alone, monkeypatch):
    ids = [i % 90 for i in range(1600)]
    chunks, compute = [], generator.debug.engine.prefill_step
    handle = generator._builder.build_one(ids, GREEDY)

    def cancelled_at_the_second_chunk(prefill):
        chunks.append(len(prefill.chunks))
        if len(chunks) == 2:
            handle.cancel()
        return compute(prefill)

    monkeypatch.setattr(generator.debug.engine, "prefill_step", cancelled_at_the_second_chunk)
    [chunk] = list(generator._dispatcher.stream(handle))
    assert (chunk.token_ids, chunk.finish_reason) == ([], "cancelled")
    assert len(chunks) == 2 < chunks[0]
    monkeypatch.undo()
    result = generator.generate(ids, GREEDY)  # goes on from what there is
    assert result.metrics.reused_tokens == 1024
    assert result.token_ids == alone.generate(ids, GREEDY).token_ids
    assert_unharmed(generator, alone)


@pytest.mark.parametrize("number", [1, 3])
def test_cancelled_during_decode_its_slot_is_free_before_the_next_step(generator, alone, monkeypatch, number):
    steps, launch = [], generator.debug.engine.launch
    handle = generator._builder.build_one("hello", GREEDY)

    def cancelled_at(*arguments):
        steps.append(arguments)
        if len(steps) == number:
            handle.cancel()
        return launch(*arguments)

    monkeypatch.setattr(generator.debug.engine, "launch", cancelled_at)
    *_, last = generator._dispatcher.stream(handle)
    assert last.finish_reason == "cancelled"
    assert state(generator) == (0, 0)
    assert len(steps) == number  # none after the one that was under way
    assert last.result.token_ids == alone.generate("hello", GREEDY).token_ids[: number + 1]
    assert_unharmed(generator, alone)


def test_cancel_from_another_thread_lets_one_step_run_at_most(generator, alone, monkeypatch):
    steps, launch = [], generator.debug.engine.launch
    monkeypatch.setattr(generator.debug.engine, "launch", lambda *arguments: (steps.append(0), launch(*arguments))[1])
    for _ in range(20):
        handle = generator.submit("hello", SLOW)
        next(iter(handle))
        handle.cancel()
        before = len(steps)
        assert handle.result(PATIENCE_S).finish_reason == "cancelled"
        assert state(generator) == (0, 0)
        assert len(steps) <= before + 1
    assert_unharmed(generator, alone)


def test_cancel_after_the_end_changes_nothing(generator, alone):
    handle = generator.submit("hello", GREEDY)
    result = handle.result(PATIENCE_S)
    handle.cancel()
    assert_unharmed(generator, alone)
    assert handle.result(0) is result
    assert result.finish_reason == "length"


def test_cancel_twice_is_cancel_once(generator, alone):
    handle = generator.submit("hello", SLOW)
    handle.cancel()
    handle.cancel()
    assert handle.result(PATIENCE_S).finish_reason == "cancelled"
    handle.cancel()
    assert_unharmed(generator, alone)


def test_thousands_of_cancels_leave_nothing_behind(generator, alone):
    for i in range(2000):
        handle = generator.submit([i % 90, 5, i // 90], GREEDY)
        handle.cancel()
    handle.result(PATIENCE_S)
    assert_unharmed(generator, alone)


def test_cancelled_at_random_moments_replies_are_the_beginnings_of_whole_ones(generator, alone):
    rng = random.Random(0)
    params = SamplingParams(temperature=30, seed=3, max_tokens=40)
    whole = alone.generate("hello", params)
    others = [generator.submit([i, i], SamplingParams(temperature=30, seed=i, max_tokens=100)) for i in range(3)]
    for number in range(24):
        handle = generator.submit("hello", params)
        for _ in zip(range(number % 8), handle, strict=False):
            pass  # chunks, of a token or more
        time.sleep(rng.random() * 0.01)
        handle.cancel()
        result = handle.result(PATIENCE_S)
        assert number % 8 <= len(result.token_ids) <= 40
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]
        assert whole.text.startswith(result.text.rstrip("�"))  # half a character may have been the last
    for i, other in enumerate(others):
        expected = alone.generate([i, i], SamplingParams(temperature=30, seed=i, max_tokens=100))
        assert other.result(PATIENCE_S).token_ids == expected.token_ids
    assert_unharmed(generator, alone)


# asyncio


async def read(generator, prompt, params):
    """Token ids of a reply, by astream."""
    return [i async for chunk in generator.astream(prompt, params) for i in chunk.token_ids]


async def until(is_so):
    """wait_until for tasks."""
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.001)


def test_astream_serves_several_tasks_at_once(generator, alone):
    prompts = [[i, 7, i] for i in range(8)]

    async def main():
        return await asyncio.gather(*[read(generator, prompt, GREEDY) for prompt in prompts])

    assert asyncio.run(main()) == [alone.generate(prompt, GREEDY).token_ids for prompt in prompts]
    assert_unharmed(generator, alone)


def test_astream_serves_one_event_loop_after_the_other(generator, alone):
    expected = alone.generate("hello", GREEDY).token_ids
    assert [asyncio.run(read(generator, "hello", GREEDY)) for _ in range(3)] == [expected] * 3


def test_astream_serves_two_event_loops_at_once(generator, alone):
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: asyncio.run(read(generator, "hello", GREEDY)), range(2)))
    assert replies == [alone.generate("hello", GREEDY).token_ids] * 2


def test_a_handle_may_be_read_by_async_for(generator, alone):
    async def main():
        return [chunk async for chunk in generator.submit("hello", GREEDY)]

    chunks = asyncio.run(main())
    expected = alone.generate("hello", GREEDY)
    assert [i for chunk in chunks for i in chunk.token_ids] == expected.token_ids
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].result.text == expected.text


def test_a_cancelled_task_frees_its_slot(generator, alone):
    async def main():
        task = asyncio.create_task(read(generator, "hello", SLOW))
        await until(lambda: state(generator) == (1, 0))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert state(generator) == (0, 0)

    asyncio.run(main())
    assert_unharmed(generator, alone)


def test_a_task_that_runs_out_of_time_frees_its_slot(generator, alone):
    async def main():
        with pytest.raises(asyncio.TimeoutError):  # not TimeoutError before Python 3.11
            await asyncio.wait_for(read(generator, "hello", SLOW), 0.1)
        assert state(generator) == (0, 0)

    asyncio.run(main())
    assert_unharmed(generator, alone)


def test_a_loop_that_is_left_early_frees_its_slot_at_once_with_aclosing(generator, alone):
    async def main():
        async with aclosing(generator.astream("hello", SLOW)) as stream:
            async for chunk in stream:
                assert chunk.token_ids
                break
        assert state(generator) == (0, 0)

    asyncio.run(main())
    assert_unharmed(generator, alone)


def test_a_loop_that_is_left_early_frees_its_slot_when_the_event_loop_ends(generator, alone):
    async def main():
        async for _ in generator.astream("hello", SLOW):
            break

    asyncio.run(main())
    assert_unharmed(generator, alone)


def test_an_event_loop_that_is_gone_ends_its_replies(generator, alone):
    loop = asyncio.new_event_loop()
    stream = aiter(generator.submit("hello", SLOW))
    loop.run_until_complete(anext(stream))
    loop.close()
    assert_unharmed(generator, alone)


def test_astream_does_not_block_the_event_loop(generator):
    may_go_on = threading.Event()

    def wait(logits, output):
        assert may_go_on.wait(PATIENCE_S), "the event loop was blocked"
        return logits

    async def tick():
        for _ in range(30):
            await asyncio.sleep(0)
        may_go_on.set()

    async def main():
        params = SamplingParams(temperature=0, max_tokens=5, logits_processor=wait)
        reply, _ = await asyncio.gather(read(generator, "hello", params), tick())
        assert len(reply) == 5

    asyncio.run(main())


def test_other_tasks_run_while_a_stream_waits_for_each_of_its_tokens(generator):
    ticks = 0

    def wait(logits, output):
        seen = ticks
        wait_until(lambda: ticks > seen)
        return logits

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def main():
        ticking = asyncio.create_task(tick())
        params = SamplingParams(temperature=0, max_tokens=30, logits_processor=wait)
        assert len(await read(generator, "hello", params)) == 30
        ticking.cancel()

    asyncio.run(main())


# Back-pressure


def test_submit_without_patience_is_refused_when_the_queue_is_full(narrow):
    with all_slots_busy(narrow):
        waiting = [narrow.submit("a", GREEDY, timeout=0) for _ in range(2)]
        with pytest.raises(QueueFullError, match=r"2 requests wait already \(max_queue\)"):
            narrow.submit("a", GREEDY, timeout=0)
        begin = time.monotonic()
        with pytest.raises(QueueFullError):
            narrow.submit("a", GREEDY, timeout=0.1)
        assert 0.1 <= time.monotonic() - begin < 0.1 + PATIENCE_S
        assert state(narrow) == (1, 2)
    assert all(handle.result(PATIENCE_S).finish_reason == "length" for handle in waiting)


@pytest.mark.parametrize("timeout", [None, PATIENCE_S])
def test_submit_with_patience_waits_for_a_place(narrow, alone, timeout):
    with all_slots_busy(narrow) as [busy], ThreadPoolExecutor(1) as pool:
        waiting = [narrow.submit("a", GREEDY) for _ in range(2)]
        late = pool.submit(narrow.submit, "late", GREEDY, timeout=timeout)
        time.sleep(0.1)
        assert not late.done()
        assert state(narrow) == (1, 2)
        busy.cancel()
        expected = alone.generate("late", GREEDY).token_ids
        assert late.result(PATIENCE_S).result(PATIENCE_S).token_ids == expected
    assert [handle.result(0).finish_reason for handle in waiting] == ["length"] * 2


def test_places_are_given_in_the_order_in_which_they_were_asked_for(narrow):
    submitted = []

    def submit(number):
        submitted.append((number, narrow.submit([number], GREEDY)))

    with all_slots_busy(narrow):
        waiting = [narrow.submit("a", GREEDY) for _ in range(2)]
        threads = [threading.Thread(target=submit, args=(number,)) for number in range(5)]
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda n=number: len(narrow.debug.admission._asking) == n + 1)
        for number, thread in enumerate(threads):  # a place at a time: whoever has one may be slow to say so
            waiting[number].cancel()
            thread.join(PATIENCE_S)
            assert submitted[-1][0] == number
            waiting.append(submitted[-1][1])


def test_astream_waits_for_a_place_without_blocking_the_event_loop(narrow, alone):
    async def main():
        with all_slots_busy(narrow) as [busy]:
            waiting = [narrow.submit("a", GREEDY) for _ in range(2)]
            task = asyncio.create_task(read(narrow, "late", GREEDY))
            await asyncio.sleep(0.1)  # would never end if astream waited for its place in the loop's own thread
            assert state(narrow) == (1, 2)
            assert not task.done()
            busy.cancel()
            return await asyncio.wait_for(task, PATIENCE_S), [handle.result(PATIENCE_S) for handle in waiting]

    tokens, _ = asyncio.run(main())
    assert tokens == alone.generate("late", GREEDY).token_ids


def test_a_waiting_request_that_is_cancelled_gives_its_place_back(narrow):
    with all_slots_busy(narrow):
        handles = [narrow.submit("a", GREEDY) for _ in range(2)]
        for handle in handles:
            handle.cancel()
        assert places(narrow) == 2


def test_a_request_that_fails_or_ends_gives_its_place_back(narrow):
    failing = SamplingParams(logits_processor=failing_at(0, KeyError("mine")), max_tokens=3)
    for _ in range(5):
        with pytest.raises(KeyError):
            narrow.submit("a", failing).result(PATIENCE_S)
        narrow.submit("a", GREEDY).result(PATIENCE_S)
    with all_slots_busy(narrow):
        assert places(narrow) == 2


def test_a_step_that_fails_loses_no_place(narrow, monkeypatch):
    launch = narrow.debug.engine.launch
    with all_slots_busy(narrow) as [busy]:
        waiting = [narrow.submit("a", GREEDY) for _ in range(2)]
        monkeypatch.setattr(narrow.debug.engine, "launch", raising_once(MemoryError("no room"), launch))
        with pytest.raises(MemoryError):
            busy.result(PATIENCE_S)
        assert [handle.result(PATIENCE_S).finish_reason for handle in waiting] == ["length"] * 2
    with all_slots_busy(narrow):
        assert places(narrow) == 2


def test_tasks_cancelled_while_they_wait_lose_no_place(narrow):
    """Also where the place comes in the same moment: neither who gives it nor who gives up may lose it."""
    rng = random.Random(0)

    async def main():
        with all_slots_busy(narrow):
            for _ in range(60):
                waiting = [narrow.submit("a", GREEDY) for _ in range(2)]
                tasks = [asyncio.create_task(read(narrow, "late", GREEDY)) for _ in range(2)]
                await asyncio.sleep(rng.choice([0, 0.001]))
                actions = [handle.cancel for handle in waiting] + [task.cancel for task in tasks]
                rng.shuffle(actions)
                for action in actions:
                    action()
                    if rng.random() < 0.3:
                        await asyncio.sleep(rng.choice([0, 0.0005, 0.003]))
                await asyncio.gather(*tasks, return_exceptions=True)
            wait_until(lambda: state(narrow) == (1, 0))
            assert places(narrow) == 2

    asyncio.run(main())


def test_threads_that_run_out_of_time_lose_no_place(narrow):
    rng = random.Random(0)

    def work(seed):
        rng = random.Random(seed)
        for _ in range(25):
            try:
                handle = narrow.submit("late", GREEDY, timeout=rng.choice([0, 0.001, 0.003]))
            except QueueFullError:
                continue
            time.sleep(rng.choice([0, 0.002]))
            handle.cancel()

    with all_slots_busy(narrow):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, [rng.random() for _ in range(4)]))
        wait_until(lambda: state(narrow) == (1, 0))
        assert places(narrow) == 2


def test_an_interrupted_submit_loses_no_place(narrow):
    with all_slots_busy(narrow):
        waiting = [narrow.submit("a", GREEDY) for _ in range(2)]
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            narrow.submit("a", GREEDY, timeout=PATIENCE_S)
        for handle in waiting:
            handle.cancel()
        assert places(narrow) == 2


def test_max_queue_must_be_positive(model):
    with pytest.raises(ValueError, match="max_queue must be an integer from 1 to 1000000, got 0"):
        Generator(model, max_seq_len=64, max_queue=0, compile=False)


# Closing


def test_close_under_load_ends_every_handle_and_every_submitter(model, tokenizer):
    generator = Generator(model, tokenizer, max_seq_len=2048, max_batch_size=2, max_queue=2, compile=False)
    runner = generator.debug.worker.thread
    handles, ends, is_begun = [], [], threading.Event()

    def submit():
        try:
            while True:
                handles.append(generator.submit("hello", SLOW))
                is_begun.set()
        except RuntimeError as err:
            ends.append(err)

    def stream():
        try:
            list(generator.stream("hello", SLOW))
        except RuntimeError as err:
            ends.append(err)

    def astream():
        try:
            asyncio.run(read(generator, "hello", SLOW))
        except RuntimeError as err:
            ends.append(err)

    def generate():
        try:
            generator.generate(["a", "b", "c"], SLOW)
        except RuntimeError as err:
            ends.append(err)

    work = [submit, submit, submit, stream, astream, generate]
    threads = [threading.Thread(target=each, name="worker") for each in work]
    for thread in threads:
        thread.start()
    assert is_begun.wait(PATIENCE_S)
    time.sleep(0.2)
    runner = generator.debug.worker.thread
    closing = [threading.Thread(target=generator.close) for _ in range(2)]
    for thread in closing:
        thread.start()
    for thread in [*closing, *threads]:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in [*closing, *threads, runner])
    assert runner not in threading.enumerate()
    assert len(ends) == len(work)
    assert all("closed" in str(err) for err in ends)
    assert len(handles) >= 2
    for handle in handles:
        with pytest.raises(RuntimeError, match="closed"):
            handle.result(PATIENCE_S)
    generator.close()
    with pytest.raises(RuntimeError, match="closed"):
        generator.submit("a", GREEDY)


def test_closing_while_requests_come_ends_them_all(model, tokenizer):
    """Closing may happen at any moment, also between getting a place and queueing."""
    rng = random.Random(0)
    for _ in range(25):
        generator = Generator(model, tokenizer, max_seq_len=128, max_queue=1, compile=False)
        outcomes = []

        def work(generator=generator, outcomes=outcomes):
            try:
                while True:
                    outcomes.append(generator.submit("hello", GREEDY))
            except RuntimeError as err:
                outcomes.append(err)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(rng.random() * 0.02)
        generator.close()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in threads)
        for outcome in outcomes:
            if isinstance(outcome, RuntimeError):
                assert "closed" in str(outcome)
            else:
                try:
                    assert outcome.result(PATIENCE_S).finish_reason == "length"
                except RuntimeError as err:
                    assert "closed" in str(err)


def test_close_from_a_callback_of_a_request_ends_it(model, tokenizer):
    generator = Generator(model, tokenizer, max_seq_len=128, compile=False)

    def close(logits, output):
        generator.close()
        return logits

    with pytest.raises(RuntimeError, match="closed"):
        generator.generate("hello", SamplingParams(max_tokens=50, logits_processor=close))
    generator.debug.worker.thread.join(PATIENCE_S)
    assert not generator.debug.worker.thread.is_alive()


def test_cancel_after_close_is_harmless(model, tokenizer):
    generator = Generator(model, tokenizer, max_seq_len=128, compile=False)
    handle = generator.submit("hello", GREEDY)
    generator.close()
    handle.cancel()
    assert handle.is_done


@pytest.mark.parametrize("is_cyclic", [False, True])
@pytest.mark.parametrize("is_running", [False, True])
def test_a_generator_that_is_dropped_is_collected_and_its_thread_ends(model, tokenizer, is_running, is_cyclic):
    generator = Generator(model, tokenizer, max_seq_len=2048, compile=False)
    generator.generate("hello", GREEDY)
    handle = generator.submit("hello", SLOW if is_running else GREEDY)
    if not is_running:
        handle.result(PATIENCE_S)
    if is_cyclic:
        generator.myself = generator
    thread, gone = generator.debug.worker.thread, weakref.ref(generator)
    assert thread in threading.enumerate()
    del generator
    gc.collect()
    assert gone() is None
    thread.join(PATIENCE_S)
    assert thread not in threading.enumerate()
    if is_running:
        with pytest.raises(RuntimeError, match="closed"):
            handle.result(PATIENCE_S)


def test_a_stream_keeps_its_generator(model, tokenizer, alone):
    chunks = Generator(model, tokenizer, max_seq_len=2048, compile=False).stream("hello", GREEDY)
    gc.collect()
    assert "".join(chunk.text for chunk in chunks) == alone.generate("hello", GREEDY).text
    gone = weakref.ref(generator := Generator(model, tokenizer, max_seq_len=2048, compile=False))
    chunks = generator.stream("hello", SLOW)
    next(chunks)
    del generator, chunks
    gc.collect()
    assert gone() is None


def test_a_generator_that_never_ran_is_collected(model):
    before = set(threading.enumerate())
    gone = weakref.ref(Generator(model, max_seq_len=64, compile=False))
    gc.collect()
    assert gone() is None
    assert set(threading.enumerate()) <= before


def test_collecting_a_generator_while_its_lock_is_held_is_no_deadlock(model, tokenizer):
    """Garbage may be collected at any allocation, so also while a handle of the same Generator posts its cancel."""
    generator = Generator(model, tokenizer, max_seq_len=2048, compile=False)
    handle = generator.submit("hello", SLOW)
    runner = generator.debug.worker
    inbox = runner._inbox

    class Inbox:
        get, get_nowait = inbox.get, inbox.get_nowait

        def put(self, call):
            gc.collect()
            inbox.put(call)

    gc.disable()
    try:
        generator.myself = generator
        del generator
        runner._inbox = Inbox()
        thread = threading.Thread(target=handle.cancel, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
    finally:
        gc.enable()
    assert not thread.is_alive()
    assert handle.is_done


# Steps that fail


def raising_once(error, function):
    """The function, but its first call raises."""
    errors = [error]

    def call(*arguments, **options):
        if errors:
            raise errors.pop()
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SystemExit])
def test_a_step_that_raises_ends_its_requests_with_the_error(generator, alone, monkeypatch, error):
    expected = alone.generate("c", GREEDY).token_ids
    with all_slots_busy(generator) as running:
        waiting = generator.submit("c", GREEDY)
        monkeypatch.setattr(
            generator.debug.engine, "launch", raising_once(error("broken"), generator.debug.engine.launch)
        )
        for handle in running:
            with pytest.raises(error, match="broken"):
                handle.result(PATIENCE_S)
        assert waiting.result(PATIENCE_S).token_ids == expected
    assert_unharmed(generator, alone)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SystemExit])
@pytest.mark.parametrize(
    "part", ["launch", "collect", "prefill_step", "begin_prefill", "sample_first", "set_rows", "clear_row"]
)
def test_whatever_part_raises_the_next_request_is_right(generator, alone, monkeypatch, part, error):
    generator.generate("some more words to keep", GREEDY)
    assert state(generator) == (0, 0)  # also waits for the end of its last step
    monkeypatch.setattr(
        generator.debug.engine, part, raising_once(error("broken"), getattr(generator.debug.engine, part))
    )
    with pytest.raises(error, match="broken"):
        generator.submit("some more words", GREEDY).result(PATIENCE_S)
    assert_unharmed(generator, alone, "some more words to keep")


@pytest.mark.parametrize("part", ["copy_row", "swap_rows"])
def test_a_request_whose_slot_cannot_be_made_ready_ends_with_the_error(generator, alone, monkeypatch, part):
    """Both ask for memory on a GPU. The request must be neither lost nor left waiting forever."""
    text = "a prompt that is kept in a row"
    if part == "copy_row":
        generator.generate(text, GREEDY)  # kept in one row, of which another request takes over a part
        request = generator._builder.build_one(text[:12] + " and goes on otherwise", GREEDY)
    else:
        generator.generate("something else, at first", GREEDY)
        request = generator._builder.build_one(text, GREEDY)
    calls = []

    def broken(*arguments):
        calls.append(arguments)
        raise MemoryError("broken")

    monkeypatch.setattr(generator.debug.engine, part, broken)
    generator.debug.worker.add([request.request])
    with pytest.raises(MemoryError, match="broken"):
        request.result(PATIENCE_S)
    assert calls
    monkeypatch.undo()
    assert_unharmed(generator, alone)


def test_a_cancel_that_raises_does_not_end_the_thread(generator, alone, monkeypatch):
    """A cancel moves the rows behind it down, which asks for memory. Whatever comes of that, nobody waits forever."""
    with all_slots_busy(generator) as [first, second]:
        calls, swap_rows = [], raising_once(MemoryError("broken"), generator.debug.engine.swap_rows)
        monkeypatch.setattr(generator.debug.engine, "swap_rows", lambda *a: (calls.append(a), swap_rows(*a))[1])
        lower, upper = sorted([first, second], key=lambda handle: handle.request.slot)
        lower.cancel()
        assert lower.result(PATIENCE_S).finish_reason == "cancelled"
        upper.cancel()
        with suppress(MemoryError):  # or it has not felt it
            assert upper.result(PATIENCE_S).finish_reason == "cancelled"
        assert generator.submit("hello", GREEDY).result(PATIENCE_S).finish_reason == "length"
        assert calls
    assert_unharmed(generator, alone)


def test_a_device_that_stays_broken_ends_all_requests(generator, monkeypatch):
    """As CUDA after an illegal address: every call raises from then on, those that clean up as well."""
    with all_slots_busy(generator) as running:
        waiting = generator.submit("c", GREEDY)

        def broken(*arguments, **options):
            raise RuntimeError("device gone")

        for part in ("launch", "collect", "prefill_step", "clear_row", "erase", "set_rows", "swap_rows"):
            monkeypatch.setattr(generator.debug.engine, part, broken)
        for handle in running:
            with pytest.raises(RuntimeError, match="device gone"):
                handle.result(PATIENCE_S)
        with pytest.raises(RuntimeError):
            waiting.result(PATIENCE_S)
        with pytest.raises(RuntimeError):
            generator.submit("later", GREEDY, timeout=PATIENCE_S).result(PATIENCE_S)


# Ctrl-C


@pytest.mark.parametrize("number", [1, 2, 6])
@pytest.mark.parametrize("method", ["generate", "stream", "submit"])
def test_an_interrupted_call_leaves_no_slot_in_use(generator, alone, monkeypatch, method, number):
    calls, launch = [], generator.debug.engine.launch

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return launch(*arguments)

    monkeypatch.setattr(generator.debug.engine, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        if method == "generate":
            generator.generate(["a", "b", "c"], SLOW)
        elif method == "stream":
            list(generator.stream("a", SLOW))
        else:
            handle = generator.submit("a", SLOW)
            try:
                handle.result()
            finally:
                handle.cancel()
    assert state(generator) == (0, 0)
    assert_unharmed(generator, alone)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_submit_runs_nothing_and_loses_no_place(narrow, monkeypatch, moment):
    """Nobody has the handle: such a request could not be cancelled, and would run to its end."""
    add = narrow.debug.worker.add

    def interrupted(requests):
        if moment == "after":
            add(requests)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(narrow.debug.worker, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        narrow.submit("a", SLOW)
    monkeypatch.undo()
    assert state(narrow) == (0, 0)
    with all_slots_busy(narrow):
        assert places(narrow) == 2


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_an_interrupt_just_after_queueing_leaves_no_slot_in_use(generator, alone, monkeypatch, method):
    add = generator.debug.worker.add

    def interrupted(requests):
        add(requests)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generator.debug.worker, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        if method == "generate":
            generator.generate(["a", "b"], SLOW)
        else:
            list(generator.stream("a", SLOW))
    monkeypatch.undo()
    assert state(generator) == (0, 0)
    assert_unharmed(generator, alone)


def test_chunks_come_apart_as_long_as_asked_but_the_end_at_once(generator, alone):
    """With an interval that never ends by itself: what there is at first, then all others with the end."""

    async def main():
        handle = generator.submit("hello", replace(SLOW, max_tokens=50))
        return [chunk async for chunk in handle.chunks(min_interval_s=100 * PATIENCE_S)]

    chunks = asyncio.run(main())
    result = chunks[-1].result
    assert len(chunks) <= 2 and len(result.token_ids) == 50
    assert [token for chunk in chunks for token in chunk.token_ids] == result.token_ids
    assert "".join(chunk.text for chunk in chunks) == result.text


def test_waiters_of_a_step_are_woken_by_one_call(generator, monkeypatch):
    calls = []

    async def main():
        loop = asyncio.get_running_loop()
        real = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda f, *a: (calls.append(f), real(f, *a)))
        waiters = [Waiter(lost=lambda: pytest.fail("the loop runs")) for _ in range(3)]
        await asyncio.to_thread(wake_all, waiters)
        await asyncio.wait_for(asyncio.gather(*(waiter.wait() for waiter in waiters)), PATIENCE_S)

    asyncio.run(main())
    assert len([call for call in calls if call.__module__ == wake_all.__module__]) == 1


def test_aresult_waits_without_being_woken_by_each_token(generator, monkeypatch):
    woken = []
    monkeypatch.setattr(Waiter, "wake", lambda self, wake=Waiter.wake: (woken.append(self), wake(self)))

    async def main():
        return await generator.submit("hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)).aresult()

    result = asyncio.run(main())
    assert len(result.token_ids) == 20 and len(woken) <= 1


def test_aresult_raises_what_ended_the_reply(generator):
    def fail(logits, output):
        raise ArithmeticError("on purpose")

    async def main():
        await generator.submit("hello", SamplingParams(max_tokens=5, logits_processor=fail)).aresult()

    with pytest.raises(ArithmeticError, match="on purpose"):
        asyncio.run(main())
