"""The description of the endpoints in OpenAPI 3.1, made from the table of routes."""

from __future__ import annotations

from typing import Any

from qwen3fast._version import __version__

# path -> method, summary, required fields of the body
ENDPOINTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "/v1/models": ("get", "List the models", ()),
    "/v1/models/{name}": ("get", "Describe one model", ()),
    "/v1/chat/completions": ("post", "Reply to a conversation", ("messages",)),
    "/v1/completions": ("post", "Continue a text or token ids", ("prompt",)),
    "/v1/responses": ("post", "Reply to a conversation (Responses API)", ("input",)),
    "/v1/responses/{id}": ("get", "A stored response", ()),
    "/v1/messages": ("post", "Reply to a conversation (Anthropic's form)", ("messages", "max_tokens")),
    "/v1/embeddings": ("post", "Turn texts into vectors", ("input",)),
    "/v1/rerank": ("post", "Order documents by a query", ("query", "documents")),
    "/v2/rerank": ("post", "Order documents by a query (Cohere's form)", ("query", "documents")),
    "/v1/score": ("post", "Score texts against a query", ("text_1", "text_2")),
    "/tokenize": ("post", "Token ids of a text or a conversation", ()),
    "/detokenize": ("post", "Text of token ids", ("tokens",)),
    "/health": ("get", "Check that the process runs", ()),
    "/ready": ("get", "Check that new requests are accepted", ()),
    "/metrics": ("get", "Metrics for Prometheus", ()),
}


def description() -> dict[str, Any]:
    """Return the OpenAPI object of the server."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "qwen3fast", "version": __version__},
        "paths": {path: {each[0]: _operation(*each[1:])} for path, each in ENDPOINTS.items()},
    }


def _operation(summary: str, required: tuple[str, ...]) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "Success"}}}
    if required:
        schema = {"type": "object", "required": list(required)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
