"""The server's pages in docs: fields are those that the server reads, curl examples run, files are in order."""

from __future__ import annotations

import argparse
import asyncio
import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
from serving import address, models, post  # noqa: F401  fixtures
from serving import quick_generator as tiny_generator  # noqa: F401

from qwen3fast.server.app import create_app
from qwen3fast.server.command import add_arguments
from qwen3fast.server.fields import Fields

httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guides/server.md").read_text("utf-8")
SECTIONS = re.split(r"^## POST ", (ROOT / "docs/server_fields.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
STATES = {
    section.partition("\n")[0]: dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", section, re.MULTILINE))
    for section in SECTIONS
}
MESSAGES = [{"role": "user", "content": "a"}]
BODIES = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/embeddings": {"input": "a"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/tokenize": {"messages": MESSAGES},
    "/detokenize": {"tokens": [1]},
}


@pytest.mark.parametrize("path", BODIES)
def test_fields_of_an_endpoint_are_those_it_reads(models, monkeypatch, path):  # noqa: F811
    read: set[str] = set()
    unknown = Fields.unknown

    def note(self):
        if not self._path:
            read.update(self._taken)
        return unknown(self)

    monkeypatch.setattr(Fields, "unknown", note)
    status, content = asyncio.run(post(create_app(models), path, BODIES[path]))
    assert status == 200, content
    states = STATES[path]
    assert set(states.values()) <= {"supported", "accepted", "refused", "ignored"}
    assert {name for name, state in states.items() if state != "ignored"} == read


def test_every_endpoint_with_a_body_has_its_fields_listed():
    assert set(STATES) == set(BODIES)


def test_the_systemd_unit_and_the_compose_file_start_the_server_with_its_own_options():
    unit = configparser.ConfigParser(delimiters="=")
    unit.optionxform = str
    unit.read_string(code("ini"))
    assert {"Unit", "Service", "Install"} == set(unit.sections())
    start = shlex.split(unit["Service"]["ExecStart"])
    assert start[1:4] == ["-m", "qwen3fast", "serve"]
    in_compose = re.search(r"command: (\[.*\])", code("yaml"))
    for options in (start[4:], json.loads(in_compose[1])):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        assert parser.parse_args(options).model == ["Qwen/Qwen3-0.6B"]


def code(language: str) -> str:
    """Return the guide's only block of code in a language."""
    [block] = re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    return block


@pytest.mark.parametrize("command", re.findall(r"^```curl\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE))
def test_curl_examples_run(address, command):  # noqa: F811
    words = shlex.split(command)
    assert words[0] == "curl"
    url = next(word for word in words if word.startswith("http")).replace("http://127.0.0.1:8000", address)
    body = words[words.index("-d") + 1]
    reply = httpx.post(url, content=body, timeout=30)
    assert reply.status_code == 200, reply.text
    assert "x-ignored-fields" not in reply.headers
    assert reply.text.endswith("data: [DONE]\n\n") if "-N" in words else json.loads(reply.text)


def torch_range() -> str:
    """Return the range of PyTorch's versions that pyproject.toml has."""
    [found] = re.findall(r'^    "(torch>=[^"]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return found


def test_the_image_copies_what_the_wheel_needs():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {"qwen3fast", "pyproject.toml", "setup.py", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in kept)
    instructions = re.findall(r"^([A-Z]+) ", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert f'"{torch_range()}"' in (ROOT / "Dockerfile").read_text()
    assert instructions.count("FROM") == 2 and instructions[-2:] == ["ENTRYPOINT", "CMD"]
