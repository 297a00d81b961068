"""Clients that are slow, silent, late or many: each is dropped or refused, and every slot is free afterwards."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import pytest
from conftest import wait_until
from serving import running

from qwen3fast import Generator
from qwen3fast.server.options import ServerOptions
from qwen3fast.server.stream import EventStream

httpx = pytest.importorskip("httpx")

CHAT = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}
LONG = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
OPTIONS = ServerOptions(send_timeout_s=0.3, receive_timeout_s=0.3, request_timeout_s=8, max_body_bytes=100_000)


@pytest.fixture(scope="module")
def server():
    """Tiny in two slots behind a server with short timeouts and little room in its sockets."""
    generator = Generator.from_pretrained("tiny", max_batch_size=2, max_seq_len=512, max_queue=4, compile=False)
    models = {"tiny": generator}
    with generator, running(models, OPTIONS, send_buffer=4096) as url, httpx.Client(base_url=url) as client:
        yield generator, client


@pytest.fixture(autouse=True)
def all_slots_are_free_afterwards(server):
    yield
    generator, client = server
    wait_until(lambda: (generator.stats.slots_in_use, generator.stats.waiting) == (0, 0))
    assert answers(client)


def answers(client) -> bool:
    """Return whether a question gets its answer."""
    reply = client.post("/v1/chat/completions", json=CHAT, timeout=30)
    return reply.json()["choices"][0]["message"]["content"] == "42"


def connect(client) -> socket.socket:
    """Connect with a small buffer, which fills up soon if nothing is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((client.base_url.host, client.base_url.port))
    return connection


def head(length: int) -> bytes:
    """Return the head of a request for a completion."""
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_client_that_never_reads_holds_up_nobody_and_is_dropped(server):
    generator, client = server
    body = json.dumps({**LONG, "logprobs": 20}).encode()
    with connect(client) as connection:
        connection.sendall(head(len(body)) + body)
        wait_until(lambda: generator.stats.slots_in_use == 1)
        assert answers(client)
        wait_until(lambda: generator.stats.slots_in_use == 0)
        time.sleep(4 * OPTIONS.send_timeout_s)  # nothing is read meanwhile
        received = 0
        try:
            while data := connection.recv(4096):
                received += len(data)
                assert b"[DONE]" not in data
        except ConnectionError:  # how it ends where the system cuts it
            pass
        assert received < 500_000


def test_an_event_stream_ends_when_nothing_is_taken():
    closed = []

    async def events():
        try:
            while True:
                yield b"data: 1\n\n"
        finally:
            closed.append(True)

    async def stuck(message):
        await asyncio.Event().wait()

    async def silent():
        await asyncio.Event().wait()

    async def run() -> None:
        source = events()
        await anext(source)
        stream = EventStream(source, ServerOptions(send_timeout_s=0.01), lambda err: b"")
        await asyncio.wait_for(stream({"type": "http"}, silent, stuck), 10)

    asyncio.run(run())
    assert closed == [True]


@pytest.mark.parametrize("sent", [b"", b'{"prompt": "a", '])
def test_a_body_that_does_not_come_gets_408(server, sent):
    with connect(server[1]) as connection:
        connection.sendall(head(1000) + sent)
        assert b" 408 " in connection.recv(4096).partition(b"\r\n")[0]


def test_a_client_that_leaves_within_its_body_is_one_line_of_the_log(server, caplog):
    caplog.set_level("INFO")
    with connect(server[1]) as connection:
        connection.sendall(head(1000) + b'{"prompt": "a", ')
    wait_until(lambda: any(" 499 " in record.getMessage() for record in caplog.records))
    assert answers(server[1])
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_many_bad_requests_leave_nothing_behind(server):
    client = server[1]
    bodies = [b"{", b"[]", b"\xff", b"null", b"x" * 200_000, json.dumps({"prompt": [[]]}).encode()]
    bodies += [json.dumps({**LONG, key: value}).encode() for key in ("top_p", "n", "stop", "logit_bias", "model")
               for value in (-1, 3.5, [1], {"a": 1}, 1e300)]  # fmt: skip
    statuses = {client.post("/v1/completions", content=body).status_code for body in bodies}
    assert statuses <= {400, 404, 413} and 413 in statuses and 500 not in statuses


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_that_takes_too_long_is_ended(stream):
    with Generator.from_pretrained("tiny", max_seq_len=4096, compile=False) as generator:
        options = ServerOptions(request_timeout_s=0.2)
        body = {**LONG, "max_tokens": 4000, "stream": stream}
        with running({"tiny": generator}, options) as url, httpx.Client(base_url=url, timeout=30) as client:
            reply = client.post("/v1/completions", json=body)
            assert reply.status_code == (200 if stream else 504)
            last = reply.text.rstrip().splitlines()[-1].removeprefix("data: ")
            assert json.loads(last)["error"]["type"] == "timeout_error"
            wait_until(lambda: generator.stats.slots_in_use == 0)


def test_a_flood_of_streams_that_are_left_leaves_no_slot_taken(server):
    client = server[1]

    def leave(i: int) -> None:
        body = json.dumps(LONG).encode()
        with connect(client) as connection:
            connection.sendall(head(len(body)) + body)
            if i % 2:
                connection.recv(100)

    threads = [threading.Thread(target=leave, args=(i,)) for i in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
