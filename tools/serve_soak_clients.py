"""Random clients of the HTTP server for serve_soak.py: they stream, leave, never read, or send bad requests."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from qwen3fast.server.options import ServerOptions

OPTIONS = ServerOptions(send_timeout_s=0.5, receive_timeout_s=0.5, heartbeat_s=0.2, max_body_bytes=200_000)
FLOOD = 24  # requests at once
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


class Client:
    """One client after another on fresh connections; counts what happened and keeps what must be checked."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self.port, self._rng = port, rng
        self.counts: Counter[str] = Counter()
        self.replies: list[tuple[dict[str, Any], str]] = []  # request and the text that came
        self.wrong: list[str] = []

    async def run(self, until: float) -> None:
        """Behave at random until a moment of time.monotonic()."""
        kinds = [self.reply, self._stream, self._leave, self._bad, self._huge, self._slow, self._flood]
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
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(_head(len(body) if length is None else length) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            return int(head.split()[1]), await _body(head, reader)
        finally:
            writer.close()

    async def reply(self) -> None:
        """Ask, and keep the whole reply."""
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
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
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
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
            body = json.dumps({**self._request(), "max_tokens": 400, "logprobs": 20, "stream": True}).encode()
            await asyncio.get_running_loop().sock_sendall(connection, _head(len(body)) + body)
            await asyncio.sleep(3 * OPTIONS.send_timeout_s)
        finally:
            connection.close()

    async def _flood(self) -> None:
        self.counts["floods"] += 1
        await asyncio.gather(*(self.reply() for _ in range(FLOOD)))


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
