"""Log-probabilities of prompts: `echo` with `max_tokens` 0; and errors of prompts by field."""

from __future__ import annotations

import asyncio

import pytest
from serving import (
    call,
    tiny_generator,  # noqa: F401  fixtures
)
from tokenizers.processors import TemplateProcessing

from qwen3fast.server.app import create_app

PROMPT = "The capital of France is Paris."
MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]


@pytest.fixture
def ask(tiny_generator):  # noqa: F811
    """A function that posts to the application. Returns status and JSON body."""
    app = create_app({"tiny": tiny_generator})
    return lambda path, **body: asyncio.run(call(app, path, body))


@pytest.fixture
def bos(tiny_generator, monkeypatch):  # noqa: F811
    """The id of a token that tokenizer.json, as it is in this test, puts before a text."""
    base = tiny_generator.tokenizer.base
    token = ("<|endoftext|>", base.token_to_id("<|endoftext|>"))
    added = TemplateProcessing(single=f"{token[0]} $A", special_tokens=[token])
    monkeypatch.setattr(base, "post_processor", added)
    return token[1]


def test_tokenize_puts_the_bos_token_first(ask, bos, tiny_generator):  # noqa: F811
    ids = tiny_generator.tokenizer.encode(PROMPT)
    assert ask("/tokenize", prompt=PROMPT)[1]["tokens"] == [bos, *ids]
    assert ask("/tokenize", prompt=PROMPT, add_special_tokens=True)[1]["count"] == len(ids) + 1
    assert ask("/tokenize", prompt=PROMPT, add_special_tokens=False)[1]["tokens"] == ids
    assert ask("/tokenize", prompt="<|endoftext|>" + PROMPT)[1]["tokens"] == [bos, *ids]  # not twice
    rendered = tiny_generator.render(MESSAGES)
    assert ask("/tokenize", messages=MESSAGES)[1]["tokens"] == rendered
    assert ask("/tokenize", messages=MESSAGES, add_special_tokens=True)[1]["tokens"] == [bos, *rendered]
    status, reply = ask("/tokenize", prompt=PROMPT, add_special_tokens="yes")
    assert status == 400 and reply["error"]["param"] == "add_special_tokens"


def test_tokens_of_a_prompt_are_the_tokens_that_a_request_computes(ask, bos):
    tokens = ask("/tokenize", prompt=PROMPT, return_token_strs=True)[1]
    reply = ask("/v1/completions", prompt=PROMPT, echo=True, logprobs=0, max_tokens=0)[1]
    assert reply["usage"]["prompt_tokens"] == tokens["count"]
    assert reply["choices"][0]["logprobs"]["tokens"] == tokens["token_strs"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prompt_logprobs_apart_from_the_text_are_refused(ask, path):
    prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": MESSAGES}
    status, reply = ask(path, **prompt, prompt_logprobs=1)
    assert (status, reply["error"]["param"]) == (400, "prompt_logprobs")


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "a b"], [[72, 73, 74]]])
def test_echo_of_no_token_is_the_prompt_and_its_scores(ask, prompt, logprobs):
    options = {"prompt": prompt, "echo": True, "temperature": 0, **({} if logprobs is None else {"logprobs": logprobs})}
    status, none = ask("/v1/completions", **options, max_tokens=0)
    _, one = ask("/v1/completions", **options, max_tokens=1)
    assert status == 200 and none["usage"]["completion_tokens"] == 0
    assert none["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"] == none["usage"]["total_tokens"]
    for choice, longer in zip(none["choices"], one["choices"], strict=True):
        assert longer["text"].startswith(choice["text"]) and choice["finish_reason"] == "length"
        if logprobs is None:
            assert choice["logprobs"] is None
        else:
            assert choice["logprobs"] == {name: values[:-1] for name, values in longer["logprobs"].items()}


def test_a_stream_of_no_token_is_refused(ask):
    status, reply = ask("/v1/completions", prompt=PROMPT, echo=True, max_tokens=0, stream=True)
    assert (status, reply["error"]["param"]) == (400, "stream")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_no_token_without_echo_is_refused(ask, name):
    status, reply = ask("/v1/completions", prompt="a", **{name: 0})
    assert status == 400 and "echo" in reply["error"]["message"]
    status, reply = ask("/v1/chat/completions", messages=MESSAGES, **{name: 0})
    assert (status, reply["error"]["param"]) == (400, name)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a " * 600}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 600}]}, "messages"),
        ("/v1/responses", {"input": "a " * 600}, "input"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_names_the_field(ask, path, body, param, stream):
    status, reply = ask(path, **body, stream=stream)
    assert status == 400, reply
    assert (reply["error"]["code"], reply["error"]["param"]) == ("context_length_exceeded", param)
    assert "max_seq_len 512" in reply["error"]["message"] and "--max-seq-len" in reply["error"]["message"]
    assert "Generator" not in reply["error"]["message"]


def test_other_faults_of_a_prompt_name_the_field(ask):
    for prompt in ("", [10**6]):
        status, reply = ask("/v1/completions", prompt=prompt or [""])
        assert (status, reply["error"]["param"]) == (400, "prompt")
