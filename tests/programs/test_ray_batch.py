"""examples/ray_batch.py: its parts without Ray, and where Ray is installed (it is no part of [test]), all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray_batch

from qwen3fast import Generator, SamplingParams

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
OPTIONS = {"compile": False, "max_seq_len": 200, "max_batch_size": 2}


def write_lines(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_prompts_get_their_line_numbers_as_ids(tmp_path):
    file = write_lines(tmp_path / "in", [{"prompt": "a"}, {"id": "x", "prompt": "b"}, {"messages": QUESTION}])
    assert [row["id"] for row in ray_batch.read_prompts(file)] == [1, "x", 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object with either"),
        ('{"text": "a"}', "line 2: expected an object with either"),
        ('{"prompt": "a", "messages": []}', "line 2: expected an object with either"),
        ('{"prompt": "a", "id": 1}', "line 2: id 1 must be a number or a text, and not come twice"),
        ('{"prompt": "a", "id": [1]}', r"line 2: id \[1\] must be a number or a text"),
    ],
)
def test_what_is_no_prompt_is_refused_by_line(tmp_path, line, message):
    file = tmp_path / "in"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ray_batch.read_prompts(file)


def test_a_line_that_was_cut_off_is_done_again(tmp_path):
    file = write_lines(tmp_path / "out", [{"id": 1, "text": "a"}, {"id": "x", "error": "b"}])
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole + '{"id": 3, "te', encoding="utf-8")
    assert ray_batch.finished_ids(file) == {1, "x"}
    assert file.read_text(encoding="utf-8") == whole
    assert ray_batch.finished_ids(tmp_path / "none") == set()


def test_other_files_are_not_appended_to(tmp_path):
    with pytest.raises(ValueError, match=r"is not an output of this program .*; choose another file"):
        ray_batch.finished_ids(write_lines(tmp_path / "out", [{"prompt": "a"}]))


def test_a_worker_replies_as_a_generator_does():
    worker = ray_batch.Worker("tiny", OPTIONS, {"max_tokens": 8, "temperature": 0}, thinks=False)
    rows = [{"id": 1, "messages": QUESTION}, {"id": 2, "prompt": ""}, {"id": 3, "prompt": "The capital of France is"}]
    first, second, third = map(json.loads, worker({"json": [json.dumps(row) for row in rows]})["json"])
    with Generator.from_pretrained("tiny", **OPTIONS) as generator:
        result = generator.generate(rows[2]["prompt"], SamplingParams(max_tokens=8, temperature=0))
    assert (first["id"], first["text"], first["finish_reason"]) == (1, "42", "stop")
    assert second == {"id": 2, "error": "the prompt is empty; it needs at least one token"}
    assert (third["text"], third["new_tokens"]) == (result.text, len(result.token_ids))
    worker.generator.close()


def test_nothing_to_do_needs_no_ray(tmp_path, capsys):
    prompts = write_lines(tmp_path / "in", [{"prompt": "a"}])
    replies = write_lines(tmp_path / "out", [{"id": 1, "text": "b"}])
    assert ray_batch.main([str(prompts), str(replies)]) == 0
    assert capsys.readouterr().out == "0 replies, 0 of them errors; 1 were there already\n"


def test_without_ray_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    prompts = write_lines(tmp_path / "in", [{"prompt": "a"}])
    assert ray_batch.main([str(prompts), str(tmp_path / "out")]) == 2
    assert "this program needs Ray: pip install -e '.[ray]'" in capsys.readouterr().err


def test_bad_input_is_named(tmp_path, capsys):
    assert ray_batch.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    prompts = write_lines(tmp_path / "in", [{"prompt": "a"}])
    assert ray_batch.main([str(prompts), str(tmp_path / "out"), "--workers", "0"]) == 2
    errors = capsys.readouterr().err
    assert "none" in errors
    assert "--workers must be at least 1, got 0" in errors


def test_two_workers_reply_in_order_and_go_on_where_they_stopped(tmp_path):
    pytest.importorskip("ray")
    sums = [{"messages": [{"role": "user", "content": f"What is {i} + 3?"}]} for i in range(20, 40)]
    prompts, replies = write_lines(tmp_path / "in", sums), tmp_path / "out"
    options = "--workers 2 --rows 2 --temperature 0 --max-seq-len 99 --max-tokens 8 --compile never"

    def run() -> str:
        command = [sys.executable, ray_batch.__file__, str(prompts), str(replies), *options.split()]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_USAGE_STATS_ENABLED": "0"}
        return subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300
        ).stdout

    assert "20 replies, 0 of them errors; 0 were there already" in run()
    once = read_lines(replies)
    assert [(row["id"], row["text"]) for row in once] == [(i + 1, str(23 + i)) for i in range(20)]
    write_lines(replies, once[:5])
    assert "15 replies, 0 of them errors; 5 were there already" in run()
    assert read_lines(replies) == once
