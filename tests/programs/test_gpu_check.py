"""tools/gpu_check.py on the CPU with a small model: the whole program, but for the GPU."""

import json
import sys

import gpu_check
import pytest
import torch
from conftest import randomised, small_config

from qwen3fast.bench.record import Record
from qwen3fast.quantization import quantize_model


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the program with a small model and without the nested tests. Returns its exit status and record."""
    loaded = []

    def load(source, device, quantization):
        loaded.append((source, quantization))
        sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 1024}
        model = randomised(small_config(**sizes, eos_token_ids=()), seed=3)
        if quantization is not None:
            quantize_model(model, quantization, torch.float32)
        return model

    monkeypatch.setattr(gpu_check, "load_model", load)
    tests = {"exit_status": 5, "summary": "none", "seconds": 0.0, "run": False}
    monkeypatch.setattr(gpu_check, "run_tests", lambda device, log: tests)

    def program(*arguments):
        command = ["gpu_check.py", "--device", "cpu", "--quick", "--new-tokens", "2", "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        status = gpu_check.main()
        return status, json.loads((tmp_path / "gpu-check-on-cpu.json").read_text()), loaded

    return program


def test_every_mode_is_measured_and_what_is_not_is_named(run, tmp_path, capsys):
    status, record, loaded = run()
    assert (status, loaded) == (0, [("random:0.6b", weights) for weights in (None, "int8", "int4")])
    assert Record.from_dict(record).suite == "gpu"
    labels = [case["labels"] for case in record["cases"]]
    plain = [c for c in labels if c["weights"] == "bf16"]
    shapes = {(c["mode"], c["batch_size"], c["context"]) for c in plain}
    cached = {(mode, *shape) for mode in ("eager", "compiled") for shape in ((1, 32), (1, 128), (2, 32))}
    assert shapes == cached | {("uncached", 1, 64), ("transformers", 1, 32)}
    others = {(c["weights"], c["mode"], c["batch_size"], c["context"]) for c in labels if c not in plain}
    assert others == {(weights, "compiled", 1, 32) for weights in ("int8", "int4")}
    assert all(c["metrics"]["decode_tok_s"]["median"] > 0 for c in record["cases"])
    assert all("launches" not in c["metrics"] for c in record["cases"])
    assert len(record["checks"]) == 6 and all(check["passed"] for check in record["checks"].values())
    assert record["notes"]["left_out"] == [
        f"0.6b, {what}, graphs: there are none on cpu"
        for what in ("batch 1", "batch 2", "int8, batch 1", "int4, batch 1")
    ]
    assert record["notes"]["tests"]["run"] is False
    assert (tmp_path / "gpu-check-on-cpu.png").stat().st_size > 10_000
    assert "left out: 0.6b, batch 1, graphs" in capsys.readouterr().out


def test_sizes_for_which_no_time_is_left_are_named(run):
    status, record, loaded = run("--minutes", "0.1", "--sizes", "0.6b,4b")
    assert (status, loaded, record["cases"]) == (0, [], [])
    assert record["notes"]["left_out"][:3] == [f"{what}: no time left" for what in ("0.6b", "4b", "0.6b, int8")]


def test_a_size_without_memory_does_not_stop_the_others(run, monkeypatch):
    def load(source, device, quantization):
        raise MemoryError("no room")

    monkeypatch.setattr(gpu_check, "load_model", load)
    status, record, _ = run("--sizes", "8b")
    assert (status, record["notes"]["left_out"]) == (0, ["8b: no room", "8b, int8: no room", "8b, int4: no room"])


def test_a_size_that_breaks_is_reported_and_does_not_stop_the_others(run, monkeypatch):
    def break_(self):
        raise RuntimeError("a kernel does not compile")

    monkeypatch.setattr(gpu_check.VariantRun, "measure_uncached", break_)
    status, record, loaded = run("--sizes", "0.6b,1.7b")
    assert status == 1 and {source for source, _ in loaded} == {"random:0.6b", "random:1.7b"}
    assert record["notes"]["errors"] == [
        f"{size}: RuntimeError: a kernel does not compile" for size in ("0.6b", "1.7b")
    ]


def test_wrong_tokens_give_exit_status_1(run, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.VariantRun, "measure_transformers", lambda self: None)
    check = gpu_check.check_tokens
    monkeypatch.setattr(gpu_check, "check_tokens", lambda m, p, ids: check(m, p, [[i ^ 1 for i in row] for row in ids]))
    assert run()[0] == 1
    assert "WRONG TOKENS: 0.6b, eager, batch 1" in capsys.readouterr().err


def test_no_cuda_device_is_said_at_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "sees no CUDA device; --device cpu --quick" in capsys.readouterr().err
