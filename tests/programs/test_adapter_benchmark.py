"""benchmarks/adapters.py checks and times steps with and without adapters, in turns."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import adapters as benchmark
import pytest
from bench_fakes import quick_probes  # noqa: F401  a fixture

from qwen3fast.bench.record import load_record

pytestmark = pytest.mark.usefixtures("quick_probes")


def run(monkeypatch, folder, output, *more):
    options = ["--model", str(folder), "--batch-sizes", "1,2", "--adapters", "0,1,2", "--rounds", "2"]
    options += ["--new-tokens", "3", "--no-compile", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["adapters.py", *options, *more])
    assert benchmark.main() == 0


def test_every_kind_of_step_is_checked_and_timed(monkeypatch, small_folder, tmp_path, capsys):
    run(monkeypatch, small_folder, tmp_path / "adapters.json", "--formats", "plain,int4")
    record = load_record(tmp_path / "adapters.json")
    labels = [tuple(case.labels.values()) for case in record.cases]
    shapes = [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert labels == [(format, *shape) for format in ("plain", "int4") for shape in shapes]
    assert len(record.checks) == len(labels) and record.passed
    assert all([len(steps) for steps in case.samples["step_s"]] == [3, 3] for case in record.cases)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[4] for line in lines if line[:1] == ["plain"] and line[2] == "0"] == ["1.00x"] * 2


def test_tokens_of_another_adapter_are_found(monkeypatch, small_folder, tmp_path):
    """The check would notice a step that ignores the adapter. Smaller ones do not change this small model's tokens."""
    monkeypatch.setattr(benchmark, "SHRINK", 1)
    real = benchmark.StepKind
    monkeypatch.setattr(benchmark, "StepKind", lambda has_adapters=False: real())
    with pytest.raises(SystemExit, match=r"'adapters': 1.*wrong tokens"):
        run(monkeypatch, small_folder, tmp_path / "adapters.json", "--formats", "plain")
