"""The results of a variant's process so far, in a file that is always complete."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3fast.bench.record import Case, write_json


@dataclass
class Results:
    """Cases and notes of one variant. path: where `save` writes them; None for nowhere.

    left_out: what could not be measured, and why. errors: what broke. conditions, checks, environment: as in a record.
    notes: by name; facts of the variant that fit nowhere else.
    """

    path: Path | None = None
    cases: list[Case] = field(default_factory=list)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    conditions: dict[str, list[float]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write everything so far: the whole file or none of it."""
        if self.path is not None:
            names = ("checks", "conditions", "environment", "left_out", "errors", "notes")
            cases = [{"labels": c.labels, "facts": c.facts, "samples": c.samples} for c in self.cases]
            write_json({name: getattr(self, name) for name in names} | {"cases": cases}, self.path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote; nothing if the process has not written yet."""
        if not path.is_file():
            return cls()
        value = json.loads(path.read_text(encoding="utf-8"))
        return cls(None, [Case(**case) for case in value.pop("cases")], **value)
