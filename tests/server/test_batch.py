"""`batch`: every line answered once, whatever interrupts it; bad lines told by number."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import pytest
from serving import tiny_generator  # noqa: F401  fixtures
from starlette.applications import Starlette
from starlette.routing import Route

from qwen3fast import SamplingParams
from qwen3fast.cli import main
from qwen3fast.server import batch
from qwen3fast.server.batch import Output
from qwen3fast.server.jobs import BatchJob, Room, answered, is_answer, read_jobs

JOBS = [BatchJob(line, name, None, "/v1/completions", {}, False) for line, name in ((1, "one"), (2, "two"))]
LINES = [{"key": str(job.line), "id": job.id, "text": job.id} for job in JOBS]
OPTIONS = ["--max-batch-size", "4", "--max-seq-len", "256", "--no-warmup"]


def write_lines(path: Path, rows: list) -> Path:
    """Write JSON lines; strings as they are."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@contextmanager
def no_open_files() -> Iterator[None]:
    """Check that no file that the block opens is left to the garbage collector."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()
    assert [str(warning.message) for warning in caught if "unclosed file" in str(warning.message)] == []


def test_every_line_is_answered_as_the_generator_would(tmp_path, tiny_generator, capsys):  # noqa: F811
    prompts = [f"What is {i} + 3?" for i in range(9)]
    greedy = {"temperature": 0, "max_tokens": 6}
    rows = [{"prompt": prompt, **greedy} for prompt in prompts]
    rows.append({"messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0})
    body = {"prompt": prompts[1], **greedy}
    rows.append({"custom_id": "mine", "method": "POST", "url": "/v1/completions", "body": body})
    source, target = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["batch", str(source), "-o", str(target), *OPTIONS]) == 0
    found = {row.get("custom_id", row.get("key")): row for row in read_lines(target)}
    alone = tiny_generator.generate(prompts, SamplingParams(**greedy))
    assert [found[str(i + 1)]["text"] for i in range(9)] == [result.text for result in alone]
    assert found["10"]["message"]["content"] == "42"
    assert found["mine"]["response"]["body"]["choices"][0]["text"] == alone[1].text
    assert len(read_lines(target)) == 11
    assert main(["batch", str(source), "-o", str(target), *OPTIONS]) == 0
    assert "11 of 11 requests were answered before" in capsys.readouterr().err
    assert len(read_lines(target)) == 11


def test_bad_lines_are_told_by_number_and_the_rest_is_answered(tmp_path, capsys):
    rows = [
        {"prompt": "a", "max_tokens": 1},
        "{",
        "[]",
        {"x": 1},
        {"prompt": "b", "temperature": -1},
        "no JSON",
    ]
    rows += [{"custom_id": "a", "url": "/etc/passwd", "body": {}}, {"prompt": "c", "max_tokens": 1}]
    source, target = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["batch", str(source), "-o", str(target), *OPTIONS]) == 1
    told = capsys.readouterr().err
    assert all(f"in.jsonl:{line}:" in told for line in (2, 3, 4, 6, 7))
    found = {row["key"]: row for row in read_lines(target)}
    assert set(found) == {"1", "5", "8"} and found["5"]["error"]["param"] == "temperature"


def test_csv_and_parquet_are_read(tmp_path):
    (tmp_path / "in.csv").write_text('prompt,max_tokens\n"a, b",3\n12,4\n', encoding="utf-8")
    jobs = list(read_jobs(tmp_path / "in.csv"))
    assert [(job.line, job.body["prompt"], job.body["max_tokens"]) for job in jobs if isinstance(job, BatchJob)] == [
        (2, "a, b", 3),
        (3, "12", 4),
    ]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {"prompt": [b"a", b"b", b"\xff"], "max_tokens": [3, None, 1], "user": [None, date(2026, 1, 2), None]}
    parquet.write_table(pyarrow.table(table), tmp_path / "in.PARQUET")
    *jobs, (line, message) = read_jobs(tmp_path / "in.PARQUET")
    assert line == 3 and "codec can't decode" in message
    assert [job.body for job in jobs] == [
        {"prompt": "a", "max_tokens": 3, "stream": False},
        {"prompt": "b", "user": "2026-01-02", "stream": False},
    ]


def test_a_row_of_csv_that_cannot_be_read_is_told_by_number(tmp_path):
    rows = ["Hello, world", f'a,"{"[" * 10**5}"', "a,,1.5", "b,,007", "c,,true,,"]
    write_lines(tmp_path / "in.CSV", ["prompt,stop,custom_id", f"{rows[0]},b,c", *rows[1:]])
    bad, deep, *jobs = read_jobs(tmp_path / "in.CSV")
    assert bad == (2, "has more cells than the first line; put cells that hold commas in quotation marks")
    assert deep[0] == 3 and "recursion" in deep[1]
    assert [job.custom_id for job in jobs] == ["1.5", "007", "true"]


def test_csv_may_hold_a_prompt_of_any_length(tmp_path):
    (tmp_path / "in.csv").write_text(f"prompt\n{'a' * 2**18}\n", encoding="utf-8")
    [job] = read_jobs(tmp_path / "in.csv")
    assert job.body["prompt"] == "a" * 2**18


def test_paths_that_cannot_be_used_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    (tmp_path / "no.parquet").write_bytes(b"no")
    (tmp_path / "latin.csv").write_bytes("prompt\n\xe9\n".encode("latin-1"))
    messages = [
        (["none.jsonl", "-o", "out.jsonl"], "none.jsonl not found; expected a file of requests: .jsonl, .csv or"),
        (["folder", "-o", "out.jsonl"], "folder is a folder; expected a file of requests"),
        (["in.jsonl", "-o", "folder"], "folder is a folder; expected the name of a file to write"),
        (["in.jsonl", "-o", "in.jsonl/out"], "in.jsonl is not a folder, so out cannot be written there"),
        (["in.jsonl", "-o", "in.jsonl"], "in.jsonl is the file of requests; choose another output file"),
        (["in.jsonl", "-o", "latin.csv"], "latin.csv has lines that are not replies of this command"),
        (["latin.csv", "-o", "out.jsonl"], "latin.csv is not a CSV file in UTF-8: 'utf-8' codec"),
        *([(["no.parquet", "-o", "out.jsonl"], "no.parquet is not a Parquet file: ")] if find_spec("pyarrow") else []),
    ]
    with no_open_files():
        for arguments, message in messages:
            assert main(["batch", *arguments, *OPTIONS]) == 2
            assert f"qwen3fast: error: {message}" in capsys.readouterr().err


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'qwen3fast\[parquet\]'"):
        list(read_jobs(tmp_path / "in.parquet"))


def test_a_plain_line_gets_all_that_it_asked_for(tmp_path, capsys):
    greedy = {"temperature": 0, "max_tokens": 3}
    rows = [
        {"prompt": "a", "n": 3, "logprobs": 1, **greedy, "custom_id": "mine"},
        {"prompt": ["a", "b"], **greedy},
        {"prompt": "a", "logprobs": 1, **greedy},
        {"messages": [{"role": "user", "content": "a"}], "logprobs": True, **greedy},
        {"prompt": "a", "max_token": 4, "temprature": 0},
        {"prompt": "a", "max_token": 4},
    ]
    source, target = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["batch", str(source), "-o", str(target), *OPTIONS]) == 0
    found = {row["key"]: row for row in read_lines(target)}
    assert found["1"]["custom_id"] == "mine" and len(found["1"]["choices"]) == 3
    assert all(len(choice["logprobs"]["tokens"]) == 3 for choice in found["1"]["choices"])
    assert [choice["index"] for choice in found["2"]["choices"]] == [0, 1]
    assert found["3"]["text"] and found["3"]["logprobs"]["tokens"]
    assert found["4"]["logprobs"]["content"] and found["4"]["usage"]
    assert found["5"]["ignored_fields"] == "max_token, temprature"
    told = capsys.readouterr().err
    assert all(told.count(f"warning: the field {name} is ignored") == 1 for name in ("max_token", "temprature"))


def test_lines_of_many_replies_wait_until_the_queue_has_room(tmp_path, capsys):
    chat = {"messages": [{"role": "user", "content": "a"}], "n": 5.0, "max_tokens": 1}
    rows = [{"prompt": [f"{i}{j}" for j in range(5)], "max_tokens": 1} for i in range(6)] + [chat] * 3
    source, target = write_lines(tmp_path / "in.jsonl", [*rows, {**rows[0], "n": 2}]), tmp_path / "out.jsonl"
    assert main(["batch", str(source), "-o", str(target), *OPTIONS, "--max-queue", "8"]) == 1
    assert "9 answered, 1 failed" in capsys.readouterr().err
    found = {row.pop("key"): row for row in read_lines(target)}
    assert "10 replies at once (prompts x n) exceed --max-queue 8" in found.pop("10")["error"]["message"]
    assert [len(row["choices"]) for row in found.values()] == [5] * 9


def test_a_fault_of_the_server_is_the_error_of_one_line():
    def fail(request):
        raise KeyError("a")

    app = Starlette(routes=[Route("/v1/completions", fail, methods=["POST"])])
    row = asyncio.run(answered(app, JOBS[0], Room(1)))
    assert row["key"] == "1" and row["error"]["message"] == "internal error: KeyError: 'a'" and not is_answer(row)


def test_lines_that_failed_or_changed_are_answered_by_the_next_run(tmp_path, capsys):
    body = {"prompt": "b", "max_tokens": 1}
    rows = [
        {"prompt": "a", "max_tokens": 1},
        {"prompt": "a", "max_tokens": 1},
        {"prompt": "b", "temperature": -1},
        {"custom_id": "mine", "method": "POST", "url": "/v1/completions", "body": {**body, "temperature": -1}},
        {"custom_id": "other", "method": "POST", "url": "/v1/completions", "body": body},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    command = ["batch", str(write_lines(source, rows)), "-o", str(target), *OPTIONS]
    for _ in range(2):
        assert main(command) == 1 and len(read_lines(target)) == 5
        assert "2 failed" in capsys.readouterr().err
    rows[0]["prompt"], rows[2], rows[3]["body"] = "changed", {"prompt": "b"}, body
    write_lines(source, [rows[2], rows[1], *rows[3:], rows[0]])
    assert main(command) == 0
    assert "2 of 5 requests were answered before" in capsys.readouterr().err
    found = read_lines(target)
    assert sorted(row.get("key", row.get("custom_id")) for row in found) == ["1", "2", "5", "mine", "other"]
    assert [row["prompt"] for row in found if "prompt" in row].count("changed") == 1
    assert [row["response"]["status_code"] for row in found if "response" in row] == [200, 200]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_at_the_end_is_written_again(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    output = Output(path, JOBS)
    output.write(LINES[0])
    output.write(LINES[1])
    output.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = Output(path, JOBS)
    assert again.rest == JOBS[1:]
    again.write(LINES[1])
    again.close()
    assert read_lines(path) == LINES


@pytest.mark.skipif(batch.fcntl is None, reason="no locks")
@pytest.mark.parametrize("change", [[], [LINES[1], LINES[0]]], ids=["new", "rewritten"])
def test_a_second_run_on_one_output_is_refused_and_changes_nothing(tmp_path, change, capsys):
    path = write_lines(tmp_path / "out.jsonl", change)
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    with closing(Output(path, JOBS[:1])) as output:
        for _ in range(2):  # before the first line, and behind it
            assert main(["batch", str(source), "-o", str(path), *OPTIONS]) == 2
            assert f"another process writes {path}" in capsys.readouterr().err
            output.begin()
            output.write({**LINES[0], "text": "second"})
        whole = path.read_bytes()
    with closing(Output(path, JOBS[:1])):
        assert path.read_bytes() == whole


def test_a_file_replaced_while_it_is_opened_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with path.open("a+b") as file:
        write_lines(tmp_path / "new", []).replace(path)
        with pytest.raises(ValueError, match="another process writes"):
            batch._lock(file, path)


@pytest.mark.parametrize("characters", [1, 2**17])
def test_a_full_disk_is_told_with_the_file_which_keeps_whole_lines(tmp_path, characters):
    resource = pytest.importorskip("resource")
    path, long = tmp_path / "out.jsonl", {**LINES[1], "text": "a" * characters}
    output = Output(path, JOBS)
    output.write(LINES[0])
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 7, limits[1]))  # as a full disk: a line is written in part
    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            output.write(long)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole
    output.write(LINES[1])  # another reply, which was ready when the disk was full
    output.close()
    assert read_lines(path) == LINES


@pytest.mark.parametrize(
    "notes",
    [
        "my notes\nmore\n",
        "my notes",
        '["my notes"]\n{"more"',
        '{"error": "a"}\n',
        '{"prompt": "a"}',
        '{"more"',
        '{"key": "a", "error": "my notes"}\n',
        '{"key": "a", "error": "my notes"}',
        '{"key": "a"}\n',
        '{"key": 1, "text": "a"}\n',
        '{"id": "a", "custom_id": "a", "response": {}}\n',
        '{"key": "1", "text": "of an earlier version, which wrote no hash"}\n',
        '{"id": "batch_req-0", "custom_id": "so did this", "response": {"status_code": 200}, "error": null}\n',
    ],
)
def test_a_file_of_something_else_is_not_overwritten(tmp_path, notes):
    path = tmp_path / "notes.txt"
    path.write_text(notes)
    with pytest.raises(ValueError, match="not replies of this command"):
        Output(path, JOBS)
    assert path.read_text() == notes


def run_batch(tmp_path: Path, rows: list, target: Path | None = None) -> list[dict]:
    """Answer lines and return the output."""
    source, target = write_lines(tmp_path / "in.jsonl", rows), target or tmp_path / "out.jsonl"
    assert main(["batch", str(source), "-o", str(target), *OPTIONS]) == 0
    return read_lines(target)


def test_changed_inserted_and_removed_lines_leave_one_reply_per_line(tmp_path, capsys):
    a, b, c, new = ({"prompt": prompt, "max_tokens": 1} for prompt in ("a", "b", "c", "new"))
    for rows, before in (([a, b], 0), ([new, b], 1), ([c, new, b], 2), ([b], 1), ([a, b, b], 1)):
        found = run_batch(tmp_path, rows)
        assert {row["key"]: row["prompt"] for row in found} == {str(i): r["prompt"] for i, r in enumerate(rows, 1)}
        assert len(found) == len(rows)
        assert (f"{before} of {len(rows)} requests were answered before" in capsys.readouterr().err) is (before > 0)


def test_a_link_stays_one_and_a_failed_rewrite_leaves_everything(tmp_path, monkeypatch, capsys):
    target, link = tmp_path / "real" / "out.jsonl", tmp_path / "out.jsonl"
    target.parent.mkdir()
    link.symlink_to(target)
    rows = [{"prompt": prompt, "max_tokens": 1} for prompt in "ab"]
    run_batch(tmp_path, rows, link)
    whole = target.read_bytes()
    write_lines(tmp_path / "in.jsonl", rows[1:])
    command = ["batch", str(tmp_path / "in.jsonl"), "-o", str(link), *OPTIONS]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copymode", lambda *_: (_ for _ in ()).throw(OSError(5, "no disk")))
        assert main(command) == 1
    assert "no disk: '" in capsys.readouterr().err
    assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"] and target.read_bytes() == whole
    assert main(command) == 0
    assert link.is_symlink() and [row["prompt"] for row in read_lines(target)] == ["b"]


def test_the_output_stays_as_it_is_until_the_model_has_loaded(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "new"}])
    answered = next(read_jobs(source))
    failed = {"key": "2", "id": "two", "error": {"message": "no"}}
    target = write_lines(tmp_path / "out.jsonl", [{"key": "1", "id": answered.id, "text": "old"}, failed])
    target.write_bytes(target.read_bytes() + b'{"key": "3')  # half a line
    whole = target.read_bytes()
    assert main(["batch", str(source), "-o", str(target), "--model", str(tmp_path / "none"), *OPTIONS]) == 2
    told = capsys.readouterr().err
    assert "1 of 2 requests were answered before" in told and f"{tmp_path / 'none'}" in told
    assert target.read_bytes() == whole


@pytest.mark.parametrize("rows", [[{"prompt": "new"}], []])
def test_replies_to_other_requests_alone_are_not_removed(tmp_path, rows, capsys):
    target = write_lines(tmp_path / "out.jsonl", [{**LINES[0], "id": "a" * 32}])
    whole, source = target.read_bytes(), write_lines(tmp_path / "in.jsonl", rows)
    assert main(["batch", str(source), "-o", str(target), *OPTIONS]) == 2
    assert "out.jsonl holds replies, but none to these requests" in capsys.readouterr().err
    assert target.read_bytes() == whole


def test_replies_that_are_the_requests_are_not_overwritten(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a", **LINES[0]}])
    whole, link = source.read_bytes(), tmp_path / "out.jsonl"
    link.symlink_to(source)
    assert main(["batch", str(source), "-o", str(link), *OPTIONS]) == 2
    assert "out.jsonl is the file of requests" in capsys.readouterr().err and source.read_bytes() == whole


def test_ctrl_c_after_the_output_was_rewritten_is_no_other_error(tmp_path, monkeypatch):
    target, replace = write_lines(tmp_path / "out.jsonl", [*LINES[::-1], *LINES]), Path.replace
    monkeypatch.setattr(Path, "replace", lambda *paths: [replace(*paths), signal.raise_signal(signal.SIGINT)])
    with closing(Output(target, [BatchJob(1, "one", None, "", {}, False)])) as output, pytest.raises(KeyboardInterrupt):
        output.begin()
    assert read_lines(target) == LINES[:1]


@pytest.mark.parametrize("custom_id", [["a"], {"a": 1}, True, 1.5])
def test_a_custom_id_that_is_no_text_is_refused(tmp_path, custom_id):
    [(line, message)] = read_jobs(write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "custom_id": custom_id}]))
    assert line == 1 and message.startswith("custom_id must be a string, got")


def test_an_interrupted_batch_goes_on_without_losing_or_doubling_a_line(tmp_path):
    rows = [{"prompt": f"What is {i} + 3?", "max_tokens": 40, "ignore_eos": True} for i in range(40)]
    source, target = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "qwen3fast", "batch", str(source), "-o", str(target), *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # nothing is compiled
    written = 0
    for how, status in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        while not target.exists() or target.stat().st_size <= written:
            assert process.poll() is None, "it ended before it wrote"
            time.sleep(0.005)
        process.send_signal(how)
        assert process.wait(30) == status
        written = target.stat().st_size
    assert main(["batch", str(source), "-o", str(target), *OPTIONS]) == 0
    assert sorted(int(row["key"]) for row in read_lines(target)) == list(range(1, 41))
