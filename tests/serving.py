"""A server with tiny on a real socket, for the clients' own code. Tests import the fixtures that they use."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn
from conftest import randomised, small_config
from starlette.applications import Starlette

from qwen3fast import Embedder, Generator, Reranker
from qwen3fast.server.app import create_app
from qwen3fast.server.command import bind
from qwen3fast.server.models import AnyModel
from qwen3fast.server.options import ServerOptions
from qwen3fast.text.tokenizer import Tokenizer


def wait_until(condition) -> None:
    """Wait for something that happens soon."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen")


@contextmanager
def running(
    models: dict[str, AnyModel],
    options: ServerOptions | None = None,
    app: Starlette | None = None,
    send_buffer: int | None = None,
) -> Iterator[str]:
    """Serve on a free port of 127.0.0.1. Yields the address; the models stay open.

    send_buffer: bytes that the system takes from the server before the client reads.
    """
    app = app or create_app(models, options)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server, listening = uvicorn.Server(config), bind(config, app.state.server.options.send_timeout_s)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), "the server ended before it listened"
    port = listening.getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


@pytest.fixture(scope="session")
def tiny_generator() -> Iterator[Generator]:
    """Tiny in four slots, uncompiled."""
    with Generator.from_pretrained("tiny", max_batch_size=4, max_seq_len=512, max_queue=64, compile=False) as generator:
        yield generator


@pytest.fixture(scope="session")
def models(tiny_generator: Generator, yes_no_folder: Path) -> dict[str, AnyModel]:
    """One model of each kind."""
    reranker = Reranker(randomised(small_config(vocab_size=1026)), Tokenizer.from_folder(yes_no_folder))
    return {"tiny": tiny_generator, "vectors": Embedder.from_pretrained("tiny", max_length=128), "ranks": reranker}


@pytest.fixture(scope="session")
def address(models: dict[str, AnyModel]) -> Iterator[str]:
    """Where a server with these models listens."""
    with running(models) as url:
        yield url
