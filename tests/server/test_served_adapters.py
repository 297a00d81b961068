"""LoRA adapters as models of a server: listed, chosen by `model`, in one batch with the base model."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import randomized, small_config, write_text_checkpoint
from serving import running
from test_lora import ALL, modules_of, write_adapter

from qwen3fast import Generator, SamplingParams
from qwen3fast.server.loading import add_model_arguments, load_models
from qwen3fast.server.models import Models

httpx = pytest.importorskip("httpx")

PROMPT = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_folder) -> dict[str, Path]:
    """A checkpoint, "base", and two adapters for it."""
    root = tmp_path_factory.mktemp("served")
    model = randomized(small_config(vocab_size=1024, tie_word_embeddings=False))
    folders = {"base": write_text_checkpoint(root / "base", model, tokenizer_folder)}
    for name, targets in (("one", ALL), ("two", ["q_proj", "up_proj"])):
        write_adapter(root / name, model, modules_of(model, targets))
        folders[name] = root / name
    return folders


@pytest.fixture(scope="module")
def generator(folders):
    options = {"device": "cpu", "compile": False, "max_seq_len": 256, "max_batch_size": 4, "max_adapters": 3}
    adapters = {name: folders[name] for name in ("one", "two")}
    with Generator.from_pretrained(folders["base"], adapters=adapters, **options) as generator:
        yield generator


@pytest.fixture(scope="module")
def client(generator):
    with running({"base": generator}) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def text(generator, adapter):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, adapter=adapter)
    return generator.generate("Hello", params).text


def test_adapters_are_listed_with_their_model_as_parent(client):
    listed = {m["id"]: (m["root"], m["parent"]) for m in client.get("/v1/models").json()["data"]}
    assert listed == {"base": ("base", None), "one": ("base", "base"), "two": ("base", "base")}
    assert client.get("/v1/models/two").json()["max_model_len"] == 256


def test_the_model_of_a_request_chooses_the_adapter(client, generator):
    names = ["base", "one", "two", "one", "base", "two"]
    with ThreadPoolExecutor(len(names)) as pool:  # together, in batches of several adapters
        replies = list(pool.map(lambda n: client.post("/v1/completions", json={**PROMPT, "model": n}).json(), names))
    expected = {"base": text(generator, None), "one": text(generator, "one"), "two": text(generator, "two")}
    assert len(set(expected.values())) == 3
    assert [r["choices"][0]["text"] for r in replies] == [expected[name] for name in names]
    assert [r["model"] for r in replies] == names
    assert client.post("/v1/completions", json=PROMPT).json()["choices"][0]["text"] == expected["base"]


def texts(value) -> str:
    """All strings of a reply that the model wrote, without ids."""
    if isinstance(value, list):
        return "".join(map(texts, value))
    if not isinstance(value, dict):
        return ""
    own = [v for k, v in value.items() if k in ("text", "content", "reasoning", "thinking") and isinstance(v, str)]
    return "".join([*own, *(texts(v) for v in value.values())])


@pytest.mark.filterwarnings("ignore:greedy decoding")
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_conversations_choose_it_in_every_form(client, path):
    fields = {"temperature": 0, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    if path == "/v1/responses":
        fields = {"temperature": 0, "input": "Hello", "max_output_tokens": 8}
    replies = []
    for name in ("base", "one", "two", "base", "one", "two"):
        body = client.post(path, json={**fields, "model": name}).json()
        assert body["model"] == name
        replies.append(texts(body.get("choices") or body.get("content") or body.get("output")))
    assert replies[:3] == replies[3:] and len(set(replies)) == 3


def test_streams_choose_it_as_well(client, generator):
    body = {**PROMPT, "model": "one", "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    assert {event["model"] for event in events} == {"one"}
    assert "".join(c["text"] for event in events for c in event["choices"]) == text(generator, "one")


def test_an_unknown_model_is_answered_with_all_names(client):
    reply = client.post("/v1/completions", json={**PROMPT, "model": "three"})
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == "model 'three' does not exist; this server has base, one, two"


def test_adapters_come_and_go_while_the_server_runs(client, generator, folders):
    generator.load_adapter("late", folders["one"])
    assert client.post("/v1/completions", json={**PROMPT, "model": "late"}).json()["choices"][0]["text"] == text(
        generator, "one"
    )
    generator.unload_adapter("late")
    assert client.post("/v1/completions", json={**PROMPT, "model": "late"}).status_code == 404


def test_metrics_count_requests_under_the_adapters_name_and_slots_once(client):
    client.post("/v1/completions", json={**PROMPT, "model": "two"})
    lines = client.get("/metrics").text.splitlines()
    assert any(line.startswith('vllm:generation_tokens_total{model_name="two"}') for line in lines)
    assert [line for line in lines if line.startswith("qwen3fast:slots{")] == ['qwen3fast:slots{model_name="base"} 4.0']


def test_names_of_models_and_adapters_must_differ(generator):
    with pytest.raises(ValueError, match="need names of their own; duplicates: one"):
        Models({"one": generator})


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return parser.parse_args([*words, "--device", "cpu", "--no-warmup", "--max-batch-size=2", "--max-seq-len=256"])


def test_the_command_takes_adapters_of_one_model(folders):
    words = [f"--model=base={folders['base']}", f"--adapter=one={folders['one']}", f"--adapter=two={folders['two']}"]
    models = load_models(parse(*words))
    with models["base"] as generator:
        assert generator.adapters == ["one", "two"]
    with pytest.raises(ValueError, match="--adapter needs a single --model"):
        load_models(parse(*words, "--model=tiny"))
    for bad in ("one", "=x", "one="):
        with pytest.raises(ValueError, match=r"--adapter must be NAME=SOURCE, each name once, got"):
            load_models(parse(words[0], f"--adapter={bad}"))
    with pytest.raises(ValueError, match="each name once, got 'one="):
        load_models(parse(*words, words[1]))


def test_the_command_asks_the_hub_once_for_each_model_and_adapter(folders, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append(name)
        return str(folders[name.removeprefix("owner/")])

    monkeypatch.setattr("qwen3fast.checkpoint.source.snapshot_download", snapshot_download)
    with load_models(parse("--model=owner/base", "--adapter=one=owner/one"))["owner/base"] as generator:
        assert generator.adapters == ["one"]
    assert asked == ["owner/base", "owner/one"]


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "a=tiny", "--model", "a=elsewhere"],
        ["--model", "tiny", "--embedder", "tiny"],
        ["--model", "a=tiny", "--adapter", "a=folder"],
    ],
)
def test_a_name_given_twice_is_refused_before_anything_is_loaded(options, monkeypatch):
    monkeypatch.setattr(Generator, "from_pretrained", None)  # calling it would fail
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    with pytest.raises(ValueError, match=r"two models or adapters are named '(a|tiny)'"):
        load_models(parser.parse_args(options))
