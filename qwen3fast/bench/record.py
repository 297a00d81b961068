"""The record of a run, version 2: what was measured, on what, every sample, and the figures derived from the samples.

One format for all suites; `record.schema.json` describes it for other programs. A case is told from others by its
labels, and holds its samples by name; see metrics.py for their names and what is derived from them.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen3fast.bench.metrics import derive
from qwen3fast.bench.statistics import Estimate

SCHEMA_VERSION = 2
SCHEMA_FILE = Path(__file__).parent / "record.schema.json"
Label = str | int | float | bool


@dataclass
class Case:
    """One thing that was measured. labels: what tells it from others, such as mode, format, context, batch_size.

    facts: numbers known without measuring, such as bytes_per_step. samples: name -> an entry a repetition.
    """

    labels: dict[str, Label]
    facts: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, sample: dict[str, Any]) -> None:
        """Keep one repetition's measurements; those that are None could not be taken."""
        for name, value in sample.items():
            if value is not None:
                self.samples.setdefault(name, []).append(value)

    @property
    def metrics(self) -> dict[str, Estimate]:
        """Derived from the samples."""
        return derive(self.labels, self.facts, self.samples)

    @property
    def name(self) -> str:
        """The labels as words: "cached-compiled, context 32, batch_size 1"."""
        return ", ".join(v if isinstance(v, str) else f"{k} {v}" for k, v in self.labels.items())


@dataclass
class Record:
    """A whole run of one suite; `cases` may be incomplete if `interrupted`.

    conditions: samples of the machine's own speed ("read_bandwidth_gb_s", "gemm_flop_s") over the whole run.
    noise: why the figures may be off, in words; a stable run has none.
    checks: tokens against the reference, by what was checked; each says whether it `passed`.
    notes: what belongs to the results and fits nowhere else, such as peers that are missing and why.
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
        """Whether all checks did."""
        return all(check["passed"] for check in self.checks.values())

    def to_dict(self) -> dict[str, Any]:
        """The JSON form. Cases without a sample are left out."""
        cases = [case for case in self.cases if case.samples]
        return {
            "schema_version": SCHEMA_VERSION,
            "suite": self.suite,
            "run": self.run,
            "environment": self.environment,
            "model": self.model,
            "conditions": self.conditions,
            "stable": not self.noise,
            "noise": self.noise,
            "checks": self.checks,
            "notes": self.notes,
            "interrupted": self.interrupted,
            "cases": [asdict(case) | {"metrics": {k: asdict(v) for k, v in case.metrics.items()}} for case in cases],
        }

    @classmethod
    def from_dict(cls, value: Any, where: str = "the record") -> Record:
        """Read the JSON form; metrics are derived anew.

        Raises: ValueError naming what is missing, of a wrong kind or version, or a metric that its samples do not give.
        """
        if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
            version = value.get("schema_version") if isinstance(value, dict) else None
            raise ValueError(f"{where}: expected schema_version {SCHEMA_VERSION}, got {version!r}; measure again")
        kinds: dict[str, type] = {
            "suite": str,
            "run": dict,
            "environment": dict,
            "model": dict,
            "conditions": dict,
            "noise": list,
        }
        kinds |= {"checks": dict, "notes": dict, "interrupted": bool, "cases": list}
        _expect(value, kinds, where)
        _expect(value["run"], {"utc": str, "command": str}, f"{where}: run")
        for name, check in value["checks"].items():
            _expect(check, {"passed": bool}, f"{where}: checks[{name!r}]")
        cases = []
        for i, raw in enumerate(value["cases"]):
            _expect(raw, {"labels": dict, "facts": dict, "samples": dict, "metrics": dict}, f"{where}: cases[{i}]")
            cases.append(Case(raw["labels"], raw["facts"], raw["samples"]))
            _compare_metrics(cases[-1], raw["metrics"], f"{where}: cases[{i}] ({cases[-1].name})")
        return cls(**{name: value[name] for name in kinds} | {"cases": cases})


def load_record(path: Path) -> Record:
    """Read a record's file.

    Raises: FileNotFoundError; ValueError naming the file if it is no valid record.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; expected a record that a benchmark wrote")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is not valid JSON: {err}") from err
    return Record.from_dict(value, str(path))


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write a whole file or none: into a temporary file beside it, then renamed."""
    text = json.dumps(value, indent=1) + "\n"
    write_text(text, path)


def write_text(text: str, path: Path) -> None:
    """Write a whole file or none, readable for all, in a folder that is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _expect(value: Any, kinds: dict[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
    for name, kind in kinds.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{where}: {name} must be of type {kind.__name__}, got {value.get(name)!r:.80}")


def _compare_metrics(case: Case, written: dict[str, Any], where: str) -> None:
    """Raises: ValueError if written medians are not those of the samples."""
    try:
        derived = case.metrics
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as err:
        raise ValueError(f"{where}: the samples are damaged: {err}") from err
    if derived.keys() != written.keys():
        raise ValueError(f"{where}: metrics {sorted(written)}, but the samples give {sorted(derived)}")
    for name, estimate in derived.items():
        median = written[name].get("median") if isinstance(written[name], dict) else None
        # Said so that nan, which JSON files can hold, is refused.
        if not isinstance(median, int | float) or not abs(median - estimate.median) <= 1e-6 * abs(estimate.median):
            raise ValueError(f"{where}: {name} is {median!r}, but the samples give {estimate.median!r}")
