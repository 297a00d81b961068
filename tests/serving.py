"""A server with tiny on a real socket, for the clients' own code. Tests import the fixtures that they use."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from conftest import randomized, small_config
from starlette.applications import Starlette

from qwen3fast import Embedder, Generator, Reranker
from qwen3fast.server import command
from qwen3fast.server.app import create_app
from qwen3fast.server.command import bind
from qwen3fast.server.in_process import exchange
from qwen3fast.server.models import AnyModel
from qwen3fast.server.options import ServerOptions
from qwen3fast.text.tokenizer import Tokenizer


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

    def bind_with_buffer(*arguments: Any) -> socket.socket:
        listening = bind(*arguments)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        return listening

    patch = nullcontext() if send_buffer is None else mock.patch.object(command, "bind", bind_with_buffer)
    with patch, command.in_background(app or create_app(models, options)) as port:
        yield f"http://127.0.0.1:{port}"


SIZES = {"max_batch_size": 4, "max_seq_len": 512, "max_queue": 64}


@pytest.fixture(scope="session")
def tiny_generator() -> Iterator[Generator]:
    """Tiny in four slots, uncompiled: slow enough to look at a reply while it runs."""
    with Generator.from_pretrained("tiny", compile=False, **SIZES) as generator:
        yield generator


@pytest.fixture(scope="session")
def quick_generator() -> Iterator[Generator]:
    """The same with the C++ operations, in a twentieth of the time; to be imported as `tiny_generator`."""
    with Generator.from_pretrained("tiny", compile=True, **SIZES) as generator:
        yield generator


@pytest.fixture(scope="session")
def models(tiny_generator: Generator, yes_no_folder: Path) -> dict[str, AnyModel]:
    """One model of each kind."""
    reranker = Reranker(randomized(small_config(vocab_size=1026)), Tokenizer.from_folder(yes_no_folder))
    return {"tiny": tiny_generator, "vectors": Embedder.from_pretrained("tiny", max_length=128), "ranks": reranker}


@pytest.fixture(scope="session")
def address(models: dict[str, AnyModel]) -> Iterator[str]:
    """Where a server with these models listens."""
    with running(models) as url:
        yield url


async def post(app: Starlette, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """Post a JSON object to a path, without a socket. Returns: status and body, for a stream with all events."""
    return (await exchange(app, path, body))[::2]


async def call(app: Starlette, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Post a JSON object to a path, without a socket. Returns: status and JSON body."""
    status, content = await post(app, path, body)
    return status, json.loads(content)
