"""Records of benchmarks, version 2: labels, samples and the metrics derived from them, with machine and commit.

All suites and programs share this format; validate.py defines it. Labels tell a case from others. metrics.py names the
samples and defines the metrics.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen3fast.bench.metrics import derive
from qwen3fast.bench.statistics import Estimate
from qwen3fast.bench.validate import KINDS, MAX_FILE_BYTES, check_record, parse_json
from qwen3fast.files import file_to_read, file_to_write, read_text

SCHEMA_VERSION = 2
LINE = 700  # characters: JSON values up to this length share a line, as most cases do
DIGITS = 7  # of a written metric
Label = str | int | float | bool


@dataclass
class Case:
    """A measured configuration.

    labels: identify it, such as mode, format, context, batch_size. facts: numbers known without measuring, such as
    bytes_per_step. samples: name -> list with one entry per repetition.
    """

    labels: dict[str, Label]
    facts: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, sample: dict[str, Any]) -> None:
        """Keep one repetition's measurements; a value of None was not available."""
        for name, value in sample.items():
            if value is not None:
                self.samples.setdefault(name, []).append(value)

    @property
    def metrics(self) -> dict[str, Estimate]:
        """The estimates, derived from the samples."""
        return derive(self.labels, self.facts, self.samples)

    @property
    def name(self) -> str:
        """The labels as text: "cached-compiled, context 32, batch_size 1"."""
        return ", ".join(v if isinstance(v, str) else f"{k} {v}" for k, v in self.labels.items())


@dataclass
class Record:
    """A run of one suite.

    conditions: samples of the machine's own speed ("bandwidth_gb_s", "gemm_flop_s") over the whole run.
    noise: reasons to doubt the figures; empty for a stable run.
    checks: tokens against the reference, by configuration; each says whether it `passed`.
    notes: other results, such as peers that are missing and why.
    interrupted: cases may be missing.
    """

    suite: str
    run: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any]
    cases: list[Case] = field(default_factory=list)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    conditions: dict[str, list[float]] = field(default_factory=dict)
    noise: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def passed(self) -> bool:
        """True if all checks passed."""
        return all(check["passed"] for check in self.checks.values())

    @property
    def model_name(self) -> str:
        """The model's name, or a placeholder."""
        return str(self.model.get("name", "unnamed model"))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without cases that have no sample."""
        head = {name: getattr(self, name) for name in KINDS if name != "cases"}
        cases = [
            asdict(case) | {"metrics": {name: _written(estimate) for name, estimate in case.metrics.items()}}
            for case in self.cases
            if case.samples
        ]
        return {"schema_version": SCHEMA_VERSION, **head, "stable": not self.noise, "cases": cases}

    @classmethod
    def from_dict(cls, value: Any, where: str = "the record") -> Record:
        """Build a record from its JSON form, deriving the metrics again.

        Raises: ValueError naming a part that is missing, of a wrong type or version, or a metric that does not follow
        from its samples.
        """
        check_record(value, SCHEMA_VERSION, where)
        cases = [Case(raw["labels"], raw["facts"], raw["samples"]) for raw in value["cases"]]
        for i, (case, raw) in enumerate(zip(cases, value["cases"], strict=True)):
            _compare_metrics(case, raw["metrics"], f"{where}: cases[{i}] ({case.name})")
        return cls(**{name: value[name] for name in KINDS} | {"cases": cases})


def load_record(path: Path) -> Record:
    """Read a record's file.

    Raises: FileNotFoundError; ValueError naming the file if it is not a valid record.
    """
    expected = "a record that a benchmark wrote"
    if file_to_read(path, expected).stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; expected {expected}")
    return Record.from_dict(parse_json(read_text(path, expected), str(path)), str(path))


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write compact JSON, as a whole or not at all, with short values and lists of numbers on one line.

    Numbers that are not finite, which JSON does not have, become null.
    """
    write_text(json_text(value), path)


def json_text(value: dict[str, Any]) -> str:
    """Return the text that `write_json` writes."""
    return "\n".join(_json_lines(_finite(value), "")) + "\n"


def write_text(text: str, path: Path) -> None:
    """Write a file as a whole or not at all, readable for all users; create missing folders.

    Raises: OSError, as `file_to_write`.
    """
    handle, temporary = tempfile.mkstemp(dir=file_to_write(path).parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)  # Ctrl-C may come after it was renamed
        raise


def _json_lines(value: Any, indent: str) -> list[str]:
    flat = json.dumps(value, allow_nan=False)
    # Lists of numbers (or of lists of them) and objects without other objects inside stay on one line.
    kinds = str | dict if isinstance(value, list) else list | dict
    items = value.values() if isinstance(value, dict) else value
    if (
        len(indent) + len(flat) <= LINE
        or not isinstance(value, dict | list)
        or not any(isinstance(item, kinds) for item in items)
    ):
        return [flat]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    lines = [begin]
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        first, *rest = _json_lines(item, indent + " ")
        lines += [f"{indent} {json.dumps(name)}: {first}" if isinstance(value, dict) else f"{indent} {first}", *rest]
        lines[-1] += ","
    lines[-1] = lines[-1].removesuffix(",")
    return [*lines, indent + end]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _written(estimate: Estimate) -> dict[str, Any]:
    """Return the JSON form; a single measurement has no spread."""
    values = {name: value for name, value in asdict(estimate).items() if estimate.n > 1 or name in ("median", "n")}
    return {name: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for name, v in values.items()}


def _compare_metrics(case: Case, written: dict[str, Any], where: str) -> None:
    """Raise ValueError if the written medians do not follow from the samples."""
    try:
        derived = case.metrics
        if not all(math.isfinite(e.median) for e in derived.values()):
            raise ValueError("they give numbers that are not finite")
    except (TypeError, ValueError, ArithmeticError, AttributeError) as err:
        raise ValueError(f"{where}: the samples are damaged: {err}") from err
    if derived.keys() != written.keys():
        raise ValueError(f"{where}: metrics {sorted(written)}, but the samples give {sorted(derived)}")
    for name, estimate in derived.items():
        median = written[name].get("median") if isinstance(written[name], dict) else None
        # The comparison is negated to also refuse NaN.
        if not isinstance(median, int | float) or not abs(median - estimate.median) <= 1e-6 * abs(estimate.median):
            raise ValueError(f"{where}: {name} is {median!r}, but the samples give {estimate.median!r}")
