"""A program that puts load on a server and times each event; with Python's standard library alone, to start fast.

Closed loop: each client sends its next request when its last reply has ended. Standard input: a JSON object with port,
path, clients, and bodies (a JSON object per request). Standard output: a JSON list with
the result of `parse` for each request, in their order, in seconds of this process's clock. Received bytes are only
stored while replies run, and parsed when all have ended.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any

EVENT = re.compile(rb"data: (.*?)\r?\n\r?\n", re.DOTALL)
LAST_CHUNK = b"\r\n0\r\n\r\n"  # with the end of the line before: a header may end in 0 as well


class Client(asyncio.Protocol):
    """A connection that reads one reply after the other."""

    def __init__(self) -> None:
        self.reads: list[tuple[float, bytes]] = []
        self._tail = b""
        self._ended: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection. Source: asyncio."""
        assert isinstance(transport, asyncio.Transport), "TCP"
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Keep what came and when. Source: asyncio."""
        self.reads.append((time.perf_counter(), data))
        self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
        if self._tail == LAST_CHUNK and self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the reply that was being read. Source: asyncio."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(exc or ConnectionError("the server closed the connection"))

    async def reply(self, request: bytes) -> tuple[float, list[tuple[float, bytes]]]:
        """Send a request. Returns when it was sent, and what came and when."""
        assert self._transport is not None, "connected"
        self.reads, self._tail, self._ended = [], b"", asyncio.get_running_loop().create_future()
        sent = time.perf_counter()
        self._transport.write(request)
        await self._ended
        return sent, self.reads


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    """Return an HTTP request."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


def parse(sent: float, reads: list[tuple[float, bytes]]) -> dict[str, Any]:
    """Return a reply's status, and its events with the seconds from the request to the read that completed each."""
    stream, ends = b"", []
    for at, data in reads:
        stream += data
        ends.append((len(stream), at))
    events, i = [], 0
    for match in EVENT.finditer(stream):
        while ends[i][0] < match.end():
            i += 1
        events.append([ends[i][1] - sent, match[1].decode()])
    status = int(stream.split(b" ", 2)[1])
    return {"status": status, "sent_s": sent, "seconds": reads[-1][0] - sent, "events": events}


async def run(port: int, path: str, clients: int, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send all requests. Returns the result of `parse` for each reply."""
    replies: dict[int, tuple[float, list[tuple[float, bytes]]]] = {}
    requests = [request_bytes(path, body) for body in bodies]
    waiting = iter(range(len(requests)))
    loop = asyncio.get_running_loop()
    connections = [(await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(clients)]

    async def work(client: Client) -> None:
        for i in waiting:
            replies[i] = await client.reply(requests[i])

    await asyncio.gather(*(work(client) for client in connections))
    return [parse(*replies[i]) for i in range(len(requests))]


if __name__ == "__main__":
    json.dump(asyncio.run(run(**json.load(sys.stdin))), sys.stdout)
