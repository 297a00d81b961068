"""tools/soak.py runs, finds nothing wrong in a short time, and would notice if something were."""

from __future__ import annotations

import re
import sys
from itertools import count

import pytest
import soak

from qwen3fast import Generator
from qwen3fast.scheduling.admission import Admission


def run(monkeypatch, capsys, *arguments):
    """Exit status and what was printed."""
    monkeypatch.setattr(sys, "argv", ["soak.py", *arguments])
    return soak.main(), capsys.readouterr().out


def use_workers(monkeypatch, threads=0, tasks=2, chats=0):
    for workers, number in {"THREADS": threads, "TASKS": tasks, "CHATS": chats}.items():
        monkeypatch.setattr(soak, workers, number)


def test_soak_finds_nothing_wrong(monkeypatch, capsys, one_thread):
    use_workers(monkeypatch, threads=1, tasks=2, chats=1)
    # Memory is not judged here: the tests before this one may have left some to grow into.
    status, printed = run(monkeypatch, capsys, "--minutes", "0.005", "--seed", "1", "--max-growth-mb", "10000")
    assert status == 0, printed
    table = dict(re.findall(r"^(\w[a-z ]*?) +(\d+)$", printed, re.MULTILINE))
    assert list(table) == list(soak.ROWS)
    assert int(table["requests"]) > 0
    assert int(table["tokens"]) > 0
    assert int(table["mismatches"]) == 0


def test_soak_notices_wrong_replies(monkeypatch, capsys):
    generate = Generator.generate

    def longer_prompt(self, prompts, params=None, **options):
        return generate(self, [*prompts, 5], params, **options)

    monkeypatch.setattr(Generator, "generate", longer_prompt)
    use_workers(monkeypatch)
    status, printed = run(monkeypatch, capsys, "--minutes", "0.003")
    assert status == 1
    assert re.search(r"\n  got .*\n  expected ", printed)


def test_soak_notices_what_is_left_behind(monkeypatch, capsys):
    init = Admission.__init__
    monkeypatch.setattr(Admission, "__init__", lambda self, places: init(self, places - 1))  # one is lost
    use_workers(monkeypatch)
    status, printed = run(monkeypatch, capsys, "--minutes", "0.003")
    assert status == 1
    assert "slots in use, waiting, places in the queue: (0, 0, 1), not (0, 0, 2)" in printed


def test_soak_notices_memory_that_grows(monkeypatch, capsys):
    sizes = count(0, 100)
    monkeypatch.setattr(soak, "rss_mb", lambda: next(sizes))
    use_workers(monkeypatch)
    status, printed = run(monkeypatch, capsys, "--minutes", "0.003", "--max-growth-mb", "64")
    assert status == 1
    assert re.search(r"resident memory grew by \d+00 MB, more than 64 MB", printed)


def test_soak_help_says_what_it_does(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, "--help")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "Soak test: everything at once" in printed
    assert "--max-batch-size" in printed
