"""Files of records: written compactly and whole, read back, refused when damaged or hostile."""

import json
import os
from pathlib import Path

import pytest
from bench_fakes import make_case, make_record

from qwen3fast.bench.record import Case, Record, json_text, load_record, write_json, write_text
from qwen3fast.bench.validate import MAX_DEPTH, MAX_REPETITIONS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def record() -> Record:
    return make_record(make_case([10.0, 11.0, 12.0]), make_case([5.0], context=256), noise=["loud"], interrupted=True)


@pytest.fixture
def value(record):
    return json.loads(json.dumps(record.to_dict()))


def test_record_comes_back_as_it_was_written(record, tmp_path):
    write_json(record.to_dict(), tmp_path / "deep" / "record.json")
    assert load_record(tmp_path / "deep" / "record.json") == record


def test_record_says_whether_it_is_stable(record):
    assert record.to_dict()["stable"] is False
    assert make_record().to_dict()["stable"] is True


def test_record_leaves_out_cases_without_a_sample():
    assert make_record(Case({"mode": "x"}), make_case([1.0])).to_dict()["cases"][0]["labels"]["context"] == 32


def test_record_passed_is_that_of_all_checks(record):
    assert record.passed
    record.checks["other"] = {"passed": False}
    assert not record.passed


def test_case_leaves_out_what_could_not_be_taken():
    case = Case({"mode": "x"})
    case.add({"seconds": 1.0, "energy_j": None})
    case.add({"seconds": 2.0, "energy_j": None})
    assert case.samples == {"seconds": [1.0, 2.0]}


def test_case_name_is_its_labels_in_words():
    assert Case({"mode": "cached-eager", "context": 32}).name == "cached-eager, context 32"


def test_load_record_names_a_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json not found; expected a record that a benchmark wrote"):
        load_record(tmp_path / "none.json")


@pytest.mark.parametrize(("content", "kind"), [(b"{", "valid JSON"), (b"\xff\xfe{}", "text in UTF-8")])
def test_load_record_names_a_file_that_is_not_json(tmp_path, content, kind):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.json is not {kind}"):
        load_record(tmp_path / "bad.json")


@pytest.mark.parametrize("broken", [[], "text", {}, {"schema_version": 1}])
def test_from_dict_refuses_other_versions(broken):
    with pytest.raises(ValueError, match=r"x: expected schema_version 2, got (None|1); measure again"):
        Record.from_dict(broken, "x")


@pytest.mark.parametrize(
    "name", ["suite", "run", "environment", "model", "conditions", "noise", "checks", "notes", "interrupted", "cases"]
)
def test_from_dict_refuses_what_is_missing_or_of_another_kind(value, name):
    with pytest.raises(ValueError, match=f"x: {name} must be of type"):
        Record.from_dict({k: v for k, v in value.items() if k != name}, "x")
    with pytest.raises(ValueError, match=rf"x: {name} must be of type \w+, got 1.5"):
        Record.from_dict(value | {name: 1.5}, "x")


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        (("run", "utc"), None, "x: run: utc must be of type str, got None"),
        (("checks", "c"), [], r"x: checks\['c'\]: expected an object, got list"),
        (("checks", "c"), {}, r"x: checks\['c'\]: passed must be of type bool, got None"),
        (("cases", 0), 7, r"x: cases\[0\]: expected an object, got int"),
        (("cases", 1, "labels"), [], r"x: cases\[1\]: labels must be of type dict"),
        (("cases", 1, "facts"), None, r"x: cases\[1\]: facts must be of type dict"),
        (("cases", 1, "samples"), None, r"x: cases\[1\]: samples must be of type dict"),
        (("cases", 1, "metrics"), None, r"x: cases\[1\]: metrics must be of type dict"),
        (("cases", 1, "samples", "step_s"), ["fast"], r"cases\[1\] \(.*context 256.*\): the samples are damaged"),
        (("cases", 1, "samples", "step_s"), [[0.0]], "the samples are damaged"),
        (("cases", 1, "samples", "step_s"), 3, "the samples are damaged"),
        (("cases", 1, "facts", "bytes_per_step"), "many", "the samples are damaged"),
        (("cases", 1, "metrics", "decode_tok_s", "median"), 5.1, r"decode_tok_s is 5\.1, but the samples give 5\.0"),
        (("cases", 1, "metrics", "decode_tok_s", "median"), float("nan"), "decode_tok_s is nan, but the samples give"),
        (("cases", 1, "metrics", "decode_tok_s", "median"), "5", "decode_tok_s is '5', but the samples give"),
        (("cases", 1, "metrics", "decode_tok_s"), 5.0, "decode_tok_s is None, but the samples give"),
        (("cases", 1, "metrics", "tok_s"), {"median": 9.0}, r"metrics \[.*'tok_s', .*\], but the samples give"),
    ],
)
def test_from_dict_refuses_what_is_damaged_or_not_what_was_measured(value, path, wrong, message):
    *parents, last = path
    place = value
    for step in parents:
        place = place[step]
    place[last] = wrong
    with pytest.raises(ValueError, match=message):
        Record.from_dict(value, "x")


def test_from_dict_refuses_a_metric_that_was_left_out(value):
    del value["cases"][0]["metrics"]["ttft_s"]
    with pytest.raises(ValueError, match=r"but the samples give .*ttft_s"):
        Record.from_dict(value)


def test_write_text_leaves_the_old_file_and_nothing_else_when_it_fails(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_text("new", tmp_path / "a.json")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_write_text_is_readable_for_all(tmp_path):
    write_text("text", tmp_path / "a.json")
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_recorded_results_are_valid_and_compact(path):
    record = load_record(path)  # derives all metrics from the samples
    assert path.read_text() == json_text(record.to_dict())


def test_json_text_is_the_same_value_with_numbers_on_one_line(record):
    record.cases[0].samples["step_s"] = [[0.125] * 500, [0.25] * 500, [0.5] * 500]
    record.notes = {"log": "a\nb" * 100, "empty": {}, "nested": [{"a": [1, {"b": "c" * 300}]}]}
    value = record.to_dict()
    text = json_text(value)
    assert json.loads(text) == json.loads(json.dumps(value))
    [line] = [line for line in text.splitlines() if "0.125" in line and '"step_s"' in line]
    assert line.count("0.125") == 500


def test_json_text_has_null_for_what_json_has_no_number_for():
    assert json.loads(json_text({"a": float("nan"), "b": [float("inf"), 1.5]})) == {"a": None, "b": [None, 1.5]}


HOSTILE_FILES = {
    "nested lists": "[" * 100_000 + "]" * 100_000,
    "nested objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "nested just too deeply": "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    "NaN": '{"schema_version": NaN}',
    "infinity": '{"schema_version": -Infinity}',
    "a float that overflows": '{"schema_version": 1e999}',
    "a huge integer": '{"schema_version": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_load_record_refuses_json_that_is_no_record(name, tmp_path):
    (tmp_path / "bad.json").write_text(HOSTILE_FILES[name])
    with pytest.raises(ValueError, match=r"bad\.json (is not valid JSON: .*(number|large|nested)|is nested)"):
        load_record(tmp_path / "bad.json")


def test_load_record_refuses_a_file_of_enormous_size(tmp_path):
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match=r"big\.json is larger than 64 MiB"):
        load_record(tmp_path / "big.json")


HOSTILE_VALUES = [
    (("run", "utc"), "yesterday", "run: utc must look like"),
    (("run", "utc"), "2026-13-45T00:00:00Z", "run: utc must look like"),
    (("run", "git_commit"), ["--output=x"], "run: git_commit must be of type str"),
    (("run", "git_dirty"), "yes", "run: git_dirty must be of type bool"),
    (("model", "name"), {"a": 1}, "model: name must be of type str"),
    (("conditions", "bandwidth_gb_s"), "fast", "conditions.* must be a list of finite numbers, got 'fast'"),
    (("conditions", "bandwidth_gb_s"), ["fast"], "conditions.* must be a list of finite numbers"),
    (("conditions", "bandwidth_gb_s"), [True], "conditions.* must be a list of finite numbers"),
    (("conditions", "bandwidth_gb_s"), [float("nan")], "conditions.* must be a list of finite numbers"),
    (("noise",), [3], "noise must be texts"),
    (("cases", 0, "labels", "mode"), ["a"], r"labels\['mode'\] must be a number or a short text"),
    (("cases", 0, "labels", "mode"), "m" * 1000, r"labels\['mode'\] must be a number or a short text"),
    (("cases", 0, "labels", "context"), 10**40, r"labels\['context'\] must be a number or a short text"),
    (("cases", 0, "facts", "steps"), 1e300, r"facts\['steps'\] must be a finite number"),
    (("cases", 0, "samples", "ttft_s"), [1e-320] * 3, "'ttft_s' must be finite numbers"),
    (("cases", 0, "samples", "ttft_s"), [float("inf")] * 3, "'ttft_s' must be finite numbers"),
    (("cases", 0, "samples", "ttft_s"), [1.0] * (MAX_REPETITIONS + 1), "'ttft_s' must be a list"),
]


@pytest.mark.parametrize(("path", "wrong", "message"), HOSTILE_VALUES)
def test_from_dict_refuses_what_would_break_tables_or_pictures(value, path, wrong, message):
    *parents, last = path
    place = value
    for step in parents:
        place = place[step]
    place[last] = wrong
    with pytest.raises(ValueError, match=f"x: .*{message}"):
        Record.from_dict(value, "x")


def test_load_record_writes_out_control_characters(record, tmp_path):
    record.cases[0].labels["mode"] = "\x1b[2J\nforged row"
    record.notes = {"\x07": ["\u202e"]}
    write_json(record.to_dict(), tmp_path / "a.json")
    loaded = load_record(tmp_path / "a.json")
    assert loaded.cases[0].labels["mode"] == r"\x1b[2J\nforged row" and loaded.notes == {r"\x07": [r"\u202e"]}
