"""Joins the records of all parts into one."""

from __future__ import annotations

from pathlib import Path

from gpu_check.parts import PARTS
from gpu_check.targets import targets_of
from qwen3fast.bench.noise import noise_of
from qwen3fast.bench.record import Record, load_record

SAME = ("gpu", "torch")  # what all parts must have run on


def merge(folder: Path) -> Record:
    """Return one record of the parts whose records lie in a folder.

    Raises: FileNotFoundError if there is none; ValueError if they come from different GPUs or versions of PyTorch.
    """
    parts = {part: load_record(path) for part in PARTS if (path := folder / f"{part}.json").is_file()}
    if not parts:
        raise FileNotFoundError(f"{folder} has no part's record; expected one of {', '.join(PARTS)}, each .json")
    first = next((record for record in parts.values() if record.cases), next(iter(parts.values())))
    merged = Record("gpu", dict(first.run), dict(first.environment), {"name": ", ".join(parts)})
    merged.notes = {"parts": {}, "variants": {}, "left_out": [], "errors": []}
    for part, record in parts.items():
        for name in SAME:
            mine, theirs = merged.environment.get(name), record.environment.get(name)
            if record.cases and mine != theirs:
                raise ValueError(f"{folder}: part {part} ran with {name} {theirs!r}, others with {mine!r}")
        merged.environment |= {k: v for k, v in record.environment.items() if k not in merged.environment}
        merged.cases += record.cases
        merged.checks |= record.checks
        merged.interrupted |= record.interrupted
        for condition, values in record.conditions.items():
            merged.conditions.setdefault(condition, []).extend(values)
        merged.notes["parts"][part] = {"run": record.run, "seconds": record.notes.get("seconds")}
        merged.notes["variants"] |= {f"{part}: {name}": notes for name, notes in record.notes["variants"].items()}
        for name in ("left_out", "errors"):
            merged.notes[name] += record.notes[name]
    merged.notes["left_out"] += [f"part {part} was not run" for part in PARTS if part not in parts]
    merged.notes["targets"] = targets_of(merged)
    merged.noise = noise_of(merged)
    return merged
