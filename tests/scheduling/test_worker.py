"""Callers that would wait forever: in the Generator's own thread, and in a process forked after its first use."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import randomized, slowly, small_config, write_text_checkpoint

from qwen3fast import ChatSession, Embedder, Generator, Reranker, SamplingParams
from qwen3fast.scheduling.worker import EngineWorker
from qwen3fast.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=4)
PATIENCE_S = 60
OWN_THREAD = "this call would wait for itself: it was made in the Generator's own thread"
FORKED = "was used before os.fork"
LONG = "hello world " * 150
MESSAGES = [{"role": "user", "content": "Hi"}]
can_fork = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs a safe os.fork")


@pytest.fixture(scope="module")
def model(tokenizer):
    return randomized(small_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, eos_token_ids=()), 1)


@pytest.fixture
def generator(model, tokenizer):
    with Generator(model, tokenizer, max_seq_len=200, max_batch_size=2, max_queue=1, compile=False) as generator:
        yield generator


async def read_all(generator):
    return [chunk async for chunk in generator.astream("hello", GREEDY)]


WAITS = {
    "generate": lambda g, other: g.generate("hello", GREEDY),
    "generate many": lambda g, other: g.generate(["a", "b"], GREEDY),
    "generate uncached": lambda g, other: g.generate("hello", GREEDY, use_cache=False),
    "chat": lambda g, other: g.chat(MESSAGES, replace(GREEDY, temperature=1.0)),
    "stream": lambda g, other: list(g.stream("hello", GREEDY)),
    "stream_chat": lambda g, other: list(g.stream_chat(MESSAGES, replace(GREEDY, temperature=1.0))),
    "submit": lambda g, other: g.submit("hello", GREEDY).result(),
    "astream": lambda g, other: asyncio.run(read_all(g)),
    "warmup": lambda g, other: g.warmup(),
    "session": lambda g, other: ChatSession(g).send("hello", replace(GREEDY, temperature=1.0)),
    "result of another request": lambda g, other: other.result(),
    "chunks of another request": lambda g, other: next(iter(other)),
}


@pytest.mark.parametrize("name", WAITS)
@pytest.mark.parametrize("place", ["logits_processor", "when_done"])
def test_a_call_that_would_wait_for_itself_is_refused(generator, name, place):
    expected, errors = generator.generate("x", GREEDY).token_ids, []
    is_called = threading.Event()

    def call():
        if not is_called.is_set():
            try:
                WAITS[name](generator, other)
            except RuntimeError as err:
                errors.append(str(err))
            finally:
                is_called.set()

    if place == "logits_processor":
        begin = threading.Event()

        def processor(logits, output):
            assert begin.wait(PATIENCE_S)
            call()
            return logits

        handle = generator.submit("x", replace(GREEDY, logits_processor=processor))
        other = generator.submit("y", replace(GREEDY, max_tokens=100))
        begin.set()
    else:
        other = generator._builder.build_one("y", GREEDY)  # never started
        handle = generator._builder.build_one("x", GREEDY)
        handle.when_done(call)
        list(generator._dispatcher.stream(handle))
    assert handle.result(PATIENCE_S).token_ids == expected
    assert is_called.wait(PATIENCE_S)
    assert len(errors) == 1 and OWN_THREAD in errors[0]
    other.cancel()
    assert generator.generate("x", GREEDY).token_ids == expected


def test_cancel_and_stats_may_be_called_from_a_callback(generator):
    seen = []

    def processor(logits, output):
        seen.append(generator.stats.slots_in_use)
        handle.cancel()
        return logits

    handle = generator._builder.build_one("x", replace(GREEDY, max_tokens=100, logits_processor=processor))
    [*_, last] = generator._dispatcher.stream(handle)
    assert last.finish_reason == "cancelled" and seen[0] == 1


@pytest.fixture
def busy_threads():
    """PyTorch has run on several threads in this one: in a forked process, it would wait for them forever."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    x = torch.ones(500, 500)
    assert (x @ x + torch.ones(500, 500)).sum() > 0
    yield
    torch.set_num_threads(before)


def in_child(function):
    """Run a function in a forked process. Returns: its exit status, from the function's return value."""
    sys.stdout.flush()
    process_id = os.fork()
    if process_id == 0:
        try:
            os._exit(function())
        except BaseException:
            os._exit(99)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        done, status = os.waitpid(process_id, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process_id, signal.SIGKILL)
    os.waitpid(process_id, 0)
    pytest.fail("the child hangs")


def says_forked(function):
    """Return exit status 0 if a function raises the RuntimeError that names os.fork."""
    try:
        function()
    except RuntimeError as err:
        return 0 if FORKED in str(err) and "build " in str(err) else 2
    return 1


@can_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("name", [*WAITS, "stats"])
def test_a_used_generator_says_in_a_forked_process_what_to_do(generator, name):
    running = generator.submit("busy", replace(GREEDY, max_tokens=150, logits_processor=slowly))
    next(iter(running))

    def call():
        return generator.stats if name == "stats" else WAITS[name](generator, running)

    assert in_child(lambda: says_forked(call)) == 0
    running.cancel()
    assert len(generator.generate("x", GREEDY).token_ids) == 4  # the parent is unharmed


@can_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_closing_a_used_generator_in_a_forked_process_is_harmless(generator):
    generator.generate("x", GREEDY)

    def close():
        generator.close()
        generator.close()
        try:
            generator.generate("x", GREEDY)
        except RuntimeError:
            return 0
        return 1

    assert in_child(close) == 0
    assert len(generator.generate("x", GREEDY).token_ids) == 4


@can_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_generator_that_was_not_used_works_in_forked_processes(model, tokenizer, generator):
    expected = generator.generate([1, 2, 3], GREEDY).token_ids
    with Generator(model, tokenizer, max_seq_len=200, compile=False) as fresh:
        for _ in range(2):
            assert in_child(lambda: int(fresh.generate([1, 2, 3], GREEDY).token_ids != expected)) == 0
        assert fresh.generate([1, 2, 3], GREEDY).token_ids == expected


@can_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_forked_process_may_build_its_own(generator, quantization, busy_threads):
    with Generator.from_pretrained("tiny", quantization=quantization, compile=False, max_seq_len=128) as first:
        expected = first.generate("hello", GREEDY).token_ids

        def build():
            with Generator.from_pretrained("tiny", quantization=quantization, compile=False, max_seq_len=128) as own:
                return int(own.generate("hello", GREEDY).token_ids != expected)

        assert in_child(build) == 0


@can_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("kind", [Embedder, Reranker])
def test_embedder_and_reranker_work_in_a_forked_process(yes_no_folder, tmp_path, kind, busy_threads):
    config = small_config(vocab_size=Tokenizer.from_folder(yes_no_folder).vocab_size, max_position_embeddings=512)
    folder = write_text_checkpoint(tmp_path, randomized(config, 1), yes_no_folder)

    def results(made):
        return made.encode([LONG, "x"]).tolist() if kind is Embedder else made.score("x", [LONG, "y"])

    made = kind.from_pretrained(folder)
    expected = results(made)
    assert in_child(lambda: int(results(made) != expected)) == 0
    assert in_child(lambda: int(results(kind.from_pretrained(folder)) != expected)) == 0
    assert results(made) == expected


def test_on_cuda_the_thread_begins_when_what_others_have_queued_is_done(monkeypatch):
    """They may have had another stream, which the thread's own does not wait for."""
    calls, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    engine = SimpleNamespace(device=device, close=lambda: None)
    worker = EngineWorker(SimpleNamespace(engine=engine, is_idle=True, end_all=lambda error: None))
    assert worker.call(lambda: [*calls]) == [device, "synchronize"]
    worker.close()
