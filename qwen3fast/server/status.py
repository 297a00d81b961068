"""`GET /v1/models`, `/health`, `/ready` and `/metrics`."""

from __future__ import annotations

import asyncio

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast.server.state import state_of


async def models(request: Request) -> Response:
    """List the models."""
    return JSONResponse({"object": "list", "data": [m.to_openai() for m in state_of(request).models.with_adapters]})


async def model(request: Request) -> Response:
    """Describe one model."""
    return JSONResponse(state_of(request).models.find(request.path_params["name"]).to_openai())


async def health(request: Request) -> Response:
    """Answer 200 while the process runs."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Answer 200 while new requests are accepted, 503 while the server drains.

    The field `compiling` names models that are not at full speed yet, each with the number of forms still to compile.
    """
    state = state_of(request)
    if state.is_draining:
        return JSONResponse({"status": "draining"}, 503)
    compiling = dict(state.compiling)
    return JSONResponse({"status": "ready", "compiling": compiling} if compiling else {"status": "ready"})


async def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus."""
    text = await asyncio.to_thread(state_of(request).metrics.render)  # asks the engine's thread, which may be busy
    return Response(text, media_type=CONTENT_TYPE_LATEST)
