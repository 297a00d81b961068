"""A figure over commits: the order of records, versions that git keeps, and what is shown of them."""

import subprocess

import pytest
from bench_fakes import MODEL, make_case, make_record

from qwen3fast.bench import timeline
from qwen3fast.bench.__main__ import main
from qwen3fast.bench.history import lines_of, parse_labels, table
from qwen3fast.bench.pictures.history import draw
from qwen3fast.bench.record import write_json, write_text
from qwen3fast.bench.timeline import in_order, versions_in_git


def record_at(utc, *speeds, commit=None, **changes):
    cases = [make_case([s, s + 1, s - 1], context=8 * 2**i) for i, s in enumerate(speeds)]
    return make_record(*cases, utc=utc, commit=commit, **changes)


def test_order_is_that_of_the_runs_where_git_knows_no_commit():
    late, early = record_at("2026-03-01T00:00:00Z", 10.0), record_at("2026-01-01T00:00:00Z", 20.0, commit="0" * 40)
    points = in_order([late, early])
    assert [p.record for p in points] == [early, late]
    assert [(p.name, p.date) for p in points] == [("0000000", "2026-01-01"), ("no commit", "2026-03-01")]


def test_order_is_that_of_the_commits_before_that_of_the_runs(monkeypatch):
    times = {"a" * 40: "2000000000", "b" * 40: "1000000000"}
    monkeypatch.setattr(timeline, "git", lambda *arguments: times[arguments[-1]])
    newer, older, again = (
        record_at(utc, 10.0, commit=name * 40)
        for utc, name in (("2026-01-01T00:00:00Z", "a"), ("2026-02-01T00:00:00Z", "b"), ("2026-03-01T00:00:00Z", "b"))
    )
    again.run["git_dirty"] = True
    assert [p.name for p in in_order([again, newer, older])] == ["bbbbbbb", "bbbbbbb*", "aaaaaaa"]


def test_order_refuses_what_does_not_belong_together():
    one, other = record_at("2026-01-01T00:00:00Z", 9.0), record_at("2026-01-02T00:00:00Z", 9.0, suite="batch")
    with pytest.raises(ValueError, match="do not belong together: suite 'cache' and 'batch'"):
        in_order([one, other], force=True)
    other = record_at("2026-01-02T00:00:00Z", 9.0, model=MODEL | {"name": "tiny"})
    with pytest.raises(ValueError, match="model name 'random:test' and 'tiny'; --force"):
        in_order([one, other])
    assert len(in_order([one, other], force=True)) == 2
    with pytest.raises(ValueError, match="no record to show; name some, or use --git PATH"):
        in_order([])


def test_lines_are_the_cases_with_the_labels_named_by_what_differs():
    points = in_order([record_at("2026-01-01T00:00:00Z", 10.0), record_at("2026-01-02T00:00:00Z", 20.0, 30.0)])
    lines = lines_of(points, "decode_tok_s", {"mode": "cached-eager"})
    assert {name: [c and c.metrics["decode_tok_s"].median for c in cases] for name, cases in lines.items()} == {
        "context 8": [10.0, 20.0],
        "context 16": [None, 30.0],
    }
    [(name, _)] = lines_of(points, "decode_tok_s", {"context": "16"}).items()
    assert name == "cached-eager, bf16, context 16, batch_size 1"


def test_lines_refuse_labels_that_no_case_has():
    points = in_order([record_at("2026-01-01T00:00:00Z", 10.0, 20.0)])
    with pytest.raises(
        ValueError, match=r"no case with these labels has decode_tok_s; there are mode: cached-eager; .*16"
    ):
        lines_of(points, "decode_tok_s", {"context": "7"})
    with pytest.raises(ValueError, match="no case with these labels has perplexity"):
        lines_of(points, "perplexity", {})


def test_table_has_a_row_for_each_case_of_each_record():
    points = in_order([record_at("2026-01-01T00:00:00Z", 10.0), record_at("2026-01-02T00:00:00Z", 20.0, 30.0)])
    rows = table(points, lines_of(points, "decode_tok_s", {}), "decode_tok_s")
    assert rows[1] == ["no commit", "2026-01-01", "2026-01-01T00:00:00Z", "context 8", "10", "9 - 11", "20.0"]
    assert [row[3] for row in rows[1:]] == ["context 8", "context 8", "context 16"]


def test_picture_has_a_line_for_each_case_and_the_memory_beneath():
    points = in_order([record_at(f"2026-01-{day:02}T00:00:00Z", 10.0, 20.0) for day in range(1, 14)])
    top, bottom = draw(points, lines_of(points, "decode_tok_s", {}), "decode_tok_s").axes
    assert [list(c.lines[0].get_ydata()) for c in top.containers] == [[10.0] * 13, [20.0] * 13]
    assert list(bottom.containers[0].lines[0].get_ydata()) == [20.0] * 13
    assert len(bottom.get_xticks()) == 7  # not all 13 names have room


@pytest.fixture
def repository(tmp_path):
    """A repository of a file that began in version 1, was renamed, and has two records."""

    def git(*arguments):
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "results").mkdir()
    # Similar enough for git to detect a renaming.
    cases = [10.0 + i for i in range(12)]
    steps = [
        ("old.json", lambda path: write_text('{"schema_version": 1}\n', path)),
        ("old.json", lambda path: write_json(record_at("2026-01-01T00:00:00Z", *cases).to_dict(), path)),
        ("new.json", None),
        ("new.json", lambda path: write_json(record_at("2026-01-02T00:00:00Z", 99.0, *cases[1:]).to_dict(), path)),
    ]
    for name, write in steps:
        if write is None:
            git("mv", "results/old.json", "results/new.json")
        else:
            write(tmp_path / "results" / name)
            git("add", "-A")
        git("commit", "-qm", "a step")
    return tmp_path


def test_git_gives_all_versions_across_renames(repository):
    records, notes = versions_in_git(repository / "results" / "new.json")
    assert [r.run["utc"][:10] for r in records] == ["2026-01-02", "2026-01-01", "2026-01-01"]
    [note] = notes
    assert note.startswith("results/old.json at ") and "expected schema_version 2, got 1" in note


def test_git_gives_versions_of_a_file_with_an_unusual_name(repository):
    name = "commit größer --output=x.json"
    (repository / "results" / "new.json").rename(repository / "results" / name)
    for command in (["add", "-A"], ["-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-qm", "rename"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    records, _ = versions_in_git(repository / "results" / name)
    assert [r.run["utc"][:10] for r in records] == ["2026-01-02", "2026-01-02", "2026-01-01", "2026-01-01"]


def test_git_has_nothing_of_an_unknown_file(repository, tmp_path_factory):
    with pytest.raises(ValueError, match=r"git has no version of .*none\.json; expected a file that was committed"):
        versions_in_git(repository / "none.json")
    with pytest.raises(ValueError, match="git has no version of"):
        versions_in_git(tmp_path_factory.mktemp("bare") / "none.json")


def test_history_command_writes_table_and_picture(repository, tmp_path, capsys):
    picture = tmp_path / "out" / "history.png"
    path = str(repository / "results" / "new.json")
    assert main(["history", "--git", path, "--labels", "context=8", "-o", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 + 3 and "99" in out
    assert "skipped: results/old.json at " in err and f"wrote {picture}" in err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_history_command_asks_for_labels_where_lines_are_too_many(tmp_path, capsys):
    write_json(record_at("2026-01-01T00:00:00Z", *range(10, 24)).to_dict(), tmp_path / "a.json")
    assert main(["history", str(tmp_path / "a.json"), "-o", str(tmp_path / "a.png")]) == 0
    assert "no picture: 14 lines; choose at most 12 with --labels" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_history_command_refuses_with_status_2(capsys, tmp_path):
    assert main(["history", str(tmp_path / "none.json")]) == 2
    assert "none.json not found" in capsys.readouterr().err
    assert main(["history"]) == 2


@pytest.mark.parametrize("text", ["context", "=8", "context=", "context=8,"])
def test_labels_of_another_form_are_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["history", "a.json", "--labels", text])
    assert "is not of the form name=value,name=value" in capsys.readouterr().err


def test_labels_are_names_and_values():
    assert parse_labels("stage=+ int8, context=32") == {"stage": "+ int8", "context": "32"}
