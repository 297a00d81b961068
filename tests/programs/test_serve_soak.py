"""tools/serve_soak.py runs, finds nothing wrong in a few seconds, and would notice if something were."""

from __future__ import annotations

import re
import sys

import pytest

pytest.importorskip("uvicorn")

import serve_soak

from qwen3fast import Generator


def run(monkeypatch, capsys, minutes: str):
    """Return exit status, table and errors."""
    monkeypatch.setattr(sys, "argv", ["serve_soak.py", "--minutes", minutes, "--seed", "1", "--max-growth-mb", "10000"])
    status, printed = serve_soak.main(), capsys.readouterr()
    return status, dict(re.findall(r"^(\w+) +(\d+)$", printed.out, re.MULTILINE)), printed.err


def test_serve_soak_finds_nothing_wrong_in_two_seconds(monkeypatch, capsys):
    status, table, errors = run(monkeypatch, capsys, "0.03")
    assert status == 0, errors
    assert list(table) == list(serve_soak.ROWS)
    assert int(table["streams"]) > 0 and int(table["wrong"]) == 0


def test_serve_soak_notices_wrong_replies(monkeypatch, capsys):
    generate = Generator.generate
    monkeypatch.setattr(Generator, "generate", lambda self, prompt, params: generate(self, f"{prompt} x", params))
    status, table, errors = run(monkeypatch, capsys, "0.02")
    assert status == 1 and int(table["wrong"]) > 0
    assert re.search(r"\n  got .*\n  expected ", errors)
