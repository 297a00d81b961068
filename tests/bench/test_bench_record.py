"""A record's file: written whole, read back, refused when it is damaged, and as its published schema says."""

import copy
import json
import os
from pathlib import Path

import pytest
from bench_fakes import make_case, make_record

from qwen3fast.bench.record import SCHEMA_FILE, Case, Record, load_record, write_json, write_text

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def record() -> Record:
    return make_record(make_case([10.0, 11.0, 12.0]), make_case([5.0], context=256), noise=["loud"], interrupted=True)


@pytest.fixture
def value(record):
    return json.loads(json.dumps(record.to_dict()))


@pytest.fixture(scope="module")
def schema():
    jsonschema = pytest.importorskip("jsonschema", reason="comes with the extra 'test'")
    text = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(text)
    return jsonschema.Draft202012Validator(text)


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


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}"])
def test_load_record_names_a_file_that_is_not_json(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json is not valid JSON"):
        load_record(tmp_path / "bad.json")


@pytest.mark.parametrize("broken", [[], "text", {}, {"schema_version": 1}])
def test_from_dict_refuses_other_versions(broken):
    with pytest.raises(ValueError, match=r"x: expected schema_version 2, got (None|1); measure again"):
        Record.from_dict(broken, "x")


@pytest.mark.parametrize(
    "name",
    ["suite", "run", "environment", "model", "conditions", "noise", "checks", "notes", "interrupted", "cases"],
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


def test_schema_takes_a_record(schema, value):
    schema.validate(value)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_schema_takes_the_recorded_results(schema, path):
    schema.validate(json.loads(path.read_text()))
    load_record(path)


def breakages():
    """Name -> what breaks a record's JSON form."""

    def without(name):
        return lambda value: value.pop(name)

    def case_with(**changes):
        return lambda value: value["cases"][0].update(changes)

    names = "schema_version suite run environment model conditions stable noise checks notes interrupted cases".split()
    found = {f"without {name}": without(name) for name in names}
    found |= {
        "version 1": lambda value: value.update(schema_version=1),
        "unknown key": lambda value: value.update(extra=1),
        "utc": lambda value: value["run"].update(utc="yesterday"),
        "no command": lambda value: value["run"].pop("command"),
        "no torch": lambda value: value["environment"].pop("torch"),
        "check without verdict": lambda value: value["checks"].update(c={}),
        "condition": lambda value: value["conditions"].update(c=[None]),
        "list as a label": case_with(labels={"mode": ["a"]}),
        "text as a fact": case_with(facts={"bytes": "many"}),
        "no sample": case_with(samples={}),
        "text as a sample": case_with(samples={"step_s": ["fast"]}),
        "metric without n": case_with(metrics={"a": dict.fromkeys(("median", "p10", "p90", "low", "high"), 1.0)}),
    }
    return found


@pytest.mark.parametrize("name", breakages())
def test_schema_refuses_what_is_broken(schema, value, name):
    broken = copy.deepcopy(value)
    breakages()[name](broken)
    assert not schema.is_valid(broken)
