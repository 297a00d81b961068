"""The command line, run in this process on the tiny model."""

import io
import json

import pytest

from qwen3fast.bench.__main__ import main as bench_main
from qwen3fast.cli import main


def test_generate_answers(capsys):
    assert main(["generate", "What is 17 + 25?", "--model", "tiny", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "42\n"


def test_generate_raw_continues_the_text(capsys):
    assert main(["generate", "The capital of France is", "--raw", "--temperature", "0", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith(" Paris")


def test_generate_stats_go_to_standard_error(capsys):
    assert main(["generate", "What is 17 + 25?", "--temperature", "0", "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "42\n"
    assert "tokens/s; ended by stop" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hi", "--model", "no/such/model/x"], "no folder 'no/such/model/x'"),
        (["generate", "hi", "--temperature", "-1"], "temperature must be a finite number >= 0, got -1.0"),
        (["generate", "hi", "--max-seq-len", "100000"], "exceeds the model's max_position_embeddings"),
        (["generate", "", "--raw"], "the prompt is empty"),
        (["info", "--model", "random:7b"], "unknown Qwen3 shape '7b'"),
    ],
)
def test_bad_values_give_one_line_and_status_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate"], ["generate", "hi", "--top-k", "many"]])
def test_bad_usage_exits_2(arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2


def test_chat_keeps_the_history_until_reset(monkeypatch, capsys):
    lines = "What is 38 + 57?\n/reset\n/nonsense\nWhat is 17 + 25?\n/exit\nWhat is 1 + 1?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "95\n42\n"
    assert "(conversation forgotten)" in captured.err and "commands: /reset, /exit" in captured.err


def test_chat_ends_with_its_input(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 38 + 57?\n"))
    assert main(["chat", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "95\n"


def test_info_states_sizes(capsys):
    assert main(["info", "--model", "random:0.6b"]) == 0
    out = capsys.readouterr().out
    assert "596,049,920" in out and "112 KiB a token" in out


def test_info_states_experts_without_making_them(capsys):
    assert main(["info", "--model", "random:30b-a3b"]) == 0
    out = capsys.readouterr().out
    assert "30,532,122,624, of which a token runs 3,041,867,776" in out
    assert "6.084 GB of weights" in out and "128, 8 a token, of 768" in out


def test_bench_writes_json_and_picture(tmp_path, capsys):
    options = ["--model", "tiny", "--lengths", "16,40", "--new-tokens", "4", "--repetitions", "2"]
    assert bench_main([*options, "--modes", "uncached-eager,cached-eager", "--output", str(tmp_path)]) == 0
    [json_file], [png_file] = tmp_path.glob("*.json"), tmp_path.glob("*.png")
    record = json.loads(json_file.read_text())
    assert [(c["mode"], c["length"]) for c in record["cases"]] == [
        ("uncached-eager", 16),
        ("cached-eager", 16),
        ("uncached-eager", 40),
        ("cached-eager", 40),
    ]
    assert all(len(c["samples"]) == 2 for c in record["cases"])
    assert all(check["passed"] for check in record["checks"].values())
    assert png_file.read_bytes().startswith(b"\x89PNG")
    assert "cached-eager" in capsys.readouterr().out


@pytest.mark.parametrize("format", [None, "int4"])
def test_bench_prints_json(tmp_path, capsys, format):
    options = ["--model", "tiny", "--lengths", "16", "--new-tokens", "2", "--modes", "cached-eager", "--json"]
    options += [] if format is None else ["--quantization", format]
    assert bench_main([*options, "--output", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["schema_version"] == 1 and record["model"]["quantization"] == format
    bytes_per_weight = record["model"]["weight_bytes"] / record["model"]["parameters"]
    assert bytes_per_weight == 2 if format is None else 0.5 < bytes_per_weight < 0.7


def test_bench_interrupted_keeps_what_was_measured(tmp_path, monkeypatch):
    import qwen3fast.bench.main as bench

    real, calls = bench.Workbench.run, []

    def interrupted(self, mode, prompts, new_tokens):
        calls.append(mode)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, mode, prompts, new_tokens)

    monkeypatch.setattr(bench.Workbench, "run", interrupted)
    options = ["--model", "tiny", "--lengths", "16,40", "--new-tokens", "2", "--modes", "cached-eager"]
    assert bench_main([*options, "--output", str(tmp_path)]) == 130
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["interrupted"] and len(record["cases"]) == 1


@pytest.mark.parametrize(
    "options",
    [["--modes", "cached-fast"], ["--lengths", "0"], ["--lengths", "1,x"], ["--dtype", "int3"], ["--threads", "-1"]],
)
def test_bench_bad_options_exit_2(options):
    with pytest.raises(SystemExit) as exit_info:
        bench_main(options)
    assert exit_info.value.code == 2


def test_bench_too_long_a_context_exits_2(capsys):
    assert bench_main(["--model", "tiny", "--lengths", "5000"]) == 2
    assert "exceeds this model's 4096 positions" in capsys.readouterr().err


def test_bench_fails_when_a_mode_gives_wrong_tokens(tmp_path, monkeypatch, capsys):
    import qwen3fast.bench.measure as measure

    real = measure.run_cached

    def wrong(engine, prompts, new_tokens):
        sample = real(engine, prompts, new_tokens)
        sample.token_ids[0][0] = (sample.token_ids[0][0] + 7) % 900
        return sample

    monkeypatch.setattr(measure, "run_cached", wrong)
    options = ["--model", "tiny", "--lengths", "16", "--new-tokens", "2", "--modes", "cached-eager"]
    assert bench_main([*options, "--output", str(tmp_path)]) == 1
    assert "WRONG" in capsys.readouterr().err
