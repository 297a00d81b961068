"""tools/loading_report.py on a small model: what it writes loads, and what it measures becomes a record."""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import loading_files
import loading_report
import pytest
import torch
from conftest import small_config

from qwen3fast import calibrated
from qwen3fast.bench.record import load_record
from qwen3fast.engine import own_text
from qwen3fast.model.config import ModelConfig

CONFIG = small_config(vocab_size=96, hidden_size=64, intermediate_size=96, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def small_block(monkeypatch):
    monkeypatch.setattr(loading_files, "BLOCK_BYTES", 2**16)  # of random numbers, which the files repeat


@pytest.mark.skipif(sys.platform != "linux", reason="the tool reads /proc")
def test_every_case_is_loaded_warm_and_cold_beside_plain_reads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ModelConfig, "named", staticmethod(lambda name: replace(CONFIG)))
    monkeypatch.setattr(loading_report, "run_apart", loading_report.load_here)
    monkeypatch.setattr(loading_report, "write_shards", partial(loading_files.write_shards, shard_bytes=20_000))
    output = tmp_path / "loading.json"
    options = ["--cases", "bfloat16", "float32", "--rounds", "2", "--folder", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["loading_report.py", *options])
    loading_report.main()
    record = load_record(output)
    assert [(case.labels["cache"], case.labels["case"]) for case in record.cases] == [
        ("cold", "plain reads"),
        *((cache, case) for cache in ("warm", "cold") for case in ("bfloat16", "float32")),
    ]
    assert all(len(case.samples["seconds"]) == 2 and case.metrics["file_gb_s"].median > 0 for case in record.cases)
    assert all("dropped_bytes" in case.samples for case in record.cases if case.labels["cache"] == "cold")
    model_bytes = {case.labels["case"]: case.facts["model_bytes"] for case in record.cases[1:]}
    assert model_bytes["float32"] == 2 * model_bytes["bfloat16"] == 4 * CONFIG.num_parameters
    assert output.with_suffix(".png").is_file() and f"wrote {output}" in capsys.readouterr().out
    assert not list(tmp_path.glob("qwen3fast-loading-*"))  # the shards are gone


@pytest.mark.skipif(sys.platform != "linux", reason="the tool reads /proc")
def test_a_first_load_calibrates_and_a_later_one_reads_what_it_kept(monkeypatch, tmp_path):
    runs, real = [], calibrated.quantize_calibrated

    def quantize_calibrated(*arguments, **options):
        runs.append(arguments[2])
        real(*arguments, **options)

    monkeypatch.setattr(calibrated, "quantize_calibrated", quantize_calibrated)
    monkeypatch.setattr(calibrated, "TOKENS", 32)
    monkeypatch.setattr(own_text, "OWN_WINDOW", 32)
    loading_files.write_shards(tmp_path, CONFIG)
    first, later = (loading_report.CASES[f"int4, {which} load"] for which in ("first", "later"))
    counts = []
    for load in (later, later, first, first, later):
        loading_report.load_here(tmp_path, load)
        counts.append(len(runs))
    assert counts == [1, 1, 2, 3, 3] and set(runs) == {"int4"}
    tasks = loading_report.tasks_of(tmp_path, ["int4", "int4, first load"])
    assert [(task.case.labels["cache"], task.case.labels["case"]) for task in tasks[1:]] == [
        ("warm", "int4"),
        ("warm", "int4, first load"),
        ("cold", "int4"),
    ]


def test_too_little_disk_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(loading_files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    with pytest.raises(SystemExit, match=r"has 1\.0 GB free, the shards take 8\.0 GB"):
        loading_files.check_space(ModelConfig.named("4b"), [], tmp_path)
