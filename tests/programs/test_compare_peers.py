"""benchmarks/compare_peers.py from its options to its record, with engines that are our own model, not processes."""

import functools
import re
import signal
import sys

import compare_peers
import pytest
import tables
import torch
from conftest import randomized, small_config
from peers import field, worker

from qwen3fast.bench.record import load_record
from qwen3fast.checkpoint.save import save_model

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 1024}


@pytest.fixture
def run(monkeypatch, tmp_path, one_thread):
    """Run the program on a small model. Returns its exit status and record.

    flaw: the engine whose tokens are wrong. crash: (engine, number of the reply at which it ends; 0: while loading).
    at_reply: called with the number of each reply of all engines together.
    """
    model = randomized(small_config(**SIZES, eos_token_ids=()), seed=3)
    save_model(model, tmp_path / "bf16")

    @functools.cache  # engines get the same prompts
    @torch.no_grad()
    def continued(prompt, tokens):
        ids = list(prompt)
        for _ in range(tokens):
            ids.append(int(model.logits(model.hidden(torch.tensor([ids])))[0, -1].argmax()))
        return ids[len(prompt) :]

    class Worker:
        flaw = None

        def __init__(self, name, python, module, variant, path, threads, max_seq_len, device):
            # Not only the lengths that are measured.
            assert max_seq_len >= max(Worker.longest, field.CHECK_PROMPT) + field.CHECK_STEPS + 1
            self.name, self.facts, self.versions, self.replies = name, {"variant": variant}, {"x": "1"}, 0
            self.count()

        def count(self):
            if Worker.crash == (self.name, self.replies):
                raise worker.WorkerError("ended by SIGILL; its log is empty")
            self.replies += 1

        def generate(self, prompt, steps):
            self.count()
            Worker.total += 1
            Worker.at_reply(Worker.total)
            new = continued(tuple(prompt), steps + 1)
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

    for name, value in {"BandwidthProbe": Probe, "PAUSE_S": 0.0}.items():
        monkeypatch.setattr(compare_peers, name, value)
    monkeypatch.setattr(field, "Worker", Worker)
    monkeypatch.setattr(field, "IDLE_S", 1e-3)
    monkeypatch.setattr(compare_peers, "require_set_up", lambda args: None)
    monkeypatch.setattr(compare_peers.time, "sleep", lambda s: None)

    def program(flaw=None, crash=None, at_reply=lambda number: None, prefill="6"):
        Worker.longest = max(map(int, prefill.split(",")))
        Worker.flaw, Worker.closed, Worker.crash, Worker.total, Worker.at_reply = flaw, [], crash, 0, at_reply
        options = ["--peers", "transformers,ctranslate2,vllm", "--formats", "bf16,int8", "--contexts", "4,8"]
        options += ["--prefill", prefill, "--new-tokens", "3", "--rounds", "2"]
        options += ["--threads", str(torch.get_num_threads())]
        output = tmp_path / "peers.json"
        command = ["compare_peers.py", *options, "--weights", str(tmp_path), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", command)
        status = compare_peers.main()
        assert output.with_suffix(".png").stat().st_size > 10_000
        program.closed = len(Worker.closed)
        return status, load_record(output)

    return program


def test_every_engine_of_every_format_is_checked_and_measured_at_every_length(run, capsys):
    status, record = run()
    assert (status, record.suite, run.closed) == (0, "peers", 5 + 3)
    peers = ["transformers eager", "transformers static-compiled", "transformers no-cache"]
    bf16 = ["qwen3fast", "qwen3fast lossless", *peers]
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


def test_prefill_of_several_lengths_is_a_column_each_with_engines_long_enough(run, capsys):
    status, record = run(prefill="64,6,8")
    lengths = [c.labels["context"] for c in record.cases if c.labels["what"] == "prefill"]
    assert status == 0 and lengths == [6] * 5 + [8] * 5 + [64] * 5 + [6] * 3 + [8] * 3 + [64] * 3
    table = capsys.readouterr().out
    columns = ("format", "engine", "decode at 4", "decode at 8", "prefill of 6", "prefill of 8", "prefill of 64")
    assert re.search(r" +".join(columns), table)
    assert tables.peers_columns(record)["prefill of 64"]["int8", "ctranslate2 int8"] == 128.0


def test_wrong_tokens_in_bf16_give_exit_status_1_and_of_rounded_weights_are_noted(run, capsys):
    status, record = run(flaw="transformers eager bf16")
    assert status == 1 and not record.checks["transformers eager, bf16"]["passed"]
    [line] = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert line.startswith("bf16 transformers eager: ")
    status, record = run(flaw="ctranslate2 int8 int8")
    assert status == 0 and record.passed
    [found] = [e["tokens"] for e in record.notes["engines"] if e["engine"] == "ctranslate2 int8"]
    assert found["exact"] < found["tokens"] == 12 and found["worst_gap"] > 0


LAST = 2 + 3 * 2 + 3  # one more than the replies of an engine before the last shape's rounds


@pytest.mark.parametrize("reply", [0, 2, 5, LAST], ids=lambda n: f"reply {n}")
def test_an_engine_that_crashes_is_left_out_with_its_reason_and_the_rest_is_kept(run, reply, capsys):
    status, record = run(crash=("transformers eager bf16", reply))
    assert status == 0 and record.passed and not record.interrupted
    assert record.notes["left_out"] == {"transformers eager, bf16": "ended by SIGILL; its log is empty"}
    cases = {(c.labels["engine"], c.labels["what"], c.labels["context"]): c for c in record.cases}
    others = {name for name, *_ in cases} - {"transformers eager"}
    assert len(others) == 6
    for name in others:
        for shape in (("decode", 4), ("decode", 8), ("prefill", 6)):
            assert len(cases[(name, *shape)].samples["ttft_s"]) % 2 == 0
    # Shapes that were finished before stay; none is there with fewer rounds than the others have.
    assert all(len(case.samples["ttft_s"]) % 2 == 0 for case in record.cases)
    assert "LEFT OUT: transformers eager, bf16: ended by SIGILL" in capsys.readouterr().err


def test_sigterm_keeps_the_rounds_so_far(run):
    status, record = run(at_reply=lambda number: signal.raise_signal(signal.SIGTERM) if number == 30 else None)
    assert status == 130 and record.interrupted and record.cases
    assert all(case.samples["ttft_s"] == [0.5] * len(case.samples["ttft_s"]) for case in record.cases)


def test_rounds_come_in_a_new_order_each(run, monkeypatch):
    order, real = [], compare_peers._reply

    def reply(vocab_size, worker, context, steps, seed):
        if seed < compare_peers.FIRST_WARM_UP_SEED and context == 4:
            order.append(worker.name.removesuffix(" bf16").removesuffix(" int8"))
        return real(vocab_size, worker, context, steps, seed)

    monkeypatch.setattr(compare_peers, "_reply", reply)
    _, record = run()
    rounds = [order[i : i + 5] for i in (0, 5)]
    assert sorted(rounds[0]) == sorted(rounds[1]) and rounds[0] != rounds[1]
    assert record.notes["order_seed"] == compare_peers.ORDER_SEED
    assert record.environment["cpu"] and record.environment["cpu_flags"]
