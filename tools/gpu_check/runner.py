"""Runs one part: its variants one after the other, each in a process, and a record written whenever more is known."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu_check.budget import Clock
from gpu_check.processes import StoppedError, environment_with_caches, last_line, run_limited
from gpu_check.results import Results
from gpu_check.variants import Variant
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.noise import noise_of
from qwen3fast.bench.record import Record, write_json

MAX_SHARE = 0.45  # of a part's time for one variant: one that hangs leaves time for others
MIN_S = 15.0  # time left that a variant is started with
SPARE_S = 5.0  # between the end that a variant is given and its process's, and between that and the part's


@dataclass
class PartRun:
    """A part in progress. folder: of all parts' records; this part's logs and results lie in a folder below it.

    child: the command of a variant's process; its arguments are described in child.py.
    """

    part: str
    folder: Path
    device: str
    clock: Clock
    caches: Path
    child: tuple[str, ...] = (sys.executable, "-m", "gpu_check.child")
    outcomes: dict[str, Results] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def work(self) -> Path:
        """The folder of this part's logs and of its variants' results."""
        return self.folder / self.part

    def run(self, variants: list[Variant]) -> Record:
        """Run all variants that time suffices for. Returns the record, which is also written."""
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            for variant in variants:
                if self.clock.left() < MIN_S:
                    self.outcomes[variant.name] = Results(left_out=["no time left"])
                else:
                    self.run_variant(variant)
                self.save()
        except (KeyboardInterrupt, StoppedError):
            self.interrupted = True
        return self.save()

    def run_variant(self, variant: Variant) -> None:
        """Run one variant in a process of its own and keep what it has found, even if it did not end well."""
        described, found, log = (self.work / f"{variant.name}{end}" for end in (".variant.json", ".json", ".log"))
        found.unlink(missing_ok=True)  # of an earlier run
        write_json(variant.to_json(), described)
        seconds = min(self.clock.left() - SPARE_S, max(MIN_S, MAX_SHARE * self.clock.seconds))
        print(f"{self.part}: {variant.name}, at most {seconds:.0f} s", flush=True)
        command = [*self.child, str(described), str(found), self.device, str(time.time() + seconds - SPARE_S)]

        def take() -> None:
            outcome = Results.load(found)
            if outcome != self.outcomes.get(variant.name):
                self.outcomes[variant.name] = outcome
                self.save()

        try:
            status = run_limited(command, log, seconds, environment_with_caches(self.caches), take)
        finally:
            outcome = self.outcomes[variant.name] = Results.load(found)
        if status is None:
            outcome.errors.append(f"not done after {seconds:.0f} s; last output: {last_line(log)}")
        elif status != 0:
            outcome.errors.append(f"{_status_text(status)}; last output: {last_line(log)}")

    def save(self) -> Record:
        """Write the part's record from what all variants have found so far."""
        record = make_record(self.part, self.device, self.outcomes)
        record.interrupted = self.interrupted
        record.notes["seconds"] = self.clock.spent()
        write_json(record.to_dict(), self.folder / f"{self.part}.json")
        return record


def make_record(part: str, device: str, outcomes: dict[str, Results]) -> Record:
    """Join what the variants of a part have found."""
    first = next((outcome.environment for outcome in outcomes.values() if outcome.environment), None)
    environment: dict[str, Any] = dict(first or describe_environment(torch.device("cpu")) | {"device": device})
    record = Record("gpu", describe_run("python tools/gpu_check.py"), environment, {"name": part})
    record.notes = {"part": part, "variants": {}, "left_out": [], "errors": []}
    for name, outcome in outcomes.items():
        environment |= {k: v for k, v in outcome.environment.items() if k not in environment}
        record.cases += outcome.cases
        record.checks |= outcome.checks
        record.notes["variants"][name] = outcome.notes
        record.notes["left_out"] += [f"{part}: {name}: {what}" for what in outcome.left_out]
        record.notes["errors"] += [f"{part}: {name}: {what}" for what in outcome.errors]
        for condition, values in outcome.conditions.items():
            record.conditions.setdefault(condition, []).extend(values)
    record.noise = noise_of(record)
    return record


def _status_text(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"
