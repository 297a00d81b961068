"""Every object and streamed event of the server is valid by the official clients' own types; clients try again."""

from __future__ import annotations

import asyncio
import functools
import json
import threading

import pytest
from conftest import wait_until
from serving import call, models, post, running  # noqa: F401  fixtures
from serving import quick_generator as tiny_generator  # noqa: F401

from qwen3fast import Generator, SamplingParams
from qwen3fast.server.app import create_app

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
from anthropic.types import Message, RawMessageStreamEvent  # noqa: E402
from openai.types import Completion, CreateEmbeddingResponse  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402
from openai.types.responses import Response, ResponseStreamEvent  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

SUM = [{"role": "user", "content": "What is 17 + 25?"}]
PARAMETERS = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
FUNCTION = {"name": "f", "description": "Adds.", "parameters": PARAMETERS}
CHAT_TOOL = {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required", "thinking_budget": 4}
RESPONSE_TOOL = {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}
MESSAGE_TOOL = {"tools": [{"name": "f", "input_schema": PARAMETERS}], "tool_choice": {"type": "any"}}
NONE, THINK = {"reasoning": {"effort": "none"}}, {"thinking": {"type": "enabled", "budget_tokens": 8}}
REQUESTS = [
    ("/v1/chat/completions", {"messages": SUM, "max_tokens": 60}),
    ("/v1/chat/completions", {"messages": SUM, "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 5}),
    ("/v1/chat/completions", {"messages": SUM, "max_tokens": 60, **CHAT_TOOL}),
    ("/v1/chat/completions", {"messages": SUM, "max_tokens": 5, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 2, "echo": True, "max_tokens": 4}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 4, "stream_options": {"include_usage": True}}),
    ("/v1/responses", {"input": "What is 17 + 25?", "max_output_tokens": 60}),
    ("/v1/responses", {"input": "What is 17 + 25?", "max_output_tokens": 3, "text": {"format": {"type": "text"}}}),
    ("/v1/responses", {"input": "What is 17 + 25?", "max_output_tokens": 60, **NONE, **RESPONSE_TOOL}),
    ("/v1/messages", {"messages": SUM, "max_tokens": 20, "stop_sequences": ["2"]}),
    ("/v1/messages", {"messages": SUM, "max_tokens": 60, **THINK}),
    ("/v1/messages", {"messages": SUM, "max_tokens": 60, **MESSAGE_TOOL}),
]
WHOLE = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": Completion,
    "/v1/responses": Response,
    "/v1/messages": Message,
}
EVENTS = {
    "/v1/chat/completions": ChatCompletionChunk,
    "/v1/completions": Completion,
    "/v1/responses": ResponseStreamEvent,
    "/v1/messages": RawMessageStreamEvent,
}


adapter = functools.cache(TypeAdapter)  # whose making takes long


def validate(kind, data: dict) -> None:
    """Check that data is valid JSON of a type. Raises: ValidationError naming the field."""
    if kind is Completion:
        # OpenAI's own older API has null where its types do not: before a stream's end, for a prompt's first token.
        for choice in data["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
            for name, empty in (("token_logprobs", 0.0), ("top_logprobs", {})):
                values = (choice["logprobs"] or {}).get(name) or [empty]
                assert None not in values[1:]
                values[0] = values[0] or empty
    adapter(kind).validate_json(json.dumps(data), strict=True)


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_replies_are_valid_by_the_clients_types(tiny_generator, path, body):  # noqa: F811
    body = {**body, "temperature": 0} if "stream_options" not in body else {**body, "stream_options": None}
    status, reply = asyncio.run(call(create_app({"tiny": tiny_generator}), path, body))
    assert status == 200, reply
    validate(WHOLE[path], reply)


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_events_are_valid_by_the_clients_types(tiny_generator, path, body):  # noqa: F811
    stream = {**body, "temperature": 0, "stream": True}
    status, content = asyncio.run(post(create_app({"tiny": tiny_generator}), path, stream))
    assert status == 200, content
    events = [line[6:] for line in content.decode().splitlines() if line.startswith("data: ")]
    if path.endswith("completions"):
        assert events.pop() == "[DONE]"
    assert len(events) > 1
    for event in map(json.loads, events):
        validate(EVENTS[path], event)


def test_embeddings_are_valid_by_the_clients_type(models):  # noqa: F811
    _, reply = asyncio.run(call(create_app(models), "/v1/embeddings", {"input": ["a", "b"], "dimensions": 4}))
    validate(CreateEmbeddingResponse, reply)


@pytest.fixture
def busy():
    """A server whose slot and place in the queue are taken, its address, and a function that frees them."""
    endless = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    with Generator.from_pretrained("tiny", max_seq_len=600, max_queue=1, compile=False) as generator:
        handles = [generator.submit([1], endless)]
        wait_until(lambda: generator.stats.slots_in_use == 1)
        handles.append(generator.submit([1], endless))
        with running({"tiny": generator}) as url:
            yield url, lambda: [handle.cancel() for handle in handles]


def test_the_openai_client_tries_again_when_the_server_says_so(busy):
    url, free = busy
    options = {"model": "tiny", "messages": SUM, "max_tokens": 3}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError, match="wait already"):
            client.chat.completions.create(**options)
        threading.Timer(0.2, free).start()  # Retry-After is a second
        assert client.with_options(max_retries=3).chat.completions.create(**options).usage.completion_tokens == 3


def test_the_anthropic_client_tries_again_when_the_server_says_so(busy):
    url, free = busy
    options = {"model": "tiny", "messages": SUM, "max_tokens": 3}
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.RateLimitError):
            client.messages.create(**options)
        threading.Timer(0.2, free).start()
        assert client.with_options(max_retries=3).messages.create(**options).usage.output_tokens == 3
