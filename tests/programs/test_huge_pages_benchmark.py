"""benchmarks/huge_pages.py measures the same saved model in small and in huge pages."""

import os
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import huge_pages as benchmark
import pytest
import tables
import torch

from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.record import Case, Record, load_record


def test_every_format_is_measured_in_both_kinds_of_pages(monkeypatch, tmp_path, one_thread, capsys):
    asked = []
    monkeypatch.setattr(benchmark, "is_enabled", lambda: True)
    monkeypatch.setattr(benchmark.Generator, "warmup", lambda self: asked.append(os.environ[benchmark.VARIABLE]))
    monkeypatch.setenv(benchmark.VARIABLE, "1")
    options = ["--model", "tiny", "--formats", "plain,int4", "--contexts", "4,9", "--rounds", "2", "--new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["huge_pages.py", *options, "--output", str(tmp_path / "record.json")])
    assert benchmark.main() == 0
    assert asked == ["0", "1", "0", "1"] and os.environ[benchmark.VARIABLE] == "1"
    record = load_record(tmp_path / "record.json")
    cases = product(("plain", "int4"), (4, 9), ("small", "huge"), (1,))
    assert [tuple(case.labels.values()) for case in record.cases] == list(cases)
    assert all(len(case.samples["step_s"]) == 2 for case in record.cases)
    assert "huge pages, ms" in capsys.readouterr().out


def test_systems_without_huge_pages_are_refused(monkeypatch):
    monkeypatch.setattr(benchmark, "is_enabled", lambda: False)
    monkeypatch.setattr(sys, "argv", ["huge_pages.py"])
    with pytest.raises(SystemExit, match="the system gives no huge pages"):
        benchmark.main()


def test_the_table_compares_within_rounds():
    record = Record("huge-pages", describe_run("test"), describe_environment(torch.device("cpu")), {"name": "tiny"})
    for pages, seconds in (("small", [0.01, 0.02, 0.04]), ("huge", [0.008, 0.01, 0.04])):
        case = Case({"format": "plain", "context": 1000, "pages": pages, "batch_size": 1})
        case.samples = {"step_s": [[s] for s in seconds]}
        record.cases.append(case)
    assert tables.huge_pages_rows(record)[1:] == [["plain", "1,000", "20.0", "10.0", "0.80"]]
