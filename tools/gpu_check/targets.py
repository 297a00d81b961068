"""The project's targets on a GPU, beside the figures of a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen3fast.bench.record import Case, Record

Find = Callable[[Record], float | None]


@dataclass(frozen=True)
class Target:
    """A figure to reach. wanted: by a part of the GPU's name; "" is for any other. find: the best that a record has."""

    what: str
    unit: str
    wanted: Mapping[str, float]
    find: Find
    is_higher_better: bool = True

    def wanted_on(self, gpu: str) -> float | None:
        """Return the figure wanted on a GPU; None if there is none for it."""
        return next((value for name, value in self.wanted.items() if name in gpu), None)

    def line(self, record: Record) -> dict[str, Any] | None:
        """Return the target and the measured figure; None if the record does not have it."""
        measured, wanted = self.find(record), self.wanted_on(str(record.environment.get("gpu", "")))
        if measured is None:
            return None
        reached = None if wanted is None else (measured >= wanted) == self.is_higher_better or measured == wanted
        row = {"what": self.what, "unit": self.unit, "wanted": wanted, "measured": measured}
        return row | {"reached": reached}


def cases(record: Record, **labels: object) -> list[Case]:
    """Return the cases with these labels."""
    return [case for case in record.cases if labels.items() <= case.labels.items()]


def best(metric: str, lowest: bool = False, **labels: object) -> Find:
    """Return a function that finds the best median of a metric among the cases with these labels."""

    def find(record: Record) -> float | None:
        medians = [c.metrics[metric].median for c in cases(record, **labels) if metric in c.metrics]
        return (min if lowest else max)(medians) if medians else None

    return find


def quotient(metric: str, above: Mapping[str, object], below: Mapping[str, object]) -> Find:
    """Return a function that divides two such bests."""

    def find(record: Record) -> float | None:
        a, b = best(metric, **above)(record), best(metric, **below)(record)
        return a / b if a is not None and b else None

    return find


def fewest_kernels(size: str) -> Find:
    """Return a function that finds the fewest kernels of a step: bfloat16, one row, in a graph."""

    def find(record: Record) -> float | None:
        of_size = [
            notes["step"]["kernels"]
            for name, notes in record.notes.get("variants", {}).items()
            if f"{size}-bf16-cached-graphs-" in name and name.endswith("batch1") and "step" in notes
        ]
        return min(of_size) if of_size else None

    return find


ONE = {"mode": "graphs", "weights": "bf16", "batch_size": 1}
SMALL, LARGE = ONE | {"size": "0.6b"}, ONE | {"size": "8b"}
TARGETS = (
    Target("0.6B, one row, context 32", "tokens/s", {"H200": 1700, "H100": 1400},
           best("decode_tok_s", **SMALL, context=32)),
    Target("0.6B, one row, context 4,096", "tokens/s", {"H200": 1500}, best("decode_tok_s", **SMALL, context=4096)),
    Target("0.6B, kernels per token", "", {"": 175}, fewest_kernels("0.6b"), False),
    Target("8B, one row, of the copy's bandwidth", "", {"": 0.85}, best("share_of_bandwidth", **LARGE, context=32)),
    *(
        Target(f"8B, {weights} over bf16", "times", {"": 1.7},
               quotient("decode_tok_s", LARGE | {"weights": weights, "context": 32}, LARGE | {"context": 32}))
        for weights in ("fp8", "int8")
    ),
    Target("0.6B, 64 rows, context 128", "tokens/s", {"": 40_000},
           best("decode_tok_s", **SMALL | {"batch_size": 64}, context=128)),
    Target("0.6B, first token after 1,000", "s", {"": 0.012}, best("ttft_s", True, **SMALL, context=1000), False),
    Target("0.6B, over transformers, compiled", "times", {"": 3.3},
           quotient("decode_tok_s", SMALL | {"context": 32},
                    {"mode": "transformers-static", "size": "0.6b", "context": 32})),
)  # fmt: skip


def targets_of(record: Record) -> list[dict[str, Any]]:
    """Return a line for each target that the record has measured."""
    return [line for target in TARGETS if (line := target.line(record)) is not None]


def as_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as text."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    verdicts = {True: "reached", False: "not reached", None: "no target for this GPU"}
    return [
        f"{row['what']:40}{number(row['wanted']):>9} wanted{number(row['measured']):>9} measured "
        f"{row['unit']:9}{verdicts[row['reached']]}"
        for row in rows
    ]
