"""The description of the endpoints in OpenAPI 3.1, made from the application's routes and their docstrings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.routing import BaseRoute, Route

from qwen3fast._version import __version__

HIDDEN = ("/", "/openapi.json")
# Fields that a body must have, by path.
REQUIRED = {
    "/v1/chat/completions": ["messages"],
    "/v1/completions": ["prompt"],
    "/v1/responses": ["input"],
    "/v1/messages": ["messages", "max_tokens"],
    "/v1/messages/count_tokens": ["messages"],
    "/v1/embeddings": ["input"],
    "/v1/rerank": ["query", "documents"],
    "/v2/rerank": ["query", "documents"],
    "/v1/score": ["text_1", "text_2"],
    "/detokenize": ["tokens"],
}


def description(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """Return the OpenAPI object of a server with these routes."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if isinstance(route, Route) and route.path not in HIDDEN:
            for method in (route.methods or set()) - {"HEAD"}:
                operations = paths.setdefault(route.path.replace(":path}", "}"), {})
                operations[method.lower()] = _operation(route, method)
    return {"openapi": "3.1.0", "info": {"title": "qwen3fast", "version": __version__}, "paths": paths}


def _operation(route: Route, method: str) -> dict[str, Any]:
    summary = (route.endpoint.__doc__ or "").partition("\n")[0].removesuffix(".")
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "Success"}}}
    if method == "POST" and route.path in REQUIRED:
        schema = {"type": "object", "required": REQUIRED[route.path]}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
