"""Fields of requests: ignored ones are named, vLLM's extensions are accepted or refused by name."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from unittest import mock

import pytest
import torch
from conftest import randomized, small_config
from serving import address, call, models, post  # noqa: F401  fixtures
from serving import quick_generator as tiny_generator  # noqa: F401

from qwen3fast import Embedder, Generator, SamplingParams
from qwen3fast.cli import main
from qwen3fast.server.app import create_app
from qwen3fast.server.completions import TextOffset
from qwen3fast.server.loading import _base_of_adapter, _name_and_source
from qwen3fast.server.options import ServerOptions
from qwen3fast.text.tokenizer import Tokenizer

httpx = pytest.importorskip("httpx")

CHAT = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0, "max_tokens": 4}
BAD = {"type": "nothing"}  # no JSON schema
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"unread": {}}}, "description": "d"}


@pytest.fixture
def client(address):  # noqa: F811
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"reasoning_effort": "none"}),
        ("/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("/v1/messages", {"max_tokens": 20}),
    ],
)
def test_reasoning_that_the_template_opens_all_the_same_is_closed_at_once(
    path,
    more,
    client,
    tiny_generator,  # noqa: F811
    monkeypatch,
):
    opens = "{{ '<|im_start|>user\n' + messages[0].content + '<|im_end|>\n<|im_start|>assistant\n<think>\n' }}"
    monkeypatch.setattr(tiny_generator.tokenizer, "chat_template", opens)
    chat = {"model": "tiny", "messages": CHAT["messages"], "temperature": 0, "max_tokens": 20, **more}
    reply = client.post(path, json=chat).json()
    text = reply["content"][0]["text"] if "content" in reply else reply["choices"][0]["message"]["content"]
    assert text and not (reply.get("choices") or [{"message": {}}])[0]["message"].get("reasoning_content")
    assert all(block["type"] == "text" for block in reply.get("content", []))


@pytest.mark.parametrize("thinks", [True, False])
def test_tokenize_counts_the_prompt_that_chat_sends(tiny_generator, thinks):  # noqa: F811
    app = create_app({"tiny": tiny_generator}, ServerOptions(enable_thinking=thinks))
    for kwargs, expected in (({}, thinks), ({"enable_thinking": True}, True), ({"enable_thinking": False}, False)):
        body = {"messages": CHAT["messages"], "chat_template_kwargs": kwargs}
        _, found = asyncio.run(call(app, "/tokenize", body))
        assert found["tokens"] == tiny_generator.render(CHAT["messages"], enable_thinking=expected)


@pytest.mark.parametrize("field", ["conversation", "prompt", "max_tool_calls"])
def test_a_response_refuses_what_would_change_its_reply(client, field):
    reply = client.post("/v1/responses", json={"input": "a", "max_output_tokens": 1, field: "x"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ({}, None),
        ({"reasoning_effort": "low"}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {}}, None),
        ({"reasoning_effort": "none"}, False),
    ],
)
def test_a_server_reasons_by_default_unless_its_options_say_otherwise(tiny_generator, thinks, more, asked):  # noqa: F811
    app = create_app({"tiny": tiny_generator}, ServerOptions(enable_thinking=thinks))
    params = {"temperature": 0, "max_tokens": 20}
    _, reply = asyncio.run(call(app, "/v1/chat/completions", {"messages": CHAT["messages"], **params, **more}))
    expected = tiny_generator.chat(
        CHAT["messages"], SamplingParams(**params), enable_thinking=thinks if asked is None else asked
    )
    message = reply["choices"][0]["message"]
    assert (message["content"], message.get("reasoning", "")) == (expected.answer, expected.reasoning)


@pytest.mark.parametrize(
    ("path", "more", "ignored"),
    [
        ("/v1/chat/completions", {"messages": [{**CHAT["messages"][0], "foo": 1}]}, "messages[0].foo"),
        (
            "/v1/chat/completions",
            {"tools": [{"type": "function", "function": {**TOOL, "x": 1}}]},
            "tools[0].function.x",
        ),
        ("/v1/chat/completions", {"stream_options": {"a": 1}, "priority": 2}, "priority, stream_options.a"),
        ("/v1/chat/completions", {"min_tokens": None}, None),
        ("/v1/chat/completions", {"function_call": "auto"}, None),
        ("/v1/completions", {"prompt": "a", "messages": 1}, "messages"),
        ("/v1/responses", {"input": [{"role": "user", "content": "a", "b": 2}], "max_tokens": None}, "input[0].b"),
        ("/v1/messages", {"system": [{"type": "text", "text": "a", "b": 1}]}, "system[0].b"),
        ("/v1/messages", {"tools": [{"name": "f", "input_schema": {"any": 1}, "c": 1}]}, "tools[0].c"),
    ],
)
def test_ignored_fields_are_named_wherever_they_stand(client, path, more, ignored):
    body = {key: value for key, value in {**CHAT, **more}.items() if path != "/v1/responses" or key != "messages"}
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers.get("x-ignored-fields") == ignored


@pytest.mark.parametrize(
    ("outputs", "text"),
    [({"choice": ["red", "green"]}, "red|green"), ({"regex": "b[12]"}, "b[12]"), ({"json": {"const": 7}}, "7")],
)
def test_structured_outputs_shape_a_reply(client, outputs, text):
    pytest.importorskip("llguidance")
    body = {"prompt": "a", "temperature": 0, "structured_outputs": outputs}
    given = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert re.fullmatch(text, given)


CALLED = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": "I call", "tool_calls": [CALLED]}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"guided_grammar": "x"}, "guided_grammar"),
        ({"guided_json": {}}, "guided_json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
        ({"min_tokens": 2, "structured_outputs": {"regex": "a"}}, "min_tokens"),
        ({"min_tokens": 2, "max_tokens": 1}, "min_tokens"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"functions": [TOOL]}, "functions"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "continue_final_message"),
        ({"continue_final_message": True, "messages": [CALLING]}, "continue_final_message"),
        ({"min_tokens": False}, "min_tokens"),
        ({"skip_special_tokens": 1}, "skip_special_tokens"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools[0].function.parameters"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_path(client, more, param):
    reply = client.post("/v1/chat/completions", json={**CHAT, **more})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("more", "instead"),
    [
        ({"guided_choice": ["a"]}, "use structured_outputs"),
        ({"guided_grammar": "x"}, "use a JSON schema or a regular expression"),
        ({"structured_outputs": {"grammar": "x"}}, "use a JSON schema or a regular expression"),
        ({"prompt_logprobs": 0}, "/v1/completions gives them with echo and logprobs"),
        ({"prompt": "a", "stream": True, "echo": True, "max_tokens": 0}, "is not available for 0 tokens"),
    ],
)
def test_the_error_of_a_refused_field_names_the_remedy(client, more, instead):
    path = "/v1/completions" if "prompt" in more else "/v1/chat/completions"
    reply = client.post(path, json={**({} if "prompt" in more else CHAT), **more})
    assert reply.status_code == 400 and instead in reply.json()["error"]["message"]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_a_strict_server_takes_what_its_own_page_asks(tiny_generator):  # noqa: F811
    script = (files("qwen3fast.server") / "web/page.js").read_text("utf-8")
    request_of = re.search(r"^function requestOf.*?^}$", script, re.DOTALL | re.MULTILINE)[0]
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}, *CHAT["messages"]]
    settings = {"system": "a", "temperature": "0", "max_tokens": "1", "thinking": True}
    state = json.dumps({"model": "tiny", "settings": settings})
    program = f"{request_of} const state = {state}; console.log(JSON.stringify(requestOf({json.dumps(messages)})))"
    body = json.loads(subprocess.run(["node", "-e", program], capture_output=True, check=True).stdout)
    app = create_app({"tiny": tiny_generator}, ServerOptions(strict=True))
    status, events = asyncio.run(post(app, "/v1/chat/completions", body))
    assert status == 200 and b'"usage"' in events, events


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        ("/v1/chat/completions", {"messages": CHAT["messages"], "temperature": -1}, "temperature"),
        ("/v1/responses", {"input": "a", "top_p": 2}, "top_p"),
        (
            "/v1/responses",
            {"input": "a", "text": {"format": {"type": "json_schema", "schema": 3}}},
            "text.format.schema",
        ),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [2**31]}, "stop_token_ids"),
        ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 2**31}, "max_completion_tokens"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 2**31}, "max_output_tokens"),
        ("/v1/responses", {"input": "a", "tool_choice": "required"}, "tool_choice"),
        ("/v1/responses", {"input": "a", "tools": [{"type": "function", **TOOL}], "tool_choice": 3}, "tool_choice"),
        ("/v1/completions", {"prompt": "a", "min_p": 2}, "min_p"),
    ],
)
def test_values_out_of_range_are_refused_by_the_name_of_their_field(client, path, more, param):
    reply = client.post(path, json=more)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_a_final_message_of_the_assistant_is_continued(client, models):  # noqa: F811
    begun = [*CHAT["messages"], {"role": "assistant", "content": "The answer is 4"}]
    body = {"messages": begun, "temperature": 0, "max_tokens": 4}
    params = SamplingParams(temperature=0, max_tokens=4)
    result = models["tiny"].chat(begun, params, continue_final_message=True)
    assert result.text != models["tiny"].chat(begun, params).text
    ours = client.post("/v1/chat/completions", json={**body, "continue_final_message": True}).json()
    assert ours["choices"][0]["message"]["content"] == result.text
    assert client.post("/v1/messages", json=body).json()["content"][0]["text"] == result.text
    count = client.post("/v1/messages/count_tokens", json={"messages": begun}).json()
    assert count == {"input_tokens": result.metrics.prompt_tokens}
    body["messages"] = [CHAT["messages"][0], {"role": "assistant", "content": "I wrote </think> here"}]
    count = client.post("/v1/messages/count_tokens", json={"messages": body["messages"]}).json()["input_tokens"]
    result = models["tiny"].chat(body["messages"], params, enable_thinking=False)  # a turn before
    assert count == result.metrics.prompt_tokens
    assert client.post("/v1/messages", json=body).json()["content"][0]["text"] == result.answer
    wrong = client.post("/v1/messages/count_tokens", json={})
    assert wrong.status_code == 400 and wrong.json()["type"] == "error"


def test_text_offsets_count_characters_not_their_tokens(tiny_generator):  # noqa: F811
    app, text = create_app({"tiny": tiny_generator}), "a\U0001f600b\u4e2dc"
    body = {"prompt": text, "echo": True, "max_tokens": 0, "logprobs": 0}
    _, whole = asyncio.run(call(app, "/v1/completions", body))
    found = whole["choices"][0]["logprobs"]
    assert len(found["tokens"]) > len(text)  # characters of several tokens
    at = {token: offset for token, offset in zip(found["tokens"], found["text_offset"], strict=True) if token in "abc"}
    assert at == {"a": 0, "b": 2, "c": 4}
    _, stream = asyncio.run(post(app, "/v1/completions", {**body, "max_tokens": 1, "stream": True}))
    events = [json.loads(data)["choices"][0] for data in re.findall(rb"data: (\{.*\})\n\n", stream)]
    offsets = [offset for event in events if event["logprobs"] for offset in event["logprobs"]["text_offset"]]
    assert offsets[:-1] == found["text_offset"]  # without the reply's token


def test_text_offsets_count_an_unfinished_character_before_the_next_token(tiny_generator):  # noqa: F811
    tokenizer = tiny_generator.tokenizer
    first, *rest = tokenizer.encode("\u4e2d")
    offset = TextOffset(tokenizer)
    ids = [first, *tokenizer.encode("b"), *tokenizer.encode("c"), first, *rest, *tokenizer.encode("d"), rest[0], first]
    assert rest and [offset.before(i) for i in ids] == [0, 1, 2, 3, *[3] * len(rest), 4, 5, 6]


def test_a_text_of_several_context_lengths_is_counted(client, models):  # noqa: F811
    length = models["tiny"].max_seq_len
    most = models["tiny"].tokenizer.max_chars("a" * 10**7, 16 * length)
    for text, status in (("a b " * 4 * length, 200), ("a" * (most + 1), 400)):
        chat = {"messages": [{"role": "user", "content": text}]}
        asked = (("/tokenize", {"prompt": text}), ("/tokenize", chat), ("/v1/messages/count_tokens", chat))
        for path, body in asked:
            reply = client.post(path, json=body)
            assert reply.status_code == status, reply.text
            if status == 200:
                found = reply.json()
                assert found.get("count", found.get("input_tokens")) > 4 * length
            elif path == "/tokenize":
                assert reply.json()["error"]["param"] == next(iter(body))
            else:
                assert reply.json()["error"]["message"].startswith("messages: prompt (")


def test_a_name_before_a_long_path_is_read():
    source = "/".join(["folder"] * 2000)  # longer than any path
    assert _name_and_source(f"chat={source}") == ("chat", source)


def test_parameters_that_leave_no_token_are_told_as_such(client):
    pytest.importorskip("llguidance")
    body = {"prompt": "a", "allowed_token_ids": [5], "structured_outputs": {"regex": "zzz"}}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 400 and "no token is allowed at token 0" in reply.text and "weights" not in reply.text


CALLS = "".join(f'<tool_call>\n{{"name": "f", "arguments": {{"n": {n}}}}}\n</tool_call>\n' for n in range(3))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "tool", "one"),
    [
        ("/v1/chat/completions", {"type": "function", "function": TOOL}, {"parallel_tool_calls": False}),
        ("/v1/responses", {"type": "function", **TOOL}, {"parallel_tool_calls": False}),
        ("/v1/messages", {"name": "f", "input_schema": {}},
         {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
    ],
)  # fmt: skip
def test_a_reply_has_one_tool_call_where_only_one_is_allowed(tiny_generator, path, tool, one, stream):  # noqa: F811
    ids = [*tiny_generator.tokenizer.encode(CALLS), *tiny_generator.config.eos_token_ids]

    def write(logits_V, output_T):
        return torch.full_like(logits_V, -1e9).index_fill_(0, torch.tensor(ids[len(output_T)]), 0.0)

    body = {"messages": CHAT["messages"], "input": "a", "tools": [tool], "stream": stream}
    body |= {} if path == "/v1/responses" else {"max_tokens": 200}
    counts = []
    build = tiny_generator._builder.build_one

    def build_scripted(prompt, params, *more, **options):
        return build(prompt, replace(params, logits_processor=write), *more, **options)

    with mock.patch.object(tiny_generator._builder, "build_one", build_scripted):
        for more in ({}, one):
            _, content = asyncio.run(post(create_app({"tiny": tiny_generator}), path, {**body, **more}))
            counts.append({n for n in range(3) if re.search(rf'n[\\]*": ?{n}\}}', content.decode())})
    assert counts == [{0, 1, 2}, {0}]


LONG = "a" * 10**6


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 1}),
        ("/v1/responses", {"input": "a", "tools": [{"type": "function", **TOOL, "description": LONG}]}),
        ("/v1/chat/completions", {"messages": CHAT["messages"] * 20_000}),
        ("/tokenize", {"prompt": LONG}),
        ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}),
    ],
)
def test_a_request_that_cannot_fit_is_refused_before_it_is_encoded(client, monkeypatch, path, body):
    encoded, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, *n: encoded.append(text) or encode(self, text, *n))
    reply = client.post(path, json=body)
    assert reply.status_code == 400 and re.search("exceeds max_seq_len|more than 8192|at most 16384 items", reply.text)
    assert sum(map(len, encoded)) < 1000


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "logit_bias": {"99999": 1}}, "logit_bias"),
        ("/v1/chat/completions", {**CHAT, "allowed_token_ids": [99999], "stream": True}, "allowed_token_ids"),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": BAD}}},
         "response_format"),
        ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function", "function": {**TOOL, "parameters": BAD}}],
                                  "tool_choice": "required"}, "tools"),
        ("/v1/completions", {"prompt": "a", "stream": True, "structured_outputs": {"regex": "("}},
         "structured_outputs.regex"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": BAD}}, "structured_outputs.json"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema", "schema": BAD}}},
         "text.format.schema"),
        ("/detokenize", {"tokens": [5, 99999]}, "tokens"),
    ],
)  # fmt: skip
def test_values_that_the_model_cannot_take_are_refused_by_the_name_of_their_field(client, path, more, param):
    pytest.importorskip("llguidance")
    reply = client.post(path, json=more)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, param, "invalid_value"), reply.text
    assert "99999" in error["message"] or "99999" not in str(more)


def test_tools_without_a_choice_and_the_other_way_round(client):
    tool = {"type": "function", **TOOL}
    for more in ({"tool_choice": "auto"}, {"tools": [tool]}, {"tools": [tool], "tool_choice": "none"}):
        reply = client.post("/v1/responses", json={"input": "a", "max_output_tokens": 1, **more})
        assert reply.status_code == 200, reply.text
    reply = client.post("/v1/messages", json={**CHAT, "temperature": 2e6})
    assert reply.status_code == 400 and reply.json()["error"]["message"].startswith("temperature: temperature must be")
    reply = client.post("/v1/messages", json={**CHAT, "stop_sequences": [3]})
    assert reply.json()["error"]["message"] == "stop_sequences: must be a list of strings, got [3]"


def test_documents_are_ranked_in_each_form(client, models):  # noqa: F811
    documents = ["Paris", "a stone", "Rome"]
    scores = models["ranks"].score("q", documents)
    body = {"query": "q", "documents": documents, "top_n": 2}
    best = sorted(range(3), key=lambda i: -scores[i])[:2]
    ours = client.post("/v1/rerank", json=body).json()
    assert [r["index"] for r in ours["results"]] == best
    assert ours["results"][0]["document"]["text"] == documents[best[0]]
    cohere = client.post("/v2/rerank", json=body).json()
    assert [r["relevance_score"] for r in cohere["results"]] == pytest.approx([scores[i] for i in best])
    assert "document" not in cohere["results"][0] and cohere["meta"]["api_version"]["version"] == "2"
    scored = client.post("/v1/score", json={"text_1": "q", "text_2": documents}).json()
    assert [r["score"] for r in scored["data"]] == pytest.approx(scores)


def test_embeddings_take_token_ids_as_they_are_and_refuse_what_is_too_long(client, models):  # noqa: F811
    def ask(given, **more):
        reply = client.post("/v1/embeddings", json={"input": given, **more})
        body = reply.json()
        if reply.status_code != 200:
            return reply.status_code, body["error"]["param"], body["error"]["code"]
        return body["data"][0]["embedding"], body["usage"]["prompt_tokens"]

    embedder = models["vectors"]
    ids = [*embedder.tokenizer.encode("a"), *embedder.tokenizer.encode("b")]  # encoding "ab" may give others
    end = embedder.token_ids([""])[0]
    by_ids = embedder.encode_ids([[*ids, *end]])[0].tolist()
    assert ask(ids) == ask([*ids, *end]) == (pytest.approx(by_ids), len(ids) + 1)
    assert ask([99999]) == (400, "input", "invalid_value")
    assert ask(ids, instruction="a") == (400, "instruction", "invalid_value")
    long = "What is 17 + 25? " * 100
    assert ask(long) == ask(["a", long]) == ask(ids * 100) == (400, "input", "context_length_exceeded")
    assert ask(long, truncate_prompt_tokens=-1) == (pytest.approx(embedder.encode(long)[0].tolist()), 128)
    assert ask(long, truncate_prompt_tokens=5)[1] == ask(ids * 9, truncate_prompt_tokens=5)[1] == 5
    assert ask(long, truncate_prompt_tokens=129)[:2] == (400, "truncate_prompt_tokens")


def test_an_embedder_works_on_one_request_even_when_clients_leave(client, models, monkeypatch):  # noqa: F811
    at_once, most = [0], [0]
    encode = Embedder.encode_ids

    def slow(self, texts, **options):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.05)
        at_once[0] -= 1
        return encode(self, texts, **options)

    monkeypatch.setattr(Embedder, "encode_ids", slow)

    def ask(timeout: float) -> None:
        with suppress(httpx.TimeoutException):
            client.post("/v1/embeddings", json={"input": ["a"] * 100}, timeout=timeout)

    threads = [threading.Thread(target=ask, args=(timeout,)) for timeout in (0.02, 0.03, 0.06, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_an_adapter_is_served_by_a_name_of_its_own(tmp_path):
    assert _base_of_adapter("tiny") is None
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "tiny"}))
    assert _base_of_adapter(str(tmp_path)) == "tiny"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        _base_of_adapter(str(tmp_path))


def test_without_the_extra_the_command_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qwen3fast.server.batch", None)
    assert main(["batch", "in.jsonl", "-o", "out.jsonl"]) == 1
    assert "pip install 'qwen3fast[server]'" in capsys.readouterr().err


def test_events_of_a_stream_keep_their_interval_and_the_end_does_not(tiny_generator):  # noqa: F811
    """With an interval beyond any reply: what there is at first, the rest with the end, all of it there."""
    body = {"prompt": "What is 17 + 25?", "temperature": 0, "max_tokens": 60, "ignore_eos": True}
    app = create_app({"tiny": tiny_generator}, ServerOptions(stream_interval_s=10_000.0))
    _, whole = asyncio.run(call(app, "/v1/completions", body))
    _, stream = asyncio.run(post(app, "/v1/completions", {**body, "stream": True}))
    events = [json.loads(data) for data in re.findall(rb"data: (\{.*\})\n\n", stream)]
    texts = [event["choices"][0]["text"] for event in events]
    assert "".join(texts) == whole["choices"][0]["text"]
    assert sum(bool(text) for text in texts) <= 2


@pytest.mark.parametrize("seconds", [-0.1, float("inf"), float("nan")])
def test_intervals_that_no_stream_can_keep_are_refused(seconds):
    with pytest.raises(ValueError, match="stream_interval_s must be 0 or a positive number, got"):
        ServerOptions(stream_interval_s=seconds)


def test_a_conversation_that_takes_long_to_render_holds_up_no_other_client(tiny_generator, monkeypatch):  # noqa: F811
    is_rendering, is_answered, render = threading.Event(), threading.Event(), tiny_generator.render

    def slowly(*arguments):
        is_rendering.set()
        assert is_answered.wait(5), "nobody else was answered meanwhile"
        return render(*arguments)

    async def ask_twice():
        reply = asyncio.create_task(call(app, "/v1/chat/completions", CHAT))
        while not is_rendering.is_set():
            await asyncio.sleep(0.001)
        tokens = await call(app, "/tokenize", {"prompt": "a"})
        is_answered.set()
        return tokens, await reply

    monkeypatch.setattr(tiny_generator, "render", slowly)
    app = create_app({"tiny": tiny_generator})
    assert [status for status, _ in asyncio.run(ask_twice())] == [200, 200]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/completions"])
def test_a_model_without_a_tokenizer_says_what_it_takes(path):
    with Generator(randomized(small_config()), compile=False, max_seq_len=64) as generator:
        app = create_app({"bare": generator})
        status, body = asyncio.run(call(app, path, {**CHAT, "prompt": "text"}))
        assert status == 400 and "no tokenizer" in str(body) and "token ids" in str(body)
        assert "random" not in str(body)
        assert asyncio.run(call(app, "/v1/completions", {"prompt": [5, 6], "max_tokens": 2}))[0] == 200
