"""benchmarks/compare_peers.py from its options to its record, with engines that are our plain model, not processes."""

import sys

import compare_peers
import pytest
import torch
from conftest import randomised, small_config

from qwen3fast.bench.record import load_record
from qwen3fast.checkpoint.save import save_model

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 1024}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the program on a small model. Returns its exit status and record; `flaw` changes the tokens of an engine."""
    model = randomised(small_config(**SIZES, eos_token_ids=()), seed=3)
    save_model(model, tmp_path / "bf16")

    class Worker:
        flaw = None

        def __init__(self, name, python, module, variant, path, threads, max_seq_len, device):
            self.name, self.facts, self.versions = name, {"variant": variant}, {"x": "1"}

        @torch.no_grad()
        def generate(self, prompt, steps):
            ids = list(prompt)
            for _ in range(steps + 1):
                ids.append(int(model.logits(model.hidden(torch.tensor([ids])))[0, -1].argmax()))
            new = ids[len(prompt) :]
            if self.name == Worker.flaw:
                new = [i ^ 1 for i in new]
            return {"prefill_s": 0.5, "decode_s": 0.25 * steps, "token_ids": new}

        def cpu_s(self):
            return 0.0

        def close(self):
            Worker.closed.append(self.name)

    class Probe:
        def __init__(self, device):
            pass

        def measure(self):
            return 20.0

    for name, value in {"Worker": Worker, "BandwidthProbe": Probe, "PAUSE_S": 0.0, "IDLE_S": 1e-3}.items():
        monkeypatch.setattr(compare_peers, name, value)
    monkeypatch.setattr(compare_peers, "require_set_up", lambda args: None)
    monkeypatch.setattr(compare_peers.time, "sleep", lambda s: None)

    def program(flaw=None):
        Worker.flaw, Worker.closed = flaw, []
        options = ["--peers", "transformers,ctranslate2,vllm", "--formats", "bf16,int8", "--contexts", "4,8"]
        options += ["--prefill", "6", "--new-tokens", "3", "--rounds", "2", "--threads", str(torch.get_num_threads())]
        output = tmp_path / "peers.json"
        command = ["compare_peers.py", *options, "--weights", str(tmp_path), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", command)
        status = compare_peers.main()
        assert output.with_suffix(".png").stat().st_size > 10_000 and len(Worker.closed) == 4 + 3
        return status, load_record(output)

    return program


def test_every_engine_of_every_format_is_checked_and_measured_at_every_length(run, capsys):
    status, record = run()
    assert (status, record.suite) == (0, "peers")
    bf16 = ["qwen3fast", "transformers eager", "transformers static-compiled", "transformers no-cache"]
    int8 = ["qwen3fast", "qwen3fast int8 cache", "ctranslate2 int8"]
    shapes = [("decode", 4), ("decode", 8), ("prefill", 6)]
    expected = [(f, e, *shape) for f, engines in (("bf16", bf16), ("int8", int8)) for shape in shapes for e in engines]
    assert [tuple(c.labels[k] for k in ("format", "engine", "what", "context")) for c in record.cases] == expected
    for case in record.cases:
        assert case.samples["ttft_s"] == [0.5, 0.5] and case.samples["bandwidth_gb_s"] == [20.0, 20.0]
        assert case.samples.get("step_s") == ([[0.25]] * 2 if case.labels["what"] == "decode" else None)
    steps = {c.labels["engine"]: c.facts["steps"] for c in record.cases if c.labels["what"] == "decode"}
    assert steps["transformers no-cache"] == 2 and steps["transformers eager"] == 3
    assert list(record.checks) == [f"{engine}, bf16" for engine in bf16]
    assert [engine["engine"] for engine in record.notes["engines"]] == bf16 + int8
    assert record.notes["not_run"] == {"vllm": "not run: needs cuda, this comparison is on cpu"}
    out = capsys.readouterr().out
    assert "vllm: not run" in out and "4.0 (1.00x)" in out


def test_wrong_tokens_in_bf16_give_exit_status_1_and_of_rounded_weights_are_noted(run, capsys):
    status, record = run(flaw="transformers eager bf16")
    assert status == 1 and not record.checks["transformers eager, bf16"]["passed"]
    [line] = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert line.startswith("bf16 transformers eager: ")
    status, record = run(flaw="ctranslate2 int8 int8")
    assert status == 0 and record.passed
    [found] = [e["tokens"] for e in record.notes["engines"] if e["engine"] == "ctranslate2 int8"]
    assert found["exact"] < found["tokens"] == 12 and found["worst_gap"] > 0
