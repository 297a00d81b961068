"""The clients of the suite `serve`: what they tell of replies whose events come in any pieces, and what they refuse."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import contextmanager

import pytest

from qwen3fast.bench import load_client
from qwen3fast.bench.serving import Reply, make_work, read_reply, run_http, tokens_of, word_tokenizer

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def sent(text, usage=None):
    """An event as the server sends it, in a chunk of its own."""
    choices = [{"text": text, "finish_reason": None}] if text is not None else []
    used = {"completion_tokens": usage} if usage is not None else None
    data = b"data: " + json.dumps({"choices": choices, "usage": used}).encode() + b"\n\n"
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


STREAM = [HEAD, sent(""), sent(" aaaa"), sent(" baaa caaa"), sent(None, 3), b"e\r\ndata: [DONE]\n\n\r\n", END]


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_events_get_the_time_of_the_read_that_completes_them(size):
    stream = b"".join(STREAM)
    reads = [(10.0 + i, stream[i : i + size]) for i in range(0, len(stream), size)]
    told = load_client.parse(9.0, reads)
    assert told["status"] == 200 and told["seconds"] == reads[-1][0] - 9.0
    ends = [stream.index(data) + len(data) for data in (b" aaaa", b"caaa", b"[DONE]")]
    found = {data: at for at, data in told["events"]}
    for needle, end in zip((" aaaa", "caaa", "[DONE]"), ends, strict=True):
        [at] = [at for data, at in found.items() if needle in data]
        blank = stream.index(b"\n\n", end) + 2  # an event is complete with its empty line
        assert at == next(t for t, part in reads if t - 10.0 + len(part) >= blank) - 9.0


def test_reply_counts_tokens_by_words_and_by_usage():
    raw = load_client.parse(0.0, [(1.0, STREAM[0] + STREAM[1]), (2.0, STREAM[2]), (4.0, b"".join(STREAM[3:]))])
    reply = read_reply(raw, 3)
    assert reply == Reply([(2.0, " aaaa"), (4.0, " baaa caaa")], 3, 4.0)
    assert (reply.ttft_s, reply.gaps_s, reply.per_token_s, reply.is_good) == (2.0, [2.0], 1.0, False)


@pytest.mark.parametrize(
    ("ttft_s", "gap_s", "is_good"), [(0.9, 0.09, True), (1.1, 0.01, False), (0.1, 0.2, False), (1.0, 0.0, True)]
)
def test_good_replies_begin_soon_and_never_stop(ttft_s, gap_s, is_good):
    assert Reply([(ttft_s, " aaaa"), (ttft_s + gap_s, " baaa")], 2, 5.0).is_good == is_good


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([sent(" aaaa"), sent(None, 3)], "expected status 200 and 3 tokens, got 200, 1 words, usage 3"),
        ([sent(" aaaa baaa caaa"), sent(None, 2)], "usage 2"),
        ([b'data: {"error": {"message": "no"}}\n\n'], "a reply failed: .*no"),
    ],
)
def test_replies_that_are_not_whole_are_refused(events, message):
    with pytest.raises(RuntimeError, match=message):
        read_reply(load_client.parse(0.0, [(1.0, HEAD), (2.0, b"".join(events))]), 3)


def test_a_server_may_send_no_usage():
    raw = load_client.parse(0.0, [(1.0, HEAD), (2.0, sent(" aaaa") + sent(" baaa"))])
    assert read_reply(raw, 2).tokens == 2


def test_words_and_tokens_are_one_to_one():
    tokenizer = word_tokenizer(200)
    assert tokens_of(tokenizer.decode(range(200)), tokenizer) == list(range(200))
    assert tokenizer.decode([0, 1, 27]) == " aaaa baaa bbaa"


def test_work_is_the_same_each_time_and_of_many_lengths_if_asked():
    assert make_work(100, 3, 5, 8, varied=False) == make_work(100, 3, 5, 8, varied=False)
    assert [(len(prompt), n) for prompt, n in make_work(100, 3, 5, 8, varied=False)] == [(5, 8)] * 3
    lengths = {n for _, n in make_work(100, 50, 5, 8, varied=True)}
    assert lengths <= set(range(4, 13)) and len(lengths) > 3


@contextmanager
def answering(reply):
    """A server that reads a request and sends these bytes. Yields its port and the bodies that came."""
    bodies, started, ends = [], threading.Event(), []

    async def answer(reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                bodies.append(json.loads(await reader.readexactly(length)))
                writer.write(reply)
        except asyncio.IncompleteReadError:
            writer.close()

    async def main():
        end = asyncio.Event()
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        ends.extend([asyncio.get_running_loop(), end, server.sockets[0].getsockname()[1]])
        started.set()
        await end.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    started.wait()
    try:
        yield ends[2], bodies
    finally:
        ends[0].call_soon_threadsafe(ends[1].set)
        thread.join()


def test_clients_share_the_requests_and_tell_what_came():
    with answering(b"".join(STREAM)) as (port, bodies):
        measured, replies = run_http(port, [([i], 3) for i in range(5)], clients=2)
    assert sorted(body["prompt"] for body in bodies) == [[i] for i in range(5)]
    assert all(body["stream"] and body["max_tokens"] == 3 for body in bodies)
    assert len(replies) == len(measured["ttfts_s"]) == 5 and measured["goodput"] == 5 / measured["seconds"]


def test_clients_that_wait_too_long_are_ended():
    with answering(HEAD) as (port, _), pytest.raises(RuntimeError, match=r"the replies took longer than 0\.5 s"):
        run_http(port, [([1], 3)], clients=1, timeout_s=0.5)


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_a_reply_ends_with_its_last_chunk_however_it_is_read(size):
    async def run():
        client = load_client.Client()
        client.connection_made(type("Transport", (asyncio.Transport,), {"write": lambda self, data: None})())
        replying = asyncio.create_task(client.reply(b""))
        await asyncio.sleep(0)
        # A header ends in 0, too, and its read may end there.
        head = HEAD.replace(b"\r\n\r\n", b"\r\nkeep-alive: timeout=5, max=100\r\n\r\n")
        for part in (head, sent(" aaaa"), END):
            assert not replying.done()
            for i in range(0, len(part), size):
                client.data_received(part[i : i + size])
                await asyncio.sleep(0)
        return await asyncio.wait_for(replying, 5)

    _, reads = asyncio.run(run())
    assert b"".join(data for _, data in reads).endswith(sent(" aaaa") + END)


def test_clients_that_fail_tell_why():
    with pytest.raises(RuntimeError, match=r"the clients failed:(?s:.*)ConnectionRefusedError"):
        run_http(1, [([1], 3)], clients=1)
