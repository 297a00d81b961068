"""examples/ray_serve.py with two replicas: replies, streams, and requests that begin alike reach the same replica."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from serving import tiny_generator  # noqa: F401  fixtures

from qwen3fast import SamplingParams

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.py"
DOCUMENTS, QUESTIONS = 8, 4


@pytest.fixture(scope="module")
def url():
    """Where two replicas are served."""
    pytest.importorskip("ray.serve")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    command = [sys.executable, str(EXAMPLE), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # nothing is compiled
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("serving tiny"):
                break
        else:
            pytest.fail("".join(lines[-30:]))
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def ask(url: str, body: dict) -> str:
    """Return the body of the answer to a completion. Raises: HTTPError."""
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()


def test_requests_with_the_same_prefix_find_it(url):
    rng = random.Random(0)
    numbers = [" ".join(str(rng.randrange(1000)) for _ in range(60)) for _ in range(DOCUMENTS)]
    work = [(d, q) for d in range(DOCUMENTS) for q in range(QUESTIONS)]
    rng.shuffle(work)
    seen: set[int] = set()
    found = 0
    for document, question in work:
        prompt = f"Document {document}: {numbers[document]} Question {question}?"
        usage = json.loads(ask(url, {"prompt": prompt, "max_tokens": 2, "temperature": 0}))["usage"]
        reused = usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"]
        found += document in seen and reused > 0.7
        seen.add(document)
    # By chance, half of them would reach the other replica. Each has slots for all its documents.
    assert found >= 0.9 * (len(work) - DOCUMENTS)


def test_replies_and_streams_are_the_engines(url, tiny_generator):  # noqa: F811
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    alone = tiny_generator.generate(body["prompt"], SamplingParams(temperature=0, max_tokens=8)).text
    assert json.loads(ask(url, body))["choices"][0]["text"] == alone
    events = [line[6:] for line in ask(url, {**body, "stream": True}).splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == alone


def test_errors_keep_their_status_and_form(url):
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url, {"prompt": "a", "n": 0})
    assert error.value.code == 400 and json.loads(error.value.read())["error"]["param"] == "n"
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url, {"prompt": "a" * 9_000_000})
    assert error.value.code == 413
