"""Limits of a server and its end: keys, sizes, draining, floods, clients that leave or read nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading

import pytest
from conftest import slow_steps, wait_until
from serving import running, tiny_generator  # noqa: F401  fixtures

from qwen3fast import Generator
from qwen3fast.server.app import create_app
from qwen3fast.server.options import ServerOptions

httpx = pytest.importorskip("httpx")

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}
ENDLESS = {**CHAT, "max_tokens": 450, "ignore_eos": True}


def is_idle(generator: Generator) -> bool:
    """Return whether no request runs or waits."""
    stats = generator.stats
    return stats.slots_in_use == 0 and stats.waiting == 0


@pytest.fixture(scope="module")
def keyed(tiny_generator):  # noqa: F811
    options = ServerOptions(api_keys=("first", "second"), strict=True, max_body_bytes=2000, heartbeat_s=0.05)
    with running({"tiny": tiny_generator}, options) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic first"}, 401),
        ({"Authorization": "Bearer first"}, 200),
        ({"Authorization": "bearer second"}, 200),
        ({"X-Api-Key": "second"}, 200),
        ({"Authorization": "Bearer é".encode()}, 401),
    ],
)
def test_a_key_opens_the_endpoints(keyed, headers, status):
    assert keyed.get("/v1/models", headers=headers).status_code == status
    assert keyed.get("/health").status_code == 200
    assert keyed.get("/ready").status_code == 200


def test_an_unknown_field_is_refused_when_strict(keyed):
    key = {"Authorization": "Bearer first"}
    reply = keyed.post("/v1/chat/completions", json={**CHAT, "temprature": 1}, headers=key)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "temprature"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_large_body_is_refused(keyed, is_chunked):
    body = json.dumps({**CHAT, "user": "x" * 3000}).encode()
    content = iter([body[:1500], body[1500:]]) if is_chunked else body
    reply = keyed.post("/v1/chat/completions", content=content, headers={"Authorization": "Bearer first"})
    assert reply.status_code == 413 and "max-body-bytes" in reply.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 900, b'{"messages": NaN}', b"1" * 900])
def test_a_body_that_is_no_json_object_is_refused(keyed, body):
    reply = keyed.post("/v1/chat/completions", content=body, headers={"Authorization": "Bearer first"})
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_a_request_id_is_kept_if_it_is_harmless(keyed):
    assert keyed.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert keyed.get("/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"].startswith("req-")


@pytest.fixture(scope="module")
def small():
    """Tiny with one slot and one place in the queue, behind a server."""
    with Generator.from_pretrained("tiny", max_seq_len=512, max_queue=1, compile=False) as generator:
        options = ServerOptions(request_timeout_s=20, heartbeat_s=0.05, send_timeout_s=0.5)
        with running({"tiny": generator}, options) as url, httpx.Client(base_url=url, timeout=30) as client:
            yield generator, client


def test_a_request_with_more_replies_than_the_queue_is_told_so(small):
    reply = small[1].post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1})
    assert reply.status_code == 400 and "2 replies at once (prompts x n) exceed --max-queue 1" in reply.text
    reply = small[1].post("/v1/chat/completions", json={"messages": [CHAT["messages"][0]] * 2**10, "n": 2})
    assert reply.status_code == 400 and "2 replies at once" in reply.text  # nothing was rendered, which is too long


@pytest.mark.parametrize("origin", ["https://a.example/", "a.example", "https://a.example/x", "https://A.example", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(ValueError, match=r"an allowed origin must be \* or like https://example.org, got"):
        ServerOptions(allow_origins=(origin,))
    with pytest.raises(ValueError, match="allow_origins must be a tuple of strings"):
        ServerOptions(allow_origins="*")
    assert ServerOptions(allow_origins=("*", "http://localhost:3000", "http://[::1]:8080", "app://local"))


def test_pages_of_allowed_origins_alone_may_ask(tiny_generator):  # noqa: F811
    page, other = {"Origin": "https://a.example"}, {"Origin": "https://b.example"}
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    options = ServerOptions(allow_origins=("https://a.example",), api_keys=("key",))
    with running({"tiny": tiny_generator}, options) as url, httpx.Client(base_url=url, timeout=30) as client:
        assert client.options("/v1/completions", headers={**page, **ask}).status_code == 200
        assert client.options("/v1/completions", headers={**other, **ask}).status_code == 400
        refused = client.post("/v1/completions", json={"prompt": "a"}, headers=page)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == page["Origin"]
        exposed = refused.headers["access-control-expose-headers"].lower().split(", ")
        assert {"retry-after", "x-ignored-fields", "x-request-id"} <= set(exposed)
        assert "access-control-allow-origin" not in client.get("/health", headers=other).headers


def test_an_unknown_field_is_named(small):
    reply = small[1].post("/v1/chat/completions", json={**CHAT, "temprature": 1, "ü": 2, "a\r\nb: c": 3})
    assert reply.status_code == 200  # and no header of the client's own
    assert reply.headers["x-ignored-fields"] == "temprature, \\xfc, a\\r\\nb: c"


def test_a_flood_gets_429_and_the_rest_its_replies(small):
    generator, client = small
    statuses: list[int] = []

    def ask() -> None:
        reply = client.post("/v1/chat/completions", json=CHAT)
        if reply.status_code == 429:
            assert reply.headers["retry-after"] == "1"
        statuses.append(reply.status_code)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    wait_until(lambda: is_idle(generator))
    assert client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"] == "42"


def test_a_stream_that_waits_sends_heartbeats(small):
    generator, client = small
    with (
        slow_steps(generator),
        client.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True}) as first,
    ):
        lines = first.iter_lines()
        next(lines)
        with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as second:
            waiting = second.iter_lines()
            assert any(line == ": heartbeat" for line in waiting)


def test_a_client_that_goes_away_frees_its_slot(small):
    generator, client = small
    for stream in (True, False):
        wait_until(lambda: is_idle(generator))
        body = json.dumps({**ENDLESS, "stream": stream}).encode()
        with slow_steps(generator) as steps:
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                wait_until(lambda: generator.stats.slots_in_use == 1)
            wait_until(lambda: is_idle(generator))
        assert len(steps) < ENDLESS["max_tokens"] - 1


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [f"{i:06d}" for i in range(100_000)]},
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(5_000)}},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        {"type": "string", "pattern": "("},
    ],
    ids=["enum", "properties", "recursion", "pattern"],
)
def test_a_schema_that_explodes_is_refused(small, schema):
    pytest.importorskip("llguidance")
    _, client = small
    more = {"chat_template_kwargs": {"enable_thinking": False}, "structured_outputs": {"json": schema}}
    reply = client.post("/v1/chat/completions", json={**CHAT, **more})
    assert reply.status_code == 400 and reply.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_metrics_count_what_was_served(small):
    _, client = small
    client.post("/v1/chat/completions", json=CHAT)
    lines = client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['vllm:request_success_total{finished_reason="stop",model_name="tiny"}']) >= 1
    assert float(values['vllm:num_requests_running{model_name="tiny"}']) == 0
    assert float(values['vllm:time_to_first_token_seconds_count{model_name="tiny"}']) >= 1


def test_a_draining_server_finishes_what_runs_and_refuses_the_rest(tiny_generator):  # noqa: F811
    app = create_app({"tiny": tiny_generator})
    body = {**ENDLESS, "max_tokens": 200, "stream": True}
    with (
        running({"tiny": tiny_generator}, app=app) as url,
        httpx.Client(base_url=url, timeout=30) as client,
        contextlib.ExitStack() as slow,
    ):
        slow.enter_context(slow_steps(tiny_generator))
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            wait_until(lambda: tiny_generator.stats.slots_in_use == 1)
            app.state.server.is_draining = True
            assert client.get("/ready").status_code == 503
            refused = client.post("/v1/chat/completions", json=CHAT)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert tiny_generator.stats.slots_in_use == 1
            slow.close()
            assert [line for line in reply.iter_lines() if line][-1] == "data: [DONE]"


def test_the_log_holds_no_prompts_unless_asked(small, caplog):
    caplog.set_level("INFO", "qwen3fast.server")
    small[1].post("/v1/chat/completions", json=CHAT)
    wait_until(lambda: "/v1/chat/completions tiny 200" in caplog.text)  # written once the response is sent
    assert "17 + 25" not in caplog.text


@pytest.mark.parametrize("headers", [{"Authorization": "Bearer first"}, {}])
def test_a_refused_client_gets_its_answer_though_it_is_still_sending(keyed, headers):
    """The system's buffers hold less than this body: without anybody who reads it, the client could not send it."""
    connection = http.client.HTTPConnection(keyed.base_url.host, keyed.base_url.port, timeout=30)
    headers = {**headers, "Connection": "close"}
    connection.request("POST", "/v1/chat/completions", b"x" * 12_000_000, headers)
    reply = connection.getresponse()
    assert reply.status == (413 if "Authorization" in headers else 401) and b"message" in reply.read()
    connection.close()


def test_a_refused_client_that_sends_without_end_is_cut_off(keyed):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 10**9:
            yield b"x" * 100_000
            sent += 100_000

    with contextlib.suppress(httpx.HTTPError):
        keyed.post("/v1/chat/completions", content=endless(), headers={"Connection": "close"})
    assert 2**26 < sent < 10**8
