"""A server with tiny on a real socket, for the clients' own code. Tests import the fixtures that they use."""

from __future__ import annotations

import asyncio
import threading
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
from qwen3fast.server.models import AnyModel
from qwen3fast.server.options import ServerOptions
from qwen3fast.text.tokenizer import Tokenizer


@contextmanager
def running(
    models: dict[str, AnyModel], options: ServerOptions | None = None, app: Starlette | None = None
) -> Iterator[str]:
    """Serve on a free port of 127.0.0.1. Yields the address; the models stay open."""
    app = app or create_app(models, options)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), "the server ended before it listened"
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


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
