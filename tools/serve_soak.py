"""Soak test of the HTTP server: random clients for some minutes, then nothing may be left behind.

    python tools/serve_soak.py --minutes 2 --seed 1

Clients ask over real sockets, streamed or not, with random sampling; some leave at a random point, some send bad or
huge requests, some never read, some come in floods. Every complete reply is compared with the engine's own, alone and
with the same seed. At the end all slots are free, the server still answers, and resident memory has not grown.
Exit status: 0, or 1 with what was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import uvicorn
from soak import rss_mb

from qwen3fast import Generator, SamplingParams
from qwen3fast.server.app import create_app
from qwen3fast.server.command import bind
from qwen3fast.server.options import ServerOptions

OPTIONS = ServerOptions(send_timeout_s=0.5, receive_timeout_s=0.5, heartbeat_s=0.2, max_body_bytes=200_000)
CLIENTS, FLOOD = 6, 24
PROMPTS = ["The capital of France is", "What is 17 + 25?", "Once upon a time", "é👩‍👩‍👧", "a b c d e f g " * 12]
BAD_BODIES = [
    b"{",
    b"[]",
    b"\xff",
    b"",
    b'{"prompt": 3}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "n": 0}',
]
ROWS = "replies", "streams", "left", "bad", "huge", "slow", "floods", "busy", "wrong"


class Client:
    """One client after another on fresh connections; counts what happened and keeps what must be checked."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self._port, self._rng = port, rng
        self.counts: Counter[str] = Counter()
        self.replies: list[tuple[dict[str, Any], str]] = []  # request and the text that came
        self.wrong: list[str] = []

    async def run(self, until: float) -> None:
        """Behave at random until a moment of time.monotonic()."""
        kinds = [self._reply, self._stream, self._leave, self._bad, self._huge, self._slow, self._flood]
        while time.monotonic() < until:
            kind = self._rng.choices(kinds, [8, 8, 4, 4, 1, 1, 1])[0]
            try:
                await asyncio.wait_for(kind(), 60)
            except asyncio.TimeoutError:
                self.wrong.append(f"{kind.__name__} got no end within 60 s")
            except ConnectionError:
                self.counts["left"] += 1

    def _request(self) -> dict[str, Any]:
        rng = self._rng
        return {
            "prompt": rng.choice(PROMPTS), "seed": rng.getrandbits(32), "temperature": rng.choice([0, 0.7, 1.5]),
            "top_k": rng.choice([0, 5, 20]), "max_tokens": rng.randint(1, 60), "ignore_eos": rng.random() < 0.3,
        }  # fmt: skip

    async def _post(self, body: bytes, length: int | None = None) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(_head(len(body) if length is None else length) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            return int(head.split()[1]), await _body(head, reader)
        finally:
            writer.close()

    async def _reply(self) -> None:
        request = self._request()
        status, content = await self._post(json.dumps(request).encode())
        if status == 429:
            self.counts["busy"] += 1
        elif status != 200:
            self.wrong.append(f"status {status} for {request}: {content[:200]!r}")
        else:
            self.counts["replies"] += 1
            self.replies.append((request, json.loads(content)["choices"][0]["text"]))

    async def _stream(self) -> None:
        request = self._request()
        status, content = await self._post(json.dumps({**request, "stream": True}).encode())
        if status == 429:
            self.counts["busy"] += 1
            return
        lines = [line[6:] for line in content.decode().split("\n") if line.startswith("data: ")]
        if not lines or lines[-1] != "[DONE]":
            self.wrong.append(f"a stream ended with {lines[-1:]}")
            return
        text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
        self.counts["streams"] += 1
        self.replies.append((request, text))

    async def _leave(self) -> None:
        body = json.dumps({**self._request(), "max_tokens": 400, "stream": self._rng.random() < 0.7}).encode()
        whole = _head(len(body)) + body
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(whole[: self._rng.choice([10, len(whole) - 5, len(whole)])])
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(self._rng.choice([1, 5000])), self._rng.uniform(0, 0.3))
        writer.transport.abort()
        self.counts["left"] += 1

    async def _bad(self) -> None:
        status, content = await self._post(self._rng.choice(BAD_BODIES))
        self.counts["bad"] += 1
        if status != 400 or "error" not in json.loads(content):
            self.wrong.append(f"a bad request got {status}: {content[:200]!r}")

    async def _huge(self) -> None:
        self.counts["huge"] += 1
        status, _ = await self._post(b'{"prompt": "', 10**9)
        if status != 413:
            self.wrong.append(f"a huge body got {status}")

    async def _slow(self) -> None:
        """Never read: small buffers fill up, and the server drops the client."""
        self.counts["slow"] += 1
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
            body = json.dumps({**self._request(), "max_tokens": 400, "logprobs": 20, "stream": True}).encode()
            await asyncio.get_running_loop().sock_sendall(connection, _head(len(body)) + body)
            await asyncio.sleep(3 * OPTIONS.send_timeout_s)
        finally:
            connection.close()

    async def _flood(self) -> None:
        self.counts["floods"] += 1
        await asyncio.gather(*(self._reply() for _ in range(FLOOD)))


def _head(length: int) -> bytes:
    line = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return f"{line}Content-Length: {length}\r\n\r\n".encode()


async def _body(head: bytes, reader: asyncio.StreamReader) -> bytes:
    if b"transfer-encoding: chunked" not in head.lower():
        return await reader.read()
    parts = []
    while size := int(await reader.readline(), 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    return b"".join(parts)


async def load(generator: Generator, seconds: float, seed: int) -> list[Client]:
    """Serve, let clients loose for some seconds, and stop. Returns: the clients."""
    app = create_app({"model": generator}, OPTIONS)
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off")
    server, listening = uvicorn.Server(config), bind(config, OPTIONS.send_timeout_s)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    clients = [Client(listening.getsockname()[1], random.Random(f"{seed} {i}")) for i in range(CLIENTS)]
    until = time.monotonic() + seconds
    await asyncio.gather(*(client.run(until) for client in clients))
    for _ in range(1000):  # requests whose clients have left end within a step
        if generator.stats.slots_in_use == generator.stats.waiting == 0:
            break
        await asyncio.sleep(0.01)
    last = Client(clients[0]._port, random.Random(seed))
    await last._reply()
    if not last.replies:
        last.wrong.append("the server does not answer at the end")
    server.should_exit = True
    await serving
    listening.close()
    return [*clients, last]


def mismatches(generator: Generator, replies: list[tuple[dict[str, Any], str]]) -> list[str]:
    """Return how replies differ from what the engine says alone."""
    found = []
    for request, text in replies:
        options = {key: value for key, value in request.items() if key != "prompt"}
        alone = generator.generate(request["prompt"], SamplingParams(**options)).text
        if text != alone:
            found.append(f"{request}\n  got {text!r}\n  expected {alone!r}")
    return found


def main() -> int:
    """Run. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2, help="of load [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the clients' behavior [%(default)s]")
    parser.add_argument("--max-growth-mb", type=float, default=64, help="of resident memory [%(default)s]")
    args = parser.parse_args()
    # float32, one weight layout: a reply does not depend on which others share its step.
    options: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 512, "max_queue": 8, "dtype": "float32"}
    with Generator.from_pretrained("tiny", compile=False, **options) as generator:
        asyncio.run(load(generator, min(10.0, 6 * args.minutes), args.seed + 1))  # what is built once is built now
        before = rss_mb()
        clients = asyncio.run(load(generator, 60 * args.minutes, args.seed))
        growth, stats = rss_mb() - before, generator.stats
        wrong = [text for client in clients for text in client.wrong]
        wrong += mismatches(generator, [reply for client in clients for reply in client.replies])
    if (stats.slots_in_use, stats.waiting) != (0, 0):
        wrong.append(f"slots in use and requests waiting: {(stats.slots_in_use, stats.waiting)}, not (0, 0)")
    if growth > args.max_growth_mb:
        wrong.append(f"resident memory grew by {growth:.0f} MB, more than {args.max_growth_mb:.0f} MB")
    counts = sum((client.counts for client in clients), Counter())
    counts["wrong"] = len(wrong)
    print("\n".join(f"{name:10} {counts[name]:>8}" for name in ROWS))
    print(f"memory     {growth:+8.1f} MB")
    print("\n".join(wrong[:20]), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
