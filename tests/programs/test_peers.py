"""The parts of benchmarks/compare_peers.py without its measurements: options, turns, the workers' protocol."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import compare_peers
import pytest
import torch
from bench_fakes import new_record
from peers import ctranslate2, ours, protocol, registry, sglang, transformers, vllm
from peers import worker as worker_process

from qwen3fast.bench.harness import Harness
from qwen3fast.bench.record import Case


class FakeWorker:
    """Remembers its prompts."""

    name = "fake"

    def __init__(self):
        self.prompts = []

    def generate(self, prompt, steps):
        self.prompts.append(tuple(prompt))
        return {"prefill_s": 0.5, "decode_s": 0.25 * steps, "token_ids": [0] * (steps + 1)}


def test_peers_options_are_checked(capsys):
    for arguments, message in (
        (["--peers", "llama-cpp,nobody"], "unknown in --peers: nobody; known: transformers, llama-cpp"),
        (["--formats", "int3"], "unknown in --formats: int3; known: bf16, int8, int4"),
        (["--rounds", "1001"], "--rounds 1001: at most 1,000"),
        (["--prefill", "512,x"], "'x' is not a positive whole number"),
        (["--contexts", "0"], "'0' is not a positive whole number"),
    ):
        with pytest.raises(SystemExit):
            compare_peers.parse(arguments)
        assert message in capsys.readouterr().err


def test_peers_for_gpus_are_left_out_on_a_cpu_with_a_reason():
    args = compare_peers.parse(["--peers", "vllm,transformers,sglang"])
    assert args.peers == ["transformers"]
    why = "not run: needs cuda, this comparison is on cpu"
    assert args.not_run == {"vllm": why, "sglang": why}
    assert registry.split_by_device(["llama-cpp", "vllm"], "cuda")[0] == ["vllm"]


def test_llama_cpp_without_amx_runs_where_there_is_amx_only(monkeypatch):
    for flags, expected in ((set(), {}), ({"amx_tile"}, {"llama-cpp-no-amx"})):
        monkeypatch.setattr(registry, "cpu_flags", lambda flags=flags: flags)
        able, reasons = registry.split_by_device(["llama-cpp", "llama-cpp-no-amx"], "cpu")
        assert set(able) == {"llama-cpp", *expected} and len(able) + len(reasons) == 2
    peer = registry.PEERS["llama-cpp-no-amx"]
    assert "AMX" not in peer.pip_environment["CMAKE_ARGS"] and "GGML_NATIVE=OFF" in peer.pip_environment["CMAKE_ARGS"]


def test_llama_cpp_without_avx512_runs_where_our_level_is_pinned_to_avx2(monkeypatch):
    name = "llama-cpp-avx2"
    monkeypatch.delenv("QWEN3FAST_CPU_LEVEL", raising=False)
    assert registry.split_by_device([name], "cpu")[0] == []
    monkeypatch.setenv("QWEN3FAST_CPU_LEVEL", "avx2")
    assert registry.split_by_device([name], "cpu") == ([name], {})
    assert "AVX512" not in registry.PEERS[name].pip_environment["CMAKE_ARGS"]


def test_set_up_goes_on_when_a_peer_fails(monkeypatch, capsys):
    tried = []

    def set_up(peer):
        tried.append(peer.name)
        if peer.name == "llama-cpp":
            raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(registry, "write_checkpoint", lambda *_: None)
    monkeypatch.setattr(protocol.Peer, "setup", set_up)
    monkeypatch.setattr(protocol.Peer, "convert", lambda *_: None)
    args = compare_peers.parse(["--peers", "llama-cpp,ctranslate2"])
    assert registry.set_up(args) == 1 and tried == ["llama-cpp", "ctranslate2"]
    assert "FAILED: llama-cpp" in capsys.readouterr().err


def test_cuda_is_refused_without_a_device(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        compare_peers.parse(["--device", "cuda"])
    assert "sees no CUDA device" in capsys.readouterr().err


def test_what_is_not_set_up_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "CACHE", tmp_path)
    args = compare_peers.parse(["--peers", "ctranslate2", "--formats", "int8", "--weights", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"qwen3fast int8 cache int8, ctranslate2 int8 int8; run: .*--setup --peers"):
        registry.require_set_up(args)


def test_each_model_has_weights_of_its_own():
    first, second = (compare_peers.parse(["--model", model]).weights for model in ("random:0.6b", "random:4b"))
    peer = registry.PEERS["llama-cpp"]
    assert peer.model_path(peer.variants[0], first) != peer.model_path(peer.variants[0], second)


def test_engines_that_read_gguf_share_the_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "coder.gguf"
    with pytest.raises(SystemExit):
        compare_peers.parse(["--gguf", str(file)])
    assert "is no file" in capsys.readouterr().err
    file.touch()
    args = compare_peers.parse(["--gguf", str(file), "--peers", "openvino-genai,llama-cpp"])
    assert (args.model, args.formats, args.peers) == ("coder.gguf", ["gguf"], ["llama-cpp"])
    engines = [(name, peer) for name, peer, _ in registry.selected(args.peers, "gguf")]
    assert [name for name, _ in engines] == ["qwen3fast", "llama-cpp gguf", "llama-cpp gguf-no-flash"]
    for (_, peer), (_, _, variant) in zip(engines, registry.selected(args.peers, "gguf"), strict=True):
        assert (peer.model_path if peer else ours.model_path)(variant, args.weights) == file
    monkeypatch.setattr(protocol, "CACHE", tmp_path)
    with pytest.raises(SystemExit, match=f"not set up: llama-cpp gguf gguf, .*--setup --peers llama-cpp --gguf {file}"):
        registry.require_set_up(args)


def test_every_peer_says_what_it_computes_in_and_names_are_told_apart():
    names = [name for format in protocol.FORMATS for name, *_ in registry.selected([*registry.PEERS], format)]
    assert names.count("qwen3fast") == 3 and len(names) - len(set(names)) == 3  # ours twice in each rounded format
    for peer in registry.PEERS.values():
        for variant in peer.variants:
            assert variant.format in (*protocol.FORMATS, protocol.GGUF) and set(variant.computes) == {
                "weights",
                "activations",
                "kv_cache",
            }
        assert all("==" in requirement for requirement in peer.requirements)


def test_engines_get_the_same_new_prompt_each_round_and_others_to_warm_up(monkeypatch):
    monkeypatch.setattr(compare_peers, "PAUSE_S", 0.0)
    args = SimpleNamespace(vocab_size=1000)
    record, workers = new_record(), [FakeWorker(), FakeWorker()]
    harness = Harness(record, is_shown=False)
    tasks = []
    for i, worker in enumerate(workers):
        labels = {"engine": f"e{i}", "format": "bf16", "context": 8, "what": "decode", "batch_size": 1}
        tasks.append(compare_peers.make_task(args, Case(labels), worker, steps=4))
        compare_peers.warm_up(args, harness, tasks[-1], worker, steps=4)
    warm = set(workers[0].prompts)
    harness.measure(tasks, 3)
    first, second = (worker.prompts[-3:] for worker in workers)
    assert first == second and len({*first, *warm}) == 3 + len(warm) and len(warm) >= 2
    assert [task.case.samples for task in tasks] == [{"ttft_s": [0.5] * 3, "step_s": [[0.25]] * 3}] * 2
    assert tasks[0].case.metrics["decode_tok_s"].median == 4


def test_no_two_shapes_have_prompts_that_begin_alike(monkeypatch):
    monkeypatch.setattr(compare_peers, "PAUSE_S", 0.0)
    args = compare_peers.parse(["--contexts", "500,1000", "--prefill", "500,1000,4000"])
    args.vocab_size = 1000
    harness, worker = Harness(new_record(), is_shown=False), FakeWorker()
    for what, context in compare_peers.shapes(args):
        labels = {"engine": "e", "format": "bf16", "context": context, "what": what, "batch_size": 1}
        task = compare_peers.make_task(args, Case(labels), worker, steps=4)
        compare_peers.warm_up(args, harness, task, worker, steps=4)
        harness.measure([task], 9)
    assert len({prompt[:500] for prompt in worker.prompts}) == len(worker.prompts) >= 5 * (9 + 2)


def test_an_engine_that_stops_early_is_refused(monkeypatch):
    monkeypatch.setattr(compare_peers, "PAUSE_S", 0.0)
    worker = FakeWorker()
    worker.generate = lambda prompt, steps: {"prefill_s": 1, "decode_s": 1, "token_ids": [0]}
    labels = {"engine": "e", "format": "bf16", "context": 8, "what": "decode", "batch_size": 1}
    with pytest.raises(AssertionError, match="fake gave 1 tokens, not 3"):
        compare_peers.make_task(SimpleNamespace(vocab_size=10), Case(labels), worker, 2).run()


ADAPTER = """
from pathlib import Path
from peers.protocol import run_adapter
class Engine:
    def __init__(self, variant, model, threads, max_seq_len, device):
        print("noise of a native library", flush=True)
        self.facts = {"variant": variant, "model": str(model), "threads": threads, "room": max_seq_len, "on": device}
    def generate(self, prompt, steps):
        return 1.0, 2.0, [len(prompt)] * (steps + 1)
run_adapter(("pytest",), Engine)
"""


def test_an_adapter_answers_on_a_channel_of_its_own():
    command = [sys.executable, "-c", ADAPTER, "serve", "v", "m", "--threads", "2", "--max-seq-len", "64"]
    request = json.dumps({"prompt": [1, 2, 3], "steps": 1})
    done = subprocess.run(
        command, input=request + "\n", capture_output=True, text=True, check=True, env=protocol.environment()
    )
    hello, answer = map(json.loads, done.stdout.splitlines())
    assert hello["facts"] == {"variant": "v", "model": "m", "threads": 2, "room": 64, "on": "cpu"}
    assert hello["versions"] == {"pytest": pytest.__version__}
    assert answer == {"prefill_s": 1.0, "decode_s": 2.0, "token_ids": [3, 3]}
    assert "noise of a native library" in done.stderr


CRASH = """
import os, signal, sys, time
print("illegal\\x1b instruction", file=sys.stderr)
sys.argv[1:2] == ["silent"] and time.sleep(60)
os.kill(os.getpid(), signal.SIGILL)
"""


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("crash", "ended by SIGILL; the end of its log:\nillegal"),
        ("silent", "no answer in 1 s; the end of its log:\nillegal"),
    ],
)
def test_a_worker_that_ends_or_keeps_silent_is_told_with_its_log(variant, message, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "CACHE", tmp_path)
    monkeypatch.setattr(worker_process, "LOAD_S", 1.0 if variant == "silent" else 60.0)
    python = tmp_path / "python"
    (tmp_path / "crash.py").write_text(CRASH)
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path / 'crash.py'} {variant}\n")
    python.chmod(0o755)
    with pytest.raises(worker_process.WorkerError, match=re.escape(message)):
        worker_process.Worker("x", python, "ours", variant, tmp_path, 1, 64)


def test_ends_of_processes_have_words():
    assert [worker_process.how_it_ended(code) for code in (0, 3, -9, -99)] == [
        "ended with status 0", "ended with status 3", "ended by SIGKILL", "ended by signal 99"
    ]  # fmt: skip


def test_peers_that_read_the_checkpoint_get_links_to_it(tmp_path):
    checkpoint, target = tmp_path / "checkpoint", tmp_path / "target"
    checkpoint.mkdir()
    target.mkdir()
    (checkpoint / "config.json").write_text("{}")
    protocol.link_checkpoint("any", checkpoint, target)
    assert (target / "config.json").is_symlink() and (target / "config.json").read_text() == "{}"
    for module in (transformers, vllm, sglang):
        assert {variant.folder for variant in module.PEER.variants} == {protocol.CHECKPOINT}


def test_transformers_streamer_takes_the_prompt_first_and_then_a_token_a_call():
    marks = transformers.Marks()
    marks.put(torch.tensor([[5, 6, 7]]))
    for token in (8, 9):
        marks.put(torch.tensor([token]))
    marks.end()
    assert marks.ids == [8, 9] and len(marks.times) == 2 and marks.times[0] <= marks.times[1]


def test_ctranslate2_gets_ids_as_tokens():
    tokens = ctranslate2.IdsAsTokens(4, 3)
    assert tokens.get_vocab() == {"0": 0, "1": 1, "2": 2, "3": 3} and tokens.eos_token == "3"
