"""Two and four processes (gloo, on this machine) against one: the same tokens, and logits up to rounding."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
from conftest import assert_near, randomized, small_config, write_text_checkpoint

from qwen3fast import cli
from qwen3fast.parallel import Ranks

TIMEOUT_S = 400
COMMAND = "generate 17+25 --model tiny --device cpu --compile never --temperature 0 --max-tokens 4"


def run_processes(
    size: int, output: Path, *cases: str, is_forked: bool = False
) -> tuple[dict[str, Any], list[int], list[str]]:
    """parallel_worker.py in `size` processes, with the environment that torchrun gives; none outlives this.

    is_forked: they are forked from one, which takes less time; otherwise each is started by itself, as by torchrun.
    Returns: its results; the exit status of each process that is started here, and what it wrote to standard error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = []
    command = [sys.executable, parallel_worker.__file__, *(["--fork"] if is_forked else []), str(output), *cases]
    try:
        for rank in range(1 if is_forked else size):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
            processes.append(subprocess.Popen(command, env=environment, **options))
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert output.is_file(), "\n".join(errors)
    return json.loads(output.read_text(encoding="utf-8")), [process.returncode for process in processes], errors


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tokenizer_folder, tmp_path_factory):
    """A function that writes a random model of eight heads in four groups, with a vocabulary that does not divide."""

    def write(**changes: Any) -> Path:
        config = small_config(
            vocab_size=tokenizer.vocab_size + 1,
            num_attention_heads=8,
            num_key_value_heads=4,
            hidden_size=64,
            intermediate_size=128,
            eos_token_ids=(tokenizer.base.token_to_id("<|im_end|>"),),
            **changes,
        )
        assert config.vocab_size % 2, "the ranks' parts differ"
        return write_text_checkpoint(tmp_path_factory.mktemp("model"), randomized(config, seed=5), tokenizer_folder)

    return write


@pytest.fixture(scope="module")
def dense(checkpoint) -> Path:
    """A dense model whose replies vary."""
    return checkpoint(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def two(dense, tmp_path_factory) -> tuple[dict[str, Any], list[int], list[str]]:
    """Return the results of two processes."""
    output = tmp_path_factory.mktemp("two") / "results.json"
    cases = [f"{case}={dense}" for case in ("everything", "int8", "compiled", "dying")]
    return run_processes(2, output, COMMAND, *cases)


@pytest.fixture(scope="module")
def expected(dense) -> dict[str, Any]:
    """Return the results of one process."""
    return parallel_worker.run("everything", str(dense), tensor_parallel=False)


def assert_same_results(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same tokens and texts; numbers up to rounding."""
    for name, value in expected.items():
        if name in ("logits", "logprobs", "prompt_logprobs"):
            assert_near(torch.tensor(actual[name]), torch.tensor(value))
        elif name != "bytes":
            assert actual[name] == value, name


def test_two_processes_give_the_same_replies_as_one(two, expected):
    assert_same_results(two[0]["everything"], expected)


def test_the_replies_vary(expected):
    replies = [tuple(ids) for name in ("greedy", "sampled", "top_k", "penalties", "mixed") for ids in expected[name]]
    assert len(set(replies)) > 15
    assert len(set(expected["greedy"][0])) > 4
    assert expected["processor"][0] != expected["greedy"][0]
    assert len(expected["stop"]) < len(expected["stream"])


def test_compiled_steps_of_two_processes_give_the_same_tokens(two, expected):
    results = two[0]["compiled"]
    assert_same_results(results, {"greedy": expected["greedy"][:4], "logits": expected["logits"]})
    # As in one process: blocks for prefill and for decoding, logits; and the sampler without the C++ operations.
    assert results["compilations"] in (3, 4)


def test_each_process_rounds_its_part_of_the_weights(two, dense):
    one, both = parallel_worker.run("int8", str(dense), tensor_parallel=False), two[0]["int8"]
    assert 0.5 * one["bytes"] <= both["bytes"] < 0.6 * one["bytes"]
    # Rows that are split have a scale for each part, so the numbers are not quite the same.
    logits = torch.tensor(one["logits"])
    assert (torch.tensor(both["logits"]) - logits).abs().max() < 0.1 * logits.abs().max()


def test_rank_0_gets_an_error_when_another_rank_fails(two):
    results, statuses, errors = two
    assert statuses == [0, 1], errors
    assert "this rank's device has failed" in errors[1]
    first, second = results["dying"]["errors"]
    assert "closed" in first or "reset" in first
    assert "this Generator is closed" in second


def test_command_line_prints_on_rank_0(two, capsys):
    assert cli.main(COMMAND.split()) == 0
    assert two[0][COMMAND] == {"status": 0, "text": capsys.readouterr().out}


def test_four_processes_give_the_same_tokens_as_one(checkpoint, tmp_path):
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": (0,)}
    folders = {
        "experts": checkpoint(tie_word_embeddings=False, **experts),
        "open": checkpoint(attention_bias=True, tie_word_embeddings=True),  # not closed before the processes end
    }
    cases = (f"{case}={folder}" for case, folder in folders.items())
    results, statuses, errors = run_processes(4, tmp_path / "four.json", "dtensor", *cases, is_forked=True)
    assert statuses == [0], errors  # of all four
    assert "dtensor" in results  # a rank's parts are those that DTensor gives it
    for case, folder in folders.items():
        one = parallel_worker.run("greedy", str(folder), tensor_parallel=False)
        assert_same_results(results[case], one)
        assert results[case]["bytes"] < 0.3 * one["bytes"]


def test_command_line_bench_refuses_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["bench", "--quick"]) == 2
    assert "bench runs in one process; start it without torchrun" in capsys.readouterr().err


def test_tensor_parallel_needs_processes(dense, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="start the program with torchrun --nproc-per-node N"):
        parallel_worker.run("greedy", str(dense), tensor_parallel=True)


def test_tensor_parallel_needs_a_device_for_each_process(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    for name, value in zip(names, ("2", "3", "127.0.0.1", "1", "2"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = "process 2 of this machine has no CUDA device: there are 2; start as many processes as devices"
    with pytest.raises(ValueError, match=message):
        Ranks.start("cuda")
