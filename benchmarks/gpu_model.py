"""A model of how long a decode step takes on a GPU: bytes that must be read, and kernels that must be started.

    python benchmarks/gpu_model.py > benchmarks/gpu_model.md

A step's time is modeled as

    bytes / bandwidth  +  kernels x (cost of a dependent kernel in a CUDA graph)

Bytes are the weights, keys and values that a step reads. Kernels are counted by tools/compile_for_gpu.py. Bandwidth
and the cost of a kernel come from the first run on a GPU, of a prototype: see FIRST_RUN. They are to be replaced by
what tools/gpu_check.py records.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qwen3fast.bench.record import load_record
from qwen3fast.model.config import ModelConfig

SIZES = ("0.6b", "1.7b", "4b", "8b", "14b", "32b")
CONTEXTS = (32, 1000, 4096)
COMPILED = Path(__file__).parent / "results" / "gpu-compile.json"
SHAPE: dict[str, Any] = {"gpu": "sm_90", "step": "decode", "model": "0.6b", "weights": "bf16", "batch_size": 1}
OF_LAYERS = ("step_norm_linear", "step_attend", "step_linear_add", "step_norm_gated_linear")
FIRST_RUN = (
    "NVIDIA H200, torch 2.11.0+cu130, triton 3.6, 2026-11-28: a prototype of this engine at commit 755fa47, one row, "
    "bfloat16, random weights, greedy, each step one CUDA graph"
)
COPY_BANDWIDTH = 4.24e12  # bytes/s of a copy in the H200's memory, read and written, in the same hour
WEIGHT_BYTES = 1.19e9  # that a step of 0.6B reads


@dataclass(frozen=True)
class Replay:
    """A graph of the prototype: kernels of a step, the device's seconds for it."""

    settings: str
    kernels: int
    seconds: float

    @property
    def kernel_s(self) -> float:
        """Seconds that a kernel costs beside reading the weights at the copy's speed."""
        return (self.seconds - WEIGHT_BYTES / COPY_BANDWIDTH) / self.kernels


REPLAYS = (
    Replay("Inductor's defaults", 506, 2.01e-3),
    Replay("coordinate_descent_tuning", 336, 1.29e-3),
    Replay("coordinate_descent_tuning, triton.enable_pdl", 336, 1.04e-3),
)
KERNEL_S = REPLAYS[-1].kernel_s
# Measured with the last of these settings: size, context, tokens/s.
MEASURED = (("0.6b", 32, 1017), ("0.6b", 1000, 987), ("8b", 32, 219), ("8b", 4000, 209))
OTHERS = (
    ("0.6B, eager, the tree before the prototype", "31"),
    ("0.6B, without graphs, same settings", "61"),
    ("0.6B, PyTorch's SDPA instead of split attention, context 32 / 1,000", "897 / 598"),
    ("0.6B, transformers 5.17, eager / static cache, compiled", "23 / 265 to 317"),
    ("0.6B, no cache, eager / compiled", "9 / 45"),
    ("0.6B, 16 rows, split attention, context 128 / 1,000", "8,740 / 7,100"),
    ("0.6B, 64 rows, SDPA, context 128 / 1,000", "23,200 / 13,100"),
    ("0.6B, int8 weights", "425"),
    ("8B, SDPA, context 32 / 4,000", "209 / 131"),
)
# What each target asks for: size, context, kernels a step, seconds a kernel.
GOALS = (("0.6b", 32, 175, 1.65e-6), ("0.6b", 4096, 175, 1.65e-6), ("8b", 32, 220, 1.65e-6))

PUBLISHED = """\
| what | tokens/s | source |
| --- | ---: | --- |
| 0.6B, eager PyTorch, no cache / with a cache, H100 | 51 / 48 | Raschka, reasoning-from-scratch, chapter 2 |
| 0.6B, compiled, no cache / with a cache, H100 | 164 / 141 | the same |
| 0.6B, compiled, static cache, H100 | 177 | the same |
| 0.6B, transformers / SGLang, H20 (4.0 TB/s), prompt of 1 token | 58.6 / 414 | Qwen3 documentation, speed benchmark |
| 8B, transformers / SGLang, H20, prompt of 1 token | 45.3 / 81.7 | the same |"""


def step_bytes(config: ModelConfig, context: int) -> int:
    """Return what one step of one request must read, in bytes."""
    return config.decode_parameters * config.dtype.itemsize + config.kv_bytes_per_token(config.dtype) * context


@cache
def compiled_kernels() -> tuple[int, int]:
    """Return the kernels of one layer, and those beside the layers: one request, bfloat16, H100.

    A library call counts as one.
    """
    record = load_record(COMPILED)
    [case] = [case for case in record.cases if case.labels == SHAPE]
    step = record.notes["steps"][case.name]
    launches = Counter({name: part["launches"] + sum(part["calls"].values()) for name, part in step["parts"].items()})
    launches.update(step["own_launches"])
    layers = ModelConfig.named(SHAPE["model"]).num_hidden_layers
    of_layers = sum(launches.pop(f"qwen3fast::{name}", 0) for name in OF_LAYERS)
    return of_layers // layers, sum(launches.values()) + sum(step["eager_calls"].values())


def kernels_of(size: str) -> int:
    """Return the kernels of a step of a size, as the code is now."""
    layer, beside = compiled_kernels()
    return layer * ModelConfig.named(size).num_hidden_layers + beside


def seconds(size: str, context: int, kernels: int, kernel_s: float = KERNEL_S) -> float:
    """Return how long a step should take on the H200."""
    return step_bytes(ModelConfig.named(size), context) / COPY_BANDWIDTH + kernels * kernel_s


def rows() -> list[str]:
    """Return a line of the table for each size and context."""
    lines = []
    for size in SIZES:
        for context in CONTEXTS:
            size_bytes, kernels = step_bytes(ModelConfig.named(size), context), kernels_of(size)
            read_s, step_s = size_bytes / COPY_BANDWIDTH, seconds(size, context, kernels)
            cells = [size, f"{context:,}", f"{size_bytes / 1e9:.2f}", f"{1 / read_s:,.0f}", f"{kernels:,}"]
            lines.append("| " + " | ".join([*cells, f"{1 / step_s:,.0f}", f"{read_s / step_s:.0%}"]) + " |")
    return lines


def print_first_run() -> None:
    """Print what the prototype measured, and what the model says of the same steps."""
    print(f"## First run on a GPU\n\n{FIRST_RUN}. A prototype's figures, noted by hand: no record of this program.\n")
    print("| settings of Inductor | kernels a step | ms a replay | us a kernel, beside reading |")
    print("| --- | ---: | ---: | ---: |")
    for replay in REPLAYS:
        cells = (f"{replay.kernels}", f"{replay.seconds * 1e3:.2f}", f"{replay.kernel_s * 1e6:.1f}")
        print(f"| {replay.settings} | {' | '.join(cells)} |")
    print("\nWith the last settings and split attention; the model with that run's kernels a layer:\n")
    print("| size | context | measured, tokens/s | model, tokens/s |\n| --- | ---: | ---: | ---: |")
    per_layer = REPLAYS[-1].kernels / ModelConfig.named("0.6b").num_hidden_layers
    for size, context, measured in MEASURED:
        kernels = round(per_layer * ModelConfig.named(size).num_hidden_layers)
        print(f"| {size} | {context:,} | {measured:,} | {1 / seconds(size, context, kernels):,.0f} |")
    print("\nOthers in the same hour:\n\n| what | tokens/s |\n| --- | ---: |")
    print("\n".join(f"| {what} | {value} |" for what, value in OTHERS))


def main() -> None:
    """Print the page."""
    layer, beside = compiled_kernels()
    print("# What a decode step should take on a GPU\n")
    print(
        "Made by `python benchmarks/gpu_model.py`. A model, not a measurement; its two constants were measured in the"
    )
    print("first run below.\n")
    print(f"One request, bfloat16, on an H200: memory at {COPY_BANDWIDTH / 1e12:.2f} TB/s (a copy, read and written),")
    print(
        f"one CUDA graph a step, {layer} kernels a layer and {beside} beside them (tools/compile_for_gpu.py; a product"
    )
    print(f"of a library counts as one), {KERNEL_S * 1e6:.1f} us a kernel beside reading.\n")
    print("| size | context | GB a step | limit, tokens/s | kernels | model, tokens/s | of the bandwidth |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(rows()))
    print("\nLimit: reading alone. The smaller the model, the more of a step is its kernels; 8B and up are bound by")
    print("memory. All are estimates.")
    print("\nThe targets, with kernels at 1.65 us each:\n")
    print("| size | context | kernels | model, tokens/s |\n| --- | ---: | ---: | ---: |")
    for size, context, kernels, kernel_s in GOALS:
        print(f"| {size} | {context:,} | {kernels} | {1 / seconds(size, context, kernels, kernel_s):,.0f} |")
    print()
    print_first_run()
    print("\n## Published figures for comparison\n")
    print(PUBLISHED)


if __name__ == "__main__":
    main()
