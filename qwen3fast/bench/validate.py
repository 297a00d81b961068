"""Checks of a record's JSON form: the one definition of a valid record, for files of any origin.

Version 2 is an object with these keys, all of them required:

- `schema_version` (2) and `suite`, the benchmark that wrote it, such as "cache", "roofline" or "peers".
- `run`: `utc` ("2026-01-02T03:04:05Z") and `command`; `git_commit` and `git_dirty` are null outside of a repository.
- `environment`: the processor (`cpu`), `threads`, the GPU if there is one, versions. `model`: `name` and more.
- `conditions`: the machine's own speed, name -> samples over the whole run.
- `noise`: reasons to doubt the figures; `stable` is true if there are none.
- `checks`: name -> {"passed": true or false, ...}, tokens against the reference.
- `notes`: anything else; `interrupted`: true if cases are missing.
- `cases`: objects of `labels` (name -> text, number or boolean), `facts` (name -> number), `samples` (name -> list
  with one entry per repetition, a number or a list of numbers) and `metrics` (name -> median, n, and with more than one
  repetition p10, p90, low, high).

Numbers are finite. Control characters in text are replaced by their escaped form.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

from qwen3fast.bench.text import visible

MAX_FILE_BYTES = 2**26
MAX_DEPTH = 20
MAX_REPETITIONS = 10_000
MAX_LABEL_CHARACTERS = 300
MAX_NUMBER, MIN_NUMBER = 1e30, 1e-30  # of numbers other than 0, whose metrics are then finite
UTC = "%Y-%m-%dT%H:%M:%SZ"
KINDS: dict[str, type] = {
    "suite": str, "run": dict, "environment": dict, "model": dict, "conditions": dict, "noise": list, "checks": dict,
    "notes": dict, "interrupted": bool, "cases": list,
}  # fmt: skip
CASE_KINDS: dict[str, type] = {"labels": dict, "facts": dict, "samples": dict, "metrics": dict}


def parse_json(text: str, where: str) -> Any:
    """Return the value of JSON text, its strings without control characters.

    Raises: ValueError naming `where`, for text that is not JSON, nested too deeply, or has numbers that are not finite.
    """
    try:
        return _visible(json.loads(text, parse_constant=_refuse, parse_float=_float, parse_int=_int), MAX_DEPTH)
    except RecursionError as err:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} levels deep") from err
    except ValueError as err:
        raise ValueError(f"{where} is not valid JSON: {err}") from err


def check_record(value: Any, version: int, where: str) -> None:
    """Check everything but the metrics, which `Record.from_dict` derives again.

    Raises: ValueError naming the part that is missing, of a wrong kind or out of range.
    """
    if not isinstance(value, dict) or value.get("schema_version") != version:
        found = value.get("schema_version") if isinstance(value, dict) else None
        raise ValueError(f"{where}: expected schema_version {version}, got {found!r:.80}; measure again")
    _expect(value, KINDS, where)
    _expect(value["run"], {"utc": str, "command": str}, f"{where}: run")
    for name, kind in {"git_commit": str, "git_dirty": bool}.items():
        if value["run"].get(name) is not None:
            _expect(value["run"], {name: kind}, f"{where}: run")
    try:
        time.strptime(value["run"]["utc"], UTC)
    except ValueError as err:
        raise ValueError(f"{where}: run: utc must look like 2026-01-02T03:04:05Z, got {value['run']['utc']!r}") from err
    if "name" in value["model"]:
        _expect(value["model"], {"name": str}, f"{where}: model")
    for name, samples in value["conditions"].items():
        _require(isinstance(samples, list) and all(map(_is_number, samples)), f"{where}: conditions[{name!r}]",
                 "a list of finite numbers", samples)  # fmt: skip
    _require(all(isinstance(reason, str) for reason in value["noise"]), f"{where}: noise", "texts", value["noise"])
    for name, check in value["checks"].items():
        _expect(check, {"passed": bool}, f"{where}: checks[{name!r}]")
    for i, case in enumerate(value["cases"]):
        _check_case(case, f"{where}: cases[{i}]")


def _check_case(case: Any, where: str) -> None:
    _expect(case, CASE_KINDS, where)
    for name, label in case["labels"].items():
        is_label = isinstance(label, bool) or _is_number(label) or isinstance(label, str)
        is_short = len(name) + len(str(label)) <= MAX_LABEL_CHARACTERS
        _require(is_label and is_short, f"{where}: labels[{name!r:.80}]", "a number or a short text", label)
    damaged = f"{where} ({', '.join(f'{k} {v}' for k, v in case['labels'].items())}): the samples are damaged"
    for name, fact in case["facts"].items():
        _require(_is_number(fact), f"{damaged}: facts[{name!r}]", "a finite number", fact)
    for name, entries in case["samples"].items():
        at = f"{damaged}: {name!r}"
        _require(isinstance(entries, list) and len(entries) <= MAX_REPETITIONS, at, "a list", entries)
        for entry in entries:
            numbers = entry if isinstance(entry, list) else [entry]
            _require(all(map(_is_number, numbers)), at, "finite numbers", entry)


def _expect(value: Any, kinds: dict[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
    for name, kind in kinds.items():
        found = value.get(name)
        _require(isinstance(found, kind), f"{where}: {name}", f"of type {kind.__name__}", found)


def _require(is_so: bool, what: str, kind: str, found: Any) -> None:
    if not is_so:
        raise ValueError(f"{what} must be {kind}, got {found!r:.80}")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or MIN_NUMBER <= abs(value) <= MAX_NUMBER


def _visible(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict | list) and not depth:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        return {visible(name): _visible(item, depth - 1) for name, item in value.items()}
    if isinstance(value, list):
        # A list of numbers, of which records hold many, is kept as it is.
        return [_visible(item, depth - 1) if isinstance(item, str | dict | list) else item for item in value]
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON has")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{text[:20]}... is too large")
    return int(text)
