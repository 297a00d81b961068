"""Streams are exact: however the engine's tokens are cut into chunks, joined events are the unstreamed reply.

Replies are scripted: their tokens are a hypothesis' choice, with characters cut in the middle, reasoning, tool calls,
malformed ones; how many tokens a chunk holds is another. Everything from the RequestHandle on is the real thing.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving import call, post
from serving import quick_generator as tiny_generator  # noqa: F401

from qwen3fast import Generator
from qwen3fast.engine.state import Logprobs
from qwen3fast.scheduling.handle import RequestHandle
from qwen3fast.scheduling.request import Request
from qwen3fast.server.app import create_app
from qwen3fast.text.stream import TextStream
from qwen3fast.text.tokenizer import Tokenizer

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é </tool_call>"}}\n</tool_call>'
PARTS = st.sampled_from(
    ["text ", "\n\n", "👩‍👩‍👧 é", "<tool", "<tool_call>", "</tool_call>", CALL, '{"name": 3}', "<b>", "END", "EN", " "]
)
TEXTS = st.lists(PARTS, max_size=6).map("".join)
IDS = re.compile(r'"(id|call_id|item_id)":"[^"]*"')


class Scripted(RequestHandle):
    """A handle whose tokens come in chunks of given sizes; the last of them repeats."""

    def __init__(self, tokens: list[int], sizes: list[int], stop: tuple[str, ...], tokenizer: Tokenizer) -> None:
        request = Request([1, 2], max_tokens=100, logprobs=2)
        super().__init__(request, TextStream(tokenizer, stop), SimpleNamespace(cancel=lambda request: None))
        self._tokens, self._sizes = tokens, sizes

    async def aresult(self) -> Any:
        """Return the result."""
        return [chunk async for chunk in self.chunks()][-1].result

    async def chunks(self, min_interval_s: float = 0.0) -> AsyncIterator[Any]:
        """Yield the chunks."""
        sizes, left = iter(self._sizes), 0
        for i, token in enumerate(self._tokens):
            left = left or next(sizes, self._sizes[-1])
            self.request.output_ids.append(token)
            self.request.output_logprobs.append(Logprobs(-1.0 / (i + 1), [token, 5], [-1.0, -2.0 - i]))
            is_stopped = self._stream.push(token)
            if is_stopped or i == len(self._tokens) - 1:
                self.request.finish_reason = "stop"
            self._on_change()
            left -= 1
            if left == 0 or self.is_done:
                await asyncio.sleep(0)
                yield self._take()
            if is_stopped:
                return


class ScriptedGenerator(Generator):
    """A Generator that says what it is told."""

    adapters: list[str] = []  # noqa: RUF012  none, and no registry of them

    def __init__(self, real: Generator) -> None:
        self.options, self._builder = real.options, real._builder
        self.tokenizer, self.max_seq_len, self._real = real.tokenizer, real.max_seq_len, real
        self.tokens: list[int] = []
        self.sizes: list[int] = [1]

    def render(self, *arguments: Any, **options: Any) -> list[int]:
        """Return any prompt."""
        return [1, 2]

    def submit(self, prompt: Any, params: Any = None, **options: Any) -> RequestHandle:
        """Return the scripted reply."""
        stop = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop)
        return Scripted(self.tokens, self.sizes, stop, self.tokenizer)

    def close(self) -> None:
        """Leave the real one open."""

    def __del__(self) -> None:
        """Nothing is held."""


@st.composite
def scripts(draw: st.DrawFn) -> tuple[str, list[int], list[int]]:
    """A reply's text; how its bytes are cut into tokens; tokens of each chunk."""
    text = draw(TEXTS)
    if draw(st.booleans()):
        text = f"<think>{draw(TEXTS)}</think>{text}"
    cuts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    return text or "a", cuts, sizes


def cut_into_tokens(tokenizer: Tokenizer, text: str, cuts: list[int]) -> list[int]:
    """Return tokens of a text: the tokenizer's, or at some places tokens of single bytes."""
    ids: list[int] = []
    for i, part in enumerate(re.split(r"(</?think>|\s|[^\x00-\x7f])", text)):
        as_bytes = cuts[i % len(cuts)] == 1 and part not in ("<think>", "</think>")
        units = [bytes([b]) for b in part.encode()] if as_bytes else []
        ids += [BYTES[unit] for unit in units] if as_bytes else (tokenizer.encode(part) if part else [])
    return ids


BYTES: dict[bytes, int] = {}


@pytest.fixture(scope="module")
def scripted(tiny_generator):  # noqa: F811
    tokenizer = tiny_generator.tokenizer
    BYTES.update({raw: i for i in range(tokenizer.vocab_size) if len(raw := tokenizer.token_bytes(i)) == 1})
    generator = ScriptedGenerator(tiny_generator)
    return generator, create_app({"tiny": generator})


def events_of(content: bytes) -> list[dict[str, Any]]:
    """Return the data of all events; each is whole UTF-8."""
    lines = content.decode("utf-8").split("\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]


def both(scripted, script, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the unstreamed reply and the events of the streamed one."""
    generator, app = scripted
    text, cuts, generator.sizes = script
    generator.tokens = cut_into_tokens(generator.tokenizer, text, cuts)

    async def ask() -> tuple[dict[str, Any], bytes]:
        status, whole = await call(app, path, {**body, "stream": False})
        assert status == 200, whole
        return whole, (await post(app, path, {**body, "stream": True}))[1]

    whole, content = asyncio.run(ask())
    return whole, events_of(content)


def joined(deltas: list[dict[str, Any]], key: str) -> str:
    """Return the texts of one field together."""
    return "".join(delta.get(key) or "" for delta in deltas)


MESSAGES = [{"role": "user", "content": "a"}]
HARD = (f"<think>EN é 👩‍👩‍👧</think> Let me see. \n\n{CALL}\n {CALL}👩‍👩‍👧 <tool_call> b", [1, 2, 1, 1, 1], [1, 3, 1])


def each_script(test: Any) -> Any:
    """Run a test on many scripts."""
    return settings(deadline=None, max_examples=50)(given(scripts())(example(HARD)(test)))


@each_script
def test_chat(scripted, script):
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "stop": "END"}
    body["stream_options"] = {"include_usage": True}
    whole, events = both(scripted, script, "/v1/chat/completions", body)
    choices = [event["choices"][0] for event in events if event["choices"]]
    deltas = [choice["delta"] for choice in choices]
    message = whole["choices"][0]["message"]
    assert joined(deltas, "content") == (message["content"] or "")
    assert joined(deltas, "reasoning_content") == message.get("reasoning_content", "")
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [c["function"] for c in calls] == [c["function"] for c in message.get("tool_calls", [])]
    assert [c["index"] for c in calls] == list(range(len(calls)))
    logprobs = [at for choice in choices if choice["logprobs"] for at in choice["logprobs"]["content"]]
    assert logprobs == whole["choices"][0]["logprobs"]["content"]
    assert [c["finish_reason"] for c in choices][-1] == whole["choices"][0]["finish_reason"]
    assert events[-1]["usage"] == whole["usage"]


@each_script
def test_completions(scripted, script):
    body = {"prompt": ["a", "b"], "logprobs": 2, "echo": False, "stop": ["END"]}
    whole, events = both(scripted, script, "/v1/completions", body)
    for i in range(2):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == i]
        expected = whole["choices"][i]
        assert joined(choices, "text") == expected["text"]
        parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        for key, values in expected["logprobs"].items():
            assert [value for part in parts for value in part[key]] == values
        assert choices[-1]["finish_reason"] == expected["finish_reason"]


@each_script
def test_responses(scripted, script):
    whole, events = both(scripted, script, "/v1/responses", {"input": "a"})
    last = events[-1]["response"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (last["status"], last["usage"]) == (whole["status"], whole["usage"])

    def of(name: str) -> list[dict[str, Any]]:
        return [event for event in events if event["type"] == f"response.{name}"]

    for output in (whole["output"], last["output"]):  # text around a call is one message, or one on each side
        reasoning = [item["content"][0]["text"] for item in output if item["type"] == "reasoning"]
        texts = [part["text"] for item in output if item["type"] == "message" for part in item["content"]]
        calls = [(item["name"], item["arguments"]) for item in output if item["type"] == "function_call"]
        assert joined(of("reasoning_text.delta"), "delta") == "".join(reasoning)
        assert joined(of("output_text.delta"), "delta") == "".join(texts)
        assert joined(of("function_call_arguments.delta"), "delta") == "".join(arguments for _, arguments in calls)
        done = of("function_call_arguments.done")
        assert [(event["name"], event["arguments"]) for event in done] == calls
    added, ended = of("output_item.added"), of("output_item.done")
    assert [event["output_index"] for event in added] == [event["output_index"] for event in ended]
    assert [event["item"] for event in ended] == last["output"]


@each_script
def test_messages(scripted, script):
    body = {"messages": MESSAGES, "max_tokens": 9, "stop_sequences": ["END"]}
    whole, events = both(scripted, script, "/v1/messages", body)
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    found = {kind: [b for b in whole["content"] if b["type"] == kind] for kind in ("thinking", "text", "tool_use")}
    assert joined(deltas, "thinking") == joined(found["thinking"], "thinking")
    assert joined(deltas, "text") == joined(found["text"], "text")
    inputs = [json.loads(delta["partial_json"]) for delta in deltas if delta["type"] == "input_json_delta"]
    assert inputs == [block["input"] for block in found["tool_use"]]
    starts = [event for event in events if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == list(range(len(starts)))
    end = events[-2]
    assert end["delta"] == {key: whole[key] for key in ("stop_reason", "stop_sequence")}
    assert end["usage"] == whole["usage"]
