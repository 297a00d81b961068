"""A model with Qwen3-Coder's chat template, through Generator, ChatSession and all protocols: calls have types."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from coder_template import CODER_TEMPLATE, tool
from serving import running

from qwen3fast import ChatSession, Generator, SamplingParams, ToolCall

httpx = pytest.importorskip("httpx")
pytest.importorskip("llguidance")

WEATHER = tool(
    "weather",
    {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "code": {"const": "7"},
    },
    required=["city", "days", "code"],
)
MESSAGES = [{"role": "user", "content": "How will it be in Oslo?"}]
CALL = "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
WRITTEN = SamplingParams(temperature=0, max_tokens=200, grammar=f"start: {json.dumps(CALL)}")
TYPED, UNTYPED = ToolCall("weather", {"days": 3}), ToolCall("weather", {"days": "3"})


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    """Tiny with the other template."""
    with Generator.from_pretrained("tiny", max_batch_size=2, max_seq_len=1024, compile=True) as generator:
        generator.tokenizer.chat_template = CODER_TEMPLATE
        yield generator


@pytest.fixture(scope="module")
def client(generator):
    with running({"coder": generator}) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_chat_gives_arguments_their_types(generator):
    result = generator.chat(MESSAGES, WRITTEN, tools=[WEATHER])
    assert (result.text, result.answer, result.tool_calls) == (CALL, "", [TYPED])
    assert list(generator.stream_chat(MESSAGES, WRITTEN, tools=[WEATHER]))[-1].result.tool_calls == [TYPED]


def test_prompts_of_ones_own_have_types_where_the_tools_are_given(generator):
    prompt = generator.render(MESSAGES, tools=[WEATHER])
    assert generator.generate(prompt, WRITTEN).tool_calls == [UNTYPED]
    assert generator.generate([prompt], WRITTEN, tools=[WEATHER])[0].tool_calls == [TYPED]
    assert generator.submit(prompt, WRITTEN, tools=[WEATHER]).result().tool_calls == [TYPED]
    assert list(generator.stream(prompt, WRITTEN, tools=[WEATHER]))[-1].result.tool_calls == [TYPED]


def test_functions_have_types_by_their_hints(generator):
    def weather(days: int) -> str:
        """Tell the weather.

        Args:
            days: how many.
        """
        return f"sunny {days}"

    assert generator.chat(MESSAGES, WRITTEN, tools=[weather]).tool_calls == [TYPED]


def test_generate_refuses_tools_that_are_none(generator):
    with pytest.raises(ValueError, match="tools must be a list"):
        generator.generate("a", tools={"name": "weather"})


def test_a_session_keeps_the_call_with_its_types(generator):
    session = ChatSession(generator, tools=[WEATHER])
    assert session.send("Oslo?", WRITTEN).tool_calls == [TYPED]
    assert session.messages[-1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"days": 3}}
    assert session.send({"role": "tool", "content": "sunny"}, SamplingParams(max_tokens=2)).token_ids


def check(arguments: dict) -> None:
    assert arguments["city"] in ("Oslo", "Rome")
    assert type(arguments["days"]) is int
    assert arguments["days"] >= 1
    assert arguments["code"] == "7"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_chat_completions_call_a_tool_when_they_must(client, choice):
    body = {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": choice, "temperature": 0, "max_tokens": 200}
    reply = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    (call,) = reply["message"]["tool_calls"]
    check(json.loads(call["function"]["arguments"]))
    assert (reply["finish_reason"], reply["message"]["content"]) == ("tool_calls", None)
    streamed = client.post("/v1/chat/completions", json={**body, "stream": True}).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events]
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
    assert calls == [call["function"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == ""


def test_responses_call_a_tool_when_they_must(client):
    body = {"input": MESSAGES, "tools": [{"type": "function", **WEATHER["function"]}], "tool_choice": "required"}
    (item,) = client.post("/v1/responses", json={**body, "temperature": 0}).json()["output"]
    check(json.loads(item["arguments"]))


def test_messages_call_a_tool_when_they_must(client):
    function = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}
    body = {"messages": MESSAGES, "tools": [function], "tool_choice": {"type": "any"}, "temperature": 0}
    reply = client.post("/v1/messages", json={**body, "max_tokens": 200}).json()
    (block,) = reply["content"]
    check(block["input"])
    assert reply["stop_reason"] == "tool_use"


def test_a_forced_call_that_is_cut_short_is_text(client):
    body = {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": "required", "temperature": 0, "max_tokens": 4}
    reply = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert reply["finish_reason"] == "length"
    assert reply["message"]["content"].startswith("<tool_call>")


def test_a_forced_call_excludes_names_that_the_format_cannot_hold(client):
    body = {"messages": MESSAGES, "tools": [tool("a>b", {})], "tool_choice": "required"}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert "no '>'" in reply.json()["error"]["message"]
