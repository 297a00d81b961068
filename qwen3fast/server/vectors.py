"""`POST /v1/embeddings`, `/v1/rerank`, `/v2/rerank` and `/v1/score`.

Source: OpenAI API reference, "Embeddings"; Jina and Cohere API references, "Rerank"; vLLM documentation, "Score API".
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast.embedder import Embedder
from qwen3fast.reranker import Reranker
from qwen3fast.server.completions import read_prompts
from qwen3fast.server.fields import Fields, describe, read_fields, refuse_or_name
from qwen3fast.server.models import ServedModel
from qwen3fast.server.replies import new_id, now
from qwen3fast.server.state import state_of
from qwen3fast.server.stream import unless_disconnected

T = TypeVar("T")
TEXTS_AT_ONCE = 32  # between batches, a request whose client has left ends


async def embeddings(request: Request) -> Response:
    """Return the vectors of texts."""
    state = state_of(request)
    fields = await read_fields(request)
    served = state.models.choose(fields, "embed")
    embedder = served.model
    assert isinstance(embedder, Embedder), "chosen for the kind 'embed'"
    texts: list[Any] = read_prompts(fields, "input")
    ids = [i for text in texts if not isinstance(text, str) for i in text]
    if outside := [i for i in ids if not 0 <= i < embedder.config.vocab_size]:
        raise fields.error("input", f"token id {outside[0]} is outside the vocabulary", "invalid_value")
    dimensions = fields.integer("dimensions", 1)
    form = fields.text("encoding_format", "float", choices=("float", "base64"))
    instruction = fields.text("instruction")
    if instruction is not None and ids:
        raise fields.error("instruction", "needs texts; put its tokens before the token ids", "invalid_value")
    limit, most = fields.integer("truncate_prompt_tokens", -1, embedder.max_length), embedder.max_length
    fields.take("user")
    headers = refuse_or_name(fields, state.options.strict)
    state.note(request, served, texts)
    longest = most + 1 if limit is None else most if limit < 1 else limit
    encode = partial(embedder.token_ids, texts, instruction=instruction, max_length=longest)
    rows = await asyncio.to_thread(encode)
    if too_long := [i for i, row in enumerate(rows) if len(row) > most]:
        text = f"text {too_long[0]} has more than {most} tokens, which the model reads; truncate_prompt_tokens cuts it"
        raise fields.error("input", text, "context_length_exceeded")
    vectors = await _computed(request, served, partial(embedder.encode_ids, dimensions=dimensions), rows)
    data = []
    for i, vector_E in enumerate(vectors):
        vector_E = vector_E.cpu()
        values = base64.b64encode(vector_E.numpy().tobytes()).decode() if form == "base64" else vector_E.tolist()
        data.append({"object": "embedding", "index": i, "embedding": values})
    body = {"object": "list", "data": data, "model": served.name, "usage": _usage(rows)}
    return JSONResponse(body, headers=headers)


async def rerank(request: Request) -> Response:
    """Return documents in the order of their scores for a query."""
    state = state_of(request)
    fields = await read_fields(request)
    served = state.models.choose(fields, "rerank")
    query = fields.required("query", fields.text("query"))
    documents = _documents(fields)
    top_n = fields.integer("top_n", 1) or len(documents)
    is_cohere = request.url.path.startswith("/v2")  # whose results have no documents
    returns_documents = fields.flag("return_documents", not is_cohere)
    fields.take("max_tokens_per_doc")
    scores, usage, headers = await _scored(request, fields, served, query, documents)
    order = sorted(range(len(documents)), key=lambda i: -scores[i])[:top_n]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
    if returns_documents:
        for entry in results:
            entry["document"] = {"text": documents[entry["index"]]}
    body: dict[str, Any] = {"id": new_id("rerank"), "model": served.name, "results": results}
    if is_cohere:
        body["meta"] = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    else:
        body["usage"] = usage
    return JSONResponse(body, headers=headers)


async def score(request: Request) -> Response:
    """Score a text against one or several others, as vLLM does: text_1 is the query, text_2 the documents."""
    state = state_of(request)
    fields = await read_fields(request)
    served = state.models.choose(fields, "rerank")
    query = fields.required("text_1", fields.text("text_1"))
    second = fields.required("text_2", fields.raw("text_2"))
    documents = [second] if isinstance(second, str) else _documents(fields, "text_2")
    scores, usage, headers = await _scored(request, fields, served, query, documents)
    body = {
        "id": new_id("score"),
        "object": "list",
        "created": now(),
        "model": served.name,
        "data": [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)],
        "usage": usage,
    }
    return JSONResponse(body, headers=headers)


async def _scored(
    request: Request, fields: Fields, served: ServedModel, query: str, documents: list[str]
) -> tuple[list[float], dict[str, int], dict[str, str]]:
    """Return the documents' scores, the usage, and the headers of the response, once all fields are read."""
    state, reranker = state_of(request), served.model
    assert isinstance(reranker, Reranker), "chosen for the kind 'rerank'"
    instruction = fields.text("instruction")
    headers = refuse_or_name(fields, state.options.strict)
    state.note(request, served, [query, documents])
    scores = await _computed(request, served, partial(reranker.score, query, instruction=instruction), documents)
    tokenizer, most = reranker.tokenizer, reranker.max_length
    read = await asyncio.to_thread(lambda: [tokenizer.encode(text, most) for text in (query, *documents)])
    return scores, _usage(read), headers


async def _computed(
    request: Request, served: ServedModel, compute: Callable[[list[Any]], Iterable[T]], texts: list[Any]
) -> list[T]:
    """Return the model's result for each text, computed in a thread, until the client leaves or time runs out."""

    async def work() -> list[T]:
        found: list[T] = []
        async with served.lock:
            for begin in range(0, len(texts), TEXTS_AT_ONCE):
                thread = asyncio.to_thread(compute, texts[begin : begin + TEXTS_AT_ONCE])
                found += await _to_its_end(thread)
        return found

    return await unless_disconnected(request, state_of(request).in_time(work()))


async def _to_its_end(thread: Coroutine[Any, Any, T]) -> T:
    """Wait for a thread, also when canceled: it cannot be stopped, and the next one must not run beside it."""
    task = asyncio.ensure_future(thread)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


def _usage(rows: list[list[int]]) -> dict[str, int]:
    num_tokens = sum(map(len, rows))
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _documents(fields: Fields, key: str = "documents") -> list[str]:
    """Return the texts of a list of documents: strings or objects with "text"."""
    given = fields.required(key, fields.items(key))
    texts = [text for d in given if isinstance(text := d.get("text") if isinstance(d, dict) else d, str)]
    if not texts or len(texts) < len(given):
        raise fields.error(key, f"must be a non-empty list of texts, got {describe(given)}")
    return texts
