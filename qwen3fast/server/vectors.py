"""`POST /v1/embeddings` and `POST /v1/rerank`.

Source: OpenAI API reference, "Embeddings"; Jina and Cohere API references, "Rerank".
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast.embedder import Embedder
from qwen3fast.reranker import Reranker
from qwen3fast.server.completions import read_prompts
from qwen3fast.server.errors import ApiError
from qwen3fast.server.fields import Fields, describe, read_fields, refuse_or_name
from qwen3fast.server.replies import new_id
from qwen3fast.server.state import state_of
from qwen3fast.server.stream import unless_disconnected


async def embeddings(request: Request) -> Response:
    """Turn texts into vectors."""
    state = state_of(request)
    fields = await read_fields(request)
    served = state.models.choose(fields, "embed")
    embedder = served.model
    assert isinstance(embedder, Embedder), "it was chosen for that"
    tokenizer = embedder.tokenizer
    texts = [p if isinstance(p, str) else tokenizer.decode(p) for p in read_prompts(fields, "input")]
    dimensions = fields.integer("dimensions", 1)
    form = fields.text("encoding_format", "float", choices=("float", "base64"))
    instruction = fields.text("instruction")
    fields.raw("user")
    headers = refuse_or_name([fields], state.options.strict)
    state.note(request, served, texts)
    async with served.lock:
        work = asyncio.to_thread(embedder.encode, texts, instruction=instruction, dimensions=dimensions)
        vectors_NE = await unless_disconnected(request, state.in_time(work))
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    data = []
    for i, vector_E in enumerate(vectors_NE.cpu()):
        values = base64.b64encode(vector_E.numpy().tobytes()).decode() if form == "base64" else vector_E.tolist()
        data.append({"object": "embedding", "index": i, "embedding": values})
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage}, headers=headers)


async def rerank(request: Request) -> Response:
    """Order documents by how well they answer a query."""
    state = state_of(request)
    fields = await read_fields(request)
    served = state.models.choose(fields, "rerank")
    reranker = served.model
    assert isinstance(reranker, Reranker), "it was chosen for that"
    query = fields.required("query", fields.text("query"))
    documents = _documents(fields)
    top_n = fields.integer("top_n", 1) or len(documents)
    returns_documents = fields.flag("return_documents", True)
    instruction = fields.text("instruction")
    headers = refuse_or_name([fields], state.options.strict)
    state.note(request, served, [query, documents])
    async with served.lock:
        work = asyncio.to_thread(reranker.score, query, documents, instruction=instruction)
        scores = await unless_disconnected(request, state.in_time(work))
    order = sorted(range(len(documents)), key=lambda i: -scores[i])[:top_n]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
    if returns_documents:
        for entry in results:
            entry["document"] = {"text": documents[entry["index"]]}
    num_tokens = sum(len(reranker.tokenizer.encode(text)) for text in (query, *documents))
    body = {
        "id": new_id("rerank"),
        "model": served.name,
        "results": results,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return JSONResponse(body, headers=headers)


def _documents(fields: Fields) -> list[str]:
    """Return the texts of `documents`: strings or objects with "text"."""
    given = fields.required("documents", fields.items("documents"))
    texts = [text for d in given if isinstance(text := d.get("text") if isinstance(d, dict) else d, str)]
    if not texts or len(texts) < len(given):
        raise ApiError(400, f"must be a non-empty list of texts, got {describe(given)}", fields.name("documents"))
    return texts
