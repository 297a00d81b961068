"""create_app: the ASGI application of a server; runs under uvicorn or any other ASGI server, and in tests without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from qwen3fast.server.chat import chat_completions
from qwen3fast.server.completions import completions
from qwen3fast.server.errors import ApiError, answer_error
from qwen3fast.server.fields import IGNORED_HEADER
from qwen3fast.server.limits import REQUEST_ID, Limits
from qwen3fast.server.messages import count_tokens, messages
from qwen3fast.server.models import AnyModel, Models
from qwen3fast.server.options import ServerOptions
from qwen3fast.server.page import index
from qwen3fast.server.responses import create_response, delete_response, get_response
from qwen3fast.server.state import ServerState
from qwen3fast.server.status import health, metrics, model, models, ready
from qwen3fast.server.tokens import detokenize, tokenize
from qwen3fast.server.vectors import embeddings, rerank, score

ROUTES = [
    Route("/", index),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/responses", create_response, methods=["POST"]),
    Route("/v1/responses/{id}", get_response),
    Route("/v1/responses/{id}", delete_response, methods=["DELETE"]),
    Route("/v1/messages", messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/v1/rerank", rerank, methods=["POST"]),
    Route("/v2/rerank", rerank, methods=["POST"]),
    Route("/v1/score", score, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/health", health),
    Route("/ready", ready),
    Route("/metrics", metrics),
]


def create_app(models: dict[str, AnyModel], options: ServerOptions | None = None) -> Starlette:
    """Return the application that serves these models by these names.

    models: a Generator, Embedder or Reranker each; the Generators are closed when the application ends.
    Raises: ValueError without a model.
    """
    options = options or ServerOptions()
    state = ServerState(Models(models, options.enable_thinking), options)

    cross_origin = []
    if origins := state.options.allow_origins:
        exposed = [REQUEST_ID, IGNORED_HEADER, "Retry-After"]
        allow: dict[str, Any] = {"allow_origins": origins, "allow_methods": ["*"], "allow_headers": ["*"]}
        cross_origin = [Middleware(CORSMiddleware, **allow, expose_headers=exposed)]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        state.models.close()

    app = Starlette(
        routes=ROUTES,
        middleware=[*cross_origin, Middleware(Limits, state=state)],
        exception_handlers={HTTPException: _answer_http_error, Exception: answer_error, **_HANDLED},
        lifespan=lifespan,
    )
    app.state.server = state
    return app


# Exceptions that are answers; all others are faults of the server, which Starlette also writes to the log.
_KINDS = (ApiError, ValueError, RuntimeError, TimeoutError, asyncio.TimeoutError, ImportError)
_HANDLED = dict.fromkeys(_KINDS, answer_error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Return Starlette's own errors (unknown path, wrong method) in the form of the API."""
    assert isinstance(error, HTTPException), "registered for these"
    text = "unknown path" if error.status_code == 404 else error.detail
    response = await answer_error(request, ApiError(error.status_code, f"{text}: {request.method} {request.url.path}"))
    response.headers.update(error.headers or {})
    return response
