"""Routing by prefix: blocks of requests, the choice of a replica, bounds; and `messages`, by which replicas answer."""

from __future__ import annotations

import asyncio
import json

from asgi_messages import messages
from hypothesis import given
from hypothesis import strategies as st
from prefix_table import BLOCK, PrefixTable, blocks_of
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

SYSTEM = {"role": "system", "content": "x" * 500}


def chat(*texts: str) -> bytes:
    """A conversation whose turns alternate."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return json.dumps({"temperature": 0.5, "messages": [SYSTEM, *turns], "model": "m"}).encode()


def test_the_next_turn_begins_with_the_blocks_of_the_one_before():
    first, second = blocks_of(chat("a" * 300)), blocks_of(chat("a" * 300, "b" * 300, "c"))
    assert len(second) > len(first) > 500 // BLOCK and second[: len(first) - 1] == first[:-1]
    other = blocks_of(chat("z" * 300))
    assert other[:8] == first[:8] and other[-1] != first[-1]


def test_other_models_share_no_blocks_and_other_sampling_does():
    one, two = json.loads(chat("a")), json.loads(chat("a"))
    assert blocks_of(json.dumps({**one, "seed": 5}).encode()) == blocks_of(json.dumps(two).encode())
    assert not set(blocks_of(json.dumps({**one, "model": "n"}).encode())) & set(blocks_of(json.dumps(two).encode()))


@given(st.binary(max_size=300))
def test_any_body_has_blocks_or_none(body):
    assert isinstance(blocks_of(body), list)


def test_short_and_broken_bodies_have_no_blocks():
    deep = b'{"prompt": ' + b"[" * 100_000
    for body in (b"", b"{", b"[]", b"3", b"\xff", b'{"prompt": "a"}', deep):
        assert blocks_of(body) == []


def test_the_replica_with_the_longest_prefix_is_chosen_unless_it_is_too_busy():
    table = PrefixTable(max_ahead=2)
    table.add([b"1", b"2"], "a")
    table.add([b"1", b"2", b"3"], "b")
    table.add([b"1"], "c")
    idle = {"a": 0, "b": 0, "c": 0}
    assert table.choose([b"1", b"2", b"3", b"4"], idle) == "b"
    assert table.choose([b"1", b"9"], idle) == "c"
    assert table.choose([b"1", b"2", b"3"], {**idle, "b": 2}) == "b"
    assert table.choose([b"1", b"2", b"3"], {"a": 0, "b": 3, "c": 1}) == "a"
    assert table.choose([b"1", b"2", b"3"], {"a": 0, "c": 1}) == "c"  # b may not be chosen: the next longest prefix


def test_new_prefixes_go_to_the_least_busy_replica_with_the_fewest_blocks():
    table = PrefixTable()
    assert table.choose([b"1"], {"a": 1, "b": 0}) == "b"
    for i in range(6):
        prefix = [b"%d %d" % (i, j) for j in range(3)]
        table.add(prefix, table.choose(prefix, {"a": 0, "b": 0}))
    assert table._num_blocks == {"a": 9, "b": 9}


def test_the_table_is_bounded_and_keeps_the_beginnings_of_prefixes_longest():
    table = PrefixTable(max_blocks=3)
    table.add([b"1", b"2", b"3", b"4"], "a")
    assert set(table._replicas) == {b"1", b"2", b"3"} and table._num_blocks == {"a": 3}
    table.add([b"5"], "b")
    assert set(table._replicas) == {b"1", b"2", b"5"}


def test_replicas_that_are_gone_are_forgotten():
    table = PrefixTable()
    table.add([b"1"], "a")
    table.add([b"2"], "b")
    table.keep({"b", "c"})
    assert dict(table._replicas) == {b"2": "b"} and table._num_blocks == {"b": 1}


def test_messages_come_one_by_one_and_closing_them_cancels_the_request():
    ended = []

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            for i in range(10**6):
                await send({"type": "http.response.body", "body": str(i).encode(), "more_body": True})
        finally:
            ended.append("closed")

    async def echo(request):
        return PlainTextResponse(f"{request.headers['x-a']} {(await request.body()).decode()}")

    app = Starlette(routes=[Route("/echo", echo, methods=["PUT"])])

    async def run():
        stream = messages(endless, "GET", "/")
        assert (await anext(stream))["type"] == "http.response.start"
        assert (await anext(stream))["body"] == b"0"
        await stream.aclose()
        assert ended == ["closed"]
        return [m async for m in messages(app, "PUT", "/echo", b"body", [(b"x-a", b"1")])]

    start, body, *_ = asyncio.run(run())
    assert start["status"] == 200 and body["body"] == b"1 body"


def test_an_exception_of_the_application_is_raised():
    async def broken(scope, receive, send):
        raise KeyError("fault")

    async def run():
        return [m async for m in messages(broken, "GET", "/")]

    try:
        asyncio.run(run())
    except KeyError as err:
        assert err.args == ("fault",)
    else:
        raise AssertionError("it was swallowed")
