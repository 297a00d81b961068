"""The official `anthropic` client against `/v1/messages`."""

from __future__ import annotations

import pytest
from serving import address, models  # noqa: F401  fixtures
from serving import quick_generator as tiny_generator  # noqa: F401

anthropic = pytest.importorskip("anthropic")

SUM = [{"role": "user", "content": "What is 17 + 25?"}]
OPTIONS = {"model": "tiny", "max_tokens": 100, "extra_body": {"temperature": 0.0}}
WEATHER = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(address):  # noqa: F811
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}])
def test_messages_and_their_stream_agree(client, thinking):
    options = {**OPTIONS, "max_tokens": 200, "messages": SUM, "thinking": thinking}
    whole = client.messages.create(**options)
    assert whole.content[-1].text == "42"
    assert [block.type for block in whole.content] == (["thinking"] if "budget_tokens" in thinking else []) + ["text"]
    assert whole.stop_reason == "end_turn"
    with client.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "42"
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in whole.content]
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_system_prompt_and_blocks_of_text_are_read(client):
    blocks = [{"type": "text", "text": "What is "}, {"type": "text", "text": "17 + 25?"}]
    one = client.messages.create(**OPTIONS, messages=[{"role": "user", "content": blocks}])
    assert one.content[0].text == "42"
    with_system = client.messages.create(**OPTIONS, messages=SUM, system=[{"type": "text", "text": "Be brief."}])
    count = one.usage.input_tokens + one.usage.cache_read_input_tokens
    assert with_system.usage.input_tokens + with_system.usage.cache_read_input_tokens > count


def test_a_limit_and_a_stop_sequence_are_told(client):
    cut = client.messages.create(**{**OPTIONS, "max_tokens": 1}, messages=SUM)
    assert (cut.stop_reason, cut.stop_sequence) == ("max_tokens", None)
    stopped = client.messages.create(**OPTIONS, messages=SUM, stop_sequences=["2", "x"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "2", "4")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_is_called_and_its_result_read(client, choice):
    pytest.importorskip("llguidance")
    options = {**OPTIONS, "tools": [WEATHER], "tool_choice": choice, "messages": SUM}
    whole = client.messages.create(**options)
    (call,) = whole.content
    assert (call.type, call.name, whole.stop_reason) == ("tool_use", "weather", "tool_use")
    assert call.input["city"] in ("Paris", "Rome")
    with client.messages.stream(**options) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    messages = [*SUM, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    after = client.messages.create(**{**OPTIONS, "max_tokens": 3}, tools=[WEATHER], messages=messages)
    assert after.usage.output_tokens <= 3


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"model": "claude"}, "NotFoundError"),
        ({"max_tokens": 0}, "BadRequestError"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "BadRequestError"),
        ({"extra_body": {"temperature": -1.0}}, "BadRequestError"),
    ],
)
def test_errors_have_anthropics_types(client, options, kind):
    with pytest.raises(getattr(anthropic, kind)) as caught:
        client.messages.create(**{**OPTIONS, "messages": SUM, **options})
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["message"]
