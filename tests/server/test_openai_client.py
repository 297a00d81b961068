"""The official `openai` client against the server: what it sends is understood, what it gets it can read."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Literal

import numpy as np
import pytest
from conftest import wait_until
from serving import address, models, running  # noqa: F401  fixtures
from serving import quick_generator as tiny_generator  # noqa: F401

from qwen3fast import Generator, SamplingParams

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")  # comes with openai, as does the next
pydantic = pytest.importorskip("pydantic")

SUM = [{"role": "user", "content": "What is 17 + 25?"}]
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}
GREEDY = {"temperature": 0, "seed": 1}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(address):  # noqa: F811
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_is_the_generators_reply(client, tiny_generator):  # noqa: F811
    reply = client.chat.completions.create(model="tiny", messages=SUM, **GREEDY)
    alone = tiny_generator.chat(SUM, SamplingParams(temperature=0))
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content) == (alone.answer, alone.reasoning)
    assert message.content == "42"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == len(alone.token_ids)
    assert reply.usage.prompt_tokens == alone.metrics.prompt_tokens
    assert 0 < reply.usage.completion_tokens_details.reasoning_tokens < len(alone.token_ids)


@pytest.mark.parametrize("n", [1, 3])
def test_chat_stream_joined_is_the_unstreamed_reply(client, n):
    options = {"model": "tiny", "messages": SUM, "temperature": 1.0, "seed": 7, "n": n, "logprobs": True}
    whole = client.chat.completions.create(**options, top_logprobs=2)
    chunks = list(
        client.chat.completions.create(**options, top_logprobs=2, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for i, choice in enumerate(whole.choices):
        deltas = [c for chunk in chunks for c in chunk.choices if c.index == i]
        assert "".join(d.delta.content or "" for d in deltas) == choice.message.content
        reasoning = "".join(getattr(d.delta, "reasoning_content", None) or "" for d in deltas)
        assert reasoning == getattr(choice.message, "reasoning_content", "")
        logprobs = [at for d in deltas if d.logprobs for at in d.logprobs.content]
        assert [at.token for at in logprobs] == [at.token for at in choice.logprobs.content]
        assert all(len(at.top_logprobs) == 2 for at in logprobs)
        assert [d.finish_reason for d in deltas if d.finish_reason] == [choice.finish_reason]


def test_chat_without_reasoning_and_with_a_limit(client):
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    reply = client.chat.completions.create(model="tiny", messages=SUM, max_tokens=1, extra_body=extra, **GREEDY)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 1
    assert getattr(reply.choices[0].message, "reasoning_content", None) is None


def test_chat_parses_into_a_pydantic_model(client):
    pytest.importorskip("llguidance")

    class Sum(pydantic.BaseModel):
        value: Literal[42, 43]
        is_even: bool

    reply = client.chat.completions.parse(model="tiny", messages=SUM, response_format=Sum, max_tokens=450, **GREEDY)
    assert isinstance(reply.choices[0].message.parsed, Sum)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_chat_calls_a_tool_when_it_must(client, choice):
    pytest.importorskip("llguidance")
    options = {"model": "tiny", "messages": SUM, "tools": [WEATHER], "tool_choice": choice, **GREEDY}
    options["reasoning_effort"] = "none"
    message = client.chat.completions.create(**options).choices[0].message
    (call,) = message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather" and arguments["city"] in ("Paris", "Rome") and arguments["days"] in (1, 2, 3)
    assert message.content is None
    with client.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert [(c.function.name, c.function.arguments) for c in streamed.message.tool_calls] == [
        (call.function.name, call.function.arguments)
    ]
    messages = [
        *SUM,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    after = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], max_tokens=4, **GREEDY)
    assert after.choices[0].finish_reason in ("stop", "length")


def test_completions_of_several_prompts(client, tiny_generator):  # noqa: F811
    prompts = ["What is 3 + 4?", "What is"]
    reply = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=5, echo=True, **GREEDY)
    alone = tiny_generator.generate(prompts, SamplingParams(temperature=0, max_tokens=5))
    assert [c.text for c in reply.choices] == [p + r.text for p, r in zip(prompts, alone, strict=True) for _ in (0, 1)]
    assert reply.usage.prompt_tokens == sum(r.metrics.prompt_tokens for r in alone)
    assert reply.usage.completion_tokens == 2 * sum(len(r.token_ids) for r in alone)


def test_completions_take_token_ids_and_stream_the_same(client, tiny_generator):  # noqa: F811
    ids = tiny_generator.tokenizer.encode("What is 3 + 4?")
    options = {"model": "tiny", "prompt": ids, "max_tokens": 12, "logprobs": 1, **GREEDY}
    whole = client.completions.create(**options).choices[0]
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.text
    tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
    assert tokens == whole.logprobs.tokens
    offsets = [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset]
    assert offsets == whole.logprobs.text_offset


def test_responses_and_their_stream_agree(client):
    options = {"model": "tiny", "input": "What is 17 + 25?", "temperature": 0}
    whole = client.responses.create(**options)
    assert whole.output_text == "42"
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    with client.responses.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "42"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "42"
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_responses_go_on_from_an_earlier_one(client):
    first = client.responses.create(model="tiny", input="What is 17 + 25?", temperature=0)
    second = client.responses.create(
        model="tiny", input="What is 3 + 4?", previous_response_id=first.id, temperature=0, max_output_tokens=3
    )
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.status == "incomplete" and second.incomplete_details.reason == "max_output_tokens"
    assert client.responses.retrieve(first.id).output_text == "42"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_responses_call_a_tool(client):
    pytest.importorskip("llguidance")
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    options = {"model": "tiny", "input": SUM, "tools": [tool], "tool_choice": "required", "temperature": 0}
    options["reasoning"] = {"effort": "none"}
    (item,) = client.responses.create(**options).output
    assert item.type == "function_call" and item.name == "weather"
    with client.responses.stream(**options) as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.arguments == item.arguments
    items = [
        *SUM,
        {"type": "function_call", "call_id": item.call_id, "name": item.name, "arguments": item.arguments},
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"},
    ]
    assert client.responses.create(model="tiny", input=items, max_output_tokens=3).usage.output_tokens <= 3


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_are_the_embedders(client, models, form):  # noqa: F811
    texts = ["a cat", "a dog"]
    reply = client.embeddings.create(model="vectors", input=texts, dimensions=16, encoding_format=form)
    expected = models["vectors"].encode(texts, dimensions=16)
    values = [e.embedding for e in reply.data]
    vectors = [np.frombuffer(base64.b64decode(v), "f4") if isinstance(v, str) else v for v in values]
    assert np.allclose(vectors, expected.numpy(), atol=1e-6)


def test_models_are_listed(client):
    assert [m.id for m in client.models.list()] == ["tiny", "vectors", "ranks"]
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize(
    ("options", "kind", "param"),
    [
        ({"model": "gpt-x"}, "NotFoundError", "model"),
        ({"model": "vectors"}, "BadRequestError", "model"),
        ({"temperature": -1}, "BadRequestError", "temperature"),
        ({"top_p": 0}, "BadRequestError", "top_p"),
        ({"messages": []}, "BadRequestError", "messages"),
        ({"messages": [{"role": "cat", "content": "x"}]}, "BadRequestError", "messages[0].role"),
        ({"messages": [IMAGE]}, "BadRequestError", "messages[0].content[0].type"),
        ({"n": 0}, "BadRequestError", "n"),
        ({"logit_bias": {"a": 1}}, "BadRequestError", "logit_bias"),
        ({"top_logprobs": 3}, "BadRequestError", "top_logprobs"),
        ({"tool_choice": "required"}, "BadRequestError", "tool_choice"),
        ({"max_tokens": 100_000}, "BadRequestError", "messages"),
    ],
)  # fmt: skip
def test_errors_have_openais_types_and_name_the_field(client, options, kind, param):
    with pytest.raises(getattr(openai, kind)) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": SUM, **options})
    assert caught.value.param == param
    assert caught.value.body["message"]


def test_the_asynchronous_client_runs_many_at_once(address):  # noqa: F811
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            create = client.chat.completions.create
            replies = await asyncio.gather(*(create(model="tiny", messages=SUM, **GREEDY) for _ in range(12)))
            return [reply.choices[0].message.content for reply in replies]

    assert asyncio.run(ask()) == ["42"] * 12


def test_a_client_that_gives_up_frees_its_slot():
    options = {"model": "tiny", "messages": SUM, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    with (
        Generator.from_pretrained("tiny", max_seq_len=512, compile=False) as slow,
        running({"tiny": slow}) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(**options, stream=True)
        next(iter(stream))
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.05).chat.completions.create(**options)
        wait_until(lambda: (slow.stats.slots_in_use, slow.stats.waiting) == (0, 0))
        assert 'finished_reason="length"' not in httpx.get(f"{url}/metrics").text  # none ran to its end


@pytest.mark.parametrize("is_text", [True, False])
def test_echo_with_logprobs_has_the_prompts(client, tiny_generator, is_text):  # noqa: F811
    """What evaluation harnesses ask for, to score a continuation that is part of the prompt."""
    text = "What is 17 + 25? é"
    ids = tiny_generator.tokenizer.encode(text)
    options = {"model": "tiny", "max_tokens": 3, "echo": True, "logprobs": 2, **GREEDY}
    [choice] = client.completions.create(prompt=text if is_text else ids, **options).choices
    alone = tiny_generator.generate(ids, SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=2))
    assert choice.text == text + alone.text
    logprobs, expected = choice.logprobs, [*alone.prompt_logprobs[1:], *alone.logprobs]
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    assert logprobs.token_logprobs[1:] == pytest.approx([at.logprob for at in expected], abs=0.05)
    tokens = [tiny_generator.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in [*ids, *alone.token_ids]]
    assert logprobs.tokens == tokens
    assert logprobs.text_offset[:3] == [0, len(tokens[0]), len(tokens[0]) + len(tokens[1])]
    assert max(map(len, logprobs.top_logprobs[1:])) == 2


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_with_echo_and_logprobs_is_the_unstreamed_reply(client, n):
    options = {"model": "tiny", "prompt": ["What is 1", "b c"], "max_tokens": 4, "echo": True, "logprobs": 1, "n": n}
    whole = client.completions.create(**options, **GREEDY)
    parts = [chunk.choices[0] for chunk in client.completions.create(**options, **GREEDY, stream=True) if chunk.choices]
    for expected in whole.choices:
        mine = [part for part in parts if part.index == expected.index]
        assert "".join(part.text for part in mine) == expected.text
        for name in ("tokens", "text_offset"):
            assert [v for part in mine if part.logprobs for v in getattr(part.logprobs, name)] == getattr(
                expected.logprobs, name
            )
        found = [v for part in mine if part.logprobs for v in part.logprobs.token_logprobs]
        assert found[0] is None and found[1:] == pytest.approx(expected.logprobs.token_logprobs[1:], abs=0.05)
