"""The HTTP server in a thread, for the suite `serve` and for tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from qwen3fast.server.command import bind


@contextmanager
def in_background(app: Starlette) -> Iterator[int]:
    """Serve an application in a thread, on a free port of 127.0.0.1, and yield the port. Its models stay open.

    Raises: RuntimeError if the server does not start.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    listening = bind("127.0.0.1", 0, app.state.server.options.send_timeout_s)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            if not thread.is_alive():
                raise RuntimeError("the server ended before it listened")
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
