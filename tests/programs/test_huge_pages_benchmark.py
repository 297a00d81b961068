"""benchmarks/huge_pages.py measures the same checkpoint in the pages of its file and in huge pages."""

import os
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import huge_pages as benchmark
import pytest
import tables
import torch
from bench_fakes import quick_probes  # noqa: F401  a fixture

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.record import Case, Record, load_record
from qwen3fast.checkpoint.save import save_model


@pytest.mark.skipif(sys.platform != "linux", reason="the program needs Linux")
@pytest.mark.parametrize("is_folder", [True, False])
@pytest.mark.usefixtures("quick_probes")
def test_one_checkpoint_is_measured_in_both_kinds_of_pages(monkeypatch, tmp_path, capsys, is_folder):
    asked = []
    monkeypatch.setattr(benchmark, "is_enabled", lambda: True)
    monkeypatch.setattr(benchmark.Generator, "warmup", lambda self: asked.append(os.environ[benchmark.VARIABLE]))
    monkeypatch.setenv(benchmark.VARIABLE, "1")
    model = "tiny"
    if is_folder:
        save_model(load_model(model, "cpu"), folder := tmp_path / "saved")
        model = str(folder)
    options = ["--model", model, "--contexts", "4,9", "--rounds", "2", "--new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["huge_pages.py", *options, "--output", str(tmp_path / "record.json")])
    assert benchmark.main() == 0
    assert asked == ["0", "1"] and os.environ[benchmark.VARIABLE] == "1"
    record = load_record(tmp_path / "record.json")
    assert record.model["name"] == ("saved" if is_folder else "tiny")
    assert [(c.labels["context"], c.labels["pages"]) for c in record.cases] == list(
        product((4, 9), ("as mapped", "huge"))
    )
    assert all(len(case.samples["step_s"]) == 2 and "huge_bytes" in case.facts for case in record.cases)
    assert "time / as mapped" in capsys.readouterr().out


def test_systems_without_huge_pages_are_refused(monkeypatch):
    monkeypatch.setattr(benchmark, "is_enabled", lambda: False)
    monkeypatch.setattr(sys, "argv", ["huge_pages.py"])
    with pytest.raises(SystemExit, match="the system gives no huge pages"):
        benchmark.main()


def test_bytes_in_huge_pages_are_of_files_and_others(monkeypatch, tmp_path):
    (tmp_path / "smaps").write_text("1-2 rw-p 0 0:0 0\nRss: 9 kB\nAnonHugePages: 2048 kB\nFilePmdMapped: 4096 kB\n")
    monkeypatch.setattr(benchmark, "SIZES", tmp_path / "smaps")
    assert benchmark.huge_bytes() == 6 * 2**20


def test_the_table_compares_within_rounds():
    record = Record("huge-pages", describe_run("test"), describe_environment(torch.device("cpu")), {"name": "tiny"})
    for pages, size, seconds in (("as mapped", 0, [0.01, 0.02, 0.04]), ("huge", 2e9, [0.008, 0.01, 0.04])):
        record.cases.append(Case({"pages": pages, "context": 1000, "batch_size": 1}, {"huge_bytes": size}))
        record.cases[-1].samples = {"step_s": [[s] for s in seconds]}
    assert tables.huge_pages_rows(record)[1:] == [
        ["as mapped", "1,000", "0.00 GB", "20.0", "50.0", "1.00"],
        ["huge", "1,000", "2.00 GB", "10.0", "100.0", "0.80"],
    ]
