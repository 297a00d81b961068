"""Hostile records: nothing in them reaches a command line, a terminal or a page unchecked."""

import json
import re

import pytest
from bench_fakes import make_case, make_record

from qwen3fast.bench import timeline
from qwen3fast.bench.__main__ import main
from qwen3fast.bench.record import write_json
from qwen3fast.bench.table import as_csv, as_markdown, as_text
from qwen3fast.bench.text import csv_cell, markdown, visible

EVIL = "\x1b[2J\x1b]0;owned\x07<script>alert(1)</script>|\n| forged | row |\r\u202e[x](javascript:1)$\\frac{"
COMMANDS = (
    ["table"], ["table", "--format", "text"], ["table", "--format", "csv"], ["history"], ["plot"], ["report"],
)  # fmt: skip


def evil_record(suite="cache", **labels):
    """A record with hostile text wherever text can be."""
    cases = [make_case([10.0, 11.0, 12.0], format=EVIL, context=n, **labels) for n in (16, 32)]
    record = make_record(*cases, suite=suite, noise=[EVIL], notes={EVIL: [EVIL]}, commit=EVIL)
    record.environment["cpu"] = record.environment["torch"] = record.run["command"] = EVIL
    record.model["name"] = EVIL
    record.checks = {EVIL: {"passed": False, "why": EVIL}}
    return record


@pytest.mark.parametrize("suite", ["cache", EVIL])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_write_control_characters_of_records_out(command, suite, tmp_path, capsys):
    write_json(evil_record(suite, **{"x" + EVIL: EVIL}).to_dict(), tmp_path / "evil.json")
    target = {"history": "h.svg", "plot": "p", "report": "r.html"}.get(command[0])
    output = ["-o", str(tmp_path / target)] if target else []
    assert main([*command, str(tmp_path / "evil.json"), *output]) == 0
    out, err = capsys.readouterr()
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.suffix in (".svg", ".html"))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out + err + written)
    assert "| forged | row |" not in (out + err).splitlines()
    assert "<script>alert" not in written and (command != ["table"] or "<script>" not in out)


def test_compare_writes_control_characters_of_records_out(tmp_path, capsys):
    for name in ("old", "new"):
        record = evil_record()
        record.environment["torch"] = name + EVIL
        write_json(record.to_dict(), tmp_path / f"{name}.json")
    for options in ([], ["--json"]):
        main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json"), "--all", *options])
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\u202e" not in out + err
        assert not any(line.startswith("| forged") for line in (out + err).splitlines())


def test_errors_write_control_characters_out(tmp_path, capsys):
    value = evil_record().to_dict()
    value["cases"][0]["metrics"]["decode_tok_s"]["median"] = 1.0
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert main(["table", str(tmp_path / "a.json")]) == 2
    error = capsys.readouterr().err
    assert "the samples give" in error and "\x1b" not in error and "\n|" not in error


def test_markdown_tables_keep_their_shape_and_hold_no_markup():
    rows = [["mode", "tok/s"], ["a|b\\|c<img src=x>&amp;\n*d* `e` [f](g)", "1"]]
    lines = as_markdown(rows, 1).splitlines()
    assert len(lines) == 3
    assert lines[2] == r"| a\|b\\\|c&lt;img src=x&gt;&amp;amp;\\n\*d\* \`e\` \[f\](g) | 1 |"
    assert markdown("cached-compiled, batch_size 1") == "cached-compiled, batch_size 1"


def test_text_tables_keep_their_shape():
    assert as_text([["a"], ["\x1b[31mred\nline\u2028\ud800"]], 1).splitlines()[2:] == [r"\x1b[31mred\nline\u2028\ud800"]
    assert visible("a\nb\tc", keep="\n") == "a\nb\\tc" and visible("größer, 日本") == "größer, 日本"


@pytest.mark.parametrize("text", ["=1+2", "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3+cmd|'x'!A0", " =HYPERLINK(1)"])
def test_csv_cells_are_no_formulas(text):
    assert csv_cell(text) == f"'{text}"
    assert f"'{text}" in as_csv([make_record(make_case([1.0], mode=text))]).replace('""', '"')


def test_csv_cells_keep_ordinary_labels():
    assert [csv_cell(v) for v in ("+ static KV cache", "-kv8", -1.5, None)] == ["+ static KV cache", "-kv8", -1.5, None]


COMMITS = ["--output=owned", "--output=owned\n", "HEAD", "main", "abc123", "g" * 40, "a" * 65, "-p", "", "deadbeef:x"]


@pytest.mark.parametrize("commit", COMMITS)
def test_history_asks_git_for_nothing_but_hexadecimal_commits(commit, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(timeline, "git", lambda *arguments, **_: asked.append(arguments))
    [point] = timeline.in_order([make_record(make_case([1.0]), commit=commit)])
    assert asked == [] and point.name == "no commit" and point.date == "2026-01-02"


@pytest.mark.parametrize("commit", ["abcdef1", "0" * 40, "f" * 64])
def test_history_asks_git_for_commits_behind_the_end_of_options(commit, monkeypatch):
    asked = []
    monkeypatch.setattr(timeline, "git", lambda *arguments, **_: asked.append(arguments) or "86400")
    [point] = timeline.in_order([make_record(make_case([1.0]), commit=commit)])
    assert asked == [("show", "-s", "--format=%ct", "--end-of-options", commit)]
    assert (point.name, point.date) == (commit[:7], "1970-01-02")


def test_history_of_a_record_overwrites_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(make_record(make_case([1.0]), commit=f"--output={tmp_path / 'owned'}").to_dict(), tmp_path / "a.json")
    assert main(["history", str(tmp_path / "a.json"), "-o", str(tmp_path / "h.png")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "h.png"]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"schema_version": NaN}', '{"schema_version": 1e999}']
)
@pytest.mark.parametrize("command", ["table", "plot", "report", "history", "compare"])
def test_commands_refuse_json_that_is_no_record_in_one_line(command, content, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert main([command, *[str(path)] * (2 if command == "compare" else 1)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "bad.json" in line and len(line) < 400


def test_records_with_dollars_and_braces_can_be_drawn(tmp_path, capsys):
    record = make_record(*(make_case([10.0, 11.0], context=n, format="$\\frac{") for n in (16, 32)))
    record.model["name"] = "$x^"
    write_json(record.to_dict(), tmp_path / "a.json")
    for command in ("plot", "history"):
        target = tmp_path / ("out" if command == "plot" else "h.png")
        assert main([command, str(tmp_path / "a.json"), "-o", str(target)]) == 0
