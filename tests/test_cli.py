"""The command line, run in this process on the tiny model."""

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bench_fakes import FakeClock, make_case, make_record, quick_probes  # noqa: F401  a fixture

from qwen3fast import Generator, __main__
from qwen3fast.bench import measure, self_test
from qwen3fast.bench.__main__ import main as bench_main
from qwen3fast.bench.record import write_json
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.cli import main, parse, program
from qwen3fast.kernels import forms, forms_file
from qwen3fast.kernels.cases import prefill_attention_case
from qwen3fast.kernels.cpu import tiles


def test_generate_answers(capsys):
    assert main(["generate", "What is 17 + 25?", "--model", "tiny", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "42\n"


def test_generate_asks_the_hub_once(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "qwen3fast.checkpoint.source.snapshot_download", lambda name, **options: asked.append(name) or str(TINY_FOLDER)
    )
    assert main(["generate", "What is 17 + 25?", "--model", "owner/tiny", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "42\n" and asked == ["owner/tiny"]


def test_generate_raw_continues_the_text(capsys):
    assert main(["generate", "The capital of France is", "--raw", "--temperature", "0", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith(" Paris")


def test_generate_stats_go_to_standard_error(capsys):
    assert main(["generate", "What is 17 + 25?", "--temperature", "0", "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "42\n"
    assert "tokens/s; ended by stop" in captured.err


@pytest.mark.parametrize("command", [["generate", "-"], ["generate", "-", "--raw"], ["chat"]])
def test_a_prompt_that_is_too_long_is_cut_on_request(monkeypatch, capsys, command):
    for options, is_refused in (([], True), (["--on-overflow", "cut"], False)):
        monkeypatch.setattr("sys.stdin", io.StringIO("again " * 200))
        status = main([*command, "--max-seq-len", "64", "--temperature", "0", "--compile", "never", *options])
        assert ("--on-overflow cut" in capsys.readouterr().err) == is_refused
        assert is_refused or status == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hi", "--model", "no/such/model/x"], "no folder 'no/such/model/x'"),
        (["generate", "hi", "--temperature", "-1"], "temperature must be a number from 0 to 1e+06, got -1.0"),
        (["generate", "hi", "--max-seq-len", "100000"], "exceeds the model's max_position_embeddings"),
        (["generate", "", "--raw"], "the prompt is empty"),
        (["generate", ""], "the prompt is empty"),  # of a script whose variable is not set
        (["generate", "hi", "--quantization", "dequantize"], "use None (no --quantization)"),
        (["generate", "hi", "--model", "random:0.6b"], "no tokenizer: it can only be measured (bench)"),
        (["chat", "--model", "random:0.6b"], "no tokenizer: it can only be measured (bench)"),
        (["info", "--model", "random:7b"], "unknown Qwen3 shape '7b'"),
        (
            ["quantize", "--model", "random:0.6b", "--output", "x"],
            "random:0.6b has random weights, which are quantized",
        ),
        (["quantize", "--output", __file__], "test_cli.py is a file; expected the name of a folder to write"),
        (["quantize", "--output", str(TINY_FOLDER)], "is the folder of the model, whose weights would be overwritten"),
        (["quantize", "--output", "x", "--calibrate", "/"], "/ is a folder; expected a text file for --calibrate"),
    ],
)
def test_bad_values_give_one_line_and_status_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", [["generate", "5 6 7"], ["generate", "hi", "--max-seq-len", "64"], ["chat"]])
def test_a_model_without_a_tokenizer_is_refused_with_what_to_do(tmp_path, monkeypatch, capsys, command):
    shutil.copytree(TINY_FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.setattr(Generator, "from_pretrained", lambda *args, **options: pytest.fail("it loads"))
    assert main([*command, "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} holds no tokenizer (tokenizer.json, or " in error and "copy it from the model" in error
    assert "list" not in error


@pytest.mark.parametrize("command", [["generate", "hi"], ["chat"], ["serve", "--port", "0"]])
@pytest.mark.parametrize("is_off", [True, False])
def test_cuda_graphs_can_be_switched_off(monkeypatch, capsys, command, is_off):
    def from_pretrained(source, **options):
        raise ValueError(f"cuda_graphs={options['cuda_graphs']}")

    if command[0] == "serve":
        pytest.importorskip("uvicorn")
    monkeypatch.setattr(Generator, "from_pretrained", from_pretrained)
    assert main([*command, *(["--no-cuda-graphs"] if is_off else [])]) == 2
    assert f"cuda_graphs={not is_off}\n" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate"], ["generate", "hi", "--top-k", "many"]])
def test_bad_usage_exits_2(arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2


@pytest.mark.parametrize("place", ["file/model", "file/a/model", "locked/model", "locked"])
def test_quantize_refuses_a_place_that_cannot_be_written_before_the_work(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    real = tempfile.mkdtemp

    def mkdtemp(suffix=None, prefix=None, dir=None):  # as for a user without rights; root may write everywhere
        if Path(dir) == tmp_path / "locked":
            raise PermissionError(13, "Permission denied", str(dir))
        return real(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr("qwen3fast.cli.quantize.Loader", lambda *args, **options: pytest.fail("it loads"))
    assert main(["quantize", "--output", str(tmp_path / place)]) == 1
    assert f"error: {tmp_path / place} cannot be written: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "locked"]


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "a.gguf"])
def test_quantize_overwrites_weights_of_its_own_alone_unless_forced(name, tmp_path, capsys):
    weights, command = tmp_path / name, ["quantize", "--quantization", "int8", "--output", str(tmp_path)]
    weights.write_text("original")
    assert main(command) == 2
    assert f"{weights} holds weights of another model; choose another folder, or" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name] and weights.read_text() == "original"
    for more in (["--force"], []):
        assert main([*command, *more]) == 0


def test_quantize_takes_no_empty_name_for_the_current_folder(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", "--output", ""])
    assert "argument --output: expected the name of a folder, got an empty one" in capsys.readouterr().err


def test_chat_keeps_the_history_until_reset(monkeypatch, capsys):
    lines = "What is 38 + 57?\n/reset\n/nonsense\nWhat is 17 + 25?\n/exit\nWhat is 1 + 1?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "95\n42\n"
    assert "(conversation forgotten)" in captured.err and "commands: /reset, /exit" in captured.err


def test_a_reply_that_is_cut_is_said_to_be(capsys, monkeypatch):
    question = "What is 17 + 25?"
    command = ["generate", question, "--compile", "never", "--temperature", "0"]
    assert main([*command, "--think", "--max-tokens", "5"]) == 0
    assert "(cut inside the reasoning after 5 tokens: --max-seq-len" in capsys.readouterr().err
    assert main([*command, "--raw", "--max-tokens", "2"]) == 0  # as long as was asked for
    assert "cut" not in capsys.readouterr().err
    assert main(["generate", "Once upon a time", *command[2:], "--raw", "--max-seq-len", "16"]) == 0
    assert re.search(r"\(cut after \d+ tokens: ", capsys.readouterr().err)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n"))
    assert main(["chat", "--compile", "never", "--temperature", "0", "--think", "--max-seq-len", "48"]) == 0
    assert "(cut inside the reasoning after" in capsys.readouterr().err


def test_chat_ends_with_its_input(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 38 + 57?\n"))
    assert main(["chat", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "95\n"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_chat_survives_a_line_that_is_no_text(monkeypatch, capsys, place):
    lines = [b"/reset\nWhat is 38 + 57?\n", b"/reset\nWhat is 17 + 25?\n"]
    lines.insert(place, b"bad \xff\xfe line \xed\xa0\xbd\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"".join(lines)), encoding="utf-8"))
    assert main(["chat", "--temperature", "0", "--compile", "never"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and out[:place] + out[place + 1 :] == ["95", "42"]


def test_chat_survives_a_lone_surrogate(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi \ud83d\n/reset\nWhat is 17 + 25?\n"))
    assert main(["chat", "--temperature", "0", "--compile", "never"]) == 0
    assert capsys.readouterr().out.endswith("42\n")


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, FloatingPointError, MemoryError])
def test_chat_keeps_its_history_when_a_reply_fails(monkeypatch, capsys, error):
    real, seen = Generator.stream_chat, []

    def failing(self, messages, *arguments, **options):
        seen.append([message["content"] for message in messages])
        if messages[-1]["content"] == "fail":
            raise error("broken")
        return real(self, messages, *arguments, **options)

    monkeypatch.setattr(Generator, "stream_chat", failing)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 38 + 57?\nfail\nand now?\n"))
    assert main(["chat", "--temperature", "0", "--compile", "never"]) == 0
    assert "(cannot reply: broken)" in capsys.readouterr().err
    assert seen[2] == ["What is 38 + 57?", "95", "and now?"]


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["generate", "hi \ud83d"], r"the prompt holds the lone surrogate '\\ud83d' at character 3"),
        (["generate", "hi", "--stop", "a\udcff"], r"--stop holds the lone surrogate '\\udcff' at character 1"),
        (["chat", "--system", "\udcff"], r"--system holds the lone surrogate '\\udcff' at character 0"),
    ],
)
def test_arguments_that_are_no_text_are_refused_with_their_place(monkeypatch, capsys, arguments, place):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main([*arguments, "--compile", "never"]) == 2
    error = capsys.readouterr().err
    assert re.search(place + ": bytes .*; write it in UTF-8", error) and "encode(" not in error


def test_messages_do_not_go_to_standard_output_where_standard_error_is_closed(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    assert main(["generate", "What is 17 + 25?", "--temperature", "0", "--compile", "never", "--stats"]) == 0
    assert main(["generate", "hi", "--temperature", "-1"]) == 2
    assert capsys.readouterr().out == "42\n"
    sys.stderr.close()


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_generate_reads_standard_input(monkeypatch, capsys, end):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 17 + 25?" + end))
    assert main(["generate", "-", "--temperature", "0", "--compile", "never"]) == 0
    assert capsys.readouterr().out == "42\n"


@pytest.mark.parametrize("stdin", [io.StringIO(""), io.StringIO("\n"), None])
def test_generate_says_that_standard_input_is_empty(monkeypatch, capsys, stdin):
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["generate", "-"]) == 2
    assert "standard input is empty" in capsys.readouterr().err


def test_an_empty_model_is_the_current_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(TINY_FOLDER)
    assert main(["info", "--model", ""]) == 0
    assert capsys.readouterr().out.startswith(f"{TINY_FOLDER}\n  parameters ")
    monkeypatch.chdir(tmp_path)
    for command in (["info"], ["generate", "hi"], ["chat"]):
        assert main([*command, "--model", ""]) == 2
        assert f"{tmp_path}/config.json not found" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["many", "", "0", "-1", "1.5"])
def test_a_bad_world_size_is_named(monkeypatch, capsys, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    for command in (["generate", "hi"], ["bench"]):
        assert main(command) == 2
        assert f"WORLD_SIZE must be a number of processes, as torchrun sets it, got {size!r}" in capsys.readouterr().err


def test_warnings_are_lines_of_the_program_without_source_code(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # set back at the end
    monkeypatch.setattr(sys, "argv", ["qwen3fast", "--version"])
    with pytest.raises(SystemExit, match="0"):
        __main__.main()
    assert warnings.formatwarning("no tokenizer", UserWarning, __file__, 3) == "qwen3fast: warning: no tokenizer\n"


@pytest.mark.parametrize("command", ["bench", "info", "quantize"])
def test_commands_that_are_not_parallel_refuse_several_processes(monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command]) == 2
    assert f"{command} runs in one process; start it without torchrun" in capsys.readouterr().err


def test_a_loaded_command_may_leave_parsing_to_the_command_line(monkeypatch, capsys):
    module = ModuleType("loaded_command")
    module.add_arguments = lambda parser: parser.add_argument("--port", type=int)
    module.run = lambda args: args.port
    monkeypatch.setitem(sys.modules, "loaded_command", module)
    loaded = program.LoadedCommand("serve it", "loaded_command")
    monkeypatch.setitem(program.COMMANDS, "serve", loaded)
    assert main(["serve", "--port", "5"]) == 5
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    assert capsys.readouterr().out.startswith("usage: qwen3fast serve [-h] [--port PORT]\n\nServe it.\n")


def test_a_command_whose_package_is_missing_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(program.COMMANDS, "bench", program.LoadedCommand("", "no_such_package.main", "bench"))
    assert main(["bench", "--anything"]) == 1
    assert "bench needs no_such_package; run: pip install 'qwen3fast[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--version"], 0), (["unknown"], 2), ([], 2)])
def test_what_needs_no_model_imports_no_pytorch(arguments, status):
    code = f"""
import sys
from qwen3fast.cli import main
try: main({arguments})
finally: assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize("command", [name for name in program.COMMANDS if name != "bench"])
def test_each_command_has_help_of_its_own(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: qwen3fast {command} [-h]")


def test_after_two_dashes_a_prompt_may_look_like_an_option():
    assert parse(["generate", "--top-k", "3", "--", "-5 + 3?"]).prompt == "-5 + 3?"


def test_info_states_sizes(capsys):
    assert main(["info", "--model", "random:0.6b"]) == 0
    out = capsys.readouterr().out
    assert "596,049,920" in out and "112 KiB per token" in out


@pytest.mark.parametrize("by_tiles", [{}, {"tiles": [0.003] * 3}], ids=["no tiles", "tiles"])
def test_info_tells_which_forms_were_measured_for_these_sizes(by_tiles, capsys, monkeypatch, tmp_path):
    def forms_of_info():
        assert main(["info", "--model", "random:0.6b"]) == 0
        return capsys.readouterr().out.partition("forms on this machine")[2]

    assert forms_of_info() == ": the first of each, as QWEN3FAST_FORMS says\n"
    monkeypatch.delenv("QWEN3FAST_FORMS")
    monkeypatch.setattr(forms_file, "path", lambda: tmp_path / "forms.json")
    assert forms_of_info().startswith(": not measured yet for these sizes")
    monkeypatch.setattr(tiles, "are_announced", lambda: bool(by_tiles))
    monkeypatch.setattr(forms, "measure", lambda calls: by_tiles | {"C++": [0.002] * 3, "SDPA": [0.001] * 3})
    for heads in ((16, 8, 128), (32, 8, 128)):
        forms.measure_and_keep(prefill_attention_case(512, 2048, heads, torch.bfloat16)._replace(calls=dict))
    title, line = forms_of_info().splitlines()
    assert f"{torch.get_num_threads()} threads" in title
    times = "tiles 3 ms, C++ 2 ms, SDPA 1 ms" if by_tiles else "C++ 2 ms, SDPA 1 ms"
    assert line == f"  prefill attention, 512 tokens at 2048, 16/8 heads of 128, bfloat16: SDPA ({times})"


def test_info_tells_which_forms_of_experts_were_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("QWEN3FAST_FORMS")
    monkeypatch.setattr(forms_file, "path", lambda: tmp_path / "forms.json")
    monkeypatch.setattr(forms, "measure", lambda calls: {"C++": [0.002] * 3, "dequantized": [0.001] * 3})
    for inner in (768, 1536):
        case = forms.FormCase("experts int4/int4", f"32 rows, 8 of 128 experts, {inner} x 2048", ("C++",), dict)
        forms.measure_and_keep(case)
    assert main(["info", "--model", "random:30b-a3b"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "experts int4" in line]
    assert lines == [
        "  experts int4/int4, 32 rows, 8 of 128 experts, 768 x 2048: dequantized (C++ 2 ms, dequantized 1 ms)"
    ]


def test_info_states_experts_without_making_them(capsys):
    assert main(["info", "--model", "random:30b-a3b"]) == 0
    out = capsys.readouterr().out
    assert "30,532,122,624, 3,041,867,776 of them active per token" in out
    assert "6.084 GB of weights" in out and "128, 8 per token, of 768" in out


@pytest.mark.usefixtures("quick_probes")
def test_bench_writes_json_and_picture(tmp_path, capsys):
    options = ["--model", "tiny", "--contexts", "16,40", "--new-tokens", "4", "--repetitions", "2"]
    assert bench_main([*options, "--modes", "uncached-eager,cached-eager", "--output", str(tmp_path)]) == 0
    [json_file], [png_file] = tmp_path.glob("*.json"), tmp_path.glob("*.png")
    record = json.loads(json_file.read_text())
    assert [(c["labels"]["mode"], c["labels"]["context"]) for c in record["cases"]] == [
        ("uncached-eager", 16),
        ("cached-eager", 16),
        ("uncached-eager", 40),
        ("cached-eager", 40),
    ]
    assert all(len(c["samples"]["step_s"]) == 2 for c in record["cases"])
    assert len(record["checks"]) == 2 and all(check["passed"] for check in record["checks"].values())
    assert png_file.read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert "cached-eager" in out and "with the cache" in out
    assert "cached-eager, bf16, batch 1: 12 of 12 greedy tokens are the reference's argmax" in err


@pytest.mark.usefixtures("quick_probes")
@pytest.mark.parametrize(("format", "label"), [("plain", "bf16"), ("int4", "int4")])
def test_bench_prints_json(tmp_path, capsys, format, label):
    options = ["--model", "tiny", "--contexts", "16", "--new-tokens", "2", "--modes", "cached-eager", "--json"]
    assert bench_main([*options, "--formats", format, "--repetitions", "1", "--output", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    [case] = record["cases"]
    assert record["schema_version"] == 2 and case["labels"]["format"] == label
    bytes_per_weight = case["facts"]["weight_bytes"] / record["model"]["parameters"]
    assert bytes_per_weight == 2 if format == "plain" else 0.5 < bytes_per_weight < 0.7


@pytest.mark.usefixtures("quick_probes")
def test_bench_output_may_be_a_file(tmp_path):
    options = ["--model", "tiny", "--contexts", "16", "--new-tokens", "2", "--modes", "cached-eager"]
    assert bench_main([*options, "--quick", "--output", str(tmp_path / "mine.json")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "mine.png"]


@pytest.mark.usefixtures("quick_probes")
def test_bench_interrupted_keeps_what_was_measured(tmp_path, monkeypatch):
    real, calls = measure.Workbench.run, []

    def interrupted(self, mode, prompts, new_tokens):
        calls.append(len(prompts[0]))
        if calls.count(40) == 5:  # two runs compile and check, one warms up, two are measured
            raise KeyboardInterrupt
        return real(self, mode, prompts, new_tokens)

    monkeypatch.setattr(measure.Workbench, "run", interrupted)
    options = ["--model", "tiny", "--contexts", "16,40", "--new-tokens", "2", "--modes", "cached-eager"]
    assert bench_main([*options, "--repetitions", "2", "--output", str(tmp_path)]) == 130
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["interrupted"]
    assert [(c["labels"]["context"], len(c["samples"]["step_s"])) for c in record["cases"]] == [(16, 2), (40, 1)]


@pytest.mark.parametrize(
    "options",
    [
        ["--suite", "speed"],
        ["--modes", "cached-fast"],
        ["--formats", "int3"],
        ["--contexts", "0"],
        ["--contexts", "1,x"],
        ["--dtype", "int3"],
        ["--threads", "-1"],
        ["measure"],
    ],
)
def test_bench_bad_options_exit_2(options):
    for run in (bench_main, lambda options: main(["bench", *options])):
        with pytest.raises(SystemExit) as exit_info:
            run(options)
        assert exit_info.value.code == 2


def test_bench_too_long_a_context_exits_2(capsys):
    assert bench_main(["--model", "tiny", "--contexts", "5000"]) == 2
    assert "exceeds this model's 4096 positions; choose smaller --contexts" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_probes")
def test_bench_fails_when_a_mode_gives_wrong_tokens(tmp_path, monkeypatch, capsys):
    real = measure.run_cached

    def wrong(engine, prompts, new_tokens):
        sample = real(engine, prompts, new_tokens)
        sample.token_ids[0][0] = (sample.token_ids[0][0] + 7) % 900
        return sample

    monkeypatch.setattr(measure, "run_cached", wrong)
    options = ["--model", "tiny", "--contexts", "16", "--new-tokens", "2", "--modes", "cached-eager"]
    assert bench_main([*options, "--repetitions", "1", "--output", str(tmp_path)]) == 1
    assert "WRONG" in capsys.readouterr().err


def test_bench_of_the_command_line_is_that_of_its_module(capsys):
    for options in (["--help"], ["compare", "--help"], ["history", "--help"], ["self-test", "--help"]):
        texts = []
        for run in (bench_main, lambda options: main(["bench", *options])):
            with pytest.raises(SystemExit, match="0"):
                run(options)
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] and texts[0].startswith("usage: python -m qwen3fast.bench")


def test_bench_of_the_command_line_gives_the_status_of_a_command(capsys):
    assert main(["bench", "compare", "none.json", "none.json"]) == 2
    assert "qwen3fast.bench: error: none.json not found" in capsys.readouterr().err


@pytest.mark.parametrize(("is_right", "status"), [(True, 0), (False, 1)])
def test_bench_self_test_prints_a_table(monkeypatch, capsys, is_right, status):
    # Its real clock is left out: tests assert no times.
    monkeypatch.setattr(self_test, "check_in_real_time", lambda: [self_test.Finding("speed", "1", "2", is_right)])
    assert bench_main(["self-test"]) == status
    out, err = capsys.readouterr()
    assert "speed" in out and ("WRONG" in out) != is_right
    assert ("1 of 1 are wrong" in err) != is_right


def test_bench_self_test_waits_as_long_as_it_says(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(self_test.time, "perf_counter", clock)
    monkeypatch.setattr(self_test.time, "sleep", clock.wait)
    monkeypatch.setattr(self_test, "wait", clock.wait)
    assert all(finding.is_right for finding in self_test.check_in_real_time())
    monkeypatch.setattr(self_test, "wait", lambda seconds: clock.wait(0.01))
    assert [finding.is_right for finding in self_test.check_in_real_time()] == [False, True, False]


NEEDLESS = ["--model", "tiny", "--suite", "cache"]  # refused before anything is measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*NEEDLESS, "--output", "file"], "{0}/file is not a folder, so "),
        ([*NEEDLESS, "--output", "file/more"], "{0}/file/more is not a folder, so "),
        ([*NEEDLESS, "--output", "folder.json"], "{0}/folder.json is a folder; expected the name of a file to write"),
        (["--model", "tiny", "--suite", "quality", "--text", "none"], "{0}/none not found; expected a text for --text"),
        (["--model", "tiny", "--suite", "quality", "--text", "folder.json"], "{0}/folder.json is a folder; expected a"),
        (["--model", "tiny", "--suite", "quality", "--text", "latin"], "{0}/latin is not text in UTF-8: 'utf-8' codec"),
        (["table", "record.json", "-o", "folder.json"], "{0}/folder.json is a folder; expected the name of a file"),
        (["report", "record.json", "-o", "file/page.html"], "{0}/file is not a folder, so page.html cannot be written"),
        (["plot", "record.json", "-o", "file"], "{0}/file is not a folder, so record.png cannot be written there"),
        (["compare", "folder.json", "record.json"], "{0}/folder.json is a folder; expected a record that a benchmark"),
        (["table", "file"], "{0}/file is not valid JSON: "),
        (["table", "latin"], "{0}/latin is not text in UTF-8: "),
    ],
)
@pytest.mark.usefixtures("quick_probes")
def test_bench_names_a_path_that_cannot_be_used(tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "latin").write_bytes("\xe9".encode("latin-1"))
    (tmp_path / "folder.json").mkdir()
    write_json(make_record(make_case([10.0])).to_dict(), tmp_path / "record.json")
    names = {"file", "file/more", "folder.json", "none", "latin", "record.json", "file/page.html"}
    assert bench_main([str(tmp_path / word) if word in names else word for word in arguments]) == 2
    assert f"qwen3fast.bench: error: {message.format(tmp_path)}" in capsys.readouterr().err
