"""Every program in examples/ runs on tiny, and so does the notebook, whose stored outputs match its code."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from qwen3fast import Generator

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "qwen3_from_scratch.ipynb").read_text(encoding="utf-8"))
# ray_serve.py needs Ray Serve, which is no part of [test]; the other two files are parts of it with tests of their own.
PROGRAMS = {"quickstart", "streaming_async", "chat_with_tools", "batch_of_prompts", "embed_and_rerank"}


@pytest.fixture
def uncompiled(monkeypatch):
    """Generators of the examples do not compile: tokens are the same, and tests stay short."""
    real = Generator.from_pretrained
    monkeypatch.setattr(Generator, "from_pretrained", lambda *a, **options: real(*a, **options | {"compile": False}))


def run(name, *options):
    """Run a program's main."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](list(options))


def test_every_example_is_tested():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == PROGRAMS | {"ray_serve", "prefix_table", "asgi_messages"}


def test_quickstart(uncompiled, capsys):
    run("quickstart")
    out = capsys.readouterr().out
    assert "The capital of France is Paris." in out
    assert "What is 17 + 25? 42\n" in out


def test_streaming_async_frees_the_slot_of_a_cancelled_reply(uncompiled, capsys):
    run("streaming_async")
    out = capsys.readouterr().out
    assert out.count("Once upon a time") == 4
    assert out.endswith("... (cancelled)\nslots in use now: 0\n")


def test_chat_with_tools_runs_the_call_and_gives_the_result_back(uncompiled, capsys):
    pytest.importorskip("llguidance")
    run("chat_with_tools")
    call, answer = capsys.readouterr().out.splitlines()
    a, b, result = (int(number) for number in re.findall("[0-9]+", call))
    assert a + b == result
    assert answer.startswith("answer: ")


def test_a_tool_that_fails_is_told_to_the_model():
    call = runpy.run_path(str(EXAMPLES / "chat_with_tools.py"))["call"]
    assert call("add", {"a": 1, "b": "2"}) == "3"
    assert call("add", {"a": 1}).startswith("error: TypeError")
    assert call("remove", {}) == "error: KeyError('remove')"


def test_batch_of_prompts(uncompiled, capsys):
    run("batch_of_prompts", "--prompts", "9")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("9 replies, ")
    assert lines[2:] == ["4 + 5 = 9", "30 + 5 = 35"]


def test_embed_and_rerank(yes_no_checkpoint, capsys):
    run("embed_and_rerank", "--embedder", "tiny", "--reranker", str(yes_no_checkpoint))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "by embedding:"
    similarities = [float(line.split()[0]) for line in lines[3:6]]
    assert similarities == sorted(similarities, reverse=True)
    scores = [float(line.split()[0]) for line in lines[8:10]]
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)


def test_the_notebook_runs_from_top_to_bottom(uncompiled, capsys, monkeypatch, one_thread):
    monkeypatch.setattr(plt, "show", plt.close)
    names = {"__name__": "__main__"}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace("[16, 64, 256, 1024, 2048]", "[16, 64]")
            exec(compile(code.replace("NEW_TOKENS = 32", "NEW_TOKENS = 3"), cell["id"], "exec"), names)
    assert names["CONTEXTS"] == [16, 64] and names["NEW_TOKENS"] == 3
    out = capsys.readouterr().out
    assert "' Paris'" in out and out.count("What is 17 + 25? 42") == 2


def test_the_notebook_is_stored_with_its_outputs_and_a_plot():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {kind for cell in code for output in cell["outputs"] for kind in output.get("data", {})}
    assert "image/png" in kinds
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []
