"""A variant: one model, run in one way, in a process of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Kind = Literal["cached", "uncached", "transformers"]
Mode = Literal["eager", "compiled", "graphs", "static"]
DRY_CONTEXTS = (8, 24)


@dataclass(frozen=True)
class Variant:
    """A measurement.

    source: what `load_model` takes; size: its name in tables. mode: "graphs" is compiled, each step one CUDA graph;
    "static" is transformers' static cache with compilation. options: of Inductor, set to these values instead of the
    package's; switches: of the package (see settings.py). label: names the options and switches in tables.
    contexts: prompt lengths in tokens, measured in this order. profiled: count the kernels of a step at the end.
    """

    part: str
    source: str
    size: str
    kind: Kind = "cached"
    mode: Mode = "graphs"
    weights: str = "bf16"
    label: str = "default"
    options: dict[str, Any] = field(default_factory=dict)
    switches: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    contexts: tuple[int, ...] = (32, 1000, 4096)
    new_tokens: int = 100
    rounds: int = 3
    profiled: bool = True

    @property
    def name(self) -> str:
        """A name that is unique within a part, fit for files."""
        words = (self.size, self.weights, self.kind, self.mode, self.label, f"batch{self.batch_size}")
        return "-".join(words).replace(" ", "_").replace("/", "_")

    @property
    def labels(self) -> dict[str, str | int]:
        """Labels of the record's cases, without the context."""
        mode = {"cached": self.mode, "uncached": f"uncached-{self.mode}", "transformers": f"transformers-{self.mode}"}
        labels: dict[str, str | int] = {"part": self.part, "size": self.size, "weights": self.weights}
        return labels | {"mode": mode[self.kind], "options": self.label, "batch_size": self.batch_size}

    def dry(self) -> Variant:
        """Return the same for a dry run on the CPU: the tiny model, short contexts, few tokens."""
        mode: Mode = "compiled" if self.mode == "graphs" else self.mode
        contexts = DRY_CONTEXTS[: len(self.contexts)]
        small = {"batch_size": min(self.batch_size, 2), "contexts": contexts, "new_tokens": 4, "rounds": 1}
        return replace(self, source="tiny", size="tiny", mode=mode, **small)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Variant:
        """Return the variant that `to_json` wrote."""
        return cls(**value | {"contexts": tuple(value["contexts"])})
