"""tools/serve_soak.py runs, finds nothing wrong in a short time, and would notice if something were."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn")

import serve_soak

from qwen3fast import Generator
from qwen3fast.bench.progress import Progress


def run(monkeypatch, capsys):
    """Return exit status, table and errors. Each client behaves in one way or two; with this seed, all six differ."""
    options = ["--minutes", "0.002", "--check-minutes", "5", "--seed", "1", "--max-growth-mb", "10000"]
    monkeypatch.setattr(sys, "argv", ["serve_soak.py", *options])
    status, printed = serve_soak.main(), capsys.readouterr()
    return status, dict(re.findall(r"^(\w+) +(\d+)$", printed.out, re.MULTILINE)), printed.err


def test_serve_soak_finds_nothing_wrong(monkeypatch, capsys):
    status, table, errors = run(monkeypatch, capsys)
    assert status == 0, errors
    assert list(table) == list(serve_soak.ROWS)
    assert int(table["streams"]) > 0 and int(table["wrong"]) == 0
    assert int(table["checked"]) == int(table["replies"]) + int(table["streams"]) and int(table["unchecked"]) == 0
    assert errors.startswith("about 5 min at most;") and "replies, 0 wrong" in errors


def test_serve_soak_notices_wrong_replies(monkeypatch, capsys):
    generate = Generator.generate
    monkeypatch.setattr(
        Generator,
        "generate",
        lambda self, prompts, params: generate(self, [f"{prompt} x" for prompt in prompts], params),
    )
    status, table, errors = run(monkeypatch, capsys)
    assert status == 1 and int(table["wrong"]) > 0
    assert re.search(r"\n  got .*\n  expected ", errors)


def test_serve_soak_stops_checking_when_the_time_is_over(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(serve_soak, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(serve_soak, "_texts", lambda generator, requests: [request["prompt"] for request in requests])
    replies = [({"prompt": str(i)}, str(i) if i != 5 else "other") for i in range(100)]
    checked, wrong = serve_soak.check(None, replies, until=4, progress=Progress(is_shown=False))
    assert checked == 2 * serve_soak.BATCH and len(wrong) == 1 and "expected '5'" in wrong[0]
